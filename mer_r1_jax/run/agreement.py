"""What the processes of a run must have in common, compared before the first of them compiles anything."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from mer_r1_jax import __version__, kernels
from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.parallel import processes
from mer_r1_jax.run.setup import DataSets

# What a host may have of its own.
MAY_DIFFER = ("data.cache_dir", "media.decode_workers", "train.local_dir", "train.compilation_cache_dir")
MAX_LISTED = 12
SOURCES = Path(__file__).parents[1]  # this package, as this process runs it
KERNELS = Path(kernels.__path__[0])  # which lie elsewhere in a checkout
_ABSENT = object()


class DisagreementError(ValueError):
    """The processes of a run were started differently; every differing field is listed with both values."""


def check_config(config: RunConfig) -> None:
    """Refuses processes whose configurations, versions or code differ.

    Raises:
        DisagreementError: on every process.
    """
    versions = {"versions": {"mer_r1_jax": __version__, "jax": jax.__version__, "code": code_hash(SOURCES, KERNELS)}}
    _check("the configuration", dataclasses.asdict(config) | versions)


def check_data(data: DataSets) -> None:
    """Refuses processes whose records differ, in number or in content.

    Raises:
        DisagreementError: on every process.
    """
    numbers = {name: len(getattr(data, name)) for name in ("sft", "rl", "eval")}
    _check("the data sets", {"data": data.fingerprints(), "records": numbers})


def code_hash(*folders: Path) -> str:
    """Hexadecimal hash of every Python file below some folders: two checkouts of one version may differ."""
    found = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            content = file.read_bytes()
            found.update(f"{file.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()[:16]


def _check(what: str, mine: Mapping[str, Any]) -> None:
    told = processes.exchange(what, flatten_dict(dict(mine), sep="."))
    lines = [
        f"{name}: {_shown(told[0], name)} on process 0, {_shown(other, name)} on process {process}"
        for process, other in enumerate(told)
        for name in sorted(told[0].keys() | other.keys())
        if told[0].get(name, _ABSENT) != other.get(name, _ABSENT) and name not in MAY_DIFFER
    ]
    if lines:
        more = [f"... and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
        raise DisagreementError(
            f"the {len(told)} processes of this run were started differently, in {what}:\n  "
            + "\n  ".join(lines[:MAX_LISTED] + more)
            + "\nStart the same command, on the same files, on every host."
        )


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "absent"
