"""An experiment of the lab where people look: tables for the terminal and as Markdown, JSON, and a figure."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mer_r1_jax.evaluation.bootstrap import FEW_SEEDS, POINTS, Difference, signed
from mer_r1_jax.evaluation.figures import FAST, MUTED, SLOW, STYLE, svg
from mer_r1_jax.evaluation.report_kit import NONE, Table, markdown, number, percent, text_table
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.lab.experiment import (
    COMPARED_WITH,
    DRIFT_STEPS,
    PERMUTED,
    SFT,
    SLOW_MINUS_FAST,
    LabResult,
    as_json,
)
from mer_r1_jax.storage import atomic_files

COLORS = ("#475569", "#b3261e", "#2a8c5f", "#1f5fbf", "#8a4fbf", "#0f766e", "#a16207", "#be185d", "#4d7c0f", "#d9730d")
_DASHES = (0, (4, 3))


def write(folder: Path, result: LabResult, command: str) -> list[Path]:
    """Writes WORLD.json, WORLD.md and WORLD.svg, and returns their paths."""
    page = [f"## World {result.world}", summary(result), f"![Operating points]({result.world}.svg)"]
    page += [markdown(table).rstrip() for table in tables_of(result)]
    page.append(f"Made by\n\n```bash\n{printable(command)}\n```\n")
    content = json.dumps(as_json(result, command), indent=1, allow_nan=False)
    files = {
        ".json": (content + "\n").encode(),
        ".md": "\n\n".join(page).encode(),
        ".svg": draw(result),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for ending, data in files.items():
        atomic_files.write_atomically(folder / f"{result.world}{ending}", lambda file, data=data: file.write(data))
    return [folder / f"{result.world}{ending}" for ending in files]


def text(result: LabResult) -> str:
    """The tables for a terminal, in lines as long as they are: a wrapped line can be read, a cut one cannot."""
    parts = []
    for table in tables_of(result):
        lines = [[cell.text for cell in row.cells] for row in (*table.heads, *table.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for name, *cells in lines:
            right = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
            parts.append("  ".join([f"{name:{widths[0]}}", *right]))
        parts.append(f"{textwrap.fill(table.note, 100)}\n")
    return "\n".join([*parts, textwrap.fill(summary(result), 100)])


def summary(result: LabResult) -> str:
    """What the experiment was, in two sentences."""
    seeds, clips, seconds = len(result.seeds), result.config.eval_clips, sum(result.seconds.values())
    few = f" With fewer than {FEW_SEEDS} seeds nothing is called clear." if seeds < FEW_SEEDS else ""
    return (
        f"World {result.world}, {seeds} seeds, {clips} held-out clips, {seconds:.0f} seconds. One who knows the cues "
        f"has F1 {percent(result.ceiling)}; slow minus fast F1 after SFT is "
        f"{_points(result, SFT, None, SLOW_MINUS_FAST)}.{few}"
    )


def tables_of(result: LabResult) -> list[Table]:
    """How policies answer, what arms differ in, what was sampled."""
    return [_answers(result), _differences(result), _sampled(result)]


def _answers(result: LabResult) -> Table:
    shares = (
        "slow_f1",
        "slow_recall",
        "slow_precision",
        "fast_f1",
        "sampled_f1",
        "confidence_right",
        "confidence_wrong",
    )
    rows = []
    for row in result.rows:
        cells = [percent(result.mean(row, name)) for name in shares]
        cells += [number(result.mean(row, "words"), 2), percent(result.mean(row, "repeats"), 0)]
        rows.append((row, *cells))
    return text_table(
        title="Answers",
        note="Means over seeds, in points; scores are expected ones, under the exact posterior over truths. Sampled: "
        "slow answers at temperature 0.9, top-p 0.9. Right, wrong: probability that a slow answer gives to the right "
        "and wrong words of the fast answers after SFT. Repeats: words of a category already named, in 100 answers.",
        columns=("row", "slow F1", "recall", "precision", "fast F1", "sampled", "right", "wrong", "words", "repeats"),
        rows=rows,
    )


def _differences(result: LabResult) -> Table:
    compared = [arm for arm in COMPARED_WITH if arm in result.arms] or list(result.arms[:1])
    first, last = compared[0], compared[-1]
    columns: dict[str, tuple[str | None, str]] = {
        "slow − fast": (None, SLOW_MINUS_FAST),
        "F1 − sft": (SFT, "slow_f1"),
        f"F1 − {first}": (first, "slow_f1"),
        f"recall − {first}": (first, "slow_recall"),
        f"F1 − {last}": (last, "slow_f1"),
        f"sampled − {last}": (last, "sampled_f1"),
        f"right − {last}": (last, "confidence_right"),
        f"wrong − {last}": (last, "confidence_wrong"),
    }
    rows = [
        (arm, *(NONE if arm == other else _points(result, arm, other, name) for other, name in columns.values()))
        for arm in result.arms
    ]
    return text_table(
        title="Differences",
        note="Points, paired, ± half of the 95% interval over seeds and clips; *: it excludes zero, each for itself.",
        columns=("row", *columns),
        rows=rows,
    )


def _sampled(result: LabResult) -> Table:
    rows = []
    for arm, values in result.sampled.items():
        mean = {name: float(column.mean()) for name, column in values.items()}
        cells = [number(mean[name], 3) for name in ("recall_spread", "precision_spread", "drift", "kl")]
        rows.append((arm, *cells, percent(mean["f1"])))
    return text_table(
        title="What was sampled",
        note="Spreads within groups, and drift, the correlation of the advantage with the number of categories named, "
        f"over the first {DRIFT_STEPS} steps of RL; KL in nats and F1 over the last fifth.",
        columns=("row", "spread of recall", "spread of precision", "drift", "KL", "F1"),
        rows=rows,
    )


def draw(result: LabResult) -> bytes:
    """The figure as SVG: operating points in the plane of recall and precision, and F1 beside an arm's."""
    settings: dict[Any, Any] = STYLE | {"svg.hashsalt": "lab"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(12, 4.8), layout="constrained")
        plane, beside = figure.subplots(1, 2, width_ratios=[1.4, 1])
        _plane(plane, result)
        _beside(beside, result)
        return svg(figure)


