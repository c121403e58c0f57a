"""The benchmark report's tables, as texts. A column is one protocol and one mode; the paper has columns of its own."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from typing import Any

from mer_r1_jax.evaluation.benchmarks.sets import (
    LAYOUTS,
    PAPER_F1,
    PAPER_F1_MEANS,
    PAPER_F1_SETS,
    PAPER_MEANS,
    PAPER_ROWS,
    SYNTHETIC,
    WAF,
    title_of,
)
from mer_r1_jax.evaluation.bootstrap import POINTS, signed
from mer_r1_jax.evaluation.evaluate import MODES

METRIC_TITLES = {"set_f1": "set F", "hit": "HIT", "waf": "WAF"}
NAMES_SHOWN = 5  # of clips with one fault
_ABSENT = "–"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number and the small print below it."""

    value: str
    note: str = ""


class Columns:
    """Scores by benchmark, protocol and mode.

    Args:
        scores: of `EvaluationFolder.scores`, in the order of the benchmarks.

    Attributes:
        benchmarks: those that have scores.
        protocols: as their scores describe them, each with its `letter`.
        heads: (protocol's key, mode) of each column.
    """

    def __init__(self, scores: Sequence[dict[str, Any]]):
        self._scores = {(score["benchmark"], score["protocol"]["key"]): score for score in scores}
        self.benchmarks = list(dict.fromkeys(score["benchmark"] for score in scores))
        described = {score["protocol"]["key"]: score["protocol"] for score in scores}
        self.protocols = [
            protocol | {"letter": letter}
            for letter, protocol in zip(string.ascii_uppercase, described.values(), strict=False)
        ]
        self.heads = [
            (protocol["key"], mode)
            for protocol in self.protocols
            for mode in MODES
            if any(mode in score["modes"] for (_, key), score in self._scores.items() if key == protocol["key"])
        ]

    def scores_of(self, benchmark: str) -> list[dict[str, Any]]:
        """A benchmark's scores under every protocol."""
        return [score for (name, _), score in self._scores.items() if name == benchmark]

    def mode(self, benchmark: str, key: str, mode: str) -> dict[str, Any] | None:
        """One cell's scores."""
        return self._scores.get((benchmark, key), {}).get("modes", {}).get(mode)

    def letter(self, score: dict[str, Any]) -> str:
        """The letter of a score's protocol."""
        return next(p["letter"] for p in self.protocols if p["key"] == score["protocol"]["key"])

    def titled(self) -> list[dict[str, str]]:
        """Heads of the columns: mode, and the protocol's letter."""
        letters = {protocol["key"]: protocol["letter"] for protocol in self.protocols}
        return [{"mode": mode, "letter": letters[key]} for key, mode in self.heads]


def main_table(columns: Columns) -> dict[str, Any] | None:
    """The nine sets by column, with their mean where a column has all nine; None without any of them."""
    if not any(name in LAYOUTS for name in columns.benchmarks):
        return None
    rows = []
    for number, layout in enumerate(LAYOUTS.values()):
        cells = [_headline(columns.mode(layout.name, key, mode)) for key, mode in columns.heads]
        paper = [f"{values[number]:.2f}" for values in PAPER_ROWS.values()]
        metric = METRIC_TITLES[layout.metric]
        rows.append({"title": layout.title, "metric": metric, "cells": cells, "paper": paper, "strong": False})
    means = [_mean_of_nine(columns, key, mode) for key, mode in columns.heads]
    paper = [f"{mean:.2f}" for mean in PAPER_MEANS.values()]
    rows.append({"title": "Mean of the nine", "metric": "", "cells": means, "paper": paper, "strong": True})
    return {"heads": columns.titled(), "paper": list(PAPER_ROWS), "rows": rows}


