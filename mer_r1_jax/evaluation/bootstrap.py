"""Bootstrap intervals over clips: of means, and of scores that are ratios of sums.

One engine serves both, and the orders of arms over seeds and clips (over_seeds.py). Every score here is a function of
sums over clips (a mean; a set F of the sums of precision, recall and scored clips of each wheel; a weighted F1 of four
counts). So a clip is a row of numbers, a draw is a vector of weights that says how often each clip occurs, and many
draws are one matrix product: `weighted_sums`.

Clips differ far more from one another than two answers to the same clip do, so everything is compared clip by clip.
Scores of several seeds are averaged for each clip first: the interval then says what other clips would change, not what
other seeds would (over_seeds.py has those).

scipy.stats.bootstrap does the first of these, but takes no ratios of sums.

Shape letters: N clips, S the summed columns, R draws, V the values of a score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 95  # per cent
POINTS = 100  # a score of 1 in points
FEW_SEEDS = 5  # below as many, no difference over seeds is called clear
_DRAWS_AT_ONCE = 1 << 22  # weights held in memory


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired difference of mean scores over the same clips, in points (hundredths), with its 95% bootstrap interval.

    Attributes:
        points: the mean difference.
        low, high: the interval.
        clips: clips that are compared.
        seeds: runs whose scores are averaged for each clip.
        over_seeds: whether the interval is over seeds as well as clips (over_seeds.py), and so speaks of other seeds.
        p_value: two-sided, of no difference; None where only the interval is known.
    """

    points: float
    low: float
    high: float
    clips: int
    seeds: int = 1
    over_seeds: bool = False
    p_value: float | None = None

    def __str__(self) -> str:
        seeds = f", {self.seeds} seeds" if self.seeds > 1 else ""
        return f"{signed(self.points)} points (95% interval {self.interval}, {self.clips} clips{seeds})"

    @property
    def interval(self) -> str:
        """Its ends, for people."""
        return f"{signed(self.low)} to {signed(self.high)}"

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero; never said of other seeds by fewer than FEW_SEEDS."""
        return (self.low > 0 or self.high < 0) and not self.has_few_seeds

    @property
    def has_few_seeds(self) -> bool:
        """Whether it speaks of other seeds and has too few to say anything clear."""
        return self.over_seeds and self.seeds < FEW_SEEDS


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value in [0, 1] with its 95% bootstrap interval; None where undefined.

    Attributes:
        value: over all clips.
        low, high: the interval; None with fewer than two clips.
        clips: clips drawn from.
        undefined: share of the draws in which the value is undefined; the interval is of the others.
    """

    value: float | None
    low: float | None
    high: float | None
    clips: int
    undefined: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Summed:
    """A score as a function of sums over clips.

    Attributes:
        rows_NS: float64, what each clip adds.
        value: sums [..., S] -> values [..., V].
        names: of the values, the score first.
    """

    rows_NS: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]
    names: tuple[str, ...] = ("score",)

    def point(self) -> dict[str, float]:
        """The values over all clips; NaN where undefined."""
        return dict(zip(self.names, map(float, self.value(self.rows_NS.sum(axis=0))), strict=True))

    def picked(self, clips: Sequence[int]) -> Summed:
        """The same over some of the clips."""
        return dataclasses.replace(self, rows_NS=self.rows_NS[np.asarray(clips, int)])


def mean_of(values: Sequence[float | None]) -> Summed:
    """The mean of one number a clip, over the clips that have one."""
    rows_NS = np.asarray([(0.0, 0.0) if value is None else (1.0, value) for value in values]).reshape(-1, 2)
    return Summed(rows_NS, lambda sums: ratio(sums[..., 1:], sums[..., :1], np.nan))


