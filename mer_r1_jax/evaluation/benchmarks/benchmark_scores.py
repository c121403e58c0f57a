"""A benchmark's scores from its answers: the headline metric, the slow-fast analysis, intervals, counts. No model."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mer_r1_jax.emotion.answer_form import AUTO, MODES
from mer_r1_jax.emotion.official_scores import NAN, SENTIMENTS, hit_rows, set_rows, undefined_f
from mer_r1_jax.emotion.predictions import Predictions, score_predictions
from mer_r1_jax.emotion.rewards import answer_rewards, constant_floor, is_scorable, majority_answer
from mer_r1_jax.emotion.wheels import Wheels
from mer_r1_jax.evaluation import bootstrap
from mer_r1_jax.evaluation.benchmarks import analysis
from mer_r1_jax.evaluation.benchmarks.sets import HIT, SET_F1, WAF, BenchmarkError, metric_of, title_of
from mer_r1_jax.evaluation.benchmarks.word_protocol import Extracted, Extractor, Scoring, extract, wheels_digest
from mer_r1_jax.evaluation.bootstrap import Summed, mean_of, ratio
from mer_r1_jax.evaluation.gate import BothAnswers, confidence_of_line, fit_and_measure, is_sure
from mer_r1_jax.evaluation.summary import ORACLE_COLUMN

UNKNOWN_SHOWN = 40  # words on no wheel that are listed
LINE_FIELDS = ("id", "mode", "truth", "text", "answer", "words", "confidences", "tokens")


@dataclasses.dataclass(frozen=True, eq=False)
class _Scored:
    """One mode's answers that could be scored, in order.

    Attributes:
        lines: their lines.
        truths: as `emotion.predictions` takes them.
        predictions: words, or for waf polarities.
        words: of each answer.
        failures: reason -> answers the extractor made nothing of.
    """

    lines: tuple[Mapping[str, Any], ...]
    truths: tuple[Any, ...]
    predictions: tuple[Any, ...]
    words: tuple[tuple[str, ...], ...]
    failures: dict[str, int]

    @property
    def true_words(self) -> list[list[str]]:
        return [[truth] if isinstance(truth, str) else list(truth) for truth in self.truths]


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """What answers are scored with.

    Attributes:
        scoring: the protocol.
        wheels: its wheels.
        extractor: the LLM, where the protocol uses one.
    """

    scoring: Scoring
    wheels: Wheels
    extractor: Extractor | None = None


def score_benchmark(
    name: str,
    answers: Mapping[tuple[str, str], Mapping[str, Any]],
    truths: Mapping[str, Any],
    scorer: Scorer,
    answer_wheels: str = "",
    threshold: float | None = None,
    unusable: Collection[str] = (),
) -> dict[str, Any]:
    """Scores of one benchmark under one protocol, as JSON-ready values.

    Args:
        name: of the benchmark.
        answers: (clip, mode) -> line of the answer file.
        truths: clip -> truth of every labelled clip that was to be asked, answered or not.
        scorer: the protocol and what it needs.
        answer_wheels: digest of the wheels that the answers' confidences were made with; under others there are none.
        threshold: of answers gated by their confidence, which are scored as a mode of their own; None = there are none.
        unusable: clips that could not be asked, be it in one mode alone.

    Raises:
        BenchmarkError: there is no answer to score, or a line lacks a field.
    """
    metric, wheels = metric_of(name), scorer.wheels
    listed = {mode: [line for (clip, m), line in answers.items() if m == mode and clip in truths] for mode in MODES}
    # Kept before answers had one: theirs is made from the wheels of a clip's truth, and another quantity.
    old = sum("confidence" not in line for line in listed["fast"])
    slow = len(listed["slow"])
    ungated = 0 if threshold is None else _add_gated(listed, threshold, unusable)
    of_gate = slow - len(listed["slow"])
    listed = {mode: lines for mode, lines in listed.items() if lines}
    if not listed:
        raise BenchmarkError(f"{title_of(name)}: there is no answer to score; run without --rescore first")
    scored = {mode: _readable(lines, metric, scorer) for mode, lines in listed.items()}
    sure = answer_wheels == wheels_digest(wheels)
    modes = {mode: _mode_scores(listed[mode], part, metric, truths, wheels, sure) for mode, part in scored.items()}
    both = scored.keys() >= set(MODES)
    return {
        "benchmark": name,
        "metric": metric,
        "protocol": scorer.scoring.as_json(),
        "modes": modes,
        "references": {} if metric == WAF else _references(next(iter(scored.values())), wheels),
        "slow_minus_fast": _difference(scored, MODES, metric, wheels, sure) if both else {},
        **(_gated(scored, threshold, metric, wheels, sure) if threshold is not None and AUTO in scored else {}),
        **({"gate": _gate(scored, wheels)} if both and sure and metric != WAF else {}),
        "n_fast_without_confidence": old,
        "threshold": threshold,
        "n_unsure_without_slow": ungated,
        "n_slow_without_score": of_gate,
    }


def _readable(lines: Sequence[Mapping[str, Any]], metric: str, scorer: Scorer) -> _Scored:
    for line in lines:
        if missing := [field for field in LINE_FIELDS if field not in line]:
            raise BenchmarkError(f"the answer of {line.get('id')} lacks {', '.join(missing)}; it cannot be scored")
    extracted: Extracted = extract(lines, metric, scorer.scoring, scorer.wheels, scorer.extractor)
    predictions = extracted.polarities if metric == WAF else extracted.words
    # Where there is a polarity there are words as well: it is made from them.
    kept = [
        (line, prediction, words)
        for line, prediction, words in zip(lines, predictions, extracted.words, strict=True)
        if prediction is not None and words is not None
    ]
    return _Scored(
        lines=tuple(line for line, _, _ in kept),
        truths=tuple(line["truth"] for line, _, _ in kept),
        predictions=tuple(prediction for _, prediction, _ in kept),
        words=tuple(words for _, _, words in kept),
        failures=extracted.failures,
    )


def _mode_scores(
    lines: Sequence[Mapping[str, Any]],
    scored: _Scored,
    metric: str,
    truths: Mapping[str, Any],
    wheels: Wheels,
    sure: bool,
) -> dict[str, Any]:
    mode = lines[0]["mode"]
    if not scored.lines:
        raise BenchmarkError(f"{mode}: the extractor gave nothing for any of {len(lines)} answers: {scored.failures}")
    official = _official(scored.predictions, scored.truths, metric, wheels)
    official["unknown_words"] = dict(list(official["unknown_words"].items())[:UNKNOWN_SHOWN])
    summed = _summed(scored, metric, wheels)
    summaries = {name: _as_json(summed_of) for name, summed_of in summed.items()}
    silent = {clip: truth for clip, truth in truths.items() if clip not in {line["id"] for line in scored.lines}}
    nothing = "" if metric == WAF else ()
    everything = _official(
        (*scored.predictions, *[nothing] * len(silent)), (*scored.truths, *silent.values()), metric, wheels
    )
    pairs = analysis.confidences(scored.lines, scored.true_words, wheels) if sure and metric != WAF else []
    return {
        **official,
        **summaries,
        "score_with_unanswered_as_empty": everything["score"],
        "n_labelled": len(truths),
        "n_answered": len(lines),
        "n_unanswered": len(truths) - len(lines),
        "extractor_failures": scored.failures,
        "n_words_on_no_wheel": sum(not wheels.is_known(word) for words in scored.words for word in words),
        **_habits(mode, lines, scored),
        **_sureness(pairs),
        **_details(scored, metric, wheels),
    }


def _official(predictions: Sequence[Any], truths: Sequence[Any], metric: str, wheels: Wheels) -> dict[str, Any]:
    """What `mer-r1 score` says of the same predictions."""
    columns = Predictions([str(i) for i in range(len(truths))], [_listed(p) for p in predictions], list(truths))
    return score_predictions(columns, metric, wheels)


def _listed(prediction: Any) -> Any:
    return prediction if isinstance(prediction, str) else list(prediction)


def _summed(scored: _Scored, metric: str, wheels: Wheels) -> dict[str, Summed]:
    """Every score with an interval: the headline, and for categories the set F and the mean F1 of single clips."""
    if metric == WAF:
        return {"headline": waf(scored.predictions, scored.truths)}
    found = {"headline": hit(scored.words, scored.truths, wheels)} if metric == HIT else {}
    found["set_f"] = set_f(scored.words, scored.true_words, wheels)
    if metric == SET_F1:
        found["headline"] = found["set_f"]
    rewards = [answer_rewards(w, t, wheels) for w, t in zip(scored.words, scored.true_words, strict=True)]
    found["clip_f1"] = mean_of([reward.f1 if reward.scorable else None for reward in rewards])
    return found


def _as_json(summed: Summed) -> dict[str, Any]:
    return {name: dataclasses.asdict(interval) for name, interval in bootstrap.intervals(summed).items()}


def _add_gated(listed: dict[str, list[Mapping[str, Any]]], threshold: float, unusable: Collection[str]) -> int:
    """Adds the answers that a gate takes as a mode of their own, the tokens of both where it took the slow one.

    Where slow answers are those alone that a gate asked for, they are no score of their own: of the clips that the
    model was unsure of. A clip that could be asked fast and not slowly says nothing of that, and is gated in no way.

    Returns:
        Clips whose slow answer the gate wants and nobody asked for. With any there is no mode added: it would be of the
        clips that the model is sure of.
    """
    slow = {line["id"]: line for line in listed["slow"]}
    taken, lacking = [], 0
    for fast in listed["fast"]:
        if is_sure(confidence_of_line(fast), threshold):
            taken.append({**fast, "mode": AUTO, "taken": "fast"})
        elif one := slow.get(fast["id"]):
            taken.append({**one, "mode": AUTO, "taken": "slow", "tokens": fast["tokens"] + one["tokens"]})
        elif fast["id"] not in unusable:
            lacking += 1
    listed[AUTO] = [] if lacking else taken
    if any(line["id"] not in slow and line["id"] not in unusable for line in listed["fast"]):
        listed["slow"] = []
    return lacking


def _gated(scored: Mapping[str, _Scored], threshold: float, metric: str, wheels: Wheels, sure: bool) -> dict[str, Any]:
    """What there is to say of gated answers besides their scores: how many are of either mode, and what they gain."""
    return {
        "auto": {
            "threshold": threshold,
            **collections.Counter(f"n_{line['taken']}" for line in scored[AUTO].lines),
        },
        **{
            f"auto_minus_{mode}": _difference(scored, (AUTO, mode), metric, wheels, sure)
            for mode in MODES
            if mode in scored
        },
    }


def _difference(
    scored: Mapping[str, _Scored], modes: tuple[str, ...], metric: str, wheels: Wheels, sure: bool
) -> dict[str, Any]:
    """Paired differences in points over the clips that both modes answered: of the first from the second."""
    one, other = modes
    scored = {mode: scored[mode] for mode in modes}
    places = {mode: {line["id"]: i for i, line in enumerate(part.lines)} for mode, part in scored.items()}
    common = [clip for clip in places[one] if clip in places[other]]
    summed = {mode: _summed(part, metric, wheels) for mode, part in scored.items()}
    if sure and metric != WAF:
        for mode, part in scored.items():
            pairs = analysis.confidences(part.lines, part.true_words, wheels)
            for label, correct in (("confidence_correct", True), ("confidence_wrong", False)):
                summed[mode][label] = mean_of(analysis.mean_confidence(pairs, correct))
    return {
        kind: {
            name: dataclasses.asdict(difference)
            for name, difference in bootstrap.paired(
                summed[one][kind].picked([places[one][clip] for clip in common]),
                summed[other][kind].picked([places[other][clip] for clip in common]),
            ).items()
        }
        for kind in summed[one]
    } | {"n_common": len(common)}


def _gate(scored: Mapping[str, _Scored], wheels: Wheels) -> dict[str, Any]:
    """What answers gated by confidence come to, on the clips that both modes answered and whose truth is on a wheel.

    By the mean F1 of single clips, whatever the headline: a gate decides clip by clip.
    """
    rows = {
        mode: {
            line["id"]: (line, reward.f1)
            for line, words, truth in zip(part.lines, part.words, part.true_words, strict=True)
            if (reward := answer_rewards(words, truth, wheels)).scorable
        }
        for mode, part in ((mode, scored[mode]) for mode in MODES)
    }
    clips = [clip for clip in rows["fast"] if clip in rows["slow"]]

    def of(mode: str, value: Callable[[Mapping[str, Any], float], float | None]) -> np.ndarray:
        return np.asarray([value(*rows[mode][clip]) for clip in clips], np.float64)

    return fit_and_measure(
        BothAnswers(
            clips=tuple(str(rows["fast"][clip][0].get("video") or clip) for clip in clips),
            confidence_N=of("fast", lambda line, _: confidence_of_line(line)),
            fast_f1_N=of("fast", lambda _, f1: f1),
            slow_f1_N=of("slow", lambda _, f1: f1),
            fast_tokens_N=of("fast", lambda line, _: line["tokens"]),
            slow_tokens_N=of("slow", lambda line, _: line["tokens"]),
        )
    )


def _references(scored: _Scored, wheels: Wheels) -> dict[str, Any]:
    """Mean F1 of single clips: the best constant answer as a floor; the ideal answer, where known, as a ceiling."""
    floor = constant_floor(majority_answer(scored.true_words, wheels), scored.true_words, wheels)
    # Over the clips that the floor and clip_f1 are over: those whose truth is on a wheel.
    pairs = zip(scored.lines, scored.true_words, strict=True)
    oracles = [(line.get(ORACLE_COLUMN), truth) for line, truth in pairs if is_scorable(truth, wheels)]
    known = [answer_rewards(words, truth, wheels).f1 for words, truth in oracles if words is not None]
    ceiling = float(np.mean(known)) if known and len(known) == len(oracles) else None
    return {"majority_answer": list(floor.words), "majority_f1": floor.f1, "oracle_f1": ceiling}


def _habits(mode: str, lines: Sequence[Mapping[str, Any]], scored: _Scored) -> dict[str, Any]:
    """How the answers look: length, format, variety."""
    count = len(lines)
    return {
        "n_without_answer_block": sum(line["answer"] is None for line in lines),
        "n_without_words": sum(not words for words in scored.words),
        # A fast answer is given its think block, empty: the format asked of slow answers does not apply.
        "format_rate": sum(bool(line.get("well_formed")) for line in lines) / count if mode == "slow" else None,
        "truncated_rate": sum(bool(line.get("truncated")) for line in lines) / count,
        "mean_words": float(np.mean([len(words) for words in scored.words])),
        "mean_tokens": float(np.mean([line["tokens"] for line in lines])),
        "distinct_answers": len({tuple(sorted(words)) for words in scored.words}),
        "common_words": dict(collections.Counter(w for words in scored.words for w in words).most_common(10)),
    }


def _sureness(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Mean confidence on correct and on wrong categories, and the calibration curve; None where there are none."""
    if not pairs:
        return {"confidence_correct": None, "confidence_wrong": None, "calibration": None}
    means = {
        name: mean_of(analysis.mean_confidence(pairs, correct))
        for name, correct in (("confidence_correct", True), ("confidence_wrong", False))
    }
    return {name: _as_json(summed)["score"] for name, summed in means.items()} | {
        "calibration": analysis.calibration(pairs)
    }


