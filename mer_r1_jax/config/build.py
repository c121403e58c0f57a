"""Between the schema's dataclasses, ml_collections configs and plain JSON, refusing typos and wrong types by name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import pathlib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import ml_collections

from mer_r1_jax.config.bounds import field_types, plain_type, shown_value
from mer_r1_jax.config.checks import check_values, out_of_bounds
from mer_r1_jax.config.names import KNOWN_ELSEWHERE, advice
from mer_r1_jax.config.schema import ConfigError, RunConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Section = TypeVar("Section", bound="DataclassInstance")


def config_dict(config: RunConfig | None = None) -> ml_collections.ConfigDict:
    """The ml_collections form of a run's configuration, locked so that a config file cannot invent fields."""
    return ml_collections.ConfigDict(dataclasses.asdict(config or RunConfig())).lock()


def from_mapping(values: Mapping[str, Any]) -> RunConfig:
    """Builds and checks a `RunConfig` from nested mappings (an ml_collections config or parsed JSON).

    Raises:
        ConfigError: for every unknown field, wrong type and impossible value, all in one message.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = ml_collections.ConfigDict.to_dict(values)
    problems: list[str] = []
    config = _build(RunConfig, values, "", problems)
    if not problems:
        problems = check_values(config)
    if problems:
        raise ConfigError("the configuration cannot be used:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return config


def checked(config: RunConfig) -> RunConfig:
    """The same configuration, for whoever made it of the schema's classes by hand.

    Raises:
        ConfigError: for every wrong type and impossible value.
    """
    return from_mapping(dataclasses.asdict(config))


def with_values(section: Section, values: Mapping[str, Any]) -> Section:
    """A section of the schema, or a dataclass typed as those are, with some fields replaced.

    Args:
        section: to begin with.
        values: dotted field name -> value.

    Raises:
        ConfigError: for every unknown field, wrong type and value outside its bounds, all in one message.
    """
    nested = dataclasses.asdict(section)
    for dotted, value in values.items():
        _set(nested, dotted, value)
    problems: list[str] = []
    made = _build(type(section), nested, "", problems)
    if problems := problems or out_of_bounds(made, section):
        raise ConfigError("the settings cannot be used:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return made


def load_config(path: str | pathlib.Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Loads a Python config file (`get_config()`) or a saved `config.json`.

    Config files are Python and are executed: load only files you trust.

    Args:
        path: `*.py` with `get_config(argument="")`, where `path:argument` passes an argument, or `*.json`.
        overrides: dotted field name -> value, applied on top.

    Raises:
        ConfigError: when the file is missing, has no `get_config`, or names fields the schema does not know.
    """
    values = config_file(path)
    for dotted, value in (overrides or {}).items():
        _set(values, dotted, value)
    return from_mapping(values)


def shipped() -> dict[str, pathlib.Path]:
    """Name -> file of the configurations that come with the package, those of experiments/configs."""
    spec = importlib.util.find_spec("mer_r1_jax.configs")
    places = (spec and spec.submodule_search_locations) or ()
    files = sorted(file for place in places for file in pathlib.Path(place).glob("[!_]*.py"))
    return {file.stem: file for file in files}


def config_place(path: str | pathlib.Path) -> str:
    """Where a configuration lies, `:argument` kept: itself when there is such a file, or the one shipped by that name.

    `synthetic:smoke` and `synthetic.py:smoke` both mean the one that comes with the package, from any folder.
    """
    name, colon, argument = str(path).partition(":")
    if "/" in name or pathlib.Path(name).is_file():
        return str(path)
    file = shipped().get(name.removesuffix(".py"))
    return f"{file}{colon}{argument}" if file else str(path)


def config_file(path: str | pathlib.Path) -> dict[str, Any]:
    """The values of a config file, as `load_config` takes it, before they are checked.

    Raises:
        ConfigError: when it is missing or cannot be run or read.
    """
    name, _, argument = config_place(path).partition(":")
    file = pathlib.Path(name)
    if not file.is_file():
        raise ConfigError(
            f"no configuration at {file}: expected a .py file with get_config(), a saved config.json, or one of those "
            f"that come with the package: {', '.join(shipped())}"
        )
    if file.suffix != ".json":
        return _run_config_file(file, argument).to_dict()
    try:
        return of_its_time(json.loads(file.read_text()))
    except ValueError as error:
        raise ConfigError(f"{file}: {error}. Expected the JSON that a run saves as config.json.") from error


# What a setting stood for before there was one, where its default is another by now.
BEFORE = {"data.synthetic_world": "concluding"}


def of_its_time(saved: Any) -> Any:
    """A configuration as a run saved it, with settings it had not yet as they were then; anything else untouched."""
    if not isinstance(saved, dict):
        return saved
    for dotted, value in BEFORE.items():
        section, _, name = dotted.partition(".")
        if isinstance(saved.get(section), dict):
            saved[section].setdefault(name, value)
    return saved


