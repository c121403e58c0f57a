"""Draws docs/variance.svg: which reward owns the update, with and without normalising apart (docs/method.md).

    python experiments/variance_figure.py [--out=docs/variance.svg]

Curves are the formulas; dots are measured on simulated groups with the functions that training uses.
"""

import pathlib
import sys
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import app, flags
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from mer_r1_jax import screen
from mer_r1_jax.cli import explained
from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.rl.advantage import Rewards, advantages
from mer_r1_jax.storage import atomic_files

_OUT = flags.DEFINE_string("out", "docs/variance.svg", "Where the picture goes.")

GROUPS, GENERATIONS = 4000, 8
RHO = -0.3  # recall and precision pull against each other: a longer answer finds more and errs more
RATIOS = np.geomspace(0.2, 5, 9)
SIGMA_R = 0.15
MEANS = np.linspace(0.3, 0.95, 8)
MU_R = 0.6
RECALL, PRECISION, BOTH, MUTED = "#2a8c5f", "#8a4fbf", "#1f5fbf", "#64748b"
STYLE: Any = {
    "svg.fonttype": "path",  # looks the same wherever it is opened
    "svg.hashsalt": "variance",  # the same picture gives the same file
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e8f0",
    "axes.edgecolor": "#cbd5e1",
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --out=docs/variance.svg")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.9), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2)
        _draw_sum(left)
        _draw_f1(right)
        path = pathlib.Path(_OUT.value)
        with explained():
            draw = FigureCanvasSVG(figure).print_svg
            atomic_files.write_atomically(path, lambda file: draw(file, metadata={"Date": None}))
    screen.say(path)
    return 0


def groups(mu_r: float, sigma_r: float, mu_p: float, sigma_p: float, rho: float) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision [B, G] of simulated groups with these moments."""
    x = np.random.default_rng(0).normal(size=(2, GROUPS, GENERATIONS))
    return mu_r + sigma_r * x[0], mu_p + sigma_p * (rho * x[0] + np.sqrt(1 - rho**2) * x[1])


def of_arm(arm: str, recall_BG: np.ndarray, precision_BG: np.ndarray) -> np.ndarray:
    """Advantages [B, G] of answers that are all well-formed."""
    f1_BG = 2 * recall_BG * precision_BG / (recall_BG + precision_BG)
    ones_BG = jnp.ones(recall_BG.shape)
    rewards = Rewards(
        recall_BG=jnp.asarray(recall_BG),
        precision_BG=jnp.asarray(precision_BG),
        f1_BG=jnp.asarray(f1_BG),
        format_BG=ones_BG,
        valid_BG=ones_BG > 0,
        scored_BG=ones_BG > 0,
    )
    return np.asarray(advantages(arm, rewards, RlConfig()))


def _centred(x_BG: np.ndarray) -> np.ndarray:
    return (x_BG - x_BG.mean(-1, keepdims=True)).ravel()


def _draw_sum(axes) -> None:
    """Correlation of the advantage with each reward against the ratio of their spreads."""
    fine = np.geomspace(RATIOS[0], RATIOS[-1], 200)
    of_sum = np.sqrt(1 + fine**2 + 2 * RHO * fine)
    axes.plot(fine, (1 + RHO * fine) / of_sum, color=RECALL, linewidth=2)
    axes.plot(fine, (fine + RHO) / of_sum, color=PRECISION, linewidth=2)
    axes.axhline(np.sqrt((1 + RHO) / 2), color=BOTH, linewidth=2)
    for ratio in RATIOS:
        rewards = groups(0.6, SIGMA_R, 0.6, SIGMA_R * ratio, RHO)
        for arm, colors in (("rd", (RECALL, PRECISION)), ("ad", (BOTH, BOTH))):
            advantage = of_arm(arm, *rewards).ravel()
            for values_BG, color in zip(rewards, colors, strict=True):
                axes.plot(ratio, np.corrcoef(advantage, _centred(values_BG))[0, 1], "o", color=color, markersize=4.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([0.2, 0.5, 1, 2, 5]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(["1/5", "1/2", "1", "2", "5"])
    axes.set_xlabel("spread of precision ÷ spread of recall")
    axes.set_ylabel("correlation with the advantage")
    axes.set_title("Summed, the noisier reward owns the update")
    axes.set_ylim(-0.2, 1.08)
    axes.text(0.22, 1.01, "recall, rd", color=RECALL, weight="bold")
    axes.text(4.7, 1.01, "precision, rd", color=PRECISION, weight="bold", ha="right")
    axes.text(0.22, np.sqrt((1 + RHO) / 2) + 0.03, "both, ad", color=BOTH, weight="bold")


def _draw_f1(axes) -> None:
    """What F1 pays for a unit of recall and of precision against the mean precision."""
    fine = np.linspace(MEANS[0], MEANS[-1], 200)
    axes.plot(fine, 2 * fine**2 / (MU_R + fine) ** 2, color=RECALL, linewidth=2)
    axes.plot(fine, 2 * MU_R**2 / (MU_R + fine) ** 2, color=PRECISION, linewidth=2)
    for mu_p in MEANS:
        recall_BG, precision_BG = groups(MU_R, 0.02, mu_p, 0.02, 0.0)
        f1_BG = 2 * recall_BG * precision_BG / (recall_BG + precision_BG)
        # baseline's advantage is z(F1 + const): times the group's spread it is F1 again, which least squares split.
        moved_BG = of_arm("baseline", recall_BG, precision_BG) * (f1_BG.std(-1, ddof=1, keepdims=True) + 1e-4)
        moves = np.stack([_centred(recall_BG), _centred(precision_BG)], -1)
        weights = np.linalg.lstsq(moves, moved_BG.ravel(), rcond=None)[0]
        for weight, color in zip(weights, (RECALL, PRECISION), strict=True):
            axes.plot(mu_p, weight, "o", color=color, markersize=4.5)
    axes.axvline(MU_R, color=MUTED, linewidth=1, linestyle="--")
    axes.text(MU_R + 0.01, 1.0, f"mean recall {MU_R}", color=MUTED)
    axes.set_xlabel("mean precision of the group")
    axes.set_ylabel("F1 gained per unit")
    axes.set_title("F1 pays for whichever is lower")
    axes.text(0.94, 0.83, "of recall", color=RECALL, weight="bold", ha="right")
    axes.text(0.94, 0.19, "of precision", color=PRECISION, weight="bold", ha="right")
    axes.set_ylim(0, 1.15)


if __name__ == "__main__":
    sys.exit(app.run(main))
