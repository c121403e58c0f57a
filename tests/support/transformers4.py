"""Finds the second transformers, version 4.57, which the exports have to load in as well."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "MER_R1_TRANSFORMERS4"
VERSION = "4.57.6"


def transformers4_path() -> str:
    """The folder to put on PYTHONPATH; fails the test, saying how to make it, when there is none."""
    given = os.environ.get(VARIABLE)
    folder = Path(given) if given else ROOT / ".compat" / "transformers4"
    if not (folder / "transformers" / "__init__.py").is_file():
        where = f"{VARIABLE}={given}" if given else f"{folder} (and {VARIABLE} is not set)"
        pytest.fail(
            f"transformers {VERSION} is not at {where}. Make it with: pip install --target .compat/transformers4 "
            f"--no-deps transformers=={VERSION} tokenizers==0.22.2 huggingface_hub==0.36.0 "
            "requests urllib3 charset-normalizer"
        )
    return str(folder)
