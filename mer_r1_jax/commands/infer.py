"""Answers about a clip: mer-r1 infer --model=HF_DIR_OR_RUN --video=clip.mp4 [--subtitle=... --mode=...]

Prints the reasoning, the emotion words with their categories on the five wheels, and how sure the model is of each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained
from mer_r1_jax.config.command_line import named_values
from mer_r1_jax.foreign_text import json_text, printable

if TYPE_CHECKING:
    from rich.console import Console

    from mer_r1_jax.emotion.answer_form import Answer

_MODEL = flags.DEFINE_string("model", None, "a run's folder, its export, or a Hugging Face directory", required=True)
_VIDEO = flags.DEFINE_string("video", None, "the clip", required=True)
_SUBTITLE = flags.DEFINE_string("subtitle", None, "what is said in the clip")
_QUESTION = flags.DEFINE_string("question", "", "what to ask; empty = the model's own question")
_MODE = flags.DEFINE_enum("mode", "both", ("slow", "fast", "both"), "answer after reasoning, at once, or both")
_SHOW = flags.DEFINE_enum("show", "both", ("both", "video", "audio"), "which part of the clip the model is given")
_SET = flags.DEFINE_multi_string("set", [], "a configuration field to change, such as media.max_frames=8; repeatable")
_JSON = flags.DEFINE_bool("json", False, "print JSON instead of text")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    from mer_r1_jax.run.inference import MODES, answer, clip_record
    from mer_r1_jax.run.policy import open_model

    with explained():
        # A clip without sound is answered from its frames; the line printed with the prompt says so.
        setup, params = open_model(_MODEL.value, {"media.missing_audio": "skip"} | named_values(_SET.value))
        record = clip_record(
            _VIDEO.value,
            _QUESTION.value or setup.config.data.question,
            _SUBTITLE.value,
            frames=_SHOW.value != "audio",
            audio=_SHOW.value != "video",
        )
        try:
            prompt, answers = answer(setup, params, record, MODES if _MODE.value == "both" else (_MODE.value,))
        finally:
            setup.source.close()
    if _JSON.value:
        screen.say(json_text([_as_json(one) for one in answers], indent=1))
        return
    console = screen.console()
    sound = f"{prompt.stats['audio_seconds']:.1f} s of audio" if prompt.audio else "no audio"
    console.print(
        f"{printable(_VIDEO.value)}: {prompt.stats['frames']} frames, {sound}, {len(prompt.ids)} tokens",
        highlight=False,
    )
    for one in answers:
        _show(console, one)


def _show(console: Console, answer: Answer) -> None:
    from rich.table import Table

    console.print()
    console.print(answer.mode, style="bold", end="")
    console.print(" (cut at the length cap)" if answer.truncated else "")
    if answer.mode == "slow":
        console.print(f"reasoning: {answer.reasoning or 'none'}", markup=False, highlight=False)
    if not answer.words:
        console.print(f"no answer; the model wrote: {answer.text!r}", markup=False, highlight=False)
        return
    table = Table("emotion", "confidence", "categories on the five wheels")
    for word in answer.words:
        confidence = f"{answer.probabilities[word]:.2f}" if word in answer.probabilities else "-"
        table.add_row(word, confidence, ", ".join(category or "-" for category in answer.categories[word]))
    console.print(table)


def _as_json(answer: Answer) -> dict:
    return {
        "mode": answer.mode,
        "reasoning": answer.reasoning,
        "answer": list(answer.words),
        "categories": {word: list(answer.categories[word]) for word in answer.words},
        "confidences": {word: answer.probabilities.get(word) for word in answer.words},
        "truncated": answer.truncated,
        "text": answer.text,
    }
