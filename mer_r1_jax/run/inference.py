"""Answers to clips of one's own: reasoning, emotion words, their categories, and how sure the model is of each."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from mer_r1_jax.data.records import Record
from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.evaluation.answering import LENGTH_STEP, AnsweringPolicy
from mer_r1_jax.media.collate import prompt_shape
from mer_r1_jax.media.prompt import Prompt
from mer_r1_jax.omni.batch import Prompts
from mer_r1_jax.parallel.mesh import row_cut
from mer_r1_jax.rl.rollout import STOP_LENGTH
from mer_r1_jax.run.asking import make_answerer
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.training.state import Params


@dataclasses.dataclass(frozen=True)
class WordReading:
    """One emotion word of an answer.

    Attributes:
        word: as answered, lower-case.
        categories: its category on each wheel, None where it has none.
        confidence: probability of its categories where it was said, mean over the wheels; None where it has none.
    """

    word: str
    categories: tuple[str | None, ...]
    confidence: float | None


@dataclasses.dataclass(frozen=True)
class Reading:
    """One mode's answer to a clip.

    Attributes:
        mode: slow or fast.
        text: everything that was generated, a forced prefix included.
        reasoning: what stands in the think block; None when there is none.
        words: the emotion words.
        truncated: the answer hit the length cap.
    """

    mode: str
    text: str
    reasoning: str | None
    words: tuple[WordReading, ...]
    truncated: bool


def clip_record(video: str | pathlib.Path, question: str, subtitle: str | None, *, frames: bool, audio: bool) -> Record:
    """A record of one clip.

    Args:
        video: the clip; a link is followed, wherever it leads: its user named it himself.
        question: what is asked.
        subtitle: what is said in it, if known.
        frames, audio: which of its parts are shown.
    """
    path = pathlib.Path(os.path.realpath(video))
    return Record(
        id=pathlib.Path(video).name,
        messages=({"role": "user", "content": question},),
        videos=(path.name,) if frames else (),
        audios=(path.name,) if audio else (),
        subtitle=subtitle,
        file=str(path),
    )


def answer(setup: Setup, params: Params, record: Record, modes: Sequence[str] = MODES) -> tuple[Prompt, list[Reading]]:
    """Answers a clip greedily in each mode.

    Raises:
        MediaError, PromptError: for a clip or text that cannot be used.
        RolloutError: the model's scores are not finite.
    """
    prompt = setup.source.load(record).prompt
    shape = prompt_shape(prompt)
    # On several devices the rows beyond the first are padding.
    bucket = dataclasses.replace(
        shape, rows=row_cut(setup.backbone.mesh), tokens=-(-shape.tokens // LENGTH_STEP) * LENGTH_STEP
    )
    answerer = make_answerer(setup, setup.programs.sampling.max_completion_length)
    with answerer.holding(params) as policy:
        prompts = policy.encode([prompt], [bucket], [0])
        return prompt, [_read(setup, policy, prompts, mode) for mode in modes]


def _read(setup: Setup, policy: AnsweringPolicy, prompts: Prompts, mode: str) -> Reading:
    answers = policy.answer(prompts, mode)
    ids, length, stop = (array[0, 0] for array in (answers.host.id_BGC, answers.host.length_BG, answers.host.stop_BG))
    said = policy.answerer.scorer.answer(ids, int(length), bool(stop == STOP_LENGTH), ())
    # With its own words for truth every word has a confidence.
    probability_WQ = policy.score(answers, [said.parsed.words], require_format=False).probability_BWQ[0]
    words = tuple(
        WordReading(
            word=word,
            categories=tuple(setup.wheels.category(word, wheel) for wheel in range(len(setup.wheels))),
            confidence=_mean(probability_WQ[index]) if index < len(probability_WQ) else None,
        )
        for index, word in enumerate(said.parsed.words)
    )
    return Reading(mode, said.text, said.parsed.reasoning, words, said.truncated)


def _mean(probability_Q: np.ndarray) -> float | None:
    """Over the wheels on which a word has a candidate set."""
    held_Q = ~np.isnan(probability_Q)
    return float(probability_Q[held_Q].mean()) if held_Q.any() else None
