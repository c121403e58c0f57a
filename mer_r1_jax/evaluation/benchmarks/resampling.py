"""Intervals of data-set scores: clips are drawn again and the whole score is computed anew from each draw.

Every score here is a function of sums over clips (a set F of the sums of precision, recall and scored clips of each
wheel; a weighted F1 of four counts). So a clip is a row of numbers, a draw is a vector of how often each clip occurs,
and a thousand draws are one matrix product.

Shape letters: N clips, S the summed columns, R draws, V the values of a score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from mer_r1_jax.emotion.metrics import NAN, SENTIMENTS
from mer_r1_jax.emotion.wheels import Wheels
from mer_r1_jax.evaluation.statistics import LEVEL, POINTS, RESAMPLES, Difference

_DRAWS_AT_ONCE = 1 << 22  # clip numbers held in memory


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
    names: tuple[str, ...]

    def point(self) -> dict[str, float]:
        """The values over all clips; NaN where undefined."""
        return dict(zip(self.names, map(float, self.value(self.rows_NS.sum(axis=0))), strict=True))

    def picked(self, clips: Sequence[int]) -> Summed:
        """The same over some of the clips."""
        return dataclasses.replace(self, rows_NS=self.rows_NS[np.asarray(clips, int)])


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


def set_f(predictions: Sequence[Sequence[str]], truths: Sequence[Sequence[str]], wheels: Wheels) -> Summed:
    """`emotion.metrics.set_f1`: F, precision, recall."""
    undefined = 0.0 if wheels.variant == "mer2026" else NAN
    rows_NKS = np.zeros((len(truths), len(wheels), 3))  # scored, precision, recall
    for clip, (words, truth) in enumerate(zip(predictions, truths, strict=True)):
        for wheel in range(len(wheels)):
            true = wheels.categories(truth, wheel)
            if true:
                predicted = wheels.categories(words, wheel)
                right = len(true & predicted)
                rows_NKS[clip, wheel] = 1, right / len(predicted) if predicted else 0, right / len(true)

    def value(sums: np.ndarray) -> np.ndarray:
        scored, precision, recall = np.moveaxis(sums.reshape(*sums.shape[:-1], len(wheels), 3), -1, 0)
        precision, recall = _ratio(precision, scored, undefined), _ratio(recall, scored, undefined)
        f1 = _ratio(2 * precision * recall, precision + recall, undefined)
        return np.stack([f1.mean(-1), precision.mean(-1), recall.mean(-1)], axis=-1)

    return Summed(rows_NKS.reshape(len(truths), -1), value, ("score", "precision", "recall"))


def hit(predictions: Sequence[Sequence[str]], labels: Sequence[str], wheels: Wheels) -> Summed:
    """`emotion.metrics.hit`."""
    rows_NKS = np.zeros((len(labels), len(wheels), 2))  # scored, hit
    for clip, (words, label) in enumerate(zip(predictions, labels, strict=True)):
        for wheel in range(len(wheels)):
            true = wheels.category(label, wheel)
            if true is not None:
                rows_NKS[clip, wheel] = 1, true in wheels.categories(words, wheel)

    def value(sums: np.ndarray) -> np.ndarray:
        scored, hits = np.moveaxis(sums.reshape(*sums.shape[:-1], len(wheels), 2), -1, 0)
        return _ratio(hits, scored, NAN).mean(-1, keepdims=True)

    return Summed(rows_NKS.reshape(len(labels), -1), value, ("score",))


def waf(sentiments: Sequence[str], labels: Sequence[float]) -> Summed:
    """`emotion.metrics.waf`: weighted F1 of the sign, and accuracy."""
    rows_NS = np.zeros((len(labels), 4))  # true positive, false positive, false negative, true negative
    for clip, (sentiment, label) in enumerate(zip(sentiments, labels, strict=True)):
        if label:
            positive = SENTIMENTS.get(sentiment, 0.0) > 0
            rows_NS[clip, (0 if positive else 2) if label > 0 else (1 if positive else 3)] = 1

    def value(sums: np.ndarray) -> np.ndarray:
        tp, fp, fn, tn = np.moveaxis(sums, -1, 0)
        positive = _ratio(2 * tp, 2 * tp + fp + fn, 0.0)
        negative = _ratio(2 * tn, 2 * tn + fp + fn, 0.0)
        total = tp + fp + fn + tn
        weighted = _ratio((tp + fn) * positive + (tn + fp) * negative, total, NAN)
        return np.stack([weighted, _ratio(tp + tn, total, NAN)], axis=-1)

    return Summed(rows_NS, value, ("score", "accuracy"))


def mean_of(values: Sequence[float | None]) -> Summed:
    """The mean of one number a clip, over the clips that have one."""
    rows_NS = np.asarray([(0.0, 0.0) if value is None else (1.0, value) for value in values]).reshape(-1, 2)
    return Summed(rows_NS, lambda sums: _ratio(sums[..., 1:], sums[..., :1], NAN), ("score",))


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
        return {name: Interval(_number(value), None, None, clips) for name, value in points.items()}
    draws_RV = _draw([summed], seed, resamples)[0]
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
        if interval.value is not None and interval.low is not None:
            found[name] = Difference(
                POINTS * interval.value, POINTS * interval.low, POINTS * interval.high, interval.clips
            )
    return found


def _draw(scores: Sequence[Summed], seed: int, resamples: int) -> list[np.ndarray]:
    """float64 [R, V] of each score, all from the same draws."""
    rng = np.random.default_rng(seed)
    clips = len(scores[0].rows_NS)
    at_once = max(1, _DRAWS_AT_ONCE // clips)
    found: list[list[np.ndarray]] = [[] for _ in scores]
    for start in range(0, resamples, at_once):
        draws = min(at_once, resamples - start)
        drawn = rng.integers(clips, size=(draws, clips)) + clips * np.arange(draws)[:, None]
        times_RN = np.bincount(drawn.ravel(), minlength=draws * clips).reshape(draws, clips).astype(np.float64)
        for score, values in zip(scores, found, strict=True):
            values.append(score.value(times_RN @ score.rows_NS))
    return [np.concatenate(values) for values in found]


def _interval(value: float, draws_R: np.ndarray, clips: int) -> Interval:
    defined = draws_R[np.isfinite(draws_R)]
    undefined = 1 - defined.size / draws_R.size
    if not np.isfinite(value) or not defined.size:
        return Interval(_number(value), None, None, clips, undefined)
    low, high = np.percentile(defined, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high), clips, undefined)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, undefined: float) -> np.ndarray:
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    out = np.full(numerator.shape, undefined, np.float64)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
