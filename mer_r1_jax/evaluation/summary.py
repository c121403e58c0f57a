"""An evaluation as the numbers and rows that are kept: one JSON file of scores, one JSON-lines file of answers."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mer_r1_jax import faults
from mer_r1_jax.data.records import Record
from mer_r1_jax.data.synthetic.oracle import Oracle, Scores
from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.emotion.rewards import answer_rewards, constant_floor, majority_answer
from mer_r1_jax.emotion.wheels import Wheels
from mer_r1_jax.evaluation.evaluate import AnswerOf, Evaluation, EvaluationError
from mer_r1_jax.evaluation.gate import BothAnswers, fit_and_measure
from mer_r1_jax.rl.scoring import ScoredAnswer
from mer_r1_jax.storage import atomic_files

# Extra columns of the synthetic world's held-out records: the answer of one who knows the cues, and the cues.
ORACLE_COLUMN, CUES_COLUMN = "oracle", "cues"
SCORES = ("precision", "recall", "f1")


@dataclasses.dataclass(frozen=True)
class Expected:
    """What answers can expect.

    Attributes:
        greedy: mode -> scores clip by clip.
        sampled: the same of the sampled answers, mean over those of a clip; without modes that were not sampled.
    """

    greedy: dict[str, list[Scores]]
    sampled: dict[str, list[Scores]]


def expected_scores(evaluation: Evaluation, oracle: Oracle | None) -> Expected | None:
    """What answers to clips of the synthetic world can expect, over all that may be true given a clip's cues.

    Means of these have the same value in the long run as those of the scores, and half the variance: the draw of each
    clip's truth, which no policy can know, is out of them.

    Args:
        evaluation: of any clips.
        oracle: of their world; None where they are of none.

    Returns:
        None where there is no oracle, or a clip without cues.
    """
    given = (record.extra.get(CUES_COLUMN) for record in evaluation.records)
    cues = [cue for cue in given if cue is not None]
    if oracle is None or len(cues) < len(evaluation.records):
        return None

    def of(cue: Sequence[int], answers: Sequence[ScoredAnswer]) -> Scores:
        found = [dataclasses.astuple(oracle.expected(cue, answer.parsed.words)) for answer in answers]
        return Scores(*map(float, np.mean(found, axis=0)))

    def of_all(chosen: Callable[[AnswerOf], Sequence[ScoredAnswer]]) -> dict[str, list[Scores]]:
        return {
            mode: [of(cue, chosen(answer)) for cue, answer in zip(cues, answers, strict=True)]
            for mode, answers in evaluation.answers.items()
            if all(chosen(answer) for answer in answers)
        }

    return Expected(of_all(lambda answer: (answer.answer,)), of_all(lambda answer: answer.sampled))


def summarise(
    evaluation: Evaluation,
    wheels: Wheels,
    expected: Expected | None = None,
    *,
    benchmark: str,
    phase: str,
    step: int,
) -> dict[str, Any]:
    """Scores of an evaluation: slow and fast, the majority answer as a floor, the oracle (where known) as a ceiling.

    Precision, recall and F1 of all four are means over the same clips, those whose truth is on a wheel; what says how
    answers look (words, tokens, format) is over all clips.

    Args:
        evaluation: the answers.
        wheels: they are scored by.
        expected: of `expected_scores`.
        benchmark, phase, step: kept beside the scores.

    Raises:
        EvaluationError: no clip's truth is on a wheel.
    """
    records = evaluation.records
    scored = [records[place] for place in evaluation.scored]
    if not scored:
        raise EvaluationError(
            f"none of the {len(records)} held-out clips that can be used has a solution with a word on a wheel, so no "
            "answer can be scored; check the solutions, or emotion.wheel_dir"
        )
    truths = [record.solution for record in scored]
    known = [
        answer_rewards(record.extra[ORACLE_COLUMN], record.solution, wheels).f1
        for record in scored
        if record.extra.get(ORACLE_COLUMN) is not None
    ]
    # Chosen on the held-out truths themselves, so it is the best any constant answer can do there.
    floor = constant_floor(majority_answer(truths, wheels), truths, wheels)
    return {
        "step": step,
        "phase": phase,
        "benchmark": benchmark,
        "n": len(records),
        "n_scored": len(scored),
        "n_unscorable": len(records) - len(scored),
        "skipped": [{"id": record.id, "reason": reason} for record, reason in evaluation.skipped],
        **{
            mode: _scores(mode, answers) | _means(expected, mode, evaluation.scored)
            for mode, answers in evaluation.answers.items()
        },
        **({"gate": fit_and_measure(_both(evaluation))} if set(evaluation.answers) == set(MODES) else {}),
        "majority_answer": list(floor.words),
        "majority_f1": floor.f1,
        "oracle_f1": float(np.mean(known)) if len(known) == len(scored) else None,
    }


def _both(evaluation: Evaluation) -> BothAnswers:
    """What the gate is fitted on: both answers to every clip that can be scored."""
    places, records = evaluation.scored, evaluation.records

    def of(mode: str, value: Callable[[AnswerOf], float | None]) -> np.ndarray:
        return np.asarray([value(evaluation.answers[mode][place]) for place in places], np.float64)

    def clip(record: Record) -> str:
        return next(iter((*record.videos, *record.audios)), record.id)

    return BothAnswers(
        clips=tuple(clip(records[place]) for place in places),
        confidence_N=of("fast", lambda answer: answer.confidence),
        fast_f1_N=of("fast", lambda answer: answer.answer.rewards.score("f1")),
        slow_f1_N=of("slow", lambda answer: answer.answer.rewards.score("f1")),
        fast_tokens_N=of("fast", lambda answer: answer.answer.length),
        slow_tokens_N=of("slow", lambda answer: answer.answer.length),
    )


def _scores(mode: str, answers: Sequence[AnswerOf]) -> dict[str, Any]:
    def mean(values: list[float | None]) -> float | None:
        present = [value for value in values if value is not None]
        return float(np.mean(present)) if present else None

    scored = [answer.answer for answer in answers]
    return {
        **{name: mean([answer.rewards.score(name) for answer in scored]) for name in SCORES},
        "confidence_correct": mean([answer.confidence_correct for answer in answers]),
        "confidence_wrong": mean([answer.confidence_wrong for answer in answers]),
        **_second_looks(answers, mean),
        "distinct_answers": len({tuple(sorted(answer.parsed.words)) for answer in scored}),
        "mean_words": mean([float(len(answer.parsed.words)) for answer in scored]),
        "mean_length": mean([float(answer.length) for answer in scored]),
        # A fast answer is given its think block, empty: the format asked of slow answers does not apply.
        "format_rate": mean([float(answer.parsed.format_reward) for answer in scored]) if mode == "slow" else None,
        "truncated_rate": mean([float(answer.truncated) for answer in scored]),
    }


def _second_looks(answers: Sequence[AnswerOf], mean: Callable[[list[float | None]], float | None]) -> dict[str, Any]:
    """Scores of sampled answers, and confidences on the fixed words; absent where they were not asked for."""
    found: dict[str, Any] = {}
    if any(answer.sampled for answer in answers):
        found |= {f"sampled_{name}": mean([_mean_score(answer, name) for answer in answers]) for name in SCORES}
    fixed = [answer.fixed for answer in answers if answer.fixed is not None]
    if fixed:
        found["fixed_confidence_correct"] = mean([confidence.correct for confidence in fixed])
        found["fixed_confidence_wrong"] = mean([confidence.wrong for confidence in fixed])
        found["fixed_confidence_clips"] = len(fixed)  # those whose slow answer has a reasoning to put the words behind
    return found


def _mean_score(answer: AnswerOf, name: str) -> float | None:
    """Mean over a clip's sampled answers; None where its truth cannot be scored."""
    scores = [given.rewards.score(name) for given in answer.sampled]
    present = [score for score in scores if score is not None]
    return float(np.mean(present)) if present else None


