"""Two ways of doing the same work, timed in turns, and what the ratio of their times is."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

Laps = dict[str, float]  # seconds by part of a piece of work; WHOLE is all of it
WHOLE = "whole"


class Stopwatch:
    """Seconds of the parts of a piece of work, from its making on."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: Laps = {}

    def lap(self, name: str) -> None:
        """Ends a part."""
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def stop(self) -> Laps:
        """The parts so far, and the whole."""
        return self._laps | {WHOLE: time.perf_counter() - self._start}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One piece of work (or a part of one) as both sides did it.

    Attributes:
        name: what was done.
        ours, theirs: seconds; entries of the same number were taken one right after the other.
        tokens: what one repetition samples or learns from, for tokens per second; 0 where that means nothing.
    """

    name: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    tokens: int = 0

    @property
    def ratio(self) -> float:
        """How many times longer theirs takes: the ratio of the medians."""
        return statistics.median(self.theirs) / statistics.median(self.ours)

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest ratio of any repetition."""
        ratios = [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        return min(ratios), max(ratios)


def alternate(
    ours: Callable[[], Laps], theirs: Callable[[], Laps], *, repeats: int, warmup: int = 2
) -> tuple[list[Laps], list[Laps], tuple[float, float]]:
    """Runs ours, theirs, ours, theirs, ...

    Returns:
        The laps of both sides without the warm-up; and the seconds of both first calls, compiling included.
    """
    runs = [(ours(), theirs()) for _ in range(warmup + repeats)]
    mine, other = ([pair[side] for pair in runs[warmup:]] for side in (0, 1))
    return mine, other, (runs[0][0][WHOLE], runs[0][1][WHOLE])


def compare(
    name: str, ours: Iterable[Laps], theirs: Iterable[Laps], parts: Sequence[str] = (WHOLE,), tokens: int = 0
) -> Comparison:
    """The sum of some parts (those of them that a side has) of each repetition."""

    def total(laps: Laps) -> float:
        return sum(laps.get(part, 0.0) for part in parts)

    return Comparison(name=name, ours=tuple(map(total, ours)), theirs=tuple(map(total, theirs)), tokens=tokens)
