"""A policy is asked the clips of benchmarks and MME-Emotion's questions, slow and fast.

Every answer is kept as it comes: by `answer_benchmarks` itself, and of MME-Emotion by its pipeline, whose predictor
`PolicyAnswers` is.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mer_r1_jax import faults
from mer_r1_jax.data.records import Record, dataset_hash
from mer_r1_jax.evaluation.benchmarks.benchmark_folder import BenchmarkFolder
from mer_r1_jax.evaluation.benchmarks.benchmark_reader import BenchmarkData, read_set, read_synthetic, truth_of
from mer_r1_jax.evaluation.benchmarks.sets import SYNTHETIC, BenchmarkError, Request, title_of
from mer_r1_jax.evaluation.evaluate import AnswerOf
from mer_r1_jax.evaluation.gate import confidence_of_line, is_sure
from mer_r1_jax.evaluation.mme.judging import QUESTION_VERSION, question
from mer_r1_jax.evaluation.mme.mme_folder import NAME as MME_EMOTION
from mer_r1_jax.evaluation.mme.mme_reader import Benchmark, Item
from mer_r1_jax.evaluation.mme.mme_tasks import TASKS
from mer_r1_jax.evaluation.mme.stages import Asked, Failure
from mer_r1_jax.evaluation.result_log import ResultLog
from mer_r1_jax.evaluation.summary import ORACLE_COLUMN, rounded
from mer_r1_jax.media.opening import MediaError
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
            "synthetic: the model's run names no synthetic world; give a --config with data.synthetic_dir, or "
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
    # One evaluator for all benchmarks: they share the shapes of batches, and so the compiled programs.
    evaluator = make_evaluator(policy.setup, tuple(record for data in datas for record in data.records))
    emotion = policy.setup.config.emotion
    wheels = {"wheel_dir": emotion.wheel_dir, "variant": emotion.variant}
    for data in datas:
        with folder.open_answers(data.name, answer_fingerprint(policy, data.name)) as answers:
            _check_records(answers, data)
            # Answers that are there keep the threshold they were gated by, whatever is asked now: without it slow ones
            # to unsure clips alone would be scored as if any clip could have had one.
            threshold = request.threshold
            if threshold is None and answers.rows:
                threshold = folder.kept_threshold(data.name)
            # Before the first answer as well: what a kill leaves can be scored.
            about = {"wheels": wheels, "threshold": threshold}
            folder.write_coverage(data, **about, unusable={}, silent=())
            # `there` is the log's own table and grows with every append. What cannot be asked is not in it, so that the
            # next start tries it again.
            there, unusable = answers.rows, {}
            # Gated answers take two rounds: which slow ones they need is known when the fast ones are there.
            for _ in range(1 if request.threshold is None else 2):
                wanted = _wanted(data, request, there)
                lacking = [asked for key, asked in wanted.items() if key not in there and key[0] not in unusable]
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
            folder.write_coverage(data, **about, unusable=unusable, silent=sorted(silent))
        finished(data)


def _wanted(
    data: BenchmarkData, request: Request, there: Mapping[tuple[str, str], Mapping[str, Any]]
) -> dict[tuple[str, str], tuple[Record, str]]:
    """(clip, mode) -> what is asked: the request's modes, and slowly too where a gate does not take the fast answer.

    Args:
        there: the answers so far.
    """
    wanted = {(record.id, mode): (record, mode) for record in data.records for mode in request.modes}
    if request.threshold is not None:
        for record in data.records:
            fast = there.get((record.id, "fast"))
            if fast is not None and not is_sure(confidence_of_line(fast), request.threshold):
                wanted[record.id, "slow"] = (record, "slow")
    return wanted


def _check_records(answers: ResultLog, data: BenchmarkData) -> None:
    """Refuses to go on where a clip's question, subtitle, files or truth have changed since it was answered."""
    digests = {record.id: dataset_hash([record]) for record in data.records}
    # A clip that is not asked this time, as beyond a limit, keeps its answer.
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
        "confidences": [[rounded(p) for p in row_Q] for row_Q in answer.confidence_WQ],
        "confidence": None if answer.confidence is None else rounded(np.float64(answer.confidence)),
        "tokens": scored.length,
        "truncated": scored.truncated,
        "well_formed": bool(scored.parsed.format_reward),
        "silent_audio": reply.silent,
    }
    # Records of the synthetic world bring the answer of one who knows the cues: the ceiling of its scores.
    if ORACLE_COLUMN in record.extra:
        line[ORACLE_COLUMN] = record.extra[ORACLE_COLUMN]
    return line


class PolicyAnswers:
    """A policy as a predictor for `evaluation.mme.mme_pipeline.run`. Answers greedily, batch by batch.

    Args:
        policy: the model.
        benchmark: what it is asked.
        modes: slow, fast or both.
        stop: asked between batches and inside them.
    """

    def __init__(self, policy: Policy, benchmark: Benchmark, modes: Sequence[str], stop: Stop = NEVER):
        self.modes = tuple(modes)
        self.fingerprint: Mapping[str, Any] = answer_fingerprint(policy, MME_EMOTION) | {"question": QUESTION_VERSION}
        self._policy, self._benchmark, self._stop = policy, benchmark, stop

    def answers(self, asked: Sequence[Asked]) -> Iterator[tuple[Asked, Mapping[str, Any] | Failure]]:
        """An answer, or why there is none, for each, in batches of items that lack the same modes."""
        present = []
        for one in asked:
            if one.item.video is None:
                yield one, Failure("clip_missing", f"{one.item.key}: the clip is not under {self._benchmark.root}")
            else:
                present.append(one)
        # Shapes of batches are planned from records, so there has to be one.
        if not present:
            return
        records = {one.item.key: record_of(one.item) for one in present}
        evaluator = make_evaluator(self._policy.setup, tuple(records.values()))
        pairs = [(records[one.item.key], one.mode) for one in present]
        items = {one.item.key: one.item for one in present}
        for replies in ask(self._policy, evaluator, self._benchmark.root, pairs, self._stop):
            for reply in replies:
                one, outcome = Asked(items[reply.record.id], reply.mode), reply.outcome
                if isinstance(outcome, AnswerOf):
                    yield one, answer_row(outcome)
                else:
                    reason = f"clip_{outcome.reason}" if isinstance(outcome, MediaError) else "prompt"
                    yield one, Failure(reason, str(outcome))


def record_of(item: Item) -> Record:
    """An item as the policy is asked it: frames, sound and our question."""
    assert item.video is not None  # where its clip is missing it is not asked
    return Record(
        id=item.key,
        messages=({"role": "user", "content": question(TASKS[item.task], item.label_set)},),
        videos=(item.video,),
        audios=(item.video,),
    )


def answer_row(answer: AnswerOf) -> dict[str, Any]:
    """An answer as it is kept."""
    faults.here("answer_row")
    scored = answer.answer
    return {"text": scored.text, "tokens": scored.length, "truncated": scored.truncated}