def _means(expected: Expected | None, mode: str, scored: Sequence[int]) -> dict[str, float]:
    if expected is None:
        return {}
    found = {
        f"expected_{name}": float(np.mean([getattr(expected.greedy[mode][n], name) for n in scored])) for name in SCORES
    }
    if mode in expected.sampled:
        found["sampled_expected_f1"] = float(np.mean([expected.sampled[mode][n].f1 for n in scored]))
    return found


def samples(evaluation: Evaluation, wheels: Wheels, expected: Expected | None = None) -> list[dict[str, Any]]:
    """One row a clip with everything needed to look at it, or to score it again without the model."""
    rows = [
        _sample(record, {mode: answers[index] for mode, answers in evaluation.answers.items()}, wheels)
        for index, record in enumerate(evaluation.records)
    ]
    if expected is None:
        return rows
    for mode, scores in expected.greedy.items():
        for row, score in zip(rows, scores, strict=True):
            row[mode] |= {f"expected_{name}": getattr(score, name) for name in SCORES}
    for mode, scores in expected.sampled.items():
        for row, score in zip(rows, scores, strict=True):
            row[mode]["sampled_expected_f1"] = score.f1
    return rows


def _sample(record: Record, answers: dict[str, AnswerOf], wheels: Wheels) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": record.id,
        "video": record.videos[0] if record.videos else None,
        "audio": record.audios[0] if record.audios else None,
        "subtitle": record.subtitle,
        "truth": list(record.solution),
    }
    for mode, answer in answers.items():
        scored = answer.answer
        row[mode] = {
            "text": scored.text,
            "reasoning": scored.parsed.reasoning,
            "words": list(scored.parsed.words),
            "categories": [sorted(wheels.categories(scored.parsed.words, k)) for k in range(len(wheels.names))],
            **{name: scored.rewards.score(name) for name in SCORES},
            "length": scored.length,
            "confidence": answer.confidence,
            "confidence_correct": answer.confidence_correct,
            "confidence_wrong": answer.confidence_wrong,
            # Word by word, on each wheel; null where the word or the truth has no category there.
            "confidences": [[rounded(p) for p in row_Q] for row_Q in answer.confidence_WQ],
        }
        if answer.sampled:
            row[mode]["sampled"] = [given.text for given in answer.sampled]
            row[mode]["sampled_f1"] = _mean_score(answer, "f1")
        if answer.fixed is not None:
            row[mode]["fixed_confidence_correct"] = answer.fixed.correct
            row[mode]["fixed_confidence_wrong"] = answer.fixed.wrong
    return row


def rounded(probability: np.floating) -> float | None:
    """A probability as files hold it; None for NaN, where there is none."""
    return None if np.isnan(probability) else round(float(probability), 6)


def write(directory: pathlib.Path, summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> pathlib.Path:
    """Writes `<benchmark>_<step>.samples.jsonl`, then `<benchmark>_<step>.json`: scores never lack rows."""
    faults.here("evaluation_files")
    stem = f"{summary['benchmark']}_{summary['step']:05d}"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_files.write_text(directory / f"{stem}.samples.jsonl", text)
    path = directory / f"{stem}.json"
    atomic_files.write_json(path, summary)
    return path
