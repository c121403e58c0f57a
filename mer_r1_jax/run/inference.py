"""Answers to clips of one's own: reasoning, emotion words, their categories, and how sure the model is of each."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from mer_r1_jax.data.records import Record
from mer_r1_jax.emotion.answer_form import MODES, Answer
from mer_r1_jax.evaluation.answering import LENGTH_STEP, AnsweringPolicy
from mer_r1_jax.media.collate import prompt_shape
from mer_r1_jax.media.prompt import Prompt
from mer_r1_jax.omni.batch import Prompts
from mer_r1_jax.parallel.mesh import row_cut
from mer_r1_jax.rl.rollout import STOP_LENGTH
from mer_r1_jax.run.asking import make_answerer
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.training.state import Params


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


def answer(setup: Setup, params: Params, record: Record, modes: Sequence[str] = MODES) -> tuple[Prompt, list[Answer]]:
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


def _read(setup: Setup, policy: AnsweringPolicy, prompts: Prompts, mode: str) -> Answer:
    answers = policy.answer(prompts, mode)
    ids, length, stop = (array[0, 0] for array in (answers.host.id_BGC, answers.host.length_BG, answers.host.stop_BG))
    said = policy.answerer.scorer.answer(ids, int(length), bool(stop == STOP_LENGTH), ())
    words = said.parsed.words
    # With its own words for truth every word has a confidence; beyond `rl.max_answer_words` there are none.
    probability_WQ = policy.score(answers, [words], require_format=False).probability_BWQ[0]
    held = {word: row_Q[~np.isnan(row_Q)] for word, row_Q in zip(words, probability_WQ, strict=False)}
    return Answer(
        mode=mode,
        reasoning=said.parsed.reasoning,
        words=words,
        probabilities={word: float(row.mean()) for word, row in held.items() if len(row)},  # mean over its wheels
        categories={
            word: tuple(setup.wheels.category(word, wheel) for wheel in range(len(setup.wheels))) for word in words
        },
        truncated=said.truncated,
        text=said.text,
    )
