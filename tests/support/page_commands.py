"""Commands that pages show, held against what the commands themselves take: nothing of them is run."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from absl import flags
from support.commands import load_command

from mer_r1_jax.cli import PRINT_CONFIG
from mer_r1_jax.commands.entry import ALONE, COMMANDS, HELP
from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.config.command_line import parse_flags

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
_VARIABLE = re.compile(r"\$(\w+)")
_SCRIPT = re.compile(r"experiments/(\w+)\.py")
_LAUNCHERS = ("worker.sh", "slurm.sh")  # hand all they are given to `mer-r1 train`
_OPERATORS = {"&&", "||", "|", ";", ">", ">>", "<"}
# Configuration files that a page's reader writes -> one that is there and may stand for them.
_READERS_OWN = {"--config=mine.py": "--config=synthetic", "--config=my_config.py": "--config=omni_7b"}
WITH_ACTION = ("probe",)  # commands whose first word is no flag


def shown_commands(page: Path) -> list[tuple[str, list[str]]]:
    """(command, its arguments) of every command of this package in the bash blocks of a page, launchers among them."""
    found = [_command(words) for block in _BLOCK.findall(page.read_text(encoding="utf-8")) for words in _lines(block)]
    return [command for command in found if command is not None]


def _lines(block: str) -> Iterator[list[str]]:
    """The words of each command of a block; a quoted text may go over several lines."""
    begun = ""
    for line in block.replace("\\\n", " ").splitlines():
        begun += line
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:  # a quotation is still open
            begun += "\n"
            continue
        begun, part = "", []
        for word in [*words, ";"]:  # a command ends where the next begins, or where its output goes
            if word not in _OPERATORS:
                part.append(word)
                continue
            yield part
            part = []
    assert not begun, f"a quotation without an end: {begun}"


def check(command: str, words: list[str]) -> None:
    """Parses a command line as the command does, its configuration too.

    Raises:
        ConfigError: a flag, a setting or a value that the command refuses.
        FileNotFoundError: there is no such command.
    """
    if command == ALONE:
        return  # it reads its arguments itself
    load_command(command.replace("-", "_"))
    words = [_READERS_OWN.get(word, _VARIABLE.sub(lambda found: found[1].lower(), word.strip("[]"))) for word in words]
    words = [word for word in words if word not in (*HELP, PRINT_CONFIG)]
    # ml_collections looks for the overrides of a configuration there.
    try:
        with mock.patch.object(sys, "argv", [f"mer-r1 {command}", *words]):
            rest = parse_flags(sys.argv)[1:]
        if command in WITH_ACTION:
            rest = rest[1:]
        assert rest == [], f"mer-r1 {command}: these are no flags: {rest}"
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            from_mapping(flags.FLAGS.config)
    finally:  # the next command has overrides of its own
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)


def _command(words: list[str]) -> tuple[str, list[str]] | None:
    for place, word in enumerate(words):
        rest = words[place + 1 :]
        name, script = Path(word).name, _SCRIPT.fullmatch(word)
        # First, or behind settings of the environment; elsewhere it is the name of something else.
        if name == "mer-r1" and all("=" in before for before in words[:place]) and rest and rest[0] not in HELP:
            return rest[0], rest[1:]
        if script and script.group(1).replace("_", "-") in COMMANDS:
            return script.group(1).replace("_", "-"), rest
        if name in _LAUNCHERS:
            return "train", rest
        if name == "tpu_vm.sh":
            return ("train", rest[1:]) if rest[:1] == ["train"] else None
    return None
