"""Paired comparisons over the same held-out clips: a mean difference and how far it can be trusted.

Clips differ far more from one another than two answers to the same clip do, so everything is compared clip by clip.
Intervals are percentile bootstraps over clips. Scores of several seeds are averaged for each clip first: the interval
then says what other clips would change. It does not say what other seeds would; for that, look at the seeds one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 95  # per cent
POINTS = 100  # a score of 1 in points
_DRAWS_AT_ONCE = 1 << 22  # indices held in memory


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired difference of mean scores over the same clips, in points (hundredths), with its 95% bootstrap interval.

    Attributes:
        points: the mean difference.
        low, high: the interval.
        clips: clips that are compared.
        seeds: runs whose scores are averaged for each clip.
    """

    points: float
    low: float
    high: float
    clips: int
    seeds: int = 1

    def __str__(self) -> str:
        interval = f"{signed(self.low)} to {signed(self.high)}"
        seeds = f", {self.seeds} seeds" if self.seeds > 1 else ""
        return f"{signed(self.points)} points (95% interval {interval}, {self.clips} clips{seeds})"

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def paired_difference(
    after: np.ndarray, before: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """Mean of `after` minus `before`, with its interval.

    Args:
        after, before: scores in [0, 1], [clips] or [seeds, clips], the same clips in the same order. The numbers of
            seeds may differ, as where several runs started from one: each side is averaged over its own.
        seed: of the resampling; the same seed gives the same interval.
        resamples: bootstrap draws.

    Raises:
        ValueError: the clips do not match, there are fewer than two, or a score is not finite.
    """
    after, before = np.atleast_2d(after), np.atleast_2d(before)
    if after.shape[1] != before.shape[1]:
        raise ValueError(f"got scores of {after.shape[1]} and {before.shape[1]} clips, expected the same clips twice")
    seeds = max(len(after), len(before))
    if {len(after), len(before)} <= {1, seeds}:
        differences = (after - before).mean(axis=0)  # the same, and exactly zero where nothing changed
    else:
        differences = after.mean(axis=0) - before.mean(axis=0)
    return mean_interval(differences, seed, resamples, seeds)


def mean_interval(differences: np.ndarray, seed: int = 0, resamples: int = RESAMPLES, seeds: int = 1) -> Difference:
    """The mean of one difference per clip, [clips] in [-1, 1], with its interval.

    Raises:
        ValueError: there are fewer than two clips, or a difference is not finite.
    """
    points = POINTS * np.asarray(differences, np.float64)
    if points.ndim != 1 or points.size < 2:
        raise ValueError(f"got differences of shape {points.shape}, expected one for each of at least two clips")
    if not np.isfinite(points).all():
        raise ValueError(f"got {np.count_nonzero(~np.isfinite(points))} scores that are no finite number")
    low, high = np.percentile(_bootstrap_means(points, seed, resamples), [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Difference(float(points.mean()), float(low), float(high), points.size, seeds)


def macro_interval(groups: Sequence[np.ndarray], seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """The unweighted mean of the groups' means, with its interval: clips are drawn again within each group.

    Args:
        groups: one difference (or score) per clip in [-1, 1], [clips of the group] each.
        seed: of the resampling.
        resamples: bootstrap draws.

    Raises:
        ValueError: a group is empty, or a value is not finite.
    """
    points = [POINTS * np.asarray(group, np.float64) for group in groups]
    if not points or any(group.ndim != 1 or not group.size for group in points):
        raise ValueError(f"got groups of shapes {[group.shape for group in points]}, expected at least one value each")
    if not all(np.isfinite(group).all() for group in points):
        raise ValueError("got scores that are no finite number")
    means = np.mean([_bootstrap_means(group, [seed, k], resamples) for k, group in enumerate(points)], axis=0)
    low, high = np.percentile(means, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    mean = np.mean([group.mean() for group in points])
    return Difference(float(mean), float(low), float(high), sum(group.size for group in points))


def _bootstrap_means(values: np.ndarray, seed: int | list[int], resamples: int) -> np.ndarray:
    """float64 [resamples]: means of as many values, drawn with replacement."""
    rng = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // values.size)
    means = []
    for start in range(0, resamples, at_once):
        drawn = rng.integers(values.size, size=(min(at_once, resamples - start), values.size))
        means.append(values[drawn].mean(axis=1))
    return np.concatenate(means)


def signed(points: float) -> str:
    """Points with one decimal and their sign, a real minus included."""
    return f"{points:+.1f}".replace("-", "−")
