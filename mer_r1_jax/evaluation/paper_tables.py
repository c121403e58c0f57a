"""The paper's tables with our rows beside its own: official scores, slow and fast F1, and the arms.

What was measured comes as `Measured` rows, from whatever folder; nothing here reads a file. A cell that no row gives is
a dash. The paper's rows say so in their name, and clips that are no set of MER-UniBench have columns without any number
of the paper.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any

from mer_r1_jax.config.schema import ARM_NAMES
from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.evaluation.ablation.arm_comparison import PAPER_F1 as PAPER_ARM_F1
from mer_r1_jax.evaluation.ablation.arm_comparison import PAPER_OFFICIAL as PAPER_ARM_OFFICIAL
from mer_r1_jax.evaluation.benchmarks.sets import (
    LAYOUTS,
    PAPER_F1,
    PAPER_F1_MEANS,
    PAPER_F1_SETS,
    PAPER_MEANS,
    PAPER_NINE_MEANS,
    PAPER_ROWS,
    PAPER_WAF,
    title_of,
)
from mer_r1_jax.evaluation.bootstrap import POINTS, signed
from mer_r1_jax.evaluation.over_seeds import Mean
from mer_r1_jax.evaluation.report_kit import NONE, Table, counted, markdown, number, text_table
from mer_r1_jax.foreign_text import for_markdown

DIGITS = 2  # of points, as published scores have
PAPER = "the paper's"  # behind the name of each row that is not ours
OTHER_CLIPS = "*"  # behind a score over fewer or other clips than the official split
UNMEASURED = (None, NONE, "")


@dataclasses.dataclass(frozen=True)
class Level:
    """A score over some clips.

    Attributes:
        value: in [0, 1]; None where it is undefined.
        low, high: its 95% interval over clips; None where there is none.
        error: its standard error over seeds; None with one seed.
        complete: whether the clips are the set's official split; true of clips that are no set.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    error: float | None = None
    complete: bool = True

    @classmethod
    def over_seeds(cls, mean: Mean) -> Level:
        """A mean over seeds."""
        return cls(mean.mean, error=mean.error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One row that is ours.

    Attributes:
        name: of the row.
        arm: with which the model was trained; "" where it is not known, "sft" before RL.
        source: folder it was read from.
        data: on which clips, in words; sets of MER-UniBench are told by their own columns.
        score: what its F1 is, in words.
        how: the protocol of scoring, or how long it was trained.
        seeds: runs it is a mean of.
        official: (set or data, mode) -> official score; of other clips recall, which a hit rate is where a clip has
            several true categories.
        f1: the same -> set F or weighted F; of other clips the mean F1 of single clips.
    """

    name: str
    source: str
    arm: str = ""
    data: str = ""
    score: str = ""
    how: str = ""
    seeds: int = 1
    official: Mapping[tuple[str, str], Level]
    f1: Mapping[tuple[str, str], Level]

    def mean_of(self, scores: str, sets: Sequence[str], mode: str) -> Level | None:
        """The mean over sets of `official` or `f1`, complete if all are; None unless every one is there."""
        found = [getattr(self, scores).get((name, mode)) for name in sets]
        values = [level.value for level in found if level is not None and level.value is not None]
        if len(values) < len(sets):
            return None
        return Level(sum(values) / len(values), complete=all(level.complete for level in found))


@dataclasses.dataclass(frozen=True)
class Tables:
    """All that was measured, and what was not taken up.

    Attributes:
        rows: ours, in their order.
        left_out: in words, what was found and is in no table, and why.
    """

    rows: tuple[Measured, ...]
    left_out: tuple[str, ...] = ()

    @property
    def letters(self) -> dict[str, str]:
        """Clips that are no set of MER-UniBench -> the letter of their columns."""
        data = dict.fromkeys(row.data for row in self.rows if row.data)
        return {name: _letter(place) for place, name in enumerate(data)}

    def tables(self) -> list[Table]:
        """Official scores, slow and fast F1, arms, and what was measured on what."""
        return [_official(self), _slow_and_fast(self), _arms(self), _sources(self)]


def _letter(place: int) -> str:
    letters = string.ascii_uppercase
    return letters[place] if place < len(letters) else f"Z{place - len(letters) + 2}"


def _official(tables: Tables) -> Table:
    """Slow answers under each set's own metric."""
    rows = [
        (f"{name}, {PAPER}", *(f"{value:.{DIGITS}f}" for value in (*values, PAPER_MEANS[name])), *_nothing(tables))
        for name, values in PAPER_ROWS.items()
    ]
    for row in tables.rows:
        cells = [_shown(row.official.get((name, "slow"))) for name in LAYOUTS]
        mean = _shown(row.mean_of("official", tuple(LAYOUTS), "slow"))
        own = [_shown(row.official.get((data, "slow"))) for data in tables.letters]
        rows.append((row.name, *cells, mean, *own))
    return text_table(
        title="Official scores",
        note="Slow answers, in points: set F on OV-MERD+, HIT on MER2023, MER2024, MELD and IEMOCAP, WAF on the rest. "
        f"Rows marked '{PAPER}' are numbers of arXiv 2606.27652, main table; its protocol of extracting words is not "
        f"known in detail. {OTHER_CLIPS}: over other clips than the official split. "
        f"{_own_said(tables, 'recall, which is what a hit rate is where a clip has several true categories')}",
        columns=("row", *(layout.title for layout in LAYOUTS.values()), "mean of nine", *_own_heads(tables, "recall")),
        rows=rows,
    )


def _slow_and_fast(tables: Tables) -> Table:
    """F1 of slow and of fast answers."""
    rows = []
    for (name, mode), values in PAPER_F1.items():
        means = (PAPER_F1_MEANS[name, mode], PAPER_NINE_MEANS[name, mode])
        shown = (*values, *PAPER_WAF[name, mode], *means)
        rows.append((f"{name} {mode}, {PAPER}", *(f"{value:.{DIGITS}f}" for value in shown), *_nothing(tables)))
    for row in tables.rows:
        for mode in MODES:
            cells = [_shown(row.f1.get((name, mode))) for name in LAYOUTS]
            means = [_shown(row.mean_of("f1", sets, mode)) for sets in (PAPER_F1_SETS, tuple(LAYOUTS))]
            own = [_shown(row.f1.get((data, mode))) for data in tables.letters]
            if any(cell not in UNMEASURED for cell in (*cells, *own)):
                rows.append((f"{row.name} {mode}", *cells, *means, *own))
    return text_table(
        title="Slow and fast answers",
        note="In points: set F where truths are categories, WAF on the four sets of sentiment. The paper's F1 of an "
        f"arm is the mean of nine of slow answers. {_own_said(tables, 'the mean F1 of single clips')}",
        columns=(
            "row",
            *(layout.title for layout in LAYOUTS.values()),
            "mean of the five F1",
            "mean of nine",
            *_own_heads(tables, "F1"),
        ),
        rows=rows,
    )


def _arms(tables: Tables) -> Table:
    """Every arm of the paper and of ours, with the paper's two means."""
    known = [*ARM_NAMES, *dict.fromkeys(row.arm for row in tables.rows if row.arm and row.arm not in ARM_NAMES)]
    rows = []
    for arm in known:
        paper = [number(of.get(arm), DIGITS) for of in (PAPER_ARM_OFFICIAL, PAPER_ARM_F1)]
        ours = [row for row in tables.rows if row.arm == arm]
        rows += [(arm, *paper, row.name, *_arm_cells(row, tables)) for row in ours]
        if not ours:
            rows.append((arm, *paper, *[NONE] * 9))
    return text_table(
        title="Arms",
        note=f"The second and third column are {PAPER}: means over the nine sets of MER-UniBench, of another model on "
        "other data. The others are ours, in points, ± the standard error over seeds; differences with their "
        "intervals stand in the tables of `mer-r1 ablate` and `mer-r1 lab`.",
        columns=(
            "arm", f"official mean, {PAPER}", f"F1 mean, {PAPER}", "our row", "official mean of nine",
            "F1 mean of nine", "clips", "seeds", "slow F1", "fast F1", "slow − fast", "slow recall",
        ),
        rows=rows,
    )  # fmt: skip


def _arm_cells(row: Measured, tables: Tables) -> list[str]:
    nine = tuple(LAYOUTS)
    slow, fast = (row.f1.get((row.data, mode)) for mode in MODES)
    gap = NONE
    if slow and fast and slow.value is not None and fast.value is not None:
        gap = signed(POINTS * (slow.value - fast.value))
    return [
        _shown(row.mean_of("official", nine, "slow")),
        _shown(row.mean_of("f1", nine, "slow")),
        tables.letters[row.data] if row.data else NONE,
        str(row.seeds),
        _shown(slow),
        _shown(fast),
        gap,
        _shown(row.official.get((row.data, "slow"))),
    ]


def _sources(tables: Tables) -> Table:
    letters = tables.letters
    rows = [
        (
            row.name,
            row.arm or NONE,
            str(row.seeds),
            f"{letters[row.data]}: {row.data}" if row.data else "MER-UniBench",
            row.score,
            row.how,
            row.source,
        )
        for row in tables.rows
    ]
    return text_table(
        title="What was measured",
        note="Our rows. Scores of different clips never share a column.",
        columns=("row", "arm", "seeds", "clips", "F1", "how", "folder"),
        rows=rows,
        texts=7,
    )


def as_markdown(tables: Tables) -> str:
    """The tables and what was left out, as one page."""
    parts = ["## The paper's tables and ours", *(markdown(table).rstrip() for table in tables.tables())]
    parts.append(f"### Left out\n\n{counted(len(tables.left_out), 'thing')} found and in no table.")
    if tables.left_out:
        parts.append("\n".join(f"- {for_markdown(line)}" for line in tables.left_out))
    return "\n\n".join(parts) + "\n"


def as_json(tables: Tables) -> dict[str, Any]:
    """The same as JSON values: our scores are shares in [0, 1], the paper's are points as it prints them."""

    def levels(found: Mapping[tuple[str, str], Level]) -> dict[str, dict[str, Any]]:
        nested: dict[str, dict[str, Any]] = {}
        for (name, mode), level in found.items():
            nested.setdefault(name, {})[mode] = dataclasses.asdict(level)
        return nested

    nine = tuple(LAYOUTS)
    ours = [
        {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
        | {"official": levels(row.official), "f1": levels(row.f1)}
        | {
            f"{scores}_mean_of_nine": {
                mode: None if (mean := row.mean_of(scores, nine, mode)) is None else dataclasses.asdict(mean)
                for mode in MODES
            }
            for scores in ("official", "f1")
        }
        for row in tables.rows
    ]
    paper = {
        "source": "arXiv 2606.27652",
        "official": {
            name: dict(zip(LAYOUTS, values, strict=True)) | {"mean": PAPER_MEANS[name]}
            for name, values in PAPER_ROWS.items()
        },
        "f1": {
            f"{name} {mode}": dict(zip(LAYOUTS, (*values, *PAPER_WAF[name, mode]), strict=True))
            | {"mean_of_five": PAPER_F1_MEANS[name, mode], "mean_of_nine": PAPER_NINE_MEANS[name, mode]}
            for (name, mode), values in PAPER_F1.items()
        },
        "arms": {
            arm: {"official_mean": PAPER_ARM_OFFICIAL[arm], "f1_mean": PAPER_ARM_F1.get(arm)}
            for arm in PAPER_ARM_OFFICIAL
        },
    }
    return {"ours": ours, "paper": paper, "left_out": list(tables.left_out), "titles": {n: title_of(n) for n in nine}}


def _own_heads(tables: Tables, score: str) -> list[str]:
    return [f"clips {letter}: {score}" for letter in tables.letters.values()]


def _own_said(tables: Tables, what: str) -> str:
    if not tables.letters:
        return ""
    named = "; ".join(f"{letter} {data}" for data, letter in tables.letters.items())
    return f"On clips that are no set of MER-UniBench ({named}): {what}."


def _nothing(tables: Tables) -> list[str]:
    return [NONE] * len(tables.letters)


def _shown(level: Level | None) -> str:
    if level is None or level.value is None:
        return NONE
    error = "" if level.error is None else f" ± {POINTS * level.error:.{DIGITS}f}"
    return f"{_points(level.value)}{error}{'' if level.complete else OTHER_CLIPS}"


def _points(value: float | None) -> str:
    return NONE if value is None else f"{POINTS * value:.{DIGITS}f}"
