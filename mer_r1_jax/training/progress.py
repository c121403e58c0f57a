"""The progress line of a run, on a terminal or in a file, and an estimate of the time that is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import IO

import jax

from mer_r1_jax import screen
from mer_r1_jax.foreign_text import printable

LINES = 50  # of a phase, where they go to a file

# Shown on the progress line when present: metric -> (label, format).
SHOWN = {
    "loss": ("loss", ".4f"),
    "reward": ("reward", ".3f"),
    "rewards/recall/mean": ("recall", ".3f"),
    "rewards/precision/mean": ("precision", ".3f"),
    "confidence/slow": ("conf slow", ".3f"),
    "confidence/fast": ("fast", ".3f"),
    "completions/mean_length": ("length", ".0f"),
    "perf/throughput": ("tok/s", ".0f"),
}
LOSS_HINT = (
    "An RL loss near 0 is normal: advantages average to zero within a group, so the loss starts at 0 and its size says "
    "nothing about learning. Watch reward, recall and precision."
)


class Compiling:
    """Seconds this process has spent compiling since JAX was asked to tell: a run does it at its first steps only.

    JAX tells the end and the length of each tracing, lowering and compilation. One can lie inside another (a function
    traced within a function), so what counts is the time that they cover together.
    """

    def __init__(self):
        self._covered: list[tuple[float, float]] = []  # from, to; apart from each other, in order
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: object) -> None:
        if not event.startswith("/jax/core/compile/"):
            return
        end = time.monotonic()
        begin = end - duration_secs
        while self._covered and self._covered[-1][1] > begin:  # what it was told of before ended inside it
            begin = min(begin, self._covered.pop()[0])
        self._covered.append((begin, end))

    def since(self, moment: float) -> float:
        """Seconds of compiling after a moment of `time.monotonic`."""
        return sum(max(0.0, end - max(begin, moment)) for begin, end in self._covered)


_COMPILING = Compiling()


class Progress:
    """The progress line of one phase: a bar on a terminal, about LINES plain lines otherwise.

    Args:
        phase: "sft" or "rl".
        total: steps of the phase.
        done: steps done before this attempt.
        stream: where to write, standard error when None.
    """

    def __init__(self, phase: str, total: int, done: int = 0, stream: IO[str] | None = None):
        self.phase, self.total, self._done, self._first = phase, total, done, done
        self._stream = stream or sys.stderr
        self._counted_from: tuple[int, float] | None = None  # the first step that is done, and when
        self._every = max(1, total // LINES)
        self._hinted = False
        self._bar = (
            screen.bar(total=total, initial=done, desc=phase, file=self._stream, dynamic_ncols=True, unit="step")
            if self._stream.isatty()
            else None
        )

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a step's metrics; `step` counts the steps done."""
        self._counted_from = self._counted_from or (step, time.monotonic())
        if self.phase == "rl" and not self._hinted:
            self._hinted = True
            self.note(LOSS_HINT)
        # The loss of RL says nothing about learning, so the line leaves it out.
        shown = {k: v for k, v in SHOWN.items() if k in metrics and not (k == "loss" and self.phase == "rl")}
        text = "  ".join(f"{label} {metrics[name]:{form}}" for name, (label, form) in shown.items())
        # Without a terminal, a line is due at the first step of an attempt, at the last of the phase, and whenever a
        # multiple of `_every` is reached or passed: with `train.logging_steps` not every step comes here.
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._done)
        elif self._done == self._first or step == self.total or step // self._every > self._done // self._every:
            self._print(f"{self.phase} {step}/{self.total}  {text}  {self._remaining(step)}".rstrip())
        self._done = step

    def note(self, text: str) -> None:
        """Prints text without tearing the bar."""
        if self._bar is not None:
            self._bar.write(printable(text, one_line=False), file=self._stream)
        else:
            self._print(text)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _print(self, text: str) -> None:
        screen.say(text, stream=self._stream)

    def _remaining(self, step: int) -> str:
        """The time left at the pace since the first step, which compiled and opened the first clips.

        Checkpoints and evaluations count, and nothing that compiled later.
        """
        assert self._counted_from is not None
        first, start = self._counted_from
        if step == first:
            return ""
        passed = time.monotonic() - start - _COMPILING.since(start)
        seconds = max(0.0, passed) / (step - first) * (self.total - step)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes}:{seconds:02d} left"
