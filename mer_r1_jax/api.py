"""The public face, for notebooks and other programs: `mer_r1_jax.load`, `Model.answer`, `mer_r1_jax.score`.

import mer_r1_jax

with mer_r1_jax.load("runs/synthetic") as model:
    answer = model.answer(video="clip.mp4", subtitle="Watch what I do next.", mode="slow")
print(answer.reasoning, answer.words, answer.probabilities)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mer_r1_jax.config.bounds import is_bucket
from mer_r1_jax.emotion import predictions as scoring
from mer_r1_jax.emotion.answer_form import Answer
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.evaluation.gate import Auto

Mode = Literal["slow", "fast", "auto"]
Part = Literal["both", "video", "audio"]


class ArgumentError(ValueError):
    """An argument that cannot be used; the message says what was got, what was expected and how to mend it."""


class Model:
    """A policy that answers about clips; `load` makes one. Answers are greedy: the same clip gives the same answer.

    Use it in a `with` block, or call `close`: processes that decode clips end with it.
    """

    def __init__(self, setup: Any, params: Any, path: str):
        # Looked up later, from wherever this process works by then.
        self._setup, self._params, self._path = setup, params, path if is_bucket(path) else os.path.abspath(path)
        self._threshold: float | None = None

    def answer(
        self,
        *,
        video: str | os.PathLike[str] | None = None,
        audio: str | os.PathLike[str] | None = None,
        subtitle: str | None = None,
        question: str | None = None,
        mode: Mode | Auto = "slow",
        show: Part = "both",
    ) -> Answer:
        """Answers about one clip.

        Args:
            video: the clip. One without sound is answered from its frames.
            audio: a sound file: alone, or in place of the clip's own sound.
            subtitle: what is said in it, where known.
            question: what is asked; None asks what the model was trained on.
            mode: slow reasons first; fast answers at once, behind an empty think block; auto answers fast, and slow
                where the model is less sure of that than the threshold that the run fitted on its held-out clips, or
                than that of `Auto(threshold)`. `Answer.why` then says which it was, and why.
            show: which part of the clip the model is given.

        Raises:
            ArgumentError: an unknown mode or part, or nothing to show.
            MediaError, PromptError: a clip or text that cannot be used.
            RolloutError: the model's scores are not finite.
            GateError: auto without a fitted threshold, or one outside [0, 1].
        """
        from mer_r1_jax.run.fitted_gate import threshold_of
        from mer_r1_jax.run.inference import answer, clip_record

        if not isinstance(mode, Auto):
            _require("mode", mode, ("slow", "fast", "auto"))
        _require("show", show, ("both", "video", "audio"))
        if (video if show == "video" else video or audio) is None:
            raise ArgumentError("video: got None, expected the clip, or a sound file as audio; name one of them")
        asked = question or self._setup.config.data.question
        clip, voice = (None if place is None else os.fspath(place) for place in (video, audio))
        record = clip_record(clip, asked, subtitle, frames=show != "audio", audio=show != "video", voice=voice)
        if isinstance(mode, Auto):
            mode = Auto(threshold_of(self._path, mode.threshold))
        elif mode == "auto":
            if self._threshold is None:
                self._threshold = threshold_of(self._path)  # once: a run that goes on fits another to other weights
            mode = Auto(self._threshold)
        _, (answered,) = answer(self._setup, self._params, record, (mode,))
        return dataclasses.replace(answered, reasoning=answered.reasoning or None)

    def close(self) -> None:
        """Ends the processes that decode clips. Closing twice does no harm."""
        self._setup.source.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(path: str | os.PathLike[str], **settings: Any) -> Model:
    """Loads a model.

    Args:
        path: a run's folder (its newest valid checkpoint is taken), the export of one, or a Hugging Face directory of
            a Qwen2.5-Omni Thinker or full Omni model.
        settings: fields of the configuration, dots as double underscores: `media__max_frames=8`.

    Raises:
        PolicyError, CheckpointError: nothing there that can be loaded.
        ConfigError: a setting that does not exist or cannot have that value.
    """
    from mer_r1_jax.run.policy import open_model

    # As in `mer-r1 infer`, a clip without a sound track is no error.
    overrides = {"media.missing_audio": "skip"} | {name.replace("__", "."): value for name, value in settings.items()}
    return Model(*open_model(os.fspath(path), overrides), os.fspath(path))


def score(
    predictions: str | os.PathLike[str] | Mapping[str, str | Sequence[str] | Answer],
    truths: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    metric: Literal["set_f1", "hit", "waf"] = "set_f1",
    wheel_dir: str | os.PathLike[str] = "",
    variant: Literal["unibench", "mer2026"] = "unibench",
) -> dict[str, Any]:
    """Scores predictions as MER-UniBench does.

    Args:
        predictions: JSON lines of `id`, `prediction` and `truth`, as for `mer-r1 score`; or id -> the answer: text,
            words, or what `Model.answer` returned.
        truths: with a mapping, id -> the truth, or a data file whose records have a `solution`.
        metric: set_f1 for open vocabularies (words against words), hit (words against one word), waf (a sentiment word
            against a number).
        wheel_dir: folder of emotion wheels; "" takes those shipped here. Published numbers need the official folder.
        variant: word forms and the treatment of an undefined F, as the two releases of the benchmark have them.

    Returns:
        score, precision, recall, per_wheel, n, n_scored, n_failed, n_unknown_words, unknown_words; accuracy for waf.

    Raises:
        ArgumentError: a mapping of predictions without truths, or truths beside a file that has its own.
        PredictionError: predictions that cannot be read, or ids that differ from those of the truths.
        RecordError, WheelError: a data file or a wheel folder that cannot be read.
    """
    wheels = load_wheels(os.fspath(wheel_dir), variant)
    if not isinstance(predictions, Mapping):
        if truths is not None:
            raise ArgumentError("truths: got some beside a file of predictions, which has its own; leave them out")
        return scoring.score_predictions(scoring.read_predictions(os.fspath(predictions), metric), metric, wheels)
    if truths is None:
        raise ArgumentError("truths: got None, expected id -> truth, or a data file whose records have a solution")
    if not isinstance(truths, Mapping):
        from mer_r1_jax.data.records import read_records

        truths = {record.id: list(record.solution) for record in read_records(truths, require=("solution",))}
    said = {name: list(given.words) if isinstance(given, Answer) else given for name, given in predictions.items()}
    return scoring.score_predictions(scoring.paired(said, truths, metric), metric, wheels)


def _require(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ArgumentError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
