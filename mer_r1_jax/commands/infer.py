"""Answers about a clip: mer-r1 infer --model=HF_DIR_OR_RUN --video=clip.mp4 [--subtitle=... --mode=...]

    mer-r1 infer --model=HF_DIR_OR_RUN --audio=voice.wav [--video=clip.mp4]
    mer-r1 infer --model=HF_DIR_OR_RUN --data=FILE --out=FILE.jsonl|FILE.csv [--media_root=DIR --mode=slow|fast|auto]

Prints the reasoning, the emotion words with their categories on the five wheels, and how sure the model is of each.
With --out they go to a file instead: one JSON object to a line, or the table `name,openset` of MER2025. Answers are
kept as they come, in FILE.answers.jsonl: the same command goes on where it was stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import ended, explained
from mer_r1_jax.config.command_line import named_values
from mer_r1_jax.config.schema import ConfigError
from mer_r1_jax.emotion.answer_form import AUTO
from mer_r1_jax.faults import StopRequested
from mer_r1_jax.foreign_text import json_text, printable
from mer_r1_jax.training.signals import EXIT_SAVED, GRACE_SECONDS, StopSignals

if TYPE_CHECKING:
    from rich.console import Console

    from mer_r1_jax.data.records import Record
    from mer_r1_jax.emotion.answer_form import Answer
    from mer_r1_jax.evaluation.gate import Auto
    from mer_r1_jax.run.answer_file import AnswerCounts

_MODEL = flags.DEFINE_string("model", None, "a run's folder, its export, or a Hugging Face directory", required=True)
_VIDEO = flags.DEFINE_string("video", None, "the clip")
_AUDIO = flags.DEFINE_string("audio", None, "a sound file: alone, or in place of the clip's own sound")
_DATA = flags.DEFINE_string("data", None, "a data file, all records of which are asked; needs --out")
_MEDIA_ROOT = flags.DEFINE_string(
    "media_root", "", "--data: folder the media paths are relative to; empty = the file's"
)
_OUT = flags.DEFINE_string("out", "", "file of answers, .jsonl or .csv; empty = they are printed")
_SUBTITLE = flags.DEFINE_string("subtitle", None, "what is said in the clip")
_QUESTION = flags.DEFINE_string("question", "", "what to ask; empty = the model's own question")
_MODE = flags.DEFINE_enum(
    "mode",
    "both",
    ("slow", "fast", "both", "auto"),
    "answer after reasoning, at once, or both; auto: at once, and after reasoning where the model is less sure of that "
    "than the threshold. A CSV has one answer: slow",
)
_THRESHOLD = flags.DEFINE_float(
    "threshold", None, "--mode=auto: confidence from which on a fast answer stands; empty = what the run fitted", 0, 1
)
_SHOW = flags.DEFINE_enum("show", "both", ("both", "video", "audio"), "which part of the clip the model is given")
_SET = flags.DEFINE_multi_string("set", [], "a configuration field to change, such as media.max_frames=8; repeatable")
_JSON = flags.DEFINE_bool("json", False, "print JSON instead of text")
_FAILURES_SHOWN = 5  # records that could not be asked, on the screen; the file of answers has them all


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    with explained():
        _check_flags()
        if _OUT.value:
            code = _to_file()
        else:
            _print_one()
            code = 0
    return ended(code)


def _check_flags() -> None:
    """Refuses flags that do not go together, before anything is loaded."""
    if bool(_DATA.value) == bool(_VIDEO.value or _AUDIO.value):
        given = "both" if _DATA.value else "neither"
        raise ConfigError(f"got {given}, expected --data=FILE, or else --video=FILE, --audio=FILE or the two; give one")
    if _DATA.value and not _OUT.value:
        raise ConfigError("--out is empty, expected FILE.jsonl or FILE.csv beside --data; name the file of answers")
    if _DATA.value and (_SUBTITLE.value is not None or _SHOW.value != "both"):
        raise ConfigError(
            "got --subtitle or --show beside --data, expected them with one clip; the file's records say what is shown"
        )
    if _THRESHOLD.value is not None and _MODE.value != AUTO:
        raise ConfigError(
            f"--threshold: got it beside --mode={_MODE.value}, expected --mode=auto, which alone compares with it; "
            "change the mode, or leave it out"
        )
    if _VIDEO.value is None and _SHOW.value == "video":
        raise ConfigError("--show: got video without --video, so there is nothing to show; name the clip")


def _modes() -> tuple[str | Auto, ...]:
    """What is asked of each clip, once the threshold is known."""
    if _MODE.value == AUTO:
        from mer_r1_jax.evaluation.gate import Auto
        from mer_r1_jax.run.fitted_gate import threshold_of

        return (Auto(threshold_of(_MODEL.value, _THRESHOLD.value)),)
    return _named_modes()


def _named_modes() -> tuple[str, ...]:
    if _MODE.value == "both" and pathlib.Path(_OUT.value).suffix == ".csv" and not flags.FLAGS["mode"].present:
        return ("slow",)
    return ("slow", "fast") if _MODE.value == "both" else (_MODE.value,)


def _clip(question: str) -> Record:
    from mer_r1_jax.run.inference import clip_record

    frames, audio = _SHOW.value != "audio", _SHOW.value != "video"
    return clip_record(_VIDEO.value, question, _SUBTITLE.value, frames=frames, audio=audio, voice=_AUDIO.value)


def _to_file() -> int:
    from mer_r1_jax.data.records import read_records
    from mer_r1_jax.run.answer_file import answer_records, check_out
    from mer_r1_jax.run.asking import open_policy
    from mer_r1_jax.run.policy import extra_columns_of, refuse_in_run
    from mer_r1_jax.training.stopping import Stop

    refuse_in_run(_OUT.value)
    modes = _modes()
    check_out(_OUT.value, modes)
    changes = named_values(_SET.value)
    extra_columns = extra_columns_of(_MODEL.value, changes)
    read = functools.partial(read_records, str(_DATA.value), _MEDIA_ROOT.value, extra_columns=extra_columns)
    if _DATA.value:
        read()  # what is wrong with it shows before a model is loaded
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignals(GRACE_SECONDS))
        policy = open_policy(_MODEL.value, changes=changes)
        stack.callback(policy.setup.source.close)
        question = _QUESTION.value or policy.setup.config.data.question
        if _DATA.value:
            records = read(question=question)
        else:
            clip = _clip(question)
            records = [dataclasses.replace(clip, id=pathlib.Path(clip.id).stem)]  # the challenge's `name`
        show = stack.enter_context(screen.stage_bar("answer"))
        try:
            counts = answer_records(
                policy,
                [(record, mode) for record in records for mode in modes],
                _OUT.value,
                media_root=_MEDIA_ROOT.value if _DATA.value else "",
                stop=Stop(stop),
                progress=lambda there, total: show("answered", there, total),
            )
        except StopRequested:
            screen.say("stopped; the same command goes on from there", error=True)
            return EXIT_SAVED
    _say(counts)
    return 0


def _say(counts: AnswerCounts) -> None:
    said = f"{_OUT.value}: {counts.answered} answers, {counts.wordless} of them without an emotion word"
    if counts.gated:
        said += f"; {counts.gated.get('fast', 0)} fast, {counts.gated.get('slow', 0)} slow"
    if counts.failed:
        said += f"; {len(counts.failed)} records could not be asked, which the same command tries again:"
    screen.say(said)
    for name, why in list(counts.failed.items())[:_FAILURES_SHOWN]:
        screen.say(f"  {name}: {why}")
    if len(counts.failed) > _FAILURES_SHOWN:
        screen.say(f"  ... and {len(counts.failed) - _FAILURES_SHOWN} more")


def _print_one() -> None:
    from mer_r1_jax.run.inference import answer, as_json
    from mer_r1_jax.run.policy import open_model

    modes = _modes()
    # A clip without sound is answered from its frames; the line printed with the prompt says so.
    setup, params = open_model(_MODEL.value, {"media.missing_audio": "skip"} | named_values(_SET.value))
    try:
        prompt, answers = answer(setup, params, _clip(_QUESTION.value or setup.config.data.question), modes)
    finally:
        setup.source.close()
    if _JSON.value:
        screen.say(json_text([as_json(one) for one in answers], indent=1))
        return
    console = screen.console()
    sound = f"{prompt.stats['audio_seconds']:.1f} s of audio" if prompt.audio else "no audio"
    name = printable(_VIDEO.value or _AUDIO.value)
    console.print(
        f"{name}: {prompt.stats['frames']} frames, {sound}, {len(prompt.ids)} tokens",
        highlight=False,
    )
    for one in answers:
        _show(console, one)


def _show(console: Console, answer: Answer) -> None:
    from rich.table import Table

    console.print()
    console.print(answer.mode, style="bold", end="")
    console.print(" (cut at the length cap)" if answer.truncated else "")
    if answer.why:
        console.print(f"taken because: {answer.why}", markup=False, highlight=False)
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