def synthetic_table(columns: Columns) -> dict[str, Any] | None:
    """The embedded world: set F, and the mean F1 of single clips between floor and ceiling."""
    scores = columns.scores_of(SYNTHETIC)
    if not scores:
        return None
    rows = []
    for title, kind, name in (
        ("Set F", "set_f", "score"),
        ("Precision", "set_f", "precision"),
        ("Recall", "set_f", "recall"),
        ("Mean F1 of single clips", "clip_f1", "score"),
    ):
        modes = [columns.mode(SYNTHETIC, key, mode) for key, mode in columns.heads]
        rows.append(
            {"title": title, "cells": [Cell(_ABSENT) if m is None else _interval(m[kind][name]) for m in modes]}
        )
    references = scores[0]["references"]
    return {
        "heads": columns.titled(),
        "rows": rows,
        "majority": ", ".join(references["majority_answer"]),
        "floor": percent(references["majority_f1"]),
        "ceiling": percent(references["oracle_f1"]),
    }


def analysis_table(columns: Columns) -> list[dict[str, Any]]:
    """Slow and fast of every benchmark and protocol: F, precision, recall, confidences, each with its difference."""
    tables = []
    for benchmark in columns.benchmarks:
        for score in columns.scores_of(benchmark):
            rows = [row for row in _analysis_rows(score) if any(cell.value != _ABSENT for cell in row["cells"])]
            tables.append(
                {
                    "title": title_of(benchmark),
                    "letter": columns.letter(score),
                    "common": score["slow_minus_fast"].get("n_common"),
                    "rows": rows,
                }
            )
    return tables


def _analysis_rows(score: dict[str, Any]) -> list[dict[str, Any]]:
    metric = METRIC_TITLES[score["metric"]]
    wanted = [(f"{metric} (headline)", "headline", "score")]
    if score["metric"] != WAF:
        if score["metric"] == "hit":
            wanted.append(("Set F", "set_f", "score"))
        wanted += [
            ("Precision", "set_f", "precision"),
            ("Recall", "set_f", "recall"),
            ("Mean F1 of single clips", "clip_f1", "score"),
            ("Confidence, correct categories", "confidence_correct", "score"),
            ("Confidence, wrong categories", "confidence_wrong", "score"),
        ]
    else:
        wanted.append(("Accuracy of the sign", "headline", "accuracy"))
    rows = []
    for title, kind, name in wanted:
        cells = [_interval(_value(score["modes"].get(mode), kind, name)) for mode in MODES]
        difference = score["slow_minus_fast"].get(kind, {}).get(name)
        decided = difference is not None and (difference["low"] > 0 or difference["high"] < 0)
        rows.append({"title": title, "cells": [*cells, _difference(difference)], "decided": decided})
    for title, name, scale, digits in (
        ("Emotion words per answer", "mean_words", 1, 2),
        ("Tokens per answer", "mean_tokens", 1, 1),
        ("Distinct answers", "distinct_answers", 1, 0),
        ("Words on no wheel", "n_words_on_no_wheel", 1, 0),
        ("In the right format", "format_rate", POINTS, 1),
        ("Cut at the length limit", "truncated_rate", POINTS, 1),
    ):
        values = [score["modes"].get(mode, {}).get(name) for mode in MODES]
        cells = [Cell(_ABSENT if value is None else f"{scale * value:.{digits}f}") for value in values]
        rows.append({"title": title, "cells": [*cells, Cell("")], "decided": False})
    return rows


def paper_f1_table() -> dict[str, Any]:
    """The paper's own slow-fast table: set F on the five sets whose truths are categories."""
    rows = [
        {"title": f"{model}, {mode}", "cells": [f"{value:.2f}" for value in (*values, PAPER_F1_MEANS[model, mode])]}
        for (model, mode), values in PAPER_F1.items()
    ]
    return {"heads": [*(title_of(name) for name in PAPER_F1_SETS), "mean"], "rows": rows}


