"""The ablation's figure: every seed and the means, the gains with their intervals, and how the arms got there."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mer_r1_jax.evaluation.ablation.comparison import SFT, Ablation, RowResult
from mer_r1_jax.evaluation.ablation.narrative import label
from mer_r1_jax.evaluation.bootstrap import POINTS
from mer_r1_jax.evaluation.figures import FAST, MUTED, SLOW, STYLE, smooth, svg

COLORS = ("#475569", "#2a8c5f", "#8a4fbf", "#1f5fbf", "#b3261e", "#0f766e", "#a16207", "#be185d", "#4d7c0f")
ROOM_FOR_LEVELS = 0.45  # rows above the first one, for the names of the dashed lines
_CONTROL = (0, (4, 2))  # dashes of a control's curve


def draw(ablation: Ablation) -> bytes:
    """The figure as SVG."""
    rows = list(ablation.rows)
    trained = [row for row in rows if any(len(result.reward_curve[0]) for result in row.results)]
    colors = {row.row: COLORS[number % len(COLORS)] for number, row in enumerate(trained)}
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "ablation"}):
        figure = Figure(figsize=(11, 2.2 + 0.28 * len(rows) + (3.2 if trained else 0)), layout="constrained")
        grid = figure.add_gridspec(
            2 if trained else 1, 2, height_ratios=[1.4 + 0.28 * len(rows), 3.2][: 1 + bool(trained)]
        )
        _scores(figure.add_subplot(grid[0, 0]), rows, ablation)
        if gained := [row for row in rows if row.gain]:
            _gains(figure.add_subplot(grid[0, 1]), gained)
        if trained:
            _held_out_curves(figure.add_subplot(grid[1, 0]), trained, colors)
            _reward_curves(figure.add_subplot(grid[1, 1]), trained, colors)
        return svg(figure)


def _scores(axes: Axes, rows: list[RowResult], ablation: Ablation) -> None:
    """Slow and fast F1 of every seed as dots, the mean and its standard error as a bar."""
    for place, row in enumerate(rows):
        for mode, color, offset in (("slow", SLOW, -0.16), ("fast", FAST, 0.16)):
            mean = row.means[mode, "f1"]
            values = POINTS * np.asarray(mean.values)
            axes.plot(values, np.full(values.shape, place + offset), "o", color=color, alpha=0.35, markersize=4, mew=0)
            axes.errorbar(
                POINTS * mean.mean, place + offset, xerr=POINTS * (mean.error or 0.0), fmt="|", color=color,
                markersize=9, capsize=0, elinewidth=2, label=mode if place == 0 else None,
            )  # fmt: skip
    levels = [(ablation.row(SFT).means["slow", "f1"].mean, "slow after SFT")]
    if ablation.ceiling is not None and not _far_away(ablation.ceiling, rows):
        levels.append((ablation.ceiling, "ceiling"))
    for value, _ in levels:
        axes.axvline(POINTS * value, color=MUTED, linestyle=_CONTROL, linewidth=1, zorder=0)
    middle = sum(axes.get_xlim()) / 2
    for value, name in levels:
        side, offset = ("left", 3) if POINTS * value < middle else ("right", -3)  # towards the middle, inside the axes
        axes.annotate(name, (POINTS * value, 1), xycoords=("data", "axes fraction"), xytext=(offset, -2),
                      textcoords="offset points", ha=side, va="top", color=MUTED, fontsize=8)  # fmt: skip
    axes.set_title("F1 of held-out clips: seeds, mean ± standard error")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=2)
    _name_rows(axes, rows)
    axes.set_ylim(top=-0.5 - ROOM_FOR_LEVELS)


def _far_away(value: float, rows: list[RowResult]) -> bool:
    """Whether a level would squeeze the rows into a corner."""
    means = [row.means[mode, "f1"].mean for row in rows for mode in ("slow", "fast")]
    return value - max(means) > 2 * (max(means) - min(means) + 0.02)


def _gains(axes: Axes, rows: list[RowResult]) -> None:
    """Gains over SFT with their 95% intervals, every seed's as a dot."""
    axes.axvline(0, color=MUTED, linewidth=1)
    for place, row in enumerate(rows):
        gain = row.gain.difference
        axes.plot([gain.low, gain.high], [place, place], color=SLOW, linewidth=2, solid_capstyle="butt")
        axes.plot(gain.points, place, "o", color=SLOW, markersize=6)
        seeds = [difference.points for difference in row.gain.by_seed.values()]
        axes.plot(seeds, np.full(len(seeds), place + 0.22), "o", color=SLOW, alpha=0.35, markersize=4, mew=0)
    axes.set_title("Points of slow F1 over SFT, 95% interval")
    _name_rows(axes, rows)


def _name_rows(axes: Axes, rows: list[RowResult]) -> None:
    axes.set_yticks(range(len(rows)), [label(row.row) for row in rows])
    axes.tick_params(axis="y", labelcolor="#1e293b")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False, axis="y")


def _held_out_curves(axes: Axes, rows: list[RowResult], colors: dict[str, str]) -> None:
    for row in rows:
        steps = sorted(set.intersection(*({step for step, _ in result.between} for result in row.results)))
        values = [
            POINTS * np.mean([dict(result.between)[step].score("slow", "f1") for result in row.results])
            for step in steps
        ]
        axes.plot(steps, values, marker="o", markersize=3.5, linewidth=1.6, **_look(row, colors))
    axes.set_title("Slow F1 of held-out clips over steps of RL, mean of the seeds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.legend(loc="best", ncols=2)


def _reward_curves(axes: Axes, rows: list[RowResult], colors: dict[str, str]) -> None:
    for row in rows:
        shortest = min(len(result.reward_curve[0]) for result in row.results)
        if shortest:
            mean = np.mean([result.reward_curve[1][:shortest] for result in row.results], axis=0)
            axes.plot(row.results[0].reward_curve[0][:shortest], smooth(mean), linewidth=1.6, **_look(row, colors))
    axes.set_title("Sampled reward over steps of RL, running mean")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _look(row: RowResult, colors: dict[str, str]) -> dict:
    style = _CONTROL if row.row.startswith("control_") else "-"
    return {"color": colors[row.row], "label": label(row.row), "linestyle": style}
