"""The results of a stage: verdicts of each family, then what has no verdict, as Markdown and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mer_r1_jax.evaluation.bootstrap import POINTS
from mer_r1_jax.evaluation.report_kit import NONE, Table, markdown, number, percent, text_table
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.study.hypotheses import AD, SFT, Rows, Stage, registered, second_weight
from mer_r1_jax.study.summaries import Summary, merged
from mer_r1_jax.study.verdicts import Estimate, Paired, Verdict, judge

# Column -> measure of a row, and what it is shown as.
_LEVELS = {
    "slow E": "slow_f1",
    "recall": "slow_recall",
    "precision": "slow_precision",
    "fast E": "fast_f1",
    "sampled E": "sampled_f1",
    "F1": "slow_f1_drawn",
    "common point": "common_f1",
    "right": "confidence_right",
    "wrong": "confidence_wrong",
}
_COUNTS = {"words": "words", "repeats": "repeats", "KL": "kl"}
_VERSUS = {
    "E": "slow_f1",
    "recall": "slow_recall",
    "sampled E": "sampled_f1",
    "F1": "slow_f1_drawn",
    "common point": "common_f1",
    "repeats": "repeats",
}


@dataclasses.dataclass(frozen=True)
class Results:
    """A stage that has ended.

    Attributes:
        stage: A or B.
        registered: whether these are the registered runs.
        families: title -> verdicts; the registered family first.
        comparisons: title -> rows of measures, one value a seed.
        beside: the first run of the same stage, where this is a second one.
    """

    stage: str
    registered: bool
    families: Mapping[str, Sequence[Verdict]]
    comparisons: Mapping[str, Rows]
    beside: Results | None = None


def results_of_a(summaries: Sequence[Summary]) -> Results:
    """Stage A from all of its summaries."""
    groups: dict[tuple[int, str, str], list[Summary]] = {}
    for summary in summaries:
        key = (summary.config["rl"]["num_generations"], summary.variant, summary.world)
        groups.setdefault(key, []).append(summary)
    rows = {key: merged(group) for key, group in groups.items()}
    by_size = {
        size: Stage({world: found for (n, variant, world), found in rows.items() if n == size and not variant})
        for size in dict.fromkeys(size for size, _, _ in rows)
    }
    families = {}
    for size, stage in by_size.items():
        title = "Registered: weight 0.1" if size == max(by_size) else "Second size of groups: weight 0.1"
        families[f"{title}, groups of {size}"] = judge(registered(stage))
        if size == max(by_size):
            families[f"Second weight: 1, groups of {size}"] = judge(second_weight(stage))
    return Results(
        stage="A",
        registered=all(summary.registered for summary in summaries),
        families=families,
        comparisons={
            f"World {world}, groups of {size}{f', {variant}' if variant else ''}": found
            for (size, variant, world), found in rows.items()
        },
    )


def results_of_b(summaries: Sequence[Summary]) -> Results:
    """Stage B from the summaries of its seeds: one world, greedy answers."""
    rows = merged(summaries)
    stage = Stage({"U": rows}, calibrated_in="U", calibrated_by="slow_f1", sign_in=("U",))
    return Results(
        stage="B",
        registered=all(summary.registered for summary in summaries),
        families={"Registered: weight 0.1": judge(registered(stage))},
        comparisons={"World U, rendered": rows},
    )


def tables_of(results: Results) -> list[Table]:
    """Verdicts, then levels and differences of every comparison."""
    tables = [_verdicts(title, verdicts) for title, verdicts in results.families.items()]
    if results.beside is not None:
        tables += [_two_runs(results, results.beside), _how_far_apart(results, results.beside)]
    for title, rows in results.comparisons.items():
        tables += [_levels(title, rows), _versus(title, rows)]
    return tables


def _verdicts(title: str, verdicts: Sequence[Verdict]) -> Table:
    rows = []
    for verdict in verdicts:
        outcome = f"{verdict.outcome}{f' ({verdict.why})' if verdict.why else ''}"
        seeds = str(min((one.seeds for one in verdict.estimates), default=0))
        shown = "; ".join(map(_said, verdict.estimates)) or NONE
        beside = "; ".join(map(_said, verdict.beside)) or NONE
        rows.append((verdict.claim.key, verdict.claim.said, outcome, shown, beside, seeds, number(verdict.level, 4)))
    return text_table(
        title=title,
        note="Means over seeds in points, with t intervals at the level that Holm's procedure gives each claim within "
        "this family (last column); beside: decides nothing, each at 5%.",
        columns=("", "claim", "verdict", "measures", "beside", "seeds", "level"),
        rows=rows,
        texts=5,
    )


def _two_runs(second: Results, first: Results) -> Table:
    """Every claim in both runs. The first one's verdict counts."""
    rows = []
    for title, verdicts in second.families.items():
        earlier = {verdict.claim.key: verdict for verdict in first.families.get(title, ())}
        for verdict in verdicts:
            cells = [title, verdict.claim.key]
            for run in (earlier.get(verdict.claim.key), verdict):
                cells += [NONE, NONE] if run is None else [run.outcome, "; ".join(map(_said, run.estimates)) or NONE]
            rows.append(tuple(cells))
    return text_table(
        title="The first run and this one",
        note="A stage is run once: the first run's verdict counts, a second one is printed beside it.",
        columns=("family", "", "first", "its measures", "this", "its measures"),
        rows=rows,
        texts=6,
    )


