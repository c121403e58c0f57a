"""Draws docs/study/operating-points.svg: where the arms of Stage A end, in the plane of recall and precision.

python experiments/study_figure.py [--summaries=docs/study/stage_a]
"""

import json
import pathlib
import sys
from typing import Any

import matplotlib
import numpy as np
from absl import app, flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mer_r1_jax import screen
from mer_r1_jax.evaluation.bootstrap import POINTS
from mer_r1_jax.evaluation.figures import FAST, SLOW, STYLE, svg
from mer_r1_jax.lab.lab_report import COLORS, contours
from mer_r1_jax.storage import atomic_files

_SUMMARIES = flags.DEFINE_string("summaries", "docs/study/stage_a", "Folder of the stage's summaries.")
_OUT = flags.DEFINE_string("out", "docs/study/operating-points.svg", "Where the picture goes.")

WORLDS = {"U": "U: F1 wants recall", "O": "O: F1 wants precision", "T": "T: slow sees its reasoning alone"}
ARMS = ("baseline", "rd", "ad", "gdpo", "mer_r1", "mer_r1@1", "permuted")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --summaries=FOLDER")
    folder = pathlib.Path(_SUMMARIES.value)
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "study"}):
        figure = Figure(figsize=(13, 4.4), layout="constrained")
        for axes, (world, title) in zip(figure.subplots(1, len(WORLDS)), WORLDS.items(), strict=True):
            draw(axes, means_of(folder, world))
            axes.set_title(title)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")
        picture = svg(figure)
    atomic_files.write_atomically(pathlib.Path(_OUT.value), lambda file: file.write(picture))
    screen.say(_OUT.value)
    return 0


def means_of(folder: pathlib.Path, world: str) -> dict[str, dict[str, float]]:
    """Row -> measure -> its mean in points over the seeds of a world's blocks with groups of 8."""
    blocks = [json.loads(path.read_text())["rows"] for path in sorted(folder.glob(f"{world}_g8_seeds*.json"))]
    if not blocks:
        raise app.UsageError(f"--summaries={folder}: got no {world}_g8_seeds*.json, expected those of mer-r1 study")
    return {
        row: {name: POINTS * float(np.mean([v for block in blocks for v in block[row][name]])) for name in measures}
        for row, measures in blocks[0].items()
    }


def draw(axes: Axes, means: dict[str, dict[str, float]]) -> None:
    """Each arm as a line from slow answers after SFT to where they end."""

    def at(row: str, mode: str = "slow") -> tuple[float, float]:
        return means[row][f"{mode}_recall"], means[row][f"{mode}_precision"]

    start: Any = at("sft")
    for place, arm in enumerate(ARMS):
        end, color = at(arm), COLORS[place]
        dashed: Any = (0, (4, 3)) if arm == "permuted" else "-"
        axes.plot((start[0], end[0]), (start[1], end[1]), color=color, linewidth=1.2, linestyle=dashed)
        axes.plot(*end, "o", color=color, markersize=7, label=arm)
    axes.plot(*start, "*", color=SLOW, markersize=13, label="slow, after SFT")
    axes.plot(*at("sft", "fast"), "^", color=FAST, markersize=8, label="fast, after SFT")
    axes.margins(0.12)
    contours(axes)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")


if __name__ == "__main__":
    sys.exit(app.run(main))
