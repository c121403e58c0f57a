"""Answers to clips of one's own: reasoning, emotion words, their categories, and how sure the model is of each."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mer_r1_jax.data.records import Record
from mer_r1_jax.emotion.answer_form import MODES, Answer
from mer_r1_jax.emotion.wheels import Wheels
from mer_r1_jax.evaluation.answering import LENGTH_STEP, Answerer, AnsweringPolicy, Answers
from mer_r1_jax.evaluation.evaluate import Evaluator
from mer_r1_jax.evaluation.gate import Auto, confidence_of, is_sure, reason
from mer_r1_jax.media.collate import prompt_shape
from mer_r1_jax.media.prompt import Prompt
from mer_r1_jax.omni.batch import BatchShape, Prompts
from mer_r1_jax.parallel.mesh import row_cut
from mer_r1_jax.rl.rollout import STOP_LENGTH
from mer_r1_jax.run.asking import make_answerer
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.training.prompts import uid_of
from mer_r1_jax.training.state import Params
from mer_r1_jax.training.stopping import Stop

Place = str | pathlib.Path


def clip_record(
    video: Place | None,
    question: str,
    subtitle: str | None,
    *,
    frames: bool = True,
    audio: bool = True,
    voice: Place | None = None,
) -> Record:
    """A record of one clip.

    Args:
        video: the clip; a link is followed, wherever it leads: its user named it himself. None for a sound alone.
        question: what is asked.
        subtitle: what is said in it, if known.
        frames, audio: which of its parts are shown.
        voice: a sound file in place of the clip's own track.
    """
    real = {name: pathlib.Path(os.path.realpath(name)) for name in (video, voice) if name is not None}
    # A record's paths stay below one media root: here the deepest folder that both files lie in.
    root = os.path.commonpath([path.parent for path in real.values()])
    sound = video if voice is None else voice
    return Record(
        id=pathlib.Path(video or voice or "").name,
        messages=({"role": "user", "content": question},),
        videos=(os.path.relpath(real[video], root),) if frames and video is not None else (),
        audios=(os.path.relpath(real[sound], root),) if audio and sound is not None else (),
        subtitle=subtitle,
        # What is hidden, or replaced, must not come with the frames.
        use_audio_in_video=None if audio and voice is None else False,
        # There is no such file: its folder is the media root of a policy that has none set.
        file=os.path.join(root, "clip"),
    )


def answer(
    setup: Setup, params: Params, record: Record, modes: Sequence[str | Auto] = MODES
) -> tuple[Prompt, list[Answer]]:
    """Answers a clip greedily in each mode.

    Args:
        setup, params: the model.
        record: the clip.
        modes: slow, fast, or `Auto`. No answer is decoded twice.

    Raises:
        MediaError, PromptError: for a clip or text that cannot be used.
        RolloutError: the model's scores are not finite.
    """
    prompt = setup.source.load(record).prompt
    with answerer_of(setup).holding(params) as policy:
        prompts = encoded_alone(setup, policy, prompt)
        once = functools.cache(lambda mode: read(setup.wheels, policy, policy.answer(prompts, mode))[0])
        return prompt, [gated(once, mode.threshold) if isinstance(mode, Auto) else once(mode) for mode in modes]


def answerer_of(setup: Setup) -> Answerer:
    """Who answers about single clips, at the length that answers had in training."""
    return make_answerer(setup, setup.programs.sampling.max_completion_length)


def encoded_alone(setup: Setup, policy: AnsweringPolicy, prompt: Prompt) -> Prompts:
    """One prompt, encoded; on several devices the rows beyond the first are padding."""
    shape = prompt_shape(prompt)
    tokens = -(-shape.tokens // LENGTH_STEP) * LENGTH_STEP
    bucket = dataclasses.replace(shape, rows=row_cut(setup.backbone.mesh), tokens=tokens)
    return policy.encode([prompt], [bucket], [0])


def gated(answer_in: Callable[[str], Answer], threshold: float) -> Answer:
    """The fast answer, or the slow one where the model is less sure of the fast one than the threshold.

    Args:
        answer_in: mode -> the answer; slow is asked for only where it is given.
        threshold: in [0, 1].
    """
    fast = answer_in("fast")
    confidence = confidence_of(fast.probabilities)
    taken = fast if is_sure(confidence, threshold) else answer_in("slow")
    return dataclasses.replace(taken, why=reason(confidence, threshold))


class Reader(Evaluator):
    """Answers batch by batch like an evaluator, and gives each as it is read, as an `Answer`: there may be no truth.

    Args:
        answerer: decodes.
        buckets: shapes of batches.
        wheels: what categories are of.
    """

    def __init__(self, answerer: Answerer, buckets: Sequence[BatchShape], wheels: Wheels):
        super().__init__(answerer, buckets)
        self.wheels = wheels

    def _answer(
        self, policy: AnsweringPolicy, batch: Sequence[tuple[Record, Prompt]], modes: Sequence[str], stop: Stop
    ) -> dict[str, list[Any]]:
        uids = [uid_of(record.id) for record, _ in batch]
        prompts = policy.encode([prompt for _, prompt in batch], self.buckets, uids)
        return {mode: read(self.wheels, policy, policy.answer(prompts, mode, stop), len(batch)) for mode in modes}


def read(wheels: Wheels, policy: AnsweringPolicy, answers: Answers, rows: int = 1) -> list[Answer]:
    """The answers to the first rows of a batch, with their confidences; the other rows are padding."""
    # Each row has one answer (G = 1), and no truth is given, so its rewards mean nothing.
    said = [
        policy.answerer.scorer.answer(ids, int(length), bool(how == STOP_LENGTH), ())
        for ids, length, how in zip(
            answers.host.id_BGC[:rows, 0],
            answers.host.length_BG[:rows, 0],
            answers.host.stop_BG[:rows, 0],
            strict=True,
        )
    ]
    # With its own words for truth every word has a confidence; beyond `rl.max_answer_words` there are none.
    own = [one.parsed.words for one in said]
    probability_BWQ = policy.score(answers, own, require_format=False)
    found = []
    for one, probability_WQ in zip(said, probability_BWQ, strict=False):
        words = one.parsed.words
        on_wheels = {
            word: row_Q for word, row_Q in zip(words, probability_WQ, strict=False) if not np.isnan(row_Q).all()
        }
        found.append(
            Answer(
                mode=answers.mode,
                reasoning=one.parsed.reasoning,
                words=words,
                # The mean is over the wheels on which the word has a category.
                probabilities={word: float(row_Q[~np.isnan(row_Q)].mean()) for word, row_Q in on_wheels.items()},
                categories={
                    word: tuple(wheels.category(word, wheel) for wheel in range(len(wheels))) for word in words
                },
                truncated=one.truncated,
                text=one.text,
                wheel_probabilities={
                    word: tuple(None if np.isnan(one) else float(one) for one in row_Q)
                    for word, row_Q in on_wheels.items()
                },
            )
        )
    return found


def as_json(answer: Answer) -> dict[str, Any]:
    """An answer as JSON values."""
    return {
        "mode": answer.mode,
        "reasoning": answer.reasoning,
        "answer": list(answer.words),
        "categories": {word: list(answer.categories[word]) for word in answer.words},
        "confidences": {word: answer.probabilities.get(word) for word in answer.words},
        "truncated": answer.truncated,
        "text": answer.text,
        **({"why": answer.why} if answer.why else {}),
    }
