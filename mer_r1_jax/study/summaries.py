"""Summaries of the study: one small JSON file for each block of seeds, from which everything else is made.

A summary holds one number a seed for every row and measure, so that it can be committed, and a stage that was stopped
goes on with the blocks that have none. It is written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mer_r1_jax.storage import atomic_files

DIGITS = 5  # of a share: a thousandth of a point
_KEYS = {"stage", "registered", "world", "variant", "seeds", "config", "rows"}


class StudyError(ValueError):
    """A stage that cannot be run or judged as asked."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the runs of one block gave.

    Attributes:
        stage: A or B.
        registered: whether it is part of the registered study; a trial is not.
        world: of the clips.
        variant: what distinguishes its settings; "" for the main comparison.
        seeds: of the block.
        config: all settings, as JSON values.
        rows: row -> measure -> one value a seed; scores are shares in [0, 1].
        about: how it came about: command, seconds, versions. Nothing is decided by it.
    """

    stage: str
    registered: bool
    world: str
    variant: str
    seeds: tuple[int, ...]
    config: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Sequence[float]]]
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def as_kept(config: Any) -> dict[str, Any]:
    """All settings of a configuration, a dataclass, as a summary gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def completed(kept: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A summary's settings with those that the version which kept it did not have yet.

    They are at their defaults, which is how that version behaved. So summaries of several versions can be compared.

    Args:
        kept: the summary's `config`.
        default: the configuration as it is made without arguments.
    """

    def filled(have: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(have)
        for name, value in defaults.items():
            if name not in found:
                found[name] = value
            elif isinstance(value, dict) and isinstance(found[name], dict):
                found[name] = filled(found[name], value)
        return found

    return filled(kept, as_kept(default))


def write_summary(path: Path, summary: Summary) -> None:
    """Writes a summary, a line for each row and measure, so that a difference of two can be read."""
    content = dataclasses.asdict(summary)
    rows = content.pop("rows")
    rounded = {
        row: {measure: [round(float(value), DIGITS) for value in values] for measure, values in measures.items()}
        for row, measures in rows.items()
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}," for name, value in content.items()]
    of_rows = [
        f"  {json.dumps(row)}: {{\n"
        + ",\n".join(f"   {json.dumps(m)}: {json.dumps(v, allow_nan=False)}" for m, v in measures.items())
        + "\n  }"
        for row, measures in rounded.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(path, "\n".join(["{", *lines, ' "rows": {', ",\n".join(of_rows), " }", "}", ""]))


def read_summary(path: Path) -> Summary:
    """A summary.

    Raises:
        StudyError: it is not there, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not content.keys() >= _KEYS:
            raise ValueError(f"it lacks {', '.join(sorted(_KEYS - content.keys()))}")
        found = Summary(**content | {"seeds": tuple(content["seeds"])})
        uneven = [row for row, of in found.rows.items() for v in of.values() if len(v) != len(found.seeds)]
        if uneven:
            raise ValueError(f"row {uneven[0]} has not one value a seed")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StudyError(
            f"{path}: got no summary that can be read ({error}), expected one that mer-r1 study wrote; remove the file "
            "to have the block run again, or take it from the repository"
        ) from error
    return found


def merged(summaries: Sequence[Summary]) -> dict[str, dict[str, list[float]]]:
    """Row -> measure -> one value a seed of several blocks, by seed; rows and measures that all of them have.

    Raises:
        StudyError: a seed is in two of them.
    """
    seeds = [seed for summary in summaries for seed in summary.seeds]
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise StudyError(
            f"seeds {', '.join(map(str, twice))} are in two summaries of one comparison, expected each once; keep a "
            "second run in a folder of its own"
        )
    order = sorted(range(len(seeds)), key=seeds.__getitem__)
    found: dict[str, dict[str, list[float]]] = {}
    for row, measures in summaries[0].rows.items():
        if not all(row in summary.rows for summary in summaries):
            continue
        for measure in measures:
            if all(measure in summary.rows[row] for summary in summaries):
                values = [value for summary in summaries for value in summary.rows[row][measure]]
                found.setdefault(row, {})[measure] = [values[place] for place in order]
    return found
