"""Runs the commands under experiments/ inside the test process, one after another."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from absl import flags

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def load_command(name: str):
    """Loads experiments/<name>.py afresh; flags that an earlier command defined are taken back."""
    # Taken down first: deleting a flag also takes it off the list its module is filed under.
    earlier = [
        flag.name
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith("command_")
        for flag in defined
    ]
    for flag_name in set(earlier):
        delattr(flags.FLAGS, flag_name)
    spec = importlib.util.spec_from_file_location(f"command_{name}", EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_command(name: str, *arguments: str, **names) -> int:
    """Runs `python experiments/<name>.py ARGUMENTS` and returns its exit code; `names` replace the command's own."""
    module = load_command(name)
    vars(module).update(names)
    try:
        return module.main(flags.FLAGS([name, *arguments])) or 0
    except SystemExit as done:
        return done.code