def _plane(axes: Axes, result: LabResult) -> None:
    """Every arm's way from SFT, and how far a change of length alone would lead."""
    curve = POINTS * np.array(result.stop_curve)
    fast = [POINTS * result.mean(SFT, f"fast_{name}") for name in ("recall", "precision")]
    paths = {arm: POINTS * np.array([point for _, point in path]) for arm, path in result.paths.items()}
    axes.plot(
        curve[:, 0], curve[:, 1], color=MUTED, linestyle=_DASHES, linewidth=1.2, label="SFT, made longer or shorter"
    )
    for place, (arm, path) in enumerate(paths.items()):
        color = COLORS[place % len(COLORS)]
        style = _DASHES if arm.startswith(PERMUTED) else "-"
        axes.plot(path[:, 0], path[:, 1], color=color, linestyle=style, linewidth=1.4, marker="o", markersize=2.5)
        axes.plot(*path[-1, :2], "o", color=color, markersize=7, label=arm)
    start = next(iter(paths.values()))[0]
    axes.plot(*start[:2], "*", color=SLOW, markersize=13, label="slow, after SFT")
    axes.plot(*fast, "^", color=FAST, markersize=8, label="fast, after SFT")
    # What matters is where arms went; the curve may leave the picture.
    points = np.concatenate([*paths.values(), [[*fast, 0.0]]])
    low, high = points.min(axis=0)[:2], points.max(axis=0)[:2]
    margin = 0.12 * (high - low) + 1
    axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
    axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
    contours(axes)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    axes.set_title(f"World {result.world}: slow answers, from SFT to the end of RL")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def contours(axes: Axes) -> None:
    """Lines of equal harmonic mean of the axes. Means over clips of F1 itself lie a little lower."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    recall, precision = np.meshgrid(np.linspace(left, right, 80), np.linspace(low, high, 80))
    f1 = 2 * recall * precision / np.maximum(recall + precision, 1e-9)
    steps = max(1.0, round((f1.max() - f1.min()) / 8))
    levels = np.arange(np.ceil(f1.min() / steps) * steps, f1.max(), steps)
    lines = axes.contour(recall, precision, f1, levels=levels, colors="#cbd5e1", linewidths=0.8, zorder=0)
    axes.clabel(lines, fmt=lambda level: f"F1 {level:.0f}", fontsize=7)


def _beside(axes: Axes, result: LabResult) -> None:
    """Slow F1 of every arm minus that of the one all are held against, with its interval and every seed."""
    other = next((arm for arm in COMPARED_WITH if arm in result.arms), SFT)
    rows = [arm for arm in result.arms if arm != other and not arm.startswith(PERMUTED)] or list(result.arms)
    axes.axvline(0, color=MUTED, linewidth=1)
    for place, arm in enumerate(rows):
        difference = result.difference(arm, other, "slow_f1")
        color = COLORS[result.arms.index(arm) % len(COLORS)]
        seeds = POINTS * (result.values(arm, "slow_f1") - result.values(other, "slow_f1")).mean(axis=1)
        axes.plot(seeds, np.full(len(seeds), place + 0.22), "o", color=color, alpha=0.35, markersize=4, mew=0)
        axes.errorbar(
            difference.points, place, xerr=_half(difference), fmt="o", color=color, elinewidth=2, markersize=6
        )
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(axis="y", labelcolor="#1e293b")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.set_title(f"Slow F1 minus {other}'s, 95% interval")


def _points(result: LabResult, row: str, other: str | None, measure: str) -> str:
    """A difference in points, with a star where it is clear."""
    difference = result.difference(row, other, measure)
    return f"{signed(difference.points)} ± {_half(difference):.1f}{'*' if difference.is_clear else ''}"


def _half(difference: Difference) -> float:
    return (difference.high - difference.low) / 2