def _how_far_apart(second: Results, first: Results) -> Table:
    """The largest difference of any seed in any row, by measure: 0 where the machine and the versions are the same."""
    rows = []
    for title, found in second.comparisons.items():
        earlier = first.comparisons.get(title, {})
        gaps = [
            float(np.abs(np.subtract(values, earlier[row][measure])).max())
            for row, measures in found.items()
            for measure, values in measures.items()
            if measure in _LEVELS.values() and len(earlier.get(row, {}).get(measure, ())) == len(values)
        ]
        rows.append((title, str(len(gaps)), NONE if not gaps else number(POINTS * max(gaps), 3)))
    return text_table(
        title="How far the two runs are apart",
        note="The largest difference of one seed's score, in points, over all rows and scores that both runs have.",
        columns=("comparison", "rows x scores", "points"),
        rows=rows,
    )


def _levels(title: str, rows: Rows) -> Table:
    def cells(measures: Mapping[str, Sequence[float]]) -> list[str]:
        levels = [percent(_mean(measures, name)) for name in _LEVELS.values()]
        return levels + [number(_mean(measures, name), 2) for name in _COUNTS.values()]

    return text_table(
        title=f"{title}: levels",
        note="Means over seeds. E: expected F1. F1: against the truths that were drawn. Sampled: at temperature 0.9, "
        "top-p 0.9. Common point: E where each stops as is best on the other half of the clips. Right, wrong: "
        "probability given to the right and wrong words of the fast answers after SFT.",
        columns=("row", *_LEVELS, *_COUNTS),
        rows=[(row, *cells(measures)) for row, measures in rows.items()],
    )


def _versus(title: str, rows: Rows) -> Table:
    before = AD if AD in rows else next(iter(rows))
    lines = []
    for row in rows:
        if row == before:
            continue
        cells = []
        for measure in _VERSUS.values():
            own, theirs = rows[row].get(measure), rows[before].get(measure)
            if own is None or theirs is None:
                cells.append(NONE)
            else:
                cells.append(_span(Paired.of("", own, theirs).estimate()))
        lines.append((row, *cells))
    if SFT in rows and "permuted" in rows:
        gains = [_gain(rows, measure) for measure in _VERSUS.values()]
        lines.append(("permuted, over sft", *gains))
    return text_table(
        title=f"{title}: differences to {before}",
        note="Points (repeats: in 100 answers), the same seeds on both sides, with 95% t intervals, each for itself. "
        "They have no verdict.",
        columns=("row", *_VERSUS),
        rows=lines,
    )


def _gain(rows: Rows, measure: str) -> str:
    if measure not in rows[SFT] or measure not in rows["permuted"]:
        return NONE
    return _span(Paired.of("", rows["permuted"][measure], rows[SFT][measure]).estimate())


def _mean(measures: Mapping[str, Sequence[float]], name: str) -> float | None:
    return float(np.mean(measures[name])) if name in measures else None


def _said(one: Estimate) -> str:
    return f"{one.label}: {_span(one)}"


def _span(one: Estimate) -> str:
    """Two decimals: a claim may hang on less than a tenth of a point."""
    mean, low, high = (f"{value:+.2f}".replace("-", "−") for value in (one.mean, one.low, one.high))
    return f"{mean} ({low} to {high})" if np.isfinite(one.low) else f"{mean} (no interval)"


def as_markdown(results: Results, command: str) -> str:
    """The whole page."""
    trial = "" if results.registered else " This is a **trial**: not the registered seeds, and no result of the study."
    parts = [
        f"## Stage {results.stage}: {'results' if results.registered else 'a trial'}",
        f"By the rules of docs/study/protocol.md.{trial}",
        *(markdown(table).rstrip() for table in tables_of(results)),
        f"Made by\n\n```bash\n{printable(command)}\n```\n",
    ]
    return "\n\n".join(parts)


def as_json(results: Results, command: str) -> dict[str, Any]:
    """Verdicts and means as JSON values; points."""

    def plain(one: Estimate) -> dict[str, Any]:
        ends = {name: value if np.isfinite(value) else None for name, value in (("low", one.low), ("high", one.high))}
        return dataclasses.asdict(one) | ends

    families = {
        title: {
            verdict.claim.key: {
                "said": verdict.claim.said,
                "outcome": verdict.outcome,
                "why": verdict.why,
                "level": verdict.level,
                "p_value": verdict.claim.p_value,
                "measures": [plain(one) for one in verdict.estimates],
                "beside": [plain(one) for one in verdict.beside],
            }
            for verdict in verdicts
        }
        for title, verdicts in results.families.items()
    }
    means = {
        title: {row: {name: POINTS * float(np.mean(of)) for name, of in found.items()} for row, found in rows.items()}
        for title, rows in results.comparisons.items()
    }
    about = {"stage": results.stage, "registered": results.registered, "command": command}
    return {**about, "families": families, "means": means}


def write(folder: Path, results: Results, command: str) -> list[Path]:
    """Writes results.md and results.json, and returns their paths."""
    content = json.dumps(as_json(results, command), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    files = {"results.md": as_markdown(results, command), "results.json": content}
    for name, text in files.items():
        atomic_files.write_text(folder / name, text)
    return [folder / name for name in files]
