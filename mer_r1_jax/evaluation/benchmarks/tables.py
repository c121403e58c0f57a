"""The benchmark report's tables, as texts. A column is one protocol and one mode; the paper has columns of its own."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from mer_r1_jax.emotion.answer_form import AUTO, MODES
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
from mer_r1_jax.evaluation.report_kit import NONE, Cell, Row, Table, number, percent, row

METRIC_TITLES = {"set_f1": "set F", "hit": "HIT", "waf": "WAF"}
NAMES_SHOWN = 5  # of clips with one fault
DIGITS = 2  # of points, as published scores have


class Columns:
    """Scores by benchmark, protocol and mode.

    Args:
        scores: of `BenchmarkFolder.scores`, in the order of the benchmarks.

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
            for mode in (*MODES, AUTO)
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

    def titled(self) -> list[Cell]:
        """Heads of the columns: mode, and the protocol's letter where there are several."""
        letters = {protocol["key"]: f" · {protocol['letter']}" for protocol in self.protocols}
        return [Cell(mode + letters[key] * (len(letters) > 1), kind=mode) for key, mode in self.heads]


def main_table(columns: Columns) -> Table | None:
    """The nine sets by column, with their mean where a column has all nine; None without any of them."""
    if not any(name in LAYOUTS for name in columns.benchmarks):
        return None
    rows = []
    for place, layout in enumerate(LAYOUTS.values()):
        cells = [_headline(columns.mode(layout.name, key, mode)) for key, mode in columns.heads]
        paper = [Cell(f"{values[place]:.2f}", kind="paper") for values in PAPER_ROWS.values()]
        rows.append(row(layout.title, [Cell(METRIC_TITLES[layout.metric], kind="text"), *cells, *paper]))
    means = [_mean_of_nine(columns, key, mode) for key, mode in columns.heads]
    paper = [Cell(f"{mean:.2f}", kind="paper") for mean in PAPER_MEANS.values()]
    rows.append(row("Mean of the nine", [Cell("", kind="text"), *means, *paper], "strong"))
    groups = (
        Cell("this model", kind="group", span=len(columns.heads)),
        Cell("the paper's numbers, not ours", kind="group paper", span=len(PAPER_ROWS)),
    )
    names = (Cell("Set"), Cell("metric", kind="text"), *columns.titled(), *(Cell(n, kind="paper") for n in PAPER_ROWS))
    return Table(
        heads=(Row((Cell(""), Cell(""), *groups)), Row(names)),
        rows=tuple(rows),
        title="MER-UniBench",
        note="The paper's columns: arXiv 2606.27652, main table; its protocol of extracting words is not known in "
        "detail.",
        kind="numbers main",
    )


def synthetic_table(columns: Columns) -> Table | None:
    """The synthetic world: set F, and the mean F1 of single clips between floor and ceiling."""
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
        rows.append(row(title, [Cell(NONE) if m is None else _interval(m[kind][name]) for m in modes]))
    references = scores[0]["references"]
    majority = ", ".join(references["majority_answer"])
    return Table(
        heads=(Row((Cell("Score"), *columns.titled())),),
        rows=tuple(rows),
        title="Synthetic world",
        note=f"Mean F1 of single clips: {percent(references['majority_f1'], DIGITS)} for the best constant answer"
        f"{f' ({majority})' if majority else ''}, {percent(references['oracle_f1'], DIGITS)} for one who knows the "
        "cues.",
    )


def analysis_tables(columns: Columns) -> list[Table]:
    """Slow and fast of every benchmark and protocol: F, precision, recall, confidences, each with its difference."""
    tables = []
    head = (Cell(""), *(Cell(mode, kind=mode) for mode in MODES), Cell("slow − fast"))
    for benchmark in columns.benchmarks:
        for score in columns.scores_of(benchmark):
            title = title_of(benchmark) + (f" · {columns.letter(score)}" if len(columns.protocols) > 1 else "")
            if (common := score["slow_minus_fast"].get("n_common")) is not None:
                title += f" · {common} clips answered both ways"
            tables.append(Table((Row(head),), tuple(_analysis_rows(score)), title, kind="numbers analysis"))
    return tables


