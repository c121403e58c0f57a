"""A policy answers MME-Emotion's questions, along the same path as those of the other benchmarks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mer_r1_jax import faults
from mer_r1_jax.data.records import Record
from mer_r1_jax.evaluation.evaluate import AnswerOf
from mer_r1_jax.evaluation.mme.judging import QUESTION_VERSION, question
from mer_r1_jax.evaluation.mme.mme_folder import NAME
from mer_r1_jax.evaluation.mme.mme_reader import Benchmark, Item
from mer_r1_jax.evaluation.mme.mme_tasks import TASKS
from mer_r1_jax.evaluation.mme.stages import Asked, Failure
from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.media.prompt import Prompt, PromptError
from mer_r1_jax.run.answering import make_evaluator
from mer_r1_jax.run.benchmark import Policy, answer_fingerprint
from mer_r1_jax.training.prompts import PromptSource
from mer_r1_jax.training.stopping import NEVER, Stop

log = logging.getLogger(__name__)


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
        self.fingerprint: Mapping[str, Any] = answer_fingerprint(policy, NAME) | {"question": QUESTION_VERSION}
        self._policy, self._benchmark, self._stop = policy, benchmark, stop

    def answers(self, asked: Sequence[Asked]) -> Iterator[tuple[Asked, Mapping[str, Any] | Failure]]:
        """An answer, or why there is none, for each, in batches of items that lack the same modes."""
        present = []
        for one in asked:
            if one.item.video is None:
                yield one, Failure("clip_missing", f"{one.item.key}: the clip is not under {self._benchmark.root}")
            else:
                present.append(one)
        if not present:
            return
        records = {one.item.key: record_of(one.item) for one in present}
        evaluator = make_evaluator(self._policy.setup, tuple(records.values()))
        source = self._source()
        try:
            for modes, items in _by_modes(present).items():
                failures: list[tuple[Item, Failure]] = []
                prompts = self._prompts(source, [(item, records[item.key]) for item in items], failures)
                of_record = {item.key: item for item in items}
                for batch, answers in evaluator.batches(self._policy.params, prompts, modes, [], self._stop):
                    for row, record in enumerate(batch):
                        for mode in modes:
                            yield Asked(of_record[record.id], mode), answer_row(answers[mode][row])
                for item, failure in failures:
                    for mode in modes:
                        yield Asked(item, mode), failure
        finally:
            source.close()

    def _source(self) -> PromptSource:
        """Decodes clips below the benchmark's folder."""
        setup = self._policy.setup
        data = dataclasses.replace(setup.config.data, media_root=str(self._benchmark.root))
        return PromptSource(dataclasses.replace(setup.config, data=data), setup.tokenizer, setup.backbone.config)

    def _prompts(
        self, source: PromptSource, items: Sequence[tuple[Item, Record]], failures: list[tuple[Item, Failure]]
    ) -> Iterator[tuple[Record, Prompt | str]]:
        for item, record in items:
            try:
                yield record, source.load(record).prompt
            except (MediaError, PromptError) as error:
                reason = f"clip_{error.reason}" if isinstance(error, MediaError) else "prompt"
                log.warning("%s: not asked: %s", item.key, error)
                failures.append((item, Failure(reason, str(error))))


def record_of(item: Item) -> Record:
    """An item as the policy is asked it: frames, sound and our question."""
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


def _by_modes(asked: Sequence[Asked]) -> dict[tuple[str, ...], list[Item]]:
    """Items by the modes they lack: one that lacks both is encoded once for both."""
    lacking: dict[Item, list[str]] = {}
    for one in asked:
        lacking.setdefault(one.item, []).append(one.mode)
    grouped: dict[tuple[str, ...], list[Item]] = {}
    for item, modes in lacking.items():
        grouped.setdefault(tuple(modes), []).append(item)
    return grouped
