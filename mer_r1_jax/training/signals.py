"""SIGTERM and SIGINT ask the run to save and stop; a second one stops it at once.

Python runs its handlers between two bytecodes of the main thread, which may be minutes away inside a compiled program.
The request is therefore taken by a thread, woken through `signal.set_wakeup_fd` the moment the signal arrives: the user
is told at once, and a second signal ends the process even while the main thread is inside XLA. The run itself looks at
`should_stop()` where it can stop: between steps, between chunks of a rollout, between batches of an evaluation.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

EXIT_SAVED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, state saved, the same command goes on from there
REPEAT_SECONDS = 1.0  # a signal this soon after the first one is the same request

_END_WATCH = b"\0"  # no signal has number 0
_active: StopSignals | None = None  # the one entered now, for the children forked meanwhile


class StopRequested(Exception):
    """Raised by `StopSignals.check` to leave a rollout or an evaluation early."""


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

    A forked child is released from all this: SIGTERM ends it, SIGINT is left to the parent, which still needs its
    workers to finish the step. A spawned child starts with Python's own handlers.
    """

    handled = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._stop = threading.Event()
        self.signal_name: str | None = None  # the signal that asked, e.g. "SIGTERM"

    def should_stop(self) -> bool:
        """Whether a signal has asked the run to save and stop."""
        return self._stop.is_set()

    def check(self) -> None:
        """Raises StopRequested when a signal has asked the run to stop."""
        if self._stop.is_set():
            raise StopRequested(f"{self.signal_name} asked the run to stop")

    def __enter__(self) -> StopSignals:
        global _active
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("StopSignals must be entered in the main thread: only there can signals be handled")
        if _active is not None:
            raise RuntimeError("another StopSignals is already entered: pass that one on instead")
        self._read_end, self._write_end = os.pipe()
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
        signal.set_wakeup_fd(self._previous_fd)
        os.write(self._write_end, _END_WATCH)
        self._watcher.join()
        os.close(self._write_end)
        os.close(self._read_end)

    def _watch(self) -> None:
        while True:
            for number in os.read(self._read_end, 64):
                if number == _END_WATCH[0]:
                    return
                if number in self.handled:
                    self._take(signal.Signals(number))

    def _take(self, received: signal.Signals) -> None:
        if self._stop.is_set():
            if time.monotonic() - self._asked_at < REPEAT_SECONDS:
                return
            _tell(f"{received.name} again: stopping now, without saving. The newest checkpoint counts.")
            os._exit(128 + received)
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
