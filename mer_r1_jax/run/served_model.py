"""A model as the server of `mer-r1 serve` asks it: questions of the page in, answers as they are written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mer_r1_jax.evaluation.gate import Auto
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.run.live_answers import LiveAnswers, Question, told_error

if TYPE_CHECKING:  # its server is an extra
    from mer_r1_jax.serving.app import Asked


class ServedModel:
    """A model as the page's server asks it (`serving.app.Answering`).

    Args:
        answers: the model.
        name: shown on the page.
        threshold: of auto; None = auto cannot be asked for.
    """

    def __init__(self, answers: LiveAnswers, name: str, threshold: float | None):
        self._answers, self._threshold = answers, threshold
        setup = answers.setup
        self.about = {
            "model": printable(name),
            "wheels": [printable(wheel) for wheel in setup.wheels.names],
            "question": setup.config.data.question,
            "threshold": threshold,
        }

    def answer(self, asked: Asked, tell: Callable[[dict[str, Any]], None]) -> None:
        """Answers a question of the page."""
        self._answers.answer(self._question(asked), tell)

    def explain(self, error: Exception, asked: Asked) -> str | None:
        """The message of an error of this package, which its asker can mend."""
        if not type(error).__module__.startswith("mer_r1_jax."):
            return None
        return told_error(error, self._question(asked))

    def _question(self, asked: Asked) -> Question:
        # Without a threshold the server refuses auto, so the 0 is never asked with.
        modes = {"both": ("slow", "fast"), "auto": (Auto(self._threshold or 0.0),)}.get(asked.mode, (asked.mode,))
        return Question(
            clip=asked.clip,
            name=asked.name,
            is_sound=asked.is_sound,
            subtitle=asked.subtitle or None,
            text=asked.text,
            modes=modes,
            hide=asked.hide,
        )
