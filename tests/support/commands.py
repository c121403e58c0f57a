"""Runs the commands of mer_r1_jax/commands inside the test process, one after another."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

from absl import flags

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
COMMANDS = Path(__file__).resolve().parents[2] / "mer_r1_jax/commands"


def load_command(name: str, folder: Path = COMMANDS) -> ModuleType:
    """Loads a command, or another script with flags, afresh; flags that an earlier command defined are taken back."""
    # Taken down first: deleting a flag also takes it off the list its module is filed under.
    earlier = [
        flag.name
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith("command_")
        for flag in defined
    ]
    for flag_name in set(earlier):
        delattr(flags.FLAGS, flag_name)
    spec = importlib.util.spec_from_file_location(f"command_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_command(name: str, *arguments: str, **names) -> int:
    """Runs `mer-r1 <name> ARGUMENTS` and returns its exit code; `names` replace what the command imports under them."""
    module = load_command(name)
    with contextlib.ExitStack() as stack:
        for replaced, value in names.items():
            stack.enter_context(mock.patch.object(_home(module, replaced), replaced, value))
        try:
            return module.main(flags.FLAGS([name, *arguments])) or 0
        except SystemExit as done:
            return done.code


def _home(module: ModuleType, name: str) -> ModuleType:
    """The module a command imports a name from, late, in a function; the command itself for a name of its own."""
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return importlib.import_module(node.module)
    return module
