"""The reports' curves, drawn by matplotlib in one style, as data URIs."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from mer_r1_jax.foreign_text import printable

if TYPE_CHECKING:  # newer than the oldest matplotlib this runs with
    from matplotlib.typing import RcKeyType

SLOW, FAST, RECALL, PRECISION, NEUTRAL = "#1f5fbf", "#d9730d", "#2a8c5f", "#8a4fbf", "#475569"
GRID, _TEXT, MUTED = "#e2e8f0", "#1e293b", "#94a3b8"
_NARROW = 3.0  # inches of a panel in which a legend has no room for two columns
_BEHIND_LABEL = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}
STYLE: dict[RcKeyType, Any] = {
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.fonttype": "path",  # looks the same wherever it is opened
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": _TEXT,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve: steps and values of equal length, a label ("" for none), a colour, and how it is drawn."""

    steps: Sequence[float] | np.ndarray
    values: Sequence[float] | np.ndarray
    label: str
    color: str
    markers: bool = False  # few, exact points rather than a noisy series that is smoothed


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes; `levels` are (value, label) of horizontal dashed lines."""

    title: str
    lines: tuple[Line, ...]
    levels: tuple[tuple[float, str], ...] = ()


def draw(panels: Sequence[Panel], columns: int, width: float = 4.6, height: float = 2.5) -> str:
    """Draws panels in a grid and returns an SVG as a data URI; `width` and `height` of one panel in inches."""
    rows = math.ceil(len(panels) / columns)

    def paint(figure: Figure) -> None:
        for number, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(rows, columns, number + 1), panel, width)

    return as_svg(paint, width * columns, height * rows)


def as_svg(paint: Callable[[Figure], None], width: float, height: float) -> str:
    """What `paint` draws on a figure of that size in inches, in the report's style, as an SVG data URI."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        return data_uri(svg(figure))


def svg(figure: Figure) -> bytes:
    """A figure as SVG, the same bytes for the same figure; to be called inside the style it was made in."""
    for text in figure.findobj(Text):
        text.set_text(printable(text.get_text(), one_line=False))
    out = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return out.getvalue()


def data_uri(picture: bytes) -> str:
    """An SVG as it stands in a page that needs no other file."""
    return "data:image/svg+xml;base64," + base64.b64encode(picture).decode()


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a twelfth of the series, shorter at its ends; NaN are left out of it."""
    half = max(1, len(values) // 24)
    finite = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(finite, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], finite]))
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def _draw_panel(axes, panel: Panel, width: float) -> None:
    for line in panel.lines:
        steps, values = np.asarray(line.steps, float), np.asarray(line.values, float)
        values = np.where(np.isfinite(values), values, np.nan)
        if line.markers or len(values) < 12:
            axes.plot(steps, values, color=line.color, label=line.label, marker="o", markersize=4, linewidth=1.8)
        else:
            axes.plot(steps, values, color=line.color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(values), color=line.color, label=line.label, linewidth=1.8)
    for value, label in panel.levels:
        axes.axhline(value, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
        axes.annotate(
            label, (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
            ha="right", va="bottom", color=MUTED, fontsize=8, bbox=_BEHIND_LABEL,
        )  # fmt: skip
    # A bold letter of the title is about a tenth of an inch wide; the labels of the axis take some of the panel.
    axes.set_title(textwrap.fill(panel.title, max(1, round(10 * width) - 4)))
    _pad_flat_axis(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.get_major_formatter().set_useOffset(False)
    if len(panel.lines) > 1:
        axes.legend(loc="best", ncols=2 if width > _NARROW else 1)


def _pad_flat_axis(axes) -> None:
    """Gives a constant series an axis around its value, where matplotlib would magnify rounding."""
    low, high = axes.dataLim.intervaly
    if np.isfinite([low, high]).all() and high - low < 1e-6 * max(abs(low), abs(high)):
        margin = 0.5 * max(abs(low), abs(high))
        axes.set_ylim(low - margin, high + margin)
