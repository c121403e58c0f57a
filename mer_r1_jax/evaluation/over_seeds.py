"""What several seeds say together: means, differences with their intervals over seeds and clips, orders, and families.

Both seeds and clips are drawn from many, and every seed answers the same clips. A paired difference d of two arms then
has three kinds of noise: of the seed (training), of the clip (which all seeds share), and the rest. The mean squares of
a two-way analysis of variance with one value a cell estimate them, and Satterthwaite (1946) gives the degrees of
freedom of their sum (`crossed_difference`). How often 95% intervals hold the truth, by simulation (by
tools/interval_coverage.py: 300 draws each of the first four rows, 600 of the others, so give or take 2.5 or 1.8 points;
training noise in points a seed, 5 points of a clip, 16 of the rest; runs of the synthetic world's default have some 3):

    seeds x clips, noise of a seed    this    t over seeds    crossed percentile bootstrap
    3 x 320, 0                         97%             94%                             99%
    3 x 320, 0.7                       96%             94%                             98%
    3 x 4000, 0.7                      95%             96%                             88%
    5 x 320, 0.7                       96%             93%                             98%
    5 x 4000, 0.7                      95%             96%                             92%
    5 x 4000, 1.5                      96%             96%                             88%
    10 x 4000, 1.5                     92%             92%                             90%
    3 x 1000, 3                        94%             94%                             78%
    5 x 1000, 3                        95%             95%                             87%

t over the seeds' means leaves out the clips that all seeds share. The bootstrap of seeds and clips (Owen 2007) is too
narrow where few seeds are the larger noise. It stays for orders, which have no closed form.

Shape letters: K rows, S seeds, N clips, R draws.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from mer_r1_jax.evaluation.bootstrap import LEVEL, POINTS, RESAMPLES, Difference, pieces, weighted_sums


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


def crossed_difference(differences_SN: np.ndarray) -> Difference:
    """The mean of paired differences over seeds and clips, in points, with its 95% interval and its p-value.

    With one seed the interval is over clips alone, and says nothing about other seeds.

    Args:
        differences_SN: float64 in [-1, 1], [seeds, clips]; the same clips for every seed.

    Raises:
        ValueError: fewer than two clips, or a difference is not finite.
    """
    d_SN = POINTS * np.asarray(differences_SN, np.float64)
    if d_SN.ndim != 2 or not d_SN.shape[0] or d_SN.shape[1] < 2:
        raise ValueError(f"got differences of shape {d_SN.shape}, expected [seeds, clips] with at least two clips")
    if not np.isfinite(d_SN).all():
        raise ValueError(f"got {np.count_nonzero(~np.isfinite(d_SN))} differences that are no finite number")
    seeds, clips = d_SN.shape
    mean = float(d_SN.mean())
    variance, freedom = _variance_of_mean(d_SN)
    if variance == 0:
        # Nothing varies: equal rows differ by exactly 0, and a shift that is the same everywhere is certain.
        return Difference(mean, mean, mean, clips, seeds, over_seeds=True, p_value=float(mean == 0))
    error = float(np.sqrt(variance))
    half = float(special.stdtrit(freedom, (100 + LEVEL) / 200)) * error
    p_value = float(2 * special.stdtr(freedom, -abs(mean) / error))
    return Difference(mean, mean - half, mean + half, clips, seeds, over_seeds=True, p_value=p_value)


def _variance_of_mean(d_SN: np.ndarray) -> tuple[float, float]:
    """The variance of the mean over both, and its degrees of freedom."""
    seeds, clips = d_SN.shape
    cells = seeds * clips
    if seeds == 1:
        return float(d_SN.var(ddof=1)) / clips, clips - 1
    of_seeds, of_clips, mean = d_SN.mean(axis=1), d_SN.mean(axis=0), d_SN.mean()
    rest_SN = d_SN - of_seeds[:, None] - of_clips + mean
    # Mean squares, each with its degrees of freedom. Var(mean) = seed/S + clip/N + rest/(SN), whose unbiased estimate
    # is (MS_seeds + MS_clips - MS_rest) / (SN). It may come out below what the rest alone makes of it: then that.
    ms_seeds, ms_clips = clips * of_seeds.var(ddof=1), seeds * of_clips.var(ddof=1)
    ms_rest = (rest_SN**2).sum() / ((seeds - 1) * (clips - 1))
    total = float(max(ms_seeds + ms_clips - ms_rest, ms_rest))
    if total == 0:
        return 0.0, float("nan")
    squares = ms_seeds**2 / (seeds - 1) + ms_clips**2 / (clips - 1) + ms_rest**2 / ((seeds - 1) * (clips - 1))
    return total / cells, total**2 / float(squares)


def holm(p_values: Sequence[float | None]) -> list[float]:
    """p-values adjusted for a family of comparisons (Holm 1979), in the order they came.

    Where those below .05 are called clear, one family in twenty has a false one. None, unknown, counts as 1.
    """
    known = [1.0 if p is None else p for p in p_values]
    adjusted, largest = [0.0] * len(known), 0.0
    for rank, place in enumerate(sorted(range(len(known)), key=known.__getitem__)):
        largest = max(largest, min(1.0, (len(known) - rank) * known[place]))
        adjusted[place] = largest
    return adjusted


class Resampled:
    """Scores of several rows (arms) by seed and clip: their differences, and how surely they stand in an order.

    All rows are drawn with the same seeds and the same clips, so an order within a draw is paired.

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
        self.draws = _crossed_means(np.stack([scores[name] for name in self._names]), seed, resamples)

    def difference(self, after: str, before: str) -> Difference:
        """The mean of row `after` minus that of row `before`, in points, with its interval over seeds and clips."""
        return crossed_difference(self.scores[after] - self.scores[before])

    def order(self, expected: Sequence[str]) -> Order:
        """How often the rows stand in an order, from the lowest to the highest."""
        drawn = self.draws[[self._names.index(name) for name in expected]]
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
            by_seed=tuple(np.asarray((np.diff(by_seed, axis=0) > 0).all(axis=0)).tolist()),
            commonest=tuple(expected[int(number)] for number in commonest),
            commonest_share=float(counts.max() / counts.sum()),
        )


def _crossed_means(scores_KSN: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """float64 [rows, R]: each row's mean over the drawn seeds and clips; here K rows of S seeds."""
    rows, seeds, clips = scores_KSN.shape
    rng = np.random.default_rng(seed)
    drawn_seeds = rng.integers(seeds, size=(resamples, seeds))
    weight_RS = (drawn_seeds[:, :, None] == np.arange(seeds)).mean(axis=1)
    columns = scores_KSN.reshape(rows * seeds, clips)
    means, start = [], 0
    for draws in pieces(resamples, clips):
        weight_RN = rng.multinomial(clips, np.full(clips, 1 / clips), size=draws) / clips
        mean_KSR = weighted_sums(columns, weight_RN).reshape(rows, seeds, draws)
        # Seeds are added one after another: a product over them could order equal rows differently again.
        means.append(sum(mean_KSR[:, s] * weight_RS[start : start + draws, s] for s in range(seeds)))
        start += draws
    return np.concatenate(means, axis=1)
