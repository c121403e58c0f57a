"""Whether a run is to stop, asked by one process and answered by all of them.

A signal may come to one process only, and all must leave the same step at the same place, or the others wait for it in
a collective. So what decides is `agreed` and `check`, which every process calls at the same places. What a process
waits for by itself (a reward function, a clip, a program on the device) it leaves as soon as `asked` says so, and then
comes to the next of those places.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax

from mer_r1_jax.faults import StopRequested
from mer_r1_jax.parallel import processes
from mer_r1_jax.training.signals import StopSignals

ANNOUNCED = "a signal to stop"
LONGEST_POLL_SECONDS = 0.05
ANNOUNCEMENT_SECONDS = 1.0  # between two looks at what other processes announced


class Stop:
    """Asks the signals of all processes of a run.

    Args:
        signals: of this process; None never stops.
    """

    def __init__(self, signals: StopSignals | None = None):
        self.signals = signals
        self._asked = False
        self._looked_at = 0.0

    def asked(self) -> bool:
        """Whether a signal came to this process, or another is known to have got one. Waits for nobody."""
        if self._asked or self.signals is None:
            return self._asked
        if self.signals.should_stop():
            self._asked = True
            processes.announce(ANNOUNCED)
        # Looking up announcements is a call to the coordinator over the network, so most polls of `wait` do without.
        elif time.monotonic() - self._looked_at > ANNOUNCEMENT_SECONDS:
            self._looked_at = time.monotonic()
            self._asked = processes.is_announced(ANNOUNCED)
        return self._asked

    def agreed(self) -> bool:
        """Whether a signal came to any process; the same answer on all of them, which all ask here."""
        return self.signals is not None and any(processes.exchange("whether to stop", self.asked()))

    def check(self) -> None:
        """Raises StopRequested on all processes when a signal came to any."""
        if self.agreed():
            raise StopRequested("a signal asked the run to stop")

    def wait(self, arrays: Any) -> None:
        """Waits until arrays are computed, or leaves them: the device goes on with them, and nobody looks at them.

        Raises:
            StopRequested: as `check`.
        """
        if self.signals is None:
            return
        leaves: list[Any] = [leaf for leaf in jax.tree.leaves(arrays) if isinstance(leaf, jax.Array)]
        # The arrays are polled, because `block_until_ready` would not return for a signal.
        for seconds in _polls():
            if self.asked() or all(leaf.is_ready() for leaf in leaves):
                break
            time.sleep(seconds)
        # The check also comes when the arrays are ready, because every process has to take part in it.
        self.check()


NEVER = Stop()


def _polls() -> Iterator[float]:
    """Seconds between two looks: what takes a moment is not delayed, what takes minutes costs nothing."""
    seconds = 0.0005
    while True:
        yield seconds
        seconds = min(2 * seconds, LONGEST_POLL_SECONDS)
