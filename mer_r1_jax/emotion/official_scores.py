"""The MER-UniBench scores as the released scorer computes them (zeroQiaoba/AffectGPT, ew_metric.py and wheel.py).

Kept quirks, all of them part of published numbers:

* the set F of a wheel is made of the data set's mean precision and recall, not of per-sample F; and the reported F is
  the mean of the wheels' F, so it is not 2PR / (P + R) of the reported precision and recall.
* P + R = 0 on a wheel, or no sample to score on it, makes its F (and so the score) NaN under "unibench" and 0 under
  "mer2026".
* a sample whose truth has no category on a wheel is skipped on that wheel ("neutral" is never scored).
* HIT costs nothing for extra predictions.
* WAF: samples whose label is 0 are left out; a prediction that is not exactly "positive" (so "Positive", "neutral",
  "mixed" too) counts as negative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mer_r1_jax.emotion.wheels import Wheels

NAN = float("nan")
SENTIMENTS = {"positive": 1.0, "negative": -1.0, "neutral": 0.0}


@dataclasses.dataclass(frozen=True)
class WheelScore:
    """One wheel's share of a score: `score` is F for set_f1, the hit rate for hit; NaN when nothing was scored."""

    score: float
    precision: float
    recall: float
    n_scored: int


@dataclasses.dataclass(frozen=True)
class Score:
    """A score over a data set.

    Attributes:
        score: the headline number in [0, 1] or NaN: F_s, HIT or WAF.
        precision, recall: their means over wheels; NaN for waf. For hit, recall is HIT and precision is the official
            code's unreported "mscore": a hit counts 1 / how many predicted categories the data set has labels for.
        per_wheel: the five wheels' own scores; empty for waf.
        n: samples.
        n_scored: samples scored on at least one wheel (waf: samples whose label is not 0).
        accuracy: waf only, the share of signs that agree; else NaN.
    """

    score: float
    precision: float
    recall: float
    per_wheel: tuple[WheelScore, ...]
    n: int
    n_scored: int
    accuracy: float = NAN


def set_f1(
    predictions: Sequence[Sequence[str]], truths: Sequence[Sequence[str]], wheels: Wheels, *, level: int = 1
) -> Score:
    """Set-level F over the wheels.

    Args:
        predictions: words of each answer.
        truths: true words of each sample.
        wheels: the wheels; their variant decides whether an undefined F is NaN or 0.
        level: 1 for core categories (reported), 2 for second-level ones.

    Raises:
        ValueError: the two do not have the same length.
    """
    _check_lengths(predictions, truths)
    undefined = undefined_f(wheels)
    rows_NKS, per_wheel = set_rows(predictions, truths, wheels, level=level), []
    for rows_NS in rows_NKS.swapaxes(0, 1):
        scored_MS = rows_NS[rows_NS[:, 0] > 0]
        precision, recall = _mean(scored_MS[:, 1], undefined), _mean(scored_MS[:, 2], undefined)
        per_wheel.append(WheelScore(_f1(precision, recall, undefined), precision, recall, len(scored_MS)))
    return _over_wheels(per_wheel, rows_NKS)


def set_rows(
    predictions: Sequence[Sequence[str]], truths: Sequence[Sequence[str]], wheels: Wheels, *, level: int = 1
) -> np.ndarray:
    """float64 [samples, wheels, 3]: whether a sample is scored there, and if so its precision and recall."""
    rows_NKS = np.zeros((len(truths), len(wheels), 3))
    for sample, (words, truth) in enumerate(zip(predictions, truths, strict=True)):
        for wheel in range(len(wheels)):
            if true := wheels.categories(truth, wheel, level):
                predicted = wheels.categories(words, wheel, level)
                right = len(true & predicted)
                rows_NKS[sample, wheel] = 1, right / len(predicted) if predicted else 0, right / len(true)
    return rows_NKS


def undefined_f(wheels: Wheels) -> float:
    """What F is where there is nothing to make it of."""
    return 0.0 if wheels.variant == "mer2026" else NAN


def hit(predictions: Sequence[Sequence[str]], labels: Sequence[str], wheels: Wheels) -> Score:
    """Hit rate: the label's category is among the predicted ones; mean over samples, then over wheels.

    Args:
        predictions: words of each answer.
        labels: one true word a sample.
        wheels: the wheels.

    Raises:
        ValueError: the two do not have the same length.
    """
    _check_lengths(predictions, labels)
    rows_NKS, per_wheel = hit_rows(predictions, labels, wheels), []
    for rows_NS in rows_NKS.swapaxes(0, 1):
        scored_MS = rows_NS[rows_NS[:, 0] > 0]
        hits, shares = _mean(scored_MS[:, 1]), _mean(scored_MS[:, 2])
        per_wheel.append(WheelScore(hits, shares, hits, len(scored_MS)))
    return _over_wheels(per_wheel, rows_NKS)


def hit_rows(predictions: Sequence[Sequence[str]], labels: Sequence[str], wheels: Wheels) -> np.ndarray:
    """float64 [samples, wheels, 3]: whether a sample is scored there, whether its label is hit, and the hit's share."""
    rows_NKS = np.zeros((len(labels), len(wheels), 3))
    for wheel in range(len(wheels)):
        labelled = wheels.categories(labels, wheel)
        for sample, (words, label) in enumerate(zip(predictions, labels, strict=True)):
            true = wheels.category(label, wheel)
            if true is not None:
                predicted = wheels.categories(words, wheel)
                is_hit = true in predicted
                rows_NKS[sample, wheel] = 1, is_hit, 1 / len(predicted & labelled) if is_hit else 0
    return rows_NKS


def waf(sentiments: Sequence[str], labels: Sequence[float]) -> Score:
    """Weighted F1 of the sign of real-valued labels.

    Args:
        sentiments: one word a sample; anything but exactly positive, negative or neutral counts as neutral.
        labels: real numbers; samples with label 0 are left out.

    Raises:
        ValueError: the two do not have the same length.
    """
    from sklearn.metrics import accuracy_score, f1_score  # takes a second to import

    _check_lengths(sentiments, labels)
    signs = ((label, SENTIMENTS.get(word, 0.0)) for word, label in zip(sentiments, labels, strict=True))
    pairs = [(label > 0, sentiment > 0) for label, sentiment in signs if label]
    if not pairs:
        return Score(NAN, NAN, NAN, (), len(labels), 0)
    true, predicted = zip(*pairs, strict=True)
    settings: dict[str, Any] = {"average": "weighted", "zero_division": 0}
    score = float(f1_score(true, predicted, **settings))
    return Score(score, NAN, NAN, (), len(labels), len(pairs), accuracy=float(accuracy_score(true, predicted)))


def _check_lengths(predictions: Sequence, truths: Sequence) -> None:
    if len(predictions) != len(truths):
        raise ValueError(f"got {len(predictions)} predictions for {len(truths)} truths; expected one for each")


def _f1(precision: float, recall: float, undefined: float) -> float:
    if precision + recall == 0:
        return undefined
    return 2 * (precision * recall) / (precision + recall)


def _over_wheels(per_wheel: list[WheelScore], rows_NKS: np.ndarray) -> Score:
    score, precision, recall = (
        _mean([getattr(wheel, name) for wheel in per_wheel]) for name in ("score", "precision", "recall")
    )
    scored = int(rows_NKS[:, :, 0].any(axis=1).sum())
    return Score(score, precision, recall, tuple(per_wheel), len(rows_NKS), scored)


def _mean(values: Sequence[float] | np.ndarray, undefined: float = NAN) -> float:
    return float(np.mean(values)) if len(values) else undefined