def _analysis_rows(score: dict[str, Any]) -> list[Row]:
    """Scores, then how answers look; "decided" where the difference's interval excludes zero."""
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
        rows.append(row(title, [*cells, _difference(difference)], "decided" if decided else ""))
    for title, name, scale, digits in (
        ("Emotion words per answer", "mean_words", 1, 2),
        ("Tokens per answer", "mean_tokens", 1, 1),
        ("Distinct answers", "distinct_answers", 1, 0),
        ("Words on no wheel", "n_words_on_no_wheel", 1, 0),
        ("In the right format", "format_rate", POINTS, 1),
        ("Cut at the length limit", "truncated_rate", POINTS, 1),
    ):
        values = [score["modes"].get(mode, {}).get(name) for mode in MODES]
        rows.append(row(title, [*(number(None if v is None else scale * v, digits) for v in values), ""]))
    return [one for one in rows if any(cell.text != NONE for cell in one.cells[1:])]


def gated_table(columns: Columns) -> Table | None:
    """Of answers gated by their confidence: what the gate took, what it cost and what it gained; None without any."""
    rows = []
    for benchmark in columns.benchmarks:
        for score in columns.scores_of(benchmark):
            if "auto" not in score:
                continue
            about, scores = score["auto"], score["modes"][AUTO]
            against = [score.get(f"auto_minus_{mode}", {}).get("headline", {}).get("score") for mode in MODES]
            title = title_of(benchmark) + (f" · {columns.letter(score)}" if len(columns.protocols) > 1 else "")
            counts = (number(about["threshold"], 2), str(about.get("n_fast", 0)), str(about.get("n_slow", 0)))
            cells = [*counts, _headline(scores), number(scores["mean_tokens"], 1), *map(_difference, against)]
            rows.append(row(title, cells))
    if not rows:
        return None
    heads = ("Benchmark", "threshold", "taken fast", "taken slow", "headline score", "tokens per answer")
    heads = (*heads, *(f"auto − {mode}" for mode in MODES))
    return Table(
        (Row(tuple(map(Cell, heads))),),
        tuple(rows),
        title="Gated answers (auto)",
        note="The fast answer, and the slow one where the model was less sure of the fast one than the threshold; the "
        "tokens of both are counted there. A threshold that was fitted on the very clips it is measured on flatters "
        "itself.",
        kind="numbers",
    )


def ungated(score: dict[str, Any]) -> str:
    """Why answers that a gate was asked for, or asked for itself, have no score; empty where all have one."""
    title, said = title_of(score["benchmark"]), []
    if score.get("threshold") is not None and "fast" not in score["modes"]:
        said.append(f"Gated answers of {title} are not scored: there is no fast one. Evaluate with --mode=auto.")
    if lacking := score.get("n_unsure_without_slow"):
        said.append(
            f"Gated answers of {title} are not scored: {lacking} of {score['modes']['fast']['n_answered']} fast "
            "answers are less sure than the threshold and have no slow answer beside them. Evaluate all clips with "
            "--mode=auto, or fewer with --limit into another --out."
        )
    if alone := score.get("n_slow_without_score"):
        said.append(
            f"Slow answers of {title} have no score of their own: there are {alone}, and not of every clip, so that "
            "most are of clips that the model was unsure of. --mode=both asks the others too."
        )
    return " ".join(said)


def paper_f1_table() -> Table:
    """The paper's own slow-fast table: set F on the five sets whose truths are categories."""
    heads = [*(title_of(name) for name in PAPER_F1_SETS), "mean"]
    rows = [
        row(f"{model}, {mode}", [Cell(f"{v:.2f}", kind="paper") for v in (*values, PAPER_F1_MEANS[model, mode])])
        for (model, mode), values in PAPER_F1.items()
    ]
    return Table((Row((Cell(""), *(Cell(name, kind="paper") for name in heads))),), tuple(rows))


