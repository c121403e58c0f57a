"""A policy is asked the clips of benchmarks, slow and fast; every answer is kept as it comes."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mer_r1_jax.data.records import dataset_hash
from mer_r1_jax.evaluation.benchmarks.benchmark_folder import BenchmarkFolder
from mer_r1_jax.evaluation.benchmarks.benchmark_reader import BenchmarkData, read_set, read_synthetic, truth_of
from mer_r1_jax.evaluation.benchmarks.sets import SYNTHETIC, BenchmarkError, Request, title_of
from mer_r1_jax.evaluation.evaluate import AnswerOf
from mer_r1_jax.evaluation.result_log import ResultLog
from mer_r1_jax.evaluation.summary import ORACLE_COLUMN
from mer_r1_jax.run.asking import Policy, Reply, answer_fingerprint, ask, make_evaluator
from mer_r1_jax.training.stopping import NEVER, Stop


def read_benchmarks(request: Request, question: str, held_out: tuple[str, str] = ("", "")) -> list[BenchmarkData]:
    """Reads every benchmark that is asked for, with the limit applied.

    Raises:
        BenchmarkError, RecordError: one cannot be read.
    """
    found = []
    for name in request.benchmarks:
        if name == SYNTHETIC:
            data = read_synthetic(*_synthetic_file(request.root, held_out), question=question)
        else:
            if not request.root:
                raise BenchmarkError(f"{title_of(name)}: --benchmark_root is empty; it names the folder of the sets")
            data = read_set(name, request.root, question=question)
        found.append(data.first(request.limit))
    return found


def _synthetic_file(root: str, held_out: tuple[str, str]) -> tuple[str, str]:
    own = pathlib.Path(root, SYNTHETIC, "eval.jsonl") if root else None
    if own is not None and own.is_file():
        return str(own), str(own.parent)
    if not held_out[0]:
        raise BenchmarkError(
            "synthetic: the model's run names no embedded world; give a --config with data.synthetic_dir, or "
            f"--benchmark_root with {SYNTHETIC}/eval.jsonl in it"
        )
    return held_out


def answer_benchmarks(
    policy: Policy,
    request: Request,
    datas: Sequence[BenchmarkData],
    finished: Callable[[BenchmarkData], None],
    stop: Stop = NEVER,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> None:
    """Asks every clip that has no answer yet, benchmark by benchmark.

    Args:
        policy: the model.
        request: modes and folder.
        datas: the benchmarks.
        finished: called with each that has all its answers.
        stop: asked between batches and inside them; raises StopRequested, and every answer so far is kept.
        progress: called with (benchmark, answers there, answers in all).

    Raises:
        BenchmarkError: the answers there are another model's, or of other settings or clips.
    """
    folder = BenchmarkFolder(request.out)
    folder.check_model(policy.fingerprint)
    evaluator = make_evaluator(policy.setup, tuple(record for data in datas for record in data.records))
    emotion = policy.setup.config.emotion
    wheels = {"wheel_dir": emotion.wheel_dir, "variant": emotion.variant}
    for data in datas:
        with folder.open_answers(data.name, answer_fingerprint(policy, data.name)) as answers:
            _check_records(answers, data)
            # Before the first answer as well: what a kill leaves can be scored.
            folder.write_coverage(data, wheels=wheels, unusable={}, silent=())
            there, unusable = answers.rows, {}
            wanted = {(record.id, mode): (record, mode) for record in data.records for mode in request.modes}
            lacking = [asked for key, asked in wanted.items() if key not in there]
            progress(data.name, len(wanted.keys() & there.keys()), len(wanted))
            for replies in ask(policy, evaluator, data.media_root, lacking, stop):
                lines = []
                for reply in replies:
                    if isinstance(reply.outcome, AnswerOf):
                        lines.append(answer_line(reply, reply.outcome, data.metric))
                    else:
                        unusable[reply.record.id] = str(reply.outcome)
                if lines:
                    answers.append(lines)
                    progress(data.name, len(wanted.keys() & there.keys()), len(wanted))
            if not there:
                reason = next(iter(unusable.values()), "there is none")
                raise BenchmarkError(
                    f"{title_of(data.name)}: none of {len(data.records)} clips can be asked; the first: {reason}"
                )
            silent = {line["id"] for line in there.values() if line["silent_audio"]}
            folder.write_coverage(data, wheels=wheels, unusable=unusable, silent=sorted(silent))
        finished(data)


def _check_records(answers: ResultLog, data: BenchmarkData) -> None:
    """Refuses to go on where a clip's question, subtitle, files or truth have changed since it was answered."""
    digests = {record.id: dataset_hash([record]) for record in data.records}
    changed = [
        line["id"] for line in answers.rows.values() if digests.get(line["id"], line["record"]) != line["record"]
    ]
    if changed:
        raise BenchmarkError(
            f"{answers.path}: {len(changed)} answers are to other questions, subtitles, files or labels than the data "
            f"folder has now, such as that of {changed[0]}; choose another --out, or use the earlier data"
        )


def answer_line(reply: Reply, answer: AnswerOf, metric: str) -> dict[str, Any]:
    """An answer as it is kept: everything that scores, reports and a second look need.

    Args:
        reply: what was asked.
        answer: the model's.
        metric: of the benchmark; it decides the form of the truth.
    """
    record, scored = reply.record, answer.answer
    line: dict[str, Any] = {
        "id": record.id,
        "mode": reply.mode,
        "record": dataset_hash([record]),
        "video": record.videos[0] if record.videos else None,
        "subtitle": record.subtitle,
        "truth": truth_of(record, metric),
        "text": scored.text,
        "reasoning": scored.parsed.reasoning,
        "answer": scored.parsed.answer_text,
        "words": list(scored.parsed.words),
        "confidences": [[_rounded(p) for p in row_Q] for row_Q in answer.confidence_WQ],
        "tokens": scored.length,
        "truncated": scored.truncated,
        "well_formed": bool(scored.parsed.format_reward),
        "silent_audio": reply.silent,
    }
    if ORACLE_COLUMN in record.extra:
        line[ORACLE_COLUMN] = record.extra[ORACLE_COLUMN]
    return line


def _rounded(probability: np.floating) -> float | None:
    return None if np.isnan(probability) else round(float(probability), 6)