def other_config(name: str, beside: str) -> ModuleType:
    """The module of another config file, for one that begins where that one ends.

    Config files are loaded by their paths and belong to no package, so they cannot import each other.

    Args:
        name: of the file, without `.py`. It lies beside the file that asks, or comes with the package.
        beside: `__file__` of the config file that asks.

    Raises:
        ConfigError: there is no such file.
    """
    own, file = pathlib.Path(beside), pathlib.Path(beside).with_name(f"{name}.py")
    if not file.is_file() or file == own:  # a file may have the name of the shipped one that it begins from
        file = shipped().get(name, file)
    if not file.is_file() or file.resolve() == own.resolve():
        raise ConfigError(
            f"{beside}: got {name!r} to begin from, expected {file.name} beside it or one of those that come with the "
            f"package: {', '.join(shipped())}; correct the name, or put the file there"
        )
    return _module(file)


def to_json(config: RunConfig) -> str:
    """Plain JSON of a configuration, as saved beside a run."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields in which two nested mappings differ, with both values (None where absent)."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed |= difference(before, after, f"{prefix}{key}.")
        elif _plain(before) != _plain(after):
            changed[f"{prefix}{key}"] = (before, after)
    return changed


def _plain(value: Any) -> Any:
    """JSON knows no tuples: compare what would be read back."""
    return list(value) if isinstance(value, tuple) else value


def _module(file: pathlib.Path) -> ModuleType:
    """Runs a config file, as a module of its own each time."""
    spec = importlib.util.spec_from_file_location(f"mer_r1_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"{file}: its name ends in {file.suffix!r}, expected a .py file with get_config() or a saved config.json; "
            "rename it"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run_config_file(file: pathlib.Path, argument: str) -> ml_collections.ConfigDict:
    try:
        module = _module(file)
        return module.get_config(argument) if argument else module.get_config()
    except ConfigError as error:
        if str(file) in str(error):
            raise
        raise ConfigError(f"{file}: {error}") from error
    except AttributeError as error:
        unknown = re.search(r'Key "(\w+)" does not exist', str(error))
        reason = f"{unknown.group(1)}: {advice(unknown.group(1))}" if unknown else str(error)
        raise ConfigError(f"{file}: {reason} (get_config() may only set fields of the schema)") from error
    except (KeyError, TypeError, ValueError, ImportError, SyntaxError) as error:
        raise ConfigError(f"{file}: {error} (get_config() may only set fields of the schema)") from error


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, field = dotted.split(".")
    for section in sections:
        if not isinstance(
            values.get(section), dict
        ):  # also where a field is taken for a section, which is refused later
            values[section] = {}
        values = values[section]
    values[field] = value


def _build(cls: type, values: Any, prefix: str, problems: list[str]) -> Any:
    """Makes one dataclass of the schema, appending to `problems` instead of raising at the first."""
    if not isinstance(values, Mapping):
        problems.append(f"{prefix.rstrip('.') or 'config'}: got {values!r}, expected a section with fields")
        return cls()
    hints = field_types(cls)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            problems.append(_unknown(prefix + name, name, hints))
        elif dataclasses.is_dataclass(hints[name]):
            arguments[name] = _build(hints[name], value, f"{prefix}{name}.", problems)
        else:
            arguments[name] = _coerce(hints[name], value, prefix + name, problems)
    return cls(**arguments)


def _unknown(dotted: str, name: str, known: Iterable[str]) -> str:
    message = f"{dotted}: no such field"
    if name in KNOWN_ELSEWHERE:
        return f"{message}; here it is {KNOWN_ELSEWHERE[name]}"
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if close:
        section = dotted.rpartition(".")[0]
        return f"{message}; did you mean {section + '.' if section else ''}{close[0]}?"
    return f"{message}; known here: {', '.join(sorted(known))}"


def _coerce(hint: Any, value: Any, dotted: str, problems: list[str]) -> Any:
    """The value as its field's type has it: whole numbers become floats there, lists tuples, and True is no number."""
    plain = plain_type(hint)
    several = typing.get_origin(plain) is tuple
    item = typing.get_args(plain)[0] if several else plain
    items: Sequence[Any] = (value if isinstance(value, (list, tuple)) else [None]) if several else [value]
    try:
        if all(type(one) is item or (item is float and type(one) is int) for one in items):
            made = tuple(item(one) for one in items)
            return made if several else made[0]
    except OverflowError:  # an integer beyond all floats
        pass
    expected = str(plain) if several else plain.__name__
    problems.append(f"{dotted}: got {shown_value(value)} ({type(value).__name__}), expected {expected}")
    return value
