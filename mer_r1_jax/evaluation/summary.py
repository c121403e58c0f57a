"""An evaluation as the numbers and rows that are kept: one JSON file of scores, one JSON-lines file of answers."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mer_r1_jax import faults
from mer_r1_jax.data.records import Record
from mer_r1_jax.emotion.rewards import answer_rewards, constant_floor, majority_answer
from mer_r1_jax.emotion.wheels import Wheels
from mer_r1_jax.evaluation.evaluate import AnswerOf, Evaluation, EvaluationError
from mer_r1_jax.storage import atomic_files

ORACLE_COLUMN = "oracle"  # extra column of the synthetic world's held-out records: the answer of one who knows the cues


def summarise(evaluation: Evaluation, wheels: Wheels, *, benchmark: str, phase: str, step: int) -> dict[str, Any]:
    """Scores of an evaluation: slow and fast, the majority answer as a floor, the oracle (where known) as a ceiling.

    Precision, recall and F1 of all four are means over the same clips, those whose truth is on a wheel; what says how
    answers look (words, tokens, format) is over all clips.

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
        **{mode: _scores(mode, answers) for mode, answers in evaluation.answers.items()},
        "majority_answer": list(floor.words),
        "majority_f1": floor.f1,
        "oracle_f1": float(np.mean(known)) if len(known) == len(scored) else None,
    }


def _scores(mode: str, answers: Sequence[AnswerOf]) -> dict[str, Any]:
    def mean(values: list[float | None]) -> float | None:
        present = [value for value in values if value is not None]
        return float(np.mean(present)) if present else None

    scored = [answer.answer for answer in answers]
    return {
        **{name: mean([answer.rewards.score(name) for answer in scored]) for name in ("precision", "recall", "f1")},
        "confidence_correct": mean([answer.confidence_correct for answer in answers]),
        "confidence_wrong": mean([answer.confidence_wrong for answer in answers]),
        "distinct_answers": len({tuple(sorted(answer.parsed.words)) for answer in scored}),
        "mean_words": mean([float(len(answer.parsed.words)) for answer in scored]),
        "mean_length": mean([float(answer.length) for answer in scored]),
        # A fast answer is given its think block, empty: the format asked of slow answers does not apply.
        "format_rate": mean([float(answer.parsed.format_reward) for answer in scored]) if mode == "slow" else None,
        "truncated_rate": mean([float(answer.truncated) for answer in scored]),
    }


def samples(evaluation: Evaluation, wheels: Wheels) -> list[dict[str, Any]]:
    """One row a clip with everything needed to look at it, or to score it again without the model."""
    return [
        _sample(record, {mode: answers[index] for mode, answers in evaluation.answers.items()}, wheels)
        for index, record in enumerate(evaluation.records)
    ]


def _sample(record: Record, answers: dict[str, AnswerOf], wheels: Wheels) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": record.id,
        "video": record.videos[0] if record.videos else None,
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
            **{name: scored.rewards.score(name) for name in ("precision", "recall", "f1")},
            "length": scored.length,
            "confidence_correct": answer.confidence_correct,
            "confidence_wrong": answer.confidence_wrong,
        }
    return row


def write(directory: pathlib.Path, summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> pathlib.Path:
    """Writes `<benchmark>_<step>.samples.jsonl`, then `<benchmark>_<step>.json`: scores never lack rows."""
    faults.here("evaluation_files")
    stem = f"{summary['benchmark']}_{summary['step']:05d}"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_files.write_text(directory / f"{stem}.samples.jsonl", text)
    path = directory / f"{stem}.json"
    atomic_files.write_json(path, summary)
    return path