def ratio(numerator: np.ndarray, denominator: np.ndarray, undefined: float) -> np.ndarray:
    """Divides entry by entry; `undefined` where the denominator is not positive."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    out = np.full(numerator.shape, undefined, np.float64)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)


def intervals(summed: Summed, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Interval]:
    """Every value of a score with its interval.

    Args:
        summed: the score.
        seed: of the draws; the same seed and number of clips draw the same clips.
        resamples: draws.
    """
    clips = len(summed.rows_NS)
    points = summed.point()
    if clips < 2:
        return {name: Interval(_finite(value), None, None, clips) for name, value in points.items()}
    (draws_RV,) = _draw([summed], seed, resamples)
    return {name: _interval(value, draws_RV[:, v], clips) for v, (name, value) in enumerate(points.items())}


def paired(after: Summed, before: Summed, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Difference]:
    """After minus before in points, for every value that is defined: both over the same draws of the same clips.

    Raises:
        ValueError: the two are not about equally many clips.
    """
    clips = len(after.rows_NS)
    if clips != len(before.rows_NS):
        raise ValueError(f"got {clips} and {len(before.rows_NS)} clips, expected the same clips twice")
    if clips < 2:
        return {}
    after_RV, before_RV = _draw([after, before], seed, resamples)
    found = {}
    for v, (name, value) in enumerate(after.point().items()):
        interval = _interval(value - before.point()[name], after_RV[:, v] - before_RV[:, v], clips)
        points, low, high = interval.value, interval.low, interval.high
        if points is not None and low is not None and high is not None:
            found[name] = Difference(POINTS * points, POINTS * low, POINTS * high, clips)
    return found


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
    low, high = _bounds(_drawn_means(points, seed, resamples))
    return Difference(float(points.mean()), low, high, points.size, seeds)


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
    # A seed of its own for each group: groups of one size would otherwise rise and fall together.
    means = np.mean([_drawn_means(group, [seed, k], resamples) for k, group in enumerate(points)], axis=0)
    low, high = _bounds(means)
    mean = np.mean([group.mean() for group in points])
    return Difference(float(mean), low, high, sum(group.size for group in points))


def weighted_sums(columns_SN: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """float64 [S, R]: of each draw, the sums over clips.

    Equal columns get equal sums to the last bit, so that a paired difference of equal scores is exactly zero. A matrix
    product does not promise that: BLAS adds up its last rows in another order than the others, depending on the
    processor. So columns that occur twice are multiplied once.
    """
    distinct_UN, place_S = np.unique(columns_SN, axis=0, return_inverse=True)
    return (distinct_UN @ weights_RN.T)[place_S.reshape(-1)]


def _counts(clips: int, seed: int | Sequence[int], resamples: int) -> Iterator[np.ndarray]:
    """float64 [draws, N], in pieces that fit into memory: how often each clip occurs among as many, drawn anew."""
    rng = np.random.default_rng(seed)
    for draws in pieces(resamples, clips):
        drawn = rng.integers(clips, size=(draws, clips)) + clips * np.arange(draws)[:, None]
        yield np.bincount(drawn.ravel(), minlength=draws * clips).reshape(draws, clips).astype(np.float64)


def pieces(resamples: int, clips: int) -> Iterator[int]:
    at_once = max(1, _DRAWS_AT_ONCE // clips)
    for start in range(0, resamples, at_once):
        yield min(at_once, resamples - start)


def _drawn_means(values_N: np.ndarray, seed: int | Sequence[int], resamples: int) -> np.ndarray:
    """float64 [R]: means of as many values, drawn with replacement."""
    clips = values_N.size
    return np.concatenate([weighted_sums(values_N[None], w)[0] / clips for w in _counts(clips, seed, resamples)])


def _draw(scores: Sequence[Summed], seed: int, resamples: int) -> list[np.ndarray]:
    """float64 [R, V] of each score, all from the same draws and one product."""
    ends = np.cumsum([score.rows_NS.shape[1] for score in scores])[:-1]
    columns_SN = np.concatenate([score.rows_NS for score in scores], axis=1).T
    found: list[list[np.ndarray]] = [[] for _ in scores]
    for weights_RN in _counts(columns_SN.shape[1], seed, resamples):
        sums = np.split(weighted_sums(columns_SN, weights_RN), ends)
        for score, values, own in zip(scores, found, sums, strict=True):
            values.append(score.value(own.T))
    return [np.concatenate(values) for values in found]


def _interval(value: float, draws_R: np.ndarray, clips: int) -> Interval:
    defined = draws_R[np.isfinite(draws_R)]
    undefined = 1 - defined.size / draws_R.size
    if not np.isfinite(value) or not defined.size:
        return Interval(_finite(value), None, None, clips, undefined)
    return Interval(float(value), *_bounds(defined), clips, undefined)


def _bounds(draws_R: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws_R, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def signed(points: float) -> str:
    """Points with one decimal and their sign, a real minus included."""
    return f"{points:+.1f}".replace("-", "−")
