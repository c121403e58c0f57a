"""One question at a time: whoever asks while another is answered waits, first come, first served."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator


class LineFull(Exception):
    """Nobody more may wait."""


class WaitingLine:
    """A line in which the first is answered and the others wait; of one event loop.

    Args:
        longest: how many may wait behind the one that is answered.
    """

    def __init__(self, longest: int):
        self._longest = longest
        self._line: list[object] = []
        self._coming = 0
        self._moved = asyncio.Condition()

    @contextlib.contextmanager
    def coming(self) -> Iterator[None]:
        """Keeps a place for somebody whose clip is on its way; nobody waits for it yet.

        Raises:
            LineFull: as many wait, or are coming, as may.
        """
        if len(self._line) + self._coming > self._longest:
            raise LineFull
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1

    def join(self) -> object:
        """A place at the end; give it to `turn`, and in any case to `leave`."""
        place = object()
        self._line.append(place)
        return place

    async def turn(self, place: object, seconds: float) -> AsyncIterator[int]:
        """Yields how many are before this place, whenever that changes and after so many seconds; ends at its turn."""
        while before := self._line.index(place):
            yield before
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds), self._moved:
                    await self._moved.wait()

    async def leave(self, place: object) -> None:
        """Takes a place out, wherever it is. Leaving twice does no harm."""
        if place in self._line:
            self._line.remove(place)
            async with self._moved:
                self._moved.notify_all()
