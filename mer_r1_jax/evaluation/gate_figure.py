"""The report's picture of gated answers: what they risk and cost as more of them are fast, on clips not fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mer_r1_jax.evaluation import figures
from mer_r1_jax.evaluation.bootstrap import POINTS, signed
from mer_r1_jax.evaluation.figures import FAST, MUTED, NEUTRAL, SLOW
from mer_r1_jax.evaluation.report_kit import Figure

_PANELS = (
    # title, value of a point, factor, value of slow and of fast alone
    ("1 − F1 of the fast answers", "risk", POINTS, None),
    ("F1 of all answers", "f1", POINTS, "f1"),
    ("Tokens per answer", "tokens", 1, "tokens"),
)


def gate_figure(gate: Mapping[str, Any] | None, of: str = "") -> Figure | None:
    """Risk, F1 and tokens over coverage with 95% intervals; None where an evaluation fitted no threshold.

    Args:
        gate: of an evaluation's scores (`gate.fit_and_measure`).
        of: what the caption begins with.
    """
    if not gate or gate.get("threshold") is None or not gate.get("curve"):
        return None
    curve = sorted(gate["curve"], key=lambda point: point["coverage"]["value"])

    def paint(figure: Any) -> None:
        for number, (title, name, factor, alone) in enumerate(_PANELS, 1):
            axes = figure.add_subplot(1, len(_PANELS), number)
            _draw(axes, curve, name, factor)
            for mode, color in (("slow", SLOW), ("fast", FAST)):
                if alone is not None:
                    axes.axhline(factor * gate[mode][alone]["value"], color=color, linewidth=1, linestyle=(0, (4, 3)))
            fitted = gate["fitted"]
            if fitted[name]["value"] is not None:
                at = POINTS * fitted["coverage"]["value"], factor * fitted[name]["value"]
                axes.plot(*at, marker="D", markersize=6, color=MUTED, markeredgecolor="white", zorder=3)
            axes.set_title(title)
            axes.set_xlabel("answered fast, per cent")

    return Figure(of + _caption(gate), figures.as_svg(paint, 4 * len(_PANELS), 2.7))


def _draw(axes: Any, curve: Sequence[Mapping[str, Any]], name: str, factor: float) -> None:
    """One value over coverage, its interval as a band; points where it is undefined are left out."""
    points = [point for point in curve if point[name]["value"] is not None]
    if not points:
        return
    x = [POINTS * point["coverage"]["value"] for point in points]
    value, low, high = (
        factor * np.asarray([point[name][part] for point in points], np.float64) for part in ("value", "low", "high")
    )
    axes.fill_between(x, low, high, color=NEUTRAL, alpha=0.15, linewidth=0)
    axes.plot(x, value, color=NEUTRAL, marker="o", markersize=3.5, linewidth=1.6)


def _caption(gate: Mapping[str, Any]) -> str:
    fitted = gate["fitted"]
    against = [
        f"{signed(found['points'])} points [{signed(found['low'])}, {signed(found['high'])}] against {mode} alone"
        for mode in ("slow", "fast")
        if (found := gate.get(f"against_{mode}"))
    ]
    return (
        f"Gated answers (--mode=auto) on {gate['clips_measured']} held-out clips, the threshold fitted on "
        f"{gate['clips_fitted']} others: from a confidence of {gate['threshold']:.3f} on the fast answer stands, which "
        f"answers {POINTS * fitted['coverage']['value']:.0f}% of the clips (diamond). F1 {', '.join(against)}; "
        f"{fitted['tokens']['value']:.1f} tokens per answer, {gate['slow']['tokens']['value']:.1f} slow. Bands: 95% "
        "intervals over these clips. Dashed: slow (blue) and fast (orange) alone."
    )
