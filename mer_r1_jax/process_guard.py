"""Runs a command, and ends with it every process that came of it: `python -I -S process_guard.py COMMAND...`

Stands between a run and code that may do anything (decoders on hostile files, a user's reward functions):

- It ends the command and all its descendants when the command ends or when nobody holds the other end of its standard
  input any more. Descendants that left the command's session or lost their parents come back to this process (it is
  their "subreaper"), so none escapes.
- It is the command's parent, so a signal to "the parent" does not reach the run, and does nothing here.
- Of what the command prints on standard error, SHOWN_BYTES are passed on, and the last TAIL_BYTES when it ends.

Standard input and output are the command's own; the exit status is the command's. Imports the standard library only:
one such process stands beside each child and has to start in no time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import select
import signal
import subprocess
import sys
from typing import NoReturn

SHOWN_BYTES = 256 << 10  # of what the command prints; a flood must fill neither a terminal nor a disk
TAIL_BYTES = 2000
LOOK_MS = 1000  # between two looks at whether the run is there, should something else hold the pipe's other end
_OWN_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}  # returning from these repeats them
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main(command: list[str]) -> NoReturn:
    """Runs the command and ends as it did."""
    run = os.getppid()
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with contextlib.suppress(OSError):  # where memory runs out, the system takes these processes and not the run
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in signal.valid_signals() - _OWN_FAULTS:
        with contextlib.suppress(OSError):  # of those that nothing can catch
            # A function that does nothing and not SIG_IGN, which the command would inherit.
            signal.signal(number, lambda *_: None)
    printed, prints = os.pipe()
    dies_with_this = functools.partial(prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    started = subprocess.Popen(command, stderr=prints, preexec_fn=dies_with_this)
    worker = started.pid  # `started` itself stays referred to: it would wait for the command where it is collected
    os.close(prints)

    poll = select.poll()
    poll.register(0, 0)  # says only when the other end was closed: what arrives there is the command's
    poll.register(printed, select.POLLIN)
    poll.register(woken, select.POLLIN)
    output, status = _Output(printed), None
    while status is None and os.getppid() == run:
        ready = dict(poll.poll(LOOK_MS))
        if 0 in ready:
            break
        if woken in ready:
            os.read(woken, 4096)
        if printed in ready and not output.pass_on():
            poll.unregister(printed)
        status = _reaped(worker)
    status = _end_all(worker, status)
    output.finish()
    if status < 0:  # ends by the same signal, without a core file of its own
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status if status >= 0 else 128 - status)


class _Output:
    """What the command prints, on its way to this process's standard error."""

    def __init__(self, source: int):
        os.set_blocking(source, False)
        self._source, self._left, self._tail = source, SHOWN_BYTES, b""

    def pass_on(self) -> bool:
        """Passes on what has arrived, as long as there is room; False at its end."""
        try:
            data = os.read(self._source, 1 << 16)
        except BlockingIOError:
            return True
        shown, rest = data[: self._left], data[self._left :]
        self._left -= len(shown)
        if rest:
            self._tail = (self._tail + rest)[-TAIL_BYTES:]
        _write(shown)
        return bool(data)

    def finish(self) -> None:
        """Passes on the rest, and of a flood its end."""
        while self.pass_on():
            if not select.select([self._source], [], [], 0)[0]:
                break
        _write(b"\n[...]\n" + self._tail if self._tail else b"")


def _write(data: bytes) -> None:
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


def _reaped(worker: int) -> int | None:
    """Takes note of all children that ended; returns the command's status once it did, -N for signal N."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == worker:
                status = os.waitstatus_to_exitcode(ended[1])
    return status


def _end_all(worker: int, status: int | None) -> int:
    """Kills children until there are none: those of a child that was killed become children of this process."""
    while True:
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            ended, code = os.waitpid(-1, 0)
        except ChildProcessError:
            return -signal.SIGKILL if status is None else status
        if ended == worker:
            status = os.waitstatus_to_exitcode(code)


def _children() -> list[int]:
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it ended meanwhile
            with open(f"/proc/{name}/stat", "rb") as file:
                # "pid (name) state parent ...", where the name may hold anything
                if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
