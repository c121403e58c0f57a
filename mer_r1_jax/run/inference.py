"""Answers to clips of one's own: reasoning, emotion words, their categories, and how sure the model is of each."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from mer_r1_jax.data.records import Record
from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.media.collate import prompt_shape
from mer_r1_jax.media.prompt import Prompt
from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.parallel.mesh import row_cut
from mer_r1_jax.parallel.rows import put
from mer_r1_jax.rl.confidence import NO_SET
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.rl.rollout import check_finite
from mer_r1_jax.rl.sampling import greedy
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.training.prompts import prompt_rows
from mer_r1_jax.training.state import Params

LENGTH_STEP = 64  # prompts are padded to a multiple of this, so that clips of one size share a compiled program


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
    with setup.programs.rollout_params(params) as decoding:
        return prompt, [_read(setup, params, decoding, prompt, bucket, mode) for mode in modes]


def _read(setup: Setup, params: Params, decoding: Params, prompt: Prompt, bucket: BatchShape, mode: str) -> Reading:
    programs, scorer = setup.programs, setup.eval_scorer
    rows = put(prompt_rows([prompt], [bucket], setup.backbone.config, [0]), setup.backbone.mesh)
    rows = programs.encode(params, rows)
    sampling = greedy(programs.sampling, scorer.tags.empty_think if mode == "fast" else ())
    completions = programs.sample(decoding, rows, jax.random.key(0), sampling)
    host = jax.device_get(completions)
    check_finite(host)
    padding = [None] * (bucket.rows - 1)
    scored = scorer.groups(host, [(), *padding]).answers[0][0]
    # With its own words for truth every word has a confidence.
    groups = scorer.groups(host, [scored.parsed.words, *padding], require_format=False)
    completion = Continuations(id_BGC=completions.id_BGC, exists_BGC=completions.exists_BGC)
    anchors = put(groups.anchors, setup.backbone.mesh)
    slow_BGWQ, _ = programs.score(params, rows, completion, anchors, setup.candidates.ids_ZY)
    confidences = _by_word(np.exp(jax.device_get(slow_BGWQ))[0, 0], groups.anchors.set_BGWQ[0, 0])
    wheels = range(len(setup.wheels))
    words = tuple(
        WordReading(
            word=word,
            categories=tuple(setup.wheels.category(word, wheel) for wheel in wheels),
            confidence=confidences.get(index),
        )
        for index, word in enumerate(scored.parsed.words)
    )
    return Reading(mode, scored.text, scored.parsed.reasoning, words, scored.truncated)


def _by_word(probability_WQ: np.ndarray, set_WQ: np.ndarray) -> dict[int, float]:
    """Mean over the wheels on which a word has a candidate set."""
    held_WQ = set_WQ != NO_SET
    return {w: float(probability_WQ[w][held_WQ[w]].mean()) for w in range(len(set_WQ)) if held_WQ[w].any()}
