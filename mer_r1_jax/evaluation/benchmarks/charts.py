"""The benchmark report's pictures: categories as bars, confusion as heat maps, calibration as a curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mer_r1_jax.evaluation.figures import FAST, NEUTRAL, SLOW, as_svg

COLORS = {"slow": SLOW, "fast": FAST}
PANEL_WIDTH = 3.3  # inches
_DARK = 0.55  # share from which a heat map's number is white


def details(modes: Mapping[str, Mapping[str, Any]]) -> str:
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

    def paint(figure: Figure) -> None:
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
