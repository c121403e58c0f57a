"""How often the 95% intervals of mer_r1_jax.evaluation.over_seeds hold the truth, beside two others, by simulation.

    python tools/interval_coverage.py [--draws=600]

A paired difference of two arms is simulated as d = A[seed] + C[clip] + E[seed, clip], normal, with the true mean 0, in
points. The standard deviations of a clip (5) and of the rest (16) are those of rendered clips' F1; A is training noise.
A quarter of an hour of one core with 600 draws.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy import stats

from mer_r1_jax.evaluation.bootstrap import POINTS
from mer_r1_jax.evaluation.over_seeds import Resampled, crossed_difference

# (seeds, clips, training noise a seed in points)
CASES = (
    *((3, 320, 0.0), (3, 320, 0.7), (3, 4000, 0.7), (5, 320, 0.7), (5, 4000, 0.7)),
    *((5, 4000, 1.5), (10, 4000, 1.5), (3, 1000, 3.0), (5, 1000, 3.0)),
)
OF_CLIP, OF_REST = 5.0, 16.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=600, help="simulated ablations a case")
    arguments = parser.parse_args()
    print("seeds x clips, noise of a seed: share of intervals that hold the truth (mean half width in points)")
    for case in CASES:
        found = coverage(*case, draws=arguments.draws)
        listed = "   ".join(f"{name} {share:.0%} ({width:.2f})" for name, (share, width) in found.items())
        print(f"{case[0]:3} x {case[1]:4}, {case[2]}:   {listed}", flush=True)


def coverage(seeds: int, clips: int, of_seed: float, draws: int) -> dict[str, tuple[float, float]]:
    """Method -> (share of its intervals that hold the truth, their mean half width in points)."""
    rng = np.random.default_rng(0)
    held: dict[str, list[tuple[bool, float]]] = {"crossed": [], "t over seeds": [], "bootstrap": []}
    for draw in range(draws):
        d_SN = of_seed * rng.normal(size=(seeds, 1)) + OF_CLIP * rng.normal(size=(1, clips))
        d_SN = d_SN + OF_REST * rng.normal(size=(seeds, clips))
        crossed = crossed_difference(d_SN / POINTS)
        of_seeds = d_SN.mean(axis=1)
        half = stats.t.ppf(0.975, seeds - 1) * of_seeds.std(ddof=1) / np.sqrt(seeds)
        drawn = POINTS * Resampled({"d": d_SN / POINTS}, seed=draw, resamples=1000).draws[0]
        bounds = {
            "crossed": (crossed.low, crossed.high),
            "t over seeds": (of_seeds.mean() - half, of_seeds.mean() + half),
            "bootstrap": tuple(np.percentile(drawn, [2.5, 97.5])),
        }
        for name, (low, high) in bounds.items():
            held[name].append((low <= 0 <= high, (high - low) / 2))
    return {name: tuple(np.mean(values, axis=0)) for name, values in held.items()}


if __name__ == "__main__":
    main()
