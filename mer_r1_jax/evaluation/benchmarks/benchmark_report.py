"""report.html of an evaluation: its scores beside the paper's, the slow-fast analysis, and clips. Needs no model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.evaluation.benchmarks.benchmark_folder import BenchmarkFolder
from mer_r1_jax.evaluation.benchmarks.sets import BENCHMARKS, WAF, BenchmarkError, title_of
from mer_r1_jax.evaluation.benchmarks.tables import (
    Columns,
    analysis_tables,
    coverage_table,
    gated_table,
    main_table,
    paper_f1_table,
    synthetic_table,
    ungated,
)
from mer_r1_jax.evaluation.clip_frames import clip_strips
from mer_r1_jax.evaluation.figures import FAST, NEUTRAL, SLOW, as_svg
from mer_r1_jax.evaluation.gate_figure import gate_figure
from mer_r1_jax.evaluation.report_kit import FEW_CLIPS, Figure, Word, WordMarks, write_page

TEXT_SHOWN = 900  # characters of reasoning
_CAPTION = (
    "{title}. Bars and confusion: categories of the first wheel. A true category that is missed is shared out over the "
    "clip's wrong ones, or counts under none. Calibration: every answered word on every wheel."
)
_CAPTION_WAF = "{title}: polarity answered where the label is positive or negative, in per cent of the row."


def make_benchmark_report(out: str | os.PathLike, num_examples: int = 6) -> Path:
    """Writes `<out>/report.html` from the scores and answers in the folder.

    Args:
        out: the folder of an evaluation.
        num_examples: clips shown of each benchmark, the first ones in order.

    Returns:
        The report's path.

    Raises:
        BenchmarkError: there is no score, or the report cannot be written.
    """
    folder = BenchmarkFolder.of(out)
    scores = sorted(folder.scores(), key=lambda score: BENCHMARKS.index(score["benchmark"]))
    if not scores:
        raise BenchmarkError(f"{folder.path}: holds no scores; evaluate something there first")
    columns = Columns(scores)
    missing: list[str] = []
    examples = [_examples(folder, columns.scores_of(name), num_examples, missing) for name in columns.benchmarks]
    values = dict(
        title=f"Benchmarks of {Path(out).resolve().name}",
        warnings=_warnings(scores, columns),
        main=main_table(columns),
        synthetic=synthetic_table(columns),
        gated=gated_table(columns),
        analysis=analysis_tables(columns),
        paper_f1=paper_f1_table(),
        coverage=coverage_table(columns),
        protocols=columns.protocols,
        figures=_figures(scores, columns),
        examples=[example for example in examples if example["clips"]],
        missing=list(dict.fromkeys(missing)),
        fingerprint=json.dumps(scores[0]["answers"]["fingerprint"], indent=2, ensure_ascii=False),
    )
    try:
        return write_page(folder.report, "benchmarks/benchmark_report.html.jinja", **values)
    except OSError as error:
        raise BenchmarkError(str(error)) from error


def _warnings(scores: Sequence[dict[str, Any]], columns: Columns) -> list[str]:
    found = []
    limited = [title_of(s["benchmark"]) for s in scores if s["coverage"]["limited"]]
    if limited:
        found.append(f"Only the first clips were asked (--limit): {', '.join(dict.fromkeys(limited))}.")
    partial, few = [], []
    for score in scores:
        official, labelled = score["coverage"]["official"], score["coverage"]["labelled"]
        if official is not None and labelled != official:
            partial.append(
                f"{title_of(score['benchmark'])} ({labelled} labelled clips, the official split has {official})"
            )
        answered = max(mode["n_answered"] for mode in score["modes"].values())
        if answered < FEW_CLIPS:
            few.append(f"{title_of(score['benchmark'])} ({answered})")
    if partial:
        found.append(f"Not the official test split: {'; '.join(dict.fromkeys(partial))}.")
    if few:
        found.append(f"Few clips, so that a score says little: {', '.join(dict.fromkeys(few))}.")
    unanswered = {title_of(s["benchmark"]): max(mode["n_unanswered"] for mode in s["modes"].values()) for s in scores}
    if any(unanswered.values()):
        named = ", ".join(f"{title} {count}" for title, count in unanswered.items() if count)
        found.append(f"Labelled clips without an answer are in no score: {named}. Coverage, below, names them.")
    # A benchmark has one file of answers, whatever they are scored by.
    old = {
        title_of(score["benchmark"]): f"{score['n_fast_without_confidence']} of {score['modes']['fast']['n_answered']}"
        for score in scores
        if ("gate" in score or "auto" in score) and score.get("n_fast_without_confidence")
    }
    if old:
        named = ", ".join(f"{title} {count}" for title, count in old.items())
        found.append(
            f"Fast answers kept by an earlier version, without a confidence of their own: {named}. Theirs is made from "
            "the wheels of each clip's truth, and gates compare it with that of other answers by one threshold. For "
            "confidences of one kind ask again, into another --out."
        )
    found += dict.fromkeys(said for score in scores if (said := ungated(score)))
    if len(columns.protocols) > 1:
        found.append("There are scores of several protocols. They stand in columns of their own and do not compare.")
    if any("shipped" in protocol["wheels"] for protocol in columns.protocols):
        found.append(
            "Words were looked up on the wheels shipped with this program. Scores to set beside published ones need "
            "the official wheel folder (--wheel_dir)."
        )
    found.append(
        "The paper's numbers were made by its authors, on the full data and by their own protocol; here they are for "
        "orientation, not a comparison under equal conditions."
    )
    return found


def _figures(scores: Sequence[dict[str, Any]], columns: Columns) -> list[Figure]:
    found = []
    for score in scores:
        caption = (_CAPTION_WAF if score["metric"] == WAF else _CAPTION).format(title=title_of(score["benchmark"]))
        if len(columns.protocols) > 1:
            caption += f" Protocol {columns.letter(score)}."
        found.append(Figure(caption, _charts({mode: score["modes"][mode] for mode in MODES if mode in score["modes"]})))
        if gated := gate_figure(score.get("gate"), f"{title_of(score['benchmark'])}: "):
            found.append(gated)
    return found


def _examples(
    folder: BenchmarkFolder, scores: Sequence[dict[str, Any]], count: int, missing: list[str]
) -> dict[str, Any]:
    """The first clips of a benchmark with their answers."""
    score = scores[0]
    name = score["benchmark"]
    _, answers = folder.read_answers(name)
    marks = WordMarks(score["wheel_dir"], score["protocol"]["variant"], missing)
    chosen = {
        clip: {mode: answers[clip, mode] for mode in MODES if (clip, mode) in answers}
        for clip in list(dict.fromkeys(clip for clip, _ in answers))[:count]
    }
    videos = [next(iter(lines.values()))["video"] for lines in chosen.values()]
    strips = clip_strips(videos, score["coverage"]["media_root"])
    clips = []
    for (clip, lines), strip in zip(chosen.items(), strips, strict=True):
        line = next(iter(lines.values()))
        if strip.problem:
            missing.append(f"frames of {title_of(name)} {clip}: {strip.problem}")
        truth = line["truth"]
        words = [truth] if isinstance(truth, str) else truth if isinstance(truth, list) else []
        answered = [word for given in lines.values() for word in given["words"]]
        clips.append(
            {
                "id": clip,
                "strip": strip,
                "subtitle": line["subtitle"],
                "reasoning": (lines["slow"]["reasoning"] or "")[:TEXT_SHOWN] if "slow" in lines else None,
                "answers": [
                    {"mode": mode, "words": _marked(given["words"], words, marks), "text": given["text"][:TEXT_SHOWN]}
                    for mode, given in lines.items()
                ],
                "truth": marks.truth(words, answered),
                "valence": None if words or not isinstance(truth, int | float) else f"{truth:+.2f}",
            }
        )
    return {"title": title_of(name), "clips": clips}


def _marked(words: Sequence[str], truth: Sequence[str], marks: WordMarks) -> list[Word]:
    """Words of an answer; without marks where the truth is a number."""
    return marks.answer(words, truth) if truth else [Word(word, "") for word in words]


COLORS = {"slow": SLOW, "fast": FAST}
PANEL_WIDTH = 3.3  # inches
_DARK = 0.55  # share from which a heat map's number is white


def _charts(modes: Mapping[str, Mapping[str, Any]]) -> str:
    """One row of panels about a benchmark, as an SVG data URI.

    Args:
        modes: mode -> its scores, with `by_category`, `confusion` and `calibration`.
    """
    painters = []
    if any(scores["by_category"] for scores in modes.values()):
        painters.append(lambda axes: _bars(axes, {mode: scores["by_category"] for mode, scores in modes.items()}))
    for mode, scores in modes.items():
        painters.append(lambda axes, mode=mode, scores=scores: _heat(axes, scores["confusion"], mode))
    curves = {mode: scores["calibration"] for mode, scores in modes.items() if scores["calibration"]}
    if curves:
        painters.append(lambda axes: _calibration(axes, curves))
    rows = max(
        [len(scores["confusion"]["rows"]) for scores in modes.values()]
        + [len(scores["by_category"]) for scores in modes.values()]
    )

    def paint(figure: matplotlib.figure.Figure) -> None:
        for number, painter in enumerate(painters):
            painter(figure.add_subplot(1, len(painters), number + 1))

    return as_svg(paint, PANEL_WIDTH * len(painters), max(2.6, 0.9 + 0.34 * rows))


def _bars(axes, by_mode: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """F1 of each category that is true somewhere or answered, most frequent first."""
    true = {row["category"]: row["true"] for row in next(iter(by_mode.values()))}
    seen = {row["category"] for rows in by_mode.values() for row in rows if row["f1"] is not None}
    categories = sorted(seen, key=lambda name: (-true[name], name))
    height = 0.8 / len(by_mode)
    for number, (mode, rows) in enumerate(by_mode.items()):
        f1 = {row["category"]: row["f1"] for row in rows}
        at = np.arange(len(categories)) + (number - (len(by_mode) - 1) / 2) * height
        axes.barh(at, [100 * (f1[name] or 0) for name in categories], height * 0.92, color=COLORS[mode], label=mode)
    axes.set_yticks(np.arange(len(categories)), [f"{name} ({true[name]})" for name in categories])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    axes.set_title("F1 by category (true in so many clips)")
    if len(by_mode) > 1:
        axes.legend(loc="best")


def _heat(axes, confusion: Mapping[str, Any], mode: str) -> None:
    """Shares of each true row."""
    counts = np.asarray(confusion["counts"], float)
    kept = counts.sum(axis=1) > 0
    rows = [name for name, keep in zip(confusion["rows"], kept, strict=True) if keep]
    shown = (counts.sum(axis=0) > 0) | np.isin(confusion["columns"], rows)
    columns = [name for name, keep in zip(confusion["columns"], shown, strict=True) if keep]
    counts = counts[kept][:, shown]
    axes.set_title(f"Answered where true: {mode}")
    axes.grid(visible=False)
    if not len(rows):
        axes.text(0.5, 0.5, "nothing to show", ha="center", va="center", color=NEUTRAL, transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    shares = counts / counts.sum(axis=1, keepdims=True)
    axes.imshow(shares, cmap="Blues" if mode == "slow" else "Oranges", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.spines[:].set_visible(False)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005:
            color = "white" if share > _DARK else "#1e293b"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=8)


def _calibration(axes, curves: Mapping[str, Mapping[str, Any]]) -> None:
    """Share of correct categories against their probability; a point's size grows with how many it stands for."""
    axes.plot([0, 100], [0, 100], color="#94a3b8", linestyle=(0, (4, 3)), linewidth=1)
    for mode, curve in curves.items():
        sure, right = 100 * np.asarray(curve["confidence"]), 100 * np.asarray(curve["correct"])
        count = np.asarray(curve["count"], float)
        ece = "" if curve["ece"] is None else f", error {100 * curve['ece']:.1f}"
        axes.plot(sure, right, color=COLORS[mode], linewidth=1.6, label=f"{mode}{ece}")
        axes.scatter(sure, right, s=12 + 60 * count / max(count.max(initial=1), 1), color=COLORS[mode], alpha=0.8)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_title("Calibration, per cent")
    axes.set_xlabel("confidence")
    axes.set_ylabel("correct")
    axes.legend(loc="best")
