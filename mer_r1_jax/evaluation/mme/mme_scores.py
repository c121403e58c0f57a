"""Recognition, Reasoning and CoT of each task, pooled over all items, and the mean over tasks.

An item's recognition is the rating of its last step (the share of the true labels that are named), its reasoning the
mean of the earlier ones (0 if there are none), its CoT the mean of both. What failed counts twice: left out, as the
official code does it, and as zero.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from mer_r1_jax.evaluation.bootstrap import POINTS, Difference, macro_interval, mean_interval, paired_difference
from mer_r1_jax.evaluation.mme.mme_tasks import METRICS, TASKS
from mer_r1_jax.evaluation.mme.stages import Asked
from mer_r1_jax.evaluation.result_log import FAILED

DROP, ZERO = TREATMENTS = ("drop", "zero")  # of items without ratings: left out (official), or 0
STAGES = ("predict", "steps", "judge")
Rows = Mapping[str, Mapping[str, Any]]


def item_scores(scores: Sequence[str]) -> dict[str, float]:
    """Recognition, reasoning and CoT of one item from its ratings, such as ["1/1", "0/1", "2/3"]."""
    ratings = [Fraction(score) for score in scores]
    recognition = ratings[-1]
    reasoning = sum(ratings[:-1], Fraction(0)) / max(1, len(ratings) - 1)
    return dict(zip(METRICS, map(float, (recognition, reasoning, (recognition + reasoning) / 2)), strict=True))


def score_mode(asked: Sequence[Asked], logs: Mapping[str, Rows]) -> dict[str, Any]:
    """All scores of one mode.

    Args:
        asked: items in that mode.
        logs: stage -> key -> line, for the three stages.
    """
    by_task: dict[str, list[Asked]] = {}
    for one in asked:
        by_task.setdefault(one.item.task, []).append(one)
    tables = {task: _table(by_task[task], logs["judge"]) for task in TASKS if task in by_task}
    tasks = {task: _coverage(by_task[task], logs) | _scores([table]) for task, table in tables.items()}
    pooled = _coverage(asked, logs) | _scores([np.concatenate(list(tables.values()))])
    rated_tasks = sum(bool(tasks[task]["rated"]) for task in tasks)
    macro = {"tasks": len(tables), "rated_tasks": rated_tasks} | _scores(list(tables.values()))
    return {"tasks": tasks, "pooled": pooled, "macro": macro}


def paired_modes(asked: Sequence[Asked], judged: Rows) -> dict[str, Any] | None:
    """Slow minus fast over the items that both have ratings of, with intervals; None without two such items."""
    ratings = {(one.mode, one.item.key): judged[one.key]["scores"] for one in asked if _is_rated(one, judged)}
    both = [key for mode, key in ratings if mode == "slow" and ("fast", key) in ratings]
    if len(both) < 2:
        return None
    found = {}
    for metric in METRICS:
        slow, fast = (np.array([item_scores(ratings[mode, key])[metric] for key in both]) for mode in ("slow", "fast"))
        found[metric] = _interval(paired_difference(slow, fast))
    return {"items": len(both), **found}


def _is_rated(one: Asked, judged: Rows) -> bool:
    return one.key in judged and FAILED not in judged[one.key]


def _table(asked: Sequence[Asked], judged: Rows) -> np.ndarray:
    """float64 [items, metrics]; NaN where there are no ratings."""
    table = np.full((len(asked), len(METRICS)), np.nan)
    for row, one in enumerate(asked):
        if _is_rated(one, judged):
            table[row] = list(item_scores(judged[one.key]["scores"]).values())
    return table


def _scores(tables: Sequence[np.ndarray]) -> dict[str, Any]:
    """Scores under both treatments; over several tables their unweighted mean."""
    rated = [table[~np.isnan(table[:, 0])] for table in tables]
    kept = {DROP: [table for table in rated if len(table)], ZERO: [np.nan_to_num(table) for table in tables]}
    return {
        treatment: {
            metric: _score([table[:, column] for table in kept[treatment]]) for column, metric in enumerate(METRICS)
        }
        for treatment in TREATMENTS
    }


def _score(groups: Sequence[np.ndarray]) -> dict[str, float | None]:
    if not groups:
        return {"score": None, "low": None, "high": None}
    if sum(map(len, groups)) < 2:
        return {"score": float(POINTS * groups[0][0]), "low": None, "high": None}
    return _interval(macro_interval(groups) if len(groups) > 1 else mean_interval(groups[0]))


def _interval(value: Difference) -> dict[str, float | None]:
    return {"score": value.points, "low": value.low, "high": value.high}


def _coverage(asked: Sequence[Asked], logs: Mapping[str, Rows]) -> dict[str, Any]:
    """Counts behind a score: items, how far they came, and why not further."""
    rated = [one for one in asked if _is_rated(one, logs["judge"])]
    failed: dict[str, collections.Counter[str]] = {stage: collections.Counter() for stage in STAGES}
    for one in asked:
        for stage in STAGES:
            row = logs[stage].get(one.key)
            if row is None or FAILED in row:
                failed[stage][row[FAILED] if row else "not_asked"] += 1
                break
    steps = [len(logs["judge"][one.key]["scores"]) for one in rated]
    return {
        "n": len(asked),
        "rated": len(rated),
        "failed": {stage: dict(sorted(counts.items())) for stage, counts in failed.items() if counts},
        "mean_steps": float(np.mean(steps)) if steps else None,
        "without_reasoning": sum(count == 1 for count in steps),
    }


def lines_of(score: Mapping[str, Any]) -> list[str]:
    """The scores of one protocol, as `MmeFolder.score` gives them, in lines for a console."""
    lines = [score["protocol"]["description"]]
    for mode, table in score["modes"].items():
        pooled, macro = table["pooled"], table["macro"]
        for name, row in (
            ("pooled", pooled[DROP]),
            ("mean over tasks", macro[DROP]),
            ("failures 0", pooled[ZERO]),
        ):
            shown = ", ".join(f"{metric} {_number(row[metric]['score'])}" for metric in METRICS)
            lines.append(f"  {mode}, {name}: {shown}")
        lines.append(f"  {mode}: {pooled['rated']} of {pooled['n']} items rated")
    return lines


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.1f}"
