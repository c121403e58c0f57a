"""The flag `--config` and its overrides, looked over before ml_collections sees them: its own errors are tracebacks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from mer_r1_jax.config.bounds import Number, shown_value
from mer_r1_jax.config.build import config_file, config_place, shipped
from mer_r1_jax.config.names import advice, field_names
from mer_r1_jax.config.schema import ConfigError

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)(?:=.*)?", re.DOTALL)
_FILE = re.compile(r"--?config(?:=(.*))?", re.DOTALL)
IN_BUCKET = ("run",)  # flags, besides those of the configuration, that may name a place in a bucket
MOST = 1_000_000_000_000  # of a number whose flag names no highest value
_MISSING = re.compile(r"flag --(\w+)=None: Flag --\w+ must have a value other than None\.")  # absl of a required flag


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """What absl's `FLAGS(arguments)` gives, for `app.run(flags_parser=...)`.

    Raises:
        ConfigError: a flag, an override's field or value, or a config file that cannot be used.
    """
    check_overrides(arguments)
    check_places(arguments)
    arguments = with_shipped_configs(arguments)
    for path in _config_files(arguments):
        if not path.partition(":")[0].endswith(".py"):
            raise ConfigError(
                f"--config={path}: expected a .py file with get_config(), or one of {', '.join(shipped())}"
            )
        config_file(path)
    try:
        rest = flags.FLAGS(arguments)
    except flags.Error as error:
        problem = "; ".join(_MISSING.sub(r"--\1 is missing", str(error)).splitlines())
        raise ConfigError(f"the command line cannot be used: {problem}; --help lists the flags") from error
    check_numbers()
    return rest


def named_values(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE texts of a flag `--set` as a mapping; values that are JSON are read as such, others are text."""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set={text}: expected NAME=VALUE, such as media.max_frames=8")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def seed_numbers(texts: Sequence[str]) -> list[int]:
    """Seeds of a flag `--seeds`, one by one or from the first to the last (0-7), each once.

    Raises:
        ConfigError: a text that is neither.
    """
    found: list[int] = []
    for text in texts:
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not 0 <= last - first < 1000:
            raise ConfigError(f"--seeds: got {text!r}, expected a number such as 0, or a range such as 0-7")
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def with_shipped_configs(arguments: Sequence[str]) -> list[str]:
    """Command line in which a configuration that comes with the package, given by name, is given by its path."""
    found, is_value = [], False
    for word in arguments:
        match = _FILE.fullmatch(word)
        if match and match.group(1) is not None:
            word = f"--config={config_place(match.group(1))}"
        elif is_value:
            word = config_place(word)
        is_value = bool(match) and match.group(1) is None
        found.append(word)
    return found


def check_numbers() -> None:
    """Holds the numbers of the command's own flags to their bounds; absl lets NaN through its own.

    Raises:
        ConfigError: naming every flag, what it got and what it expects.
    """
    problems = []
    for module, listed in flags.FLAGS.flags_by_module_dict().items():
        # Fields of the configuration are checked with it, and absl looks after what is its own.
        own = [flag for flag in listed if not module.startswith("absl.") and "." not in flag.name]
        for flag in own:
            if flag.value is None or not isinstance(flag.value, int | float) or isinstance(flag.value, bool):
                continue
            least, most = getattr(flag.parser, "lower_bound", None), getattr(flag.parser, "upper_bound", None)
            bound = Number(-MOST if least is None else least, MOST if most is None else most)
            if wrong := bound.problem(flag.value):
                problems.append(f"--{flag.name}: got {shown_value(flag.value)}, {wrong}")
    if problems:
        raise ConfigError("the command line cannot be used:\n  " + "\n  ".join(problems))


def check_overrides(arguments: Sequence[str]) -> None:
    """Checks that every `--config.<field>` names a field of the schema.

    Raises:
        ConfigError: for every one that does not, with the field that was probably meant.
    """
    problems = []
    for argument in _flags_only(arguments):
        match = _OVERRIDE.fullmatch(argument)
        if match and match.group(1) not in field_names():
            problems.append(f"--config.{match.group(1)}: {advice(match.group(1))}")
    if problems:
        raise ConfigError("the command line cannot be used:\n  " + "\n  ".join(problems))


def check_places(arguments: Sequence[str]) -> None:
    """Refuses `gs://` addresses in flags that need files.

    Raises:
        ConfigError: naming every one, and what to do.
    """
    problems, flag = [], ""
    for word in _flags_only(arguments):
        value = word
        if word.startswith("-"):  # otherwise the value of the flag before it
            flag, _, value = word.lstrip("-").partition("=")
        if flag in IN_BUCKET or flag.startswith("config."):
            continue
        problems += [
            f"--{flag}: got {part!r}, expected a path of a file system"
            for part in value.split(",")
            if part.startswith("gs://")
        ]
    if problems:
        raise ConfigError(
            "the command line cannot be used:\n  "
            + "\n  ".join(problems)
            + "\nCopy it with `gcloud storage cp -r`, or, where it is a run, write its policy with "
            "`mer-r1 export --run=gs://... --out=FOLDER`, and name the folder."
        )


def _flags_only(arguments: Sequence[str]) -> Sequence[str]:
    """Arguments up to `--`, without the program's name."""
    rest = list(arguments[1:])
    return rest[: rest.index("--")] if "--" in rest else rest


def _config_files(arguments: Sequence[str]) -> list[str]:
    rest = _flags_only(arguments)
    files = []
    for place, argument in enumerate(rest):
        match = _FILE.fullmatch(argument)
        if match:
            files += [match.group(1)] if match.group(1) is not None else list(rest[place + 1 : place + 2])
    return files
