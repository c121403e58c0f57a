"""A policy answers MME-Emotion's questions, along the same path as those of the other benchmarks."""

from __future__ import annotations

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
from mer_r1_jax.media.errors import MediaError
from mer_r1_jax.run.asking import Policy, answer_fingerprint, ask, make_evaluator
from mer_r1_jax.training.stopping import NEVER, Stop


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
