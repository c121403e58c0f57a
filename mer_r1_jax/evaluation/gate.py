"""Which of its two answers a model gives to a clip: the fast one, unless it is not sure enough of it.

A fast answer's *confidence* is the probability that the policy gives to the categories of its words, mean over the
wheels of a word and then over words. At or above a threshold the fast answer stands; below it, or where an answer has
no word with a confidence, the clip is answered again, slowly. So a gated answer costs the fast answer's tokens, and the
slow one's besides where that is asked for.

The threshold is fitted on one half of held-out clips and everything that is said of it is measured on the other:
`fit_and_measure`. The halves are drawn by clip, from the sorted names of the clips and the fixed seed SPLIT_SEED, so
the same clips are always divided alike and no clip lies in both.

Shape letters: N records; W words, Q wheels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mer_r1_jax.evaluation.bootstrap import Difference, Interval, Summed, intervals, mean_of, paired, ratio

SPLIT_SEED = 0
GRID = 10  # steps of the curves: thresholds at every tenth of the fitted half's confidences
FEWEST_CLIPS = 4  # two for each half: with fewer there is no interval
_OF_A_THRESHOLD = ("coverage", "risk", "f1", "tokens")
_ALONE = ("fast_f1", "fast_tokens", "slow_f1", "slow_tokens")


@dataclasses.dataclass(frozen=True)
class Auto:
    """The mode auto: the fast answer, and where the model is less sure of it than this, the slow one.

    Attributes:
        threshold: in [0, 1].
    """

    threshold: float


@dataclasses.dataclass(frozen=True, eq=False)
class BothAnswers:
    """What the fast and the slow answer to the same records came to.

    Attributes:
        clips: the clip of each record; records that share one stay in one half.
        confidence_N: float64, of the fast answer, in [0, 1]; NaN where it has none.
        fast_f1_N, slow_f1_N: float64 in [0, 1].
        fast_tokens_N, slow_tokens_N: float64, tokens of each answer.
    """

    clips: tuple[str, ...]
    confidence_N: np.ndarray
    fast_f1_N: np.ndarray
    slow_f1_N: np.ndarray
    fast_tokens_N: np.ndarray
    slow_tokens_N: np.ndarray

    def picked(self, places: np.ndarray) -> BothAnswers:
        """Some of the records, by their places."""
        arrays = {name: value[places] for name, value in vars(self).items() if name != "clips"}
        return BothAnswers(clips=tuple(self.clips[place] for place in places), **arrays)


def mean_confidence(probability_WQ: np.ndarray) -> float | None:
    """How sure a policy is of an answer, in [0, 1]: mean over each word's wheels, then over words.

    Args:
        probability_WQ: float, given to the category of each word on each wheel; NaN where there is none.

    Returns:
        None where no word has one.
    """
    of_words = [row_Q[~np.isnan(row_Q)].mean() for row_Q in np.asarray(probability_WQ) if not np.isnan(row_Q).all()]
    return float(np.mean(of_words)) if of_words else None


def confidence_of(probabilities: Mapping[str, float | None]) -> float | None:
    """The same of an answer whose words have their mean over the wheels already: word -> probability."""
    of_words = [probability for probability in probabilities.values() if probability is not None]
    return float(np.mean(of_words)) if of_words else None


def confidence_of_line(line: Mapping[str, Any]) -> float | None:
    """The same of a kept answer; those kept before answers had one have that of the wheels their truth is on."""
    if "confidence" in line:
        return line["confidence"]
    rows = [np.asarray([np.nan if p is None else p for p in row_Q]) for row_Q in line["confidences"]]
    return mean_confidence(np.stack(rows)) if rows else None


def is_sure(confidence: float | None, threshold: float) -> bool:
    """Whether the fast answer stands."""
    return confidence is not None and confidence >= threshold


def reason(confidence: float | None, threshold: float) -> str:
    """The same for people: why the fast answer stands, or why there is a slow one."""
    if confidence is None:
        return "no word of the fast answer has a confidence"
    relation = "not below" if is_sure(confidence, threshold) else "below"
    # Enough digits for the two to differ as they were compared.
    digits = next((n for n in range(2, 9) if f"{confidence:.{n}f}" != f"{threshold:.{n}f}"), 2)
    return f"fast confidence {confidence:.{digits}f} is {relation} the threshold {threshold:.{digits}f}"


def halves(clips: Sequence[str], seed: int = SPLIT_SEED) -> tuple[np.ndarray, np.ndarray]:
    """Places of the records in the half that is fitted on, and of those in the other; each sorted.

    Of an odd number of clips the other half gets the one more.
    """
    names = sorted(set(clips))
    drawn = np.random.default_rng(seed).permutation(len(names))[: len(names) // 2]
    fitting = {names[place] for place in drawn}
    is_fitting = np.asarray([clip in fitting for clip in clips], bool)
    return np.flatnonzero(is_fitting), np.flatnonzero(~is_fitting)


def fit_threshold(both: BothAnswers) -> float:
    """The threshold in [0, 1] at which the gated answers have the highest mean F1; of equal ones the lowest.

    Tried are 0, 1 and the middle between any two confidences that follow one another, so all there are to tell apart.
    The lowest of equal ones asks for the fewest slow answers.
    """
    known = np.unique(both.confidence_N[~np.isnan(both.confidence_N)])
    thresholds = np.concatenate([[0.0], (known[1:] + known[:-1]) / 2, [1.0]])
    # What the fast answer adds over the slow one, by rising confidence: keeping the sure ones keeps a tail of the sum.
    order = np.argsort(both.confidence_N)  # NaN last, and never sure
    gain_N = (both.fast_f1_N - both.slow_f1_N)[order][: np.count_nonzero(~np.isnan(both.confidence_N))]
    tail = np.concatenate([[0.0], np.cumsum(gain_N)])
    first_sure = np.searchsorted(both.confidence_N[order][: gain_N.size], thresholds)
    gains = tail[-1] - tail[first_sure]
    # Rounding of the sums must not decide between thresholds that are equally good.
    return float(thresholds[np.flatnonzero(gains >= gains.max() - 1e-9)[0]])


def fit_and_measure(both: BothAnswers, seed: int = SPLIT_SEED) -> dict[str, Any]:
    """Fits the threshold on half of the clips and measures it on the other half.

    Args:
        both: scored records.
        seed: of the division into halves.

    Returns:
        JSON values. `threshold`, or None with `why_none`; `clips_fitted`, `clips_measured` and `split_seed`;
        `records_measured` and, of them, `without_confidence`. On the measured half, each value with its 95% bootstrap
        interval over clips: `fitted`, what the threshold comes to, and `curve`, the same at thresholds that rise
        through the confidences of the fitted half: `coverage` (share answered fast), `risk` (1 - F1 of those answers),
        `f1` and `tokens` of all answers. `fast` and `slow`, F1 and tokens of either alone. `against_fast` and
        `against_slow`, paired differences of F1 in points.
    """
    clips = len(set(both.clips))
    if clips < FEWEST_CLIPS:
        return {"threshold": None, "why_none": f"{clips} scored clips; {FEWEST_CLIPS} or more can be halved"}
    fitting, measuring = (both.picked(places) for places in halves(both.clips, seed))
    threshold = fit_threshold(fitting)
    sure = fitting.confidence_N[~np.isnan(fitting.confidence_N)]
    grid = np.quantile(sure, np.linspace(0, 1, GRID + 1)) if sure.size else np.zeros(0)
    thresholds = [threshold, *np.unique([0.0, *grid, 1.0]).tolist()]
    found = intervals(_by_clip(_summed(measuring, thresholds), measuring.clips))
    points = [
        {"threshold": value} | {name: _told(found[f"{name}_{place}"]) for name in _OF_A_THRESHOLD}
        for place, value in enumerate(thresholds)
    ]
    gated = _mean_by_clip(np.where(_sure(measuring, threshold), measuring.fast_f1_N, measuring.slow_f1_N), measuring)
    against = {
        f"against_{mode}": _difference(paired(gated, _mean_by_clip(alone, measuring)).get("score"))
        for mode, alone in (("fast", measuring.fast_f1_N), ("slow", measuring.slow_f1_N))
    }
    return {
        "threshold": threshold,
        "split_seed": seed,
        "clips_fitted": len(set(fitting.clips)),
        "clips_measured": len(set(measuring.clips)),
        "records_measured": len(measuring.clips),
        "without_confidence": int(np.isnan(measuring.confidence_N).sum()),
        "fitted": points[0],
        "curve": points[1:],
        **{mode: {name: _told(found[f"{mode}_{name}"]) for name in ("f1", "tokens")} for mode in ("fast", "slow")},
        **against,
    }


def _sure(both: BothAnswers, threshold: float) -> np.ndarray:
    """bool [N], `is_sure` of every record."""
    return np.where(np.isnan(both.confidence_N), -1.0, both.confidence_N) >= threshold


def _summed(both: BothAnswers, thresholds: Sequence[float]) -> Summed:
    """Every number of the curves as a function of sums over records, so that all of them share their draws."""
    columns = [np.ones(len(both.clips)), both.fast_f1_N, both.fast_tokens_N, both.slow_f1_N, both.slow_tokens_N]
    for threshold in thresholds:
        sure_N = _sure(both, threshold)
        columns += [
            sure_N,
            sure_N * (1 - both.fast_f1_N),
            np.where(sure_N, both.fast_f1_N, both.slow_f1_N),
            # The fast answer comes first, whichever is given.
            both.fast_tokens_N + np.where(sure_N, 0, both.slow_tokens_N),
        ]

    def value(sums: np.ndarray) -> np.ndarray:
        count, alone = sums[..., :1], sums[..., 1:5]
        gated = sums[..., 5:].reshape(*sums.shape[:-1], len(thresholds), 4)
        risk = ratio(gated[..., 1], gated[..., 0], np.nan)
        share = gated / count[..., None]
        at_each = np.stack([share[..., 0], risk, share[..., 2], share[..., 3]], axis=-1)
        return np.concatenate([alone / count, at_each.reshape(*sums.shape[:-1], -1)], axis=-1)

    names = [f"{name}_{place}" for place in range(len(thresholds)) for name in _OF_A_THRESHOLD]
    return Summed(np.stack(columns, axis=1).astype(np.float64), value, (*_ALONE, *names))


def _by_clip(summed: Summed, clips: Sequence[str]) -> Summed:
    """The same with a row a clip: records of one clip are no independent draws of clips."""
    places = {clip: place for place, clip in enumerate(dict.fromkeys(clips))}
    rows = np.zeros((len(places), summed.rows_NS.shape[1]))
    np.add.at(rows, [places[clip] for clip in clips], summed.rows_NS)
    return dataclasses.replace(summed, rows_NS=rows)


def _mean_by_clip(values_N: np.ndarray, both: BothAnswers) -> Summed:
    return _by_clip(mean_of(values_N.tolist()), both.clips)


def _told(interval: Interval) -> dict[str, float | None]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _difference(found: Difference | None) -> dict[str, float] | None:
    return None if found is None else {"points": found.points, "low": found.low, "high": found.high}
