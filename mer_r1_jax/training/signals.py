"""SIGTERM and SIGINT ask the run to save and stop; a second one stops it at once.

Python runs its handlers between two bytecodes of the main thread, which may be minutes away inside a compiled program.
The request is therefore taken by a thread, woken through `signal.set_wakeup_fd` the moment the signal arrives: the user
is told at once, and a second signal ends the process even while the main thread is inside XLA. The run itself looks at
`should_stop()` where it can stop: between steps, between chunks of a rollout, between batches of an evaluation.

A spot machine goes 30 s after its notice, whatever the run is doing then. Where a limit is given, the same thread ends
a process that has not come to such a place in time, with a message that says what counts; a save under way goes on.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

from mer_r1_jax.faults import StopRequested

EXIT_SAVED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal; the same command goes on from what is saved
GRACE_SECONDS = 25.0  # of the 30 s between a spot machine's notice and its end
REPEAT_SECONDS = 1.0  # a signal this soon after the first one is the same request

_END_WATCH = b"\0"  # no signal has number 0
_active: StopSignals | None = None  # the one entered now, for the children forked meanwhile


class StopSignals:
    """Context manager that turns SIGTERM and SIGINT into a flag.

    with StopSignals() as stop:
        for step in steps:
            ...
            if stop.should_stop():
                save()
                sys.exit(EXIT_SAVED)

    The first signal sets the flag; a second one ends the process with 128 + its number, as if uncaught, without saving:
    the newest checkpoint counts. Signals within `REPEAT_SECONDS` of the first are the same request (`timeout` and
    terminals deliver one twice). Must be entered in the main thread (RuntimeError otherwise), one at a time.

    Args:
        grace_seconds: after the first signal; a process that is still there then, and does not save, is ended with
            EXIT_SAVED: what it saved before counts. None or 0 waits as long as it takes.

    A forked child is released from all this: SIGTERM ends it, SIGINT is left to the parent, which still needs its
    workers to finish the step. A spawned child starts with Python's own handlers.
    """

    handled = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, grace_seconds: float | None = None) -> None:
        self._grace_seconds = grace_seconds or None
        self._stop = threading.Event()
        self._saving = threading.Event()
        self._late = False  # the grace is over
        self.signal_name: str | None = None  # the signal that asked, e.g. "SIGTERM"

    def should_stop(self) -> bool:
        """Whether a signal has asked the run to save and stop."""
        return self._stop.is_set()

    def check(self) -> None:
        """Raises StopRequested when a signal has asked the run to stop."""
        if self._stop.is_set():
            raise StopRequested(f"{self.signal_name} asked the run to stop")

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """While it lasts the end of the grace ends nothing: a save that comes late is worth more than none."""
        self._saving.set()
        try:
            yield
        finally:
            self._saving.clear()

    def __enter__(self) -> StopSignals:
        global _active
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("StopSignals must be entered in the main thread: only there can signals be handled")
        if _active is not None:
            raise RuntimeError("another StopSignals is already entered: pass that one on instead")
        self._read_end, self._write_end = os.pipe()
        # `set_wakeup_fd` refuses a descriptor that can block, because a signal handler must never wait.
        os.set_blocking(self._write_end, False)
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        # The handlers do nothing: they only keep the default action away, the thread below does the work.
        self._previous = {number: signal.signal(number, lambda *_: None) for number in self.handled}
        self._watcher = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
        self._watcher.start()
        _active = self
        return self

    def __exit__(self, *_) -> None:
        global _active
        _active = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # The descriptor is given up before the thread ends, so that no signal is written where nobody reads.
        signal.set_wakeup_fd(self._previous_fd)
        os.write(self._write_end, _END_WATCH)
        self._watcher.join()
        os.close(self._write_end)
        os.close(self._read_end)

    def _watch(self) -> None:
        while True:
            if not select.select([self._read_end], [], [], self._left())[0]:
                self._end_of_grace()
                continue
            # Each signal is one byte, its number, and several may have arrived since the last read.
            for number in os.read(self._read_end, 64):
                if number == _END_WATCH[0]:
                    return
                if number in self.handled:
                    self._take(signal.Signals(number))

    def _left(self) -> float | None:
        """Seconds until the grace is over; None where there is no end to wait for."""
        if self._grace_seconds is None or self._late or not self._stop.is_set():
            return None
        return max(0.0, self._asked_at + self._grace_seconds - time.monotonic())

    def _end_of_grace(self) -> None:
        self._late = True
        over = f"{self._grace_seconds:g} s after {self.signal_name} (train.preemption_grace_seconds)"
        if self._saving.is_set():
            _tell(f"{over} a checkpoint is still being written and goes on. Until it is there the one before counts.")
            return
        _tell(
            f"{over} the program has not come to a place where it can save: it compiles, or waits for the device. It "
            "ends now, and the last valid checkpoint counts: the same command goes on from there."
        )
        # `sys.exit` would end this thread alone and leave the main thread inside its program.
        os._exit(EXIT_SAVED)

    def _take(self, received: signal.Signals) -> None:
        if self._stop.is_set():
            if time.monotonic() - self._asked_at < REPEAT_SECONDS:
                return
            _tell(f"{received.name} again: stopping now, without saving. The newest checkpoint counts.")
            os._exit(128 + received)
        # The name is set before the event, because the main thread reads it as soon as it sees the event.
        self.signal_name = received.name
        self._asked_at = time.monotonic()
        self._stop.set()
        _tell(
            f"{received.name} received: the run saves at the next safe point and ends with exit code {EXIT_SAVED}; "
            "the same command goes on from there. Once more stops at once, without saving."
        )


def _tell(message: str) -> None:
    """Straight to the descriptor: the main thread may hold the lock of sys.stderr."""
    try:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{message}\n".encode())
    except (OSError, ValueError):
        pass  # a closed terminal must not keep the run from saving


def _release_forked_child() -> None:
    """The child shares the parent's pipe: a signal to the child would be taken for one to the parent."""
    global _active
    if _active is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.close(_active._read_end)
        os.close(_active._write_end)
        _active = None


os.register_at_fork(after_in_child=_release_forked_child)