def coverage_table(columns: Columns) -> Table:
    """What each data folder held, what was answered, and what was missing, counted and named."""
    rows = []
    for benchmark in columns.benchmarks:
        score = columns.scores_of(benchmark)[0]
        coverage, modes = score["coverage"], score["modes"]
        counts = [modes[mode][name] if mode in modes else NONE for name in ("n_answered", "n_scored") for mode in MODES]
        cells = map(str, (coverage["official"] or NONE, coverage["labelled"], *counts))
        notes = "\n".join(_coverage_notes(coverage, modes)) or "nothing"
        rows.append(row(title_of(benchmark), [*cells, Cell(notes, kind="text")]))
    heads = ("Benchmark", "official split", "labelled here", *(f"answered {m}" for m in MODES))
    heads = (*heads, *(f"scored {mode}" for mode in MODES))
    return Table((Row((*map(Cell, heads), Cell("missing or odd", kind="text"))),), tuple(rows))


def _coverage_notes(coverage: dict[str, Any], modes: dict[str, dict[str, Any]]) -> list[str]:
    faults = {
        "no video file, not asked": coverage["missing_clip"],
        "no usable label, not asked": coverage["missing_label"],
        "could not be read, not asked": list(coverage["unusable"]),
        "no subtitle row, asked without": coverage["missing_subtitle"],
        "empty subtitle, asked without": coverage["empty_subtitle"],
        "no sound file, the video's own used": coverage["missing_audio"],
        "no sound at all, asked without": coverage["silent_audio"],
    }
    notes = [_named(what, names) for what, names in faults.items() if names]
    for what, name in (
        ("answers without an answer block", "n_without_answer_block"),
        ("answers without words", "n_without_words"),
    ):
        if any(scores[name] for scores in modes.values()):
            notes.append(f"{what}: " + ", ".join(f"{mode} {scores[name]}" for mode, scores in modes.items()))
    for mode, scores in modes.items():
        if scores["extractor_failures"]:
            listed = ", ".join(f"{reason} {count}" for reason, count in scores["extractor_failures"].items())
            notes.append(f"extractor without a reply, {mode}: {listed}")
    if any(scores["n_unanswered"] for scores in modes.values()):
        as_empty = ", ".join(
            f"{mode} {percent(scores['score_with_unanswered_as_empty'], DIGITS)}" for mode, scores in modes.items()
        )
        notes.append(f"score with unanswered clips as empty answers: {as_empty}")
    return notes


def _named(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{what}: {len(names)} ({', '.join(names[:NAMES_SHOWN])}{more})"


def _headline(scores: dict[str, Any] | None) -> Cell:
    if scores is None:
        return Cell(NONE)
    cell = _interval(scores["headline"]["score"])
    of = f"{scores['n_scored']} of {scores['n_labelled']} clips"
    return Cell(cell.text, f"{cell.note} · {of}" if cell.note else of)


def _mean_of_nine(columns: Columns, key: str, mode: str) -> Cell:
    found = [columns.mode(name, key, mode) for name in LAYOUTS]
    values = [scores["headline"]["score"]["value"] for scores in found if scores is not None]
    if len(values) < len(LAYOUTS):
        return Cell(NONE, f"{len(values)} of {len(LAYOUTS)} sets")
    if None in values:
        return Cell(NONE, "a score is undefined")
    return Cell(percent(sum(values) / len(values), DIGITS))


def _value(scores: dict[str, Any] | None, kind: str, name: str) -> dict[str, Any] | None:
    """An interval; confidences are kept without the name of a value."""
    if scores is None or scores.get(kind) is None:
        return None
    return scores[kind] if "value" in scores[kind] else scores[kind].get(name)


def _interval(interval: dict[str, Any] | None) -> Cell:
    if interval is None or interval["value"] is None:
        return Cell(NONE)
    value, low, high = (percent(interval[name], DIGITS) for name in ("value", "low", "high"))
    return Cell(value, "" if interval["low"] is None else f"[{low}, {high}]")


def _difference(difference: dict[str, Any] | None) -> Cell:
    if difference is None:
        return Cell(NONE)
    return Cell(signed(difference["points"]), f"[{signed(difference['low'])}, {signed(difference['high'])}]")