def _details(scored: _Scored, metric: str, wheels: Wheels) -> dict[str, Any]:
    if metric == WAF:
        return {"by_category": [], "confusion": analysis.polarity_confusion(scored.predictions, scored.truths)}
    return {
        "by_category": analysis.by_category(scored.words, scored.true_words, wheels),
        "confusion": analysis.confusion(scored.words, scored.true_words, wheels),
    }


def set_f(predictions: Sequence[Sequence[str]], truths: Sequence[Sequence[str]], wheels: Wheels) -> Summed:
    """`emotion.official_scores.set_f1`: F, precision, recall."""
    undefined = undefined_f(wheels)
    rows_NKS = set_rows(predictions, truths, wheels)

    def value(sums: np.ndarray) -> np.ndarray:
        scored, precision, recall = np.moveaxis(sums.reshape(*sums.shape[:-1], len(wheels), 3), -1, 0)
        precision, recall = ratio(precision, scored, undefined), ratio(recall, scored, undefined)
        f1 = ratio(2 * precision * recall, precision + recall, undefined)
        return np.stack([f1.mean(-1), precision.mean(-1), recall.mean(-1)], axis=-1)

    return Summed(rows_NKS.reshape(len(truths), -1), value, ("score", "precision", "recall"))


def hit(predictions: Sequence[Sequence[str]], labels: Sequence[str], wheels: Wheels) -> Summed:
    """`emotion.official_scores.hit`."""
    rows_NKS = hit_rows(predictions, labels, wheels)

    def value(sums: np.ndarray) -> np.ndarray:
        scored, hits, _ = np.moveaxis(sums.reshape(*sums.shape[:-1], len(wheels), 3), -1, 0)
        return ratio(hits, scored, NAN).mean(-1, keepdims=True)

    return Summed(rows_NKS.reshape(len(labels), -1), value)


def waf(sentiments: Sequence[str], labels: Sequence[float]) -> Summed:
    """`emotion.official_scores.waf`: weighted F1 of the sign, and accuracy."""
    rows_NS = np.zeros((len(labels), 4))  # true positive, false positive, false negative, true negative
    for clip, (sentiment, label) in enumerate(zip(sentiments, labels, strict=True)):
        if label:
            positive = SENTIMENTS.get(sentiment, 0.0) > 0
            rows_NS[clip, (0 if positive else 2) if label > 0 else (1 if positive else 3)] = 1

    def value(sums: np.ndarray) -> np.ndarray:
        tp, fp, fn, tn = np.moveaxis(sums, -1, 0)
        positive = ratio(2 * tp, 2 * tp + fp + fn, 0.0)
        negative = ratio(2 * tn, 2 * tn + fp + fn, 0.0)
        total = tp + fp + fn + tn
        weighted = ratio((tp + fn) * positive + (tn + fp) * negative, total, NAN)
        return np.stack([weighted, ratio(tp + tn, total, NAN)], axis=-1)

    return Summed(rows_NS, value, ("score", "accuracy"))