def coverage_table(columns: Columns) -> list[dict[str, Any]]:
    """What each data folder held, what was answered, and what was missing, counted and named."""
    rows = []
    for benchmark in columns.benchmarks:
        score = columns.scores_of(benchmark)[0]
        coverage = score["coverage"]
        faults = {
            "no video file, not asked": coverage["missing_clip"],
            "no usable label, not asked": coverage["missing_label"],
            "could not be read, not asked": list(coverage["unusable"]),
            "no subtitle row, asked without": coverage["missing_subtitle"],
            "empty subtitle, asked without": coverage["empty_subtitle"],
            "no sound file, the video's own used": coverage["missing_audio"],
            "no sound at all, asked without": coverage["silent_audio"],
        }
        modes = score["modes"]
        faults_of_answers = {
            "answers without an answer block": "n_without_answer_block",
            "answers without words": "n_without_words",
        }
        notes = [_named(what, names) for what, names in faults.items() if names]
        for what, name in faults_of_answers.items():
            if any(scores[name] for scores in modes.values()):
                notes.append(f"{what}: " + ", ".join(f"{mode} {scores[name]}" for mode, scores in modes.items()))
        for mode, scores in modes.items():
            if scores["extractor_failures"]:
                listed = ", ".join(f"{reason} {count}" for reason, count in scores["extractor_failures"].items())
                notes.append(f"extractor without a reply, {mode}: {listed}")
        if any(scores["n_unanswered"] for scores in modes.values()):
            as_empty = ", ".join(
                f"{mode} {percent(scores['score_with_unanswered_as_empty'])}" for mode, scores in modes.items()
            )
            notes.append(f"score with unanswered clips as empty answers: {as_empty}")
        rows.append(
            {
                "title": title_of(benchmark),
                "official": coverage["official"] or _ABSENT,
                "labelled": coverage["labelled"],
                "answered": [modes[mode]["n_answered"] if mode in modes else _ABSENT for mode in MODES],
                "scored": [modes[mode]["n_scored"] if mode in modes else _ABSENT for mode in MODES],
                "notes": notes,
            }
        )
    return rows


def percent(value: float | None) -> str:
    """A share in points, or a dash."""
    return _ABSENT if value is None else f"{POINTS * value:.2f}"


def _named(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{what}: {len(names)} ({', '.join(names[:NAMES_SHOWN])}{more})"


def _headline(scores: dict[str, Any] | None) -> Cell:
    if scores is None:
        return Cell(_ABSENT)
    cell = _interval(scores["headline"]["score"])
    of = f"{scores['n_scored']} of {scores['n_labelled']} clips"
    return Cell(cell.value, f"{cell.note} · {of}" if cell.note else of)


def _mean_of_nine(columns: Columns, key: str, mode: str) -> Cell:
    found = [columns.mode(name, key, mode) for name in LAYOUTS]
    values = [scores["headline"]["score"]["value"] for scores in found if scores is not None]
    if len(values) < len(LAYOUTS):
        return Cell(_ABSENT, f"{len(values)} of {len(LAYOUTS)} sets")
    if None in values:
        return Cell(_ABSENT, "a score is undefined")
    return Cell(percent(sum(values) / len(values)))


def _value(scores: dict[str, Any] | None, kind: str, name: str) -> dict[str, Any] | None:
    """An interval; confidences are kept without the name of a value."""
    if scores is None or scores.get(kind) is None:
        return None
    return scores[kind] if "value" in scores[kind] else scores[kind].get(name)


def _interval(interval: dict[str, Any] | None) -> Cell:
    if interval is None or interval["value"] is None:
        return Cell(_ABSENT)
    if interval["low"] is None:
        return Cell(percent(interval["value"]))
    return Cell(percent(interval["value"]), f"[{percent(interval['low'])}, {percent(interval['high'])}]")


def _difference(difference: dict[str, Any] | None) -> Cell:
    if difference is None:
        return Cell(_ABSENT)
    return Cell(signed(difference["points"]), f"[{signed(difference['low'])}, {signed(difference['high'])}]")
