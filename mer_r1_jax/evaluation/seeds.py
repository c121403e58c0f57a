"""Means over seeds and clips, and how far they can be trusted when other clips and other seeds could have been drawn.

Draws are made for all rows of a table at once, with the same seeds and the same clips in all of them: a difference
within a draw is paired, and so is an order.

Seeds and clips are drawn apart and crossed (Owen 2007, "The pigeonhole bootstrap"). Where answers differ mostly from
clip to clip, such intervals are a little too wide; where they differ mostly from seed to seed, an interval of a few
seeds reaches from the worst of them to the best, which leaves out the true mean of three seeds in one case of four.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from mer_r1_jax.evaluation.statistics import LEVEL, POINTS, RESAMPLES, Difference

_CLIP_DRAWS_AT_ONCE = 1 << 22  # counts held in memory


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        mean: of the seeds' values.
        error: its standard error, the seeds' standard deviation (ddof 1) over the root of their number; None for one.
        values: the seeds' own.
    """

    mean: float
    error: float | None
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Order:
    """How often an expected order shows.

    Attributes:
        expected: names from the lowest to the highest.
        observed: names in the order of their means.
        share: of the draws in which the expected order holds, every step of it.
        chance: that share if nothing distinguished the names.
        steps: (lower, higher, share of the draws in which higher is the higher).
        by_seed: for each seed, whether the order holds there.
        commonest, commonest_share: the order most draws have, and their share.
    """

    expected: tuple[str, ...]
    observed: tuple[str, ...]
    share: float
    chance: float
    steps: tuple[tuple[str, str, float], ...]
    by_seed: tuple[bool, ...]
    commonest: tuple[str, ...]
    commonest_share: float


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Mean and standard error of one value a seed."""
    array = np.asarray(values, np.float64)
    error = float(array.std(ddof=1) / np.sqrt(array.size)) if array.size > 1 else None
    return Mean(float(array.mean()), error, tuple(array.tolist()))


class Resampled:
    """Bootstrap draws of the means of several rows.

    Args:
        scores: row -> float64 [seeds, clips] in [0, 1], the same seeds and clips in the same order in all.
        seed: of the draws.
        resamples: draws.

    Raises:
        ValueError: shapes differ, there are fewer than two clips, or a score is not finite.
    """

    def __init__(self, scores: Mapping[str, np.ndarray], seed: int = 0, resamples: int = RESAMPLES):
        shapes = {array.shape for array in scores.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2 or next(iter(shapes))[1] < 2:
            raise ValueError(f"got scores of shapes {sorted(shapes)}, expected the same seeds and at least two clips")
        if not all(np.isfinite(array).all() for array in scores.values()):
            raise ValueError("got scores that are no finite number")
        self.scores = dict(scores)
        self._names = list(scores)
        self._draws = _draws(np.stack([scores[name] for name in self._names]), seed, resamples)

    def difference(self, after: str, before: str) -> Difference:
        """The mean of row `after` minus that of row `before`, in points, with its interval."""
        drawn = POINTS * (self._draws[self._names.index(after)] - self._draws[self._names.index(before)])
        low, high = np.percentile(drawn, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
        differences = self.scores[after] - self.scores[before]
        seeds, clips = differences.shape
        return Difference(POINTS * float(differences.mean()), float(low), float(high), clips, seeds)

    def order(self, expected: Sequence[str]) -> Order:
        """How often the rows stand in an order, from the lowest to the highest."""
        drawn = self._draws[[self._names.index(name) for name in expected]]
        means = {name: float(self.scores[name].mean()) for name in expected}
        holds = (np.diff(drawn, axis=0) > 0).all(axis=0)
        by_seed = np.stack([self.scores[name].mean(axis=1) for name in expected])
        orders, counts = np.unique(np.argsort(drawn, axis=0, kind="stable"), axis=1, return_counts=True)
        commonest = orders[:, counts.argmax()]
        return Order(
            expected=tuple(expected),
            observed=tuple(sorted(expected, key=means.__getitem__)),
            share=float(holds.mean()),
            chance=1 / float(np.prod(np.arange(1, len(expected) + 1))),
            steps=tuple(
                (low, high, float((drawn[number + 1] > drawn[number]).mean()))
                for number, (low, high) in enumerate(itertools.pairwise(expected))
            ),
            by_seed=tuple((np.diff(by_seed, axis=0) > 0).all(axis=0).tolist()),
            commonest=tuple(expected[number] for number in commonest),
            commonest_share=float(counts.max() / counts.sum()),
        )


def _draws(scores_RSC: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """float64 [rows, resamples]: each row's mean over the drawn seeds and clips, the same draws for all rows.

    Equal scores get equal means to the last bit, so that a paired difference of equal rows is exactly zero. A matrix
    product does not promise that: BLAS adds up its last rows in another order than the others, depending on the
    processor. So scores that occur twice are multiplied once, and seeds are added one after another.
    """
    rows, seeds, clips = scores_RSC.shape
    rng = np.random.default_rng(seed)
    drawn_seeds = rng.integers(seeds, size=(resamples, seeds))
    weight_DS = (drawn_seeds[:, :, None] == np.arange(seeds)).mean(axis=1)
    distinct_UC, place = np.unique(scores_RSC.reshape(rows * seeds, clips), axis=0, return_inverse=True)
    means = []
    at_once = max(1, _CLIP_DRAWS_AT_ONCE // clips)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        weight_DC = rng.multinomial(clips, np.full(clips, 1 / clips), size=count) / clips
        mean_RSD = (distinct_UC @ weight_DC.T)[place].reshape(rows, seeds, count)
        means.append(sum(mean_RSD[:, s] * weight_DS[start : start + count, s] for s in range(seeds)))
    return np.concatenate(means, axis=1)
