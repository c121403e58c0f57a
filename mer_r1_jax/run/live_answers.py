"""Answers to one question after the other, told while they are decoded: what `mer-r1 serve` shows on its page.

A question is answered in one or several modes and, where that is asked for, once more with the face, the voice or the
subtitle hidden. What comes of it is told as events, small JSON objects with a `kind`:

    clip      what the model is shown: frames, seconds of sound, tokens of the prompt
    begins    an answer is decoded now: its `mode`, and `hidden`, the part that is not shown ("" = all are)
    text      what is written so far, after every `rl.decode_chunk` tokens; with the same two fields
    answer    the answer, read, with the same two fields
    taken     of a gated answer, the `mode` that was taken, and `why`
    left_out  a part that cannot be hidden, and why
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mer_r1_jax.data.records import Record
from mer_r1_jax.emotion.answer_form import Answer
from mer_r1_jax.evaluation.answering import AnsweringPolicy
from mer_r1_jax.evaluation.gate import Auto
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.media.prompt import Prompt
from mer_r1_jax.run.inference import answerer_of, as_json, clip_record, encoded_alone, gated, read
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.training.state import Params

Tell = Callable[[dict[str, Any]], None]
PARTS = ("face", "voice", "subtitle")


@dataclasses.dataclass(frozen=True)
class Question:
    """What somebody asks about a clip.

    Attributes:
        clip: the file.
        name: what its owner calls it.
        is_sound: it is a voice alone.
        subtitle: what is said in it, where known.
        text: what is asked; "" asks what the model was trained on.
        modes: slow, fast, or `Auto`, each answered.
        hide: also answer with each part hidden, in the mode of the first answer.
    """

    clip: pathlib.Path
    name: str
    is_sound: bool
    subtitle: str | None
    text: str
    modes: tuple[str | Auto, ...]
    hide: bool = False

    def record(self, question: str, hidden: str = "") -> Record:
        """What the model is shown, without one of its parts."""
        return clip_record(
            None if self.is_sound else self.clip,
            self.text or question,
            None if hidden == "subtitle" else self.subtitle,
            frames=hidden != "face",
            audio=hidden != "voice",
            voice=self.clip if self.is_sound else None,
        )


class LiveAnswers:
    """A model that answers one question at a time. What decoding holds is freed at the end of a `with` block, or
    with the process.

    Args:
        setup, params: the model; `rl.decode_chunk` says how often the text so far is told.
    """

    def __init__(self, setup: Setup, params: Params):
        self.setup = setup
        # Parameters lie ready for decoding from one question to the next.
        self._stack = contextlib.ExitStack()
        self._policy = self._stack.enter_context(answerer_of(setup).holding(params))

    def __enter__(self) -> LiveAnswers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def answer(self, question: Question, tell: Tell) -> None:
        """Answers, telling what comes of it.

        Args:
            question: of one clip.
            tell: called with each event; what it raises ends the answer, at the latest after the next chunk.

        Raises:
            MediaError, PromptError: a clip or text that cannot be used.
            RolloutError: the model's scores are not finite.
        """
        prompt = self._prompt(question)
        tell({"kind": "clip", **_shown(prompt)})
        answers = list(self._answers(prompt, question.modes, "", tell))
        # Parts are hidden in the mode of the first answer; of a gated one that is the mode that was taken.
        for part in PARTS if question.hide else ():
            if why := _cannot_hide(part, question, prompt):
                tell({"kind": "left_out", "hidden": part, "why": why})
                continue
            without = self._prompt(question, part)
            list(self._answers(without, (answers[0].mode,), part, tell))

    def _prompt(self, question: Question, hidden: str = "") -> Prompt:
        return self.setup.source.load(question.record(self.setup.config.data.question, hidden)).prompt

    def _answers(self, prompt: Prompt, modes: tuple[str | Auto, ...], hidden: str, tell: Tell) -> Iterator[Answer]:
        """The answers, each told as it is there; none is decoded twice."""
        policy, wheels = self._policy, self.setup.wheels
        prompts = encoded_alone(self.setup, policy, prompt)

        def decoded(mode: str) -> Answer:
            about = {"mode": mode, "hidden": hidden}
            tell({"kind": "begins", **about})

            def watch(sampled: Any) -> None:
                tell({"kind": "text", **about, "text": _text_so_far(policy, sampled)})

            answer = read(wheels, policy, policy.answer(prompts, mode, watch=watch))[0]
            on_wheels = {word: list(row) for word, row in answer.wheel_probabilities.items()}
            tell({"kind": "answer", "hidden": hidden, **as_json(answer), "wheel_confidences": on_wheels})
            return answer

        # A mode that is asked for and that a gate takes as well is decoded, and told, once.
        once = functools.cache(decoded)
        for mode in modes:
            if isinstance(mode, Auto):
                answer = gated(once, mode.threshold)
                tell({"kind": "taken", "mode": answer.mode, "why": answer.why})
            else:
                answer = once(mode)
            yield answer


def told_error(error: Exception, question: Question) -> str:
    """What was wrong with a question, for its asker: the clip by its own name, not where it lies here."""
    if isinstance(error, MediaError):
        return printable(f"{question.name}: {error.found}; expected {error.expected}. {error.mend}")
    # Its file has a name of its own here, which may stand without its folder.
    said = str(error).replace(str(question.clip), question.name).replace(question.clip.name, question.name)
    return printable(said)


def _shown(prompt: Prompt) -> dict[str, Any]:
    seconds = float(prompt.stats["audio_seconds"]) if prompt.audio else 0.0
    return {"frames": int(prompt.stats["frames"]), "seconds_of_sound": seconds, "tokens": len(prompt.ids)}


def _cannot_hide(part: str, question: Question, prompt: Prompt) -> str:
    """Why a part of a clip cannot be hidden; "" where it can."""
    there = {
        "face": bool(prompt.stats["frames"]),
        "voice": bool(prompt.audio),
        "subtitle": bool(question.subtitle),
    }
    if not there[part]:
        return "there is none"
    if part != "subtitle" and not any(there[other] for other in ("face", "voice") if other != part):
        return "nothing would be left to show"
    return ""


def _text_so_far(policy: AnsweringPolicy, sampled: Any) -> str:
    """The text of the first row; a character that is cut between two tokens waits for its other half."""
    length = int(np.asarray(sampled.length_BG)[0, 0])
    ids = np.asarray(sampled.id_BGC)[0, 0, :length]
    return policy.answerer.scorer.tags.completion_text(ids, length).rstrip("\ufffd")
