"""A child process that answers jobs one at a time, each within a time limit, and the loop such a process runs.

For work that may hang or bring its process down: decoding of clips, reward functions of a user's. Jobs and the heads of
answers are lines of JSON; bytes may follow an answer.

Plain child processes and pipes rather than `multiprocessing`: a forked child of a program that runs JAX can deadlock, a
spawned one would import the main program again.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

START_SECONDS = 60.0  # a process may take this long to import its libraries
KILL_SECONDS = 5.0  # to wait for a process that ends
PARENT_CHECK_SECONDS = 1.0
_READ_BYTES = 1 << 20


class ChildDiedError(Exception):
    """A process that ended, or answered with something else than an answer."""


class Child:
    """One process and its pipes, on the parent's side.

    Args:
        command: a program that calls `serve`. This package can be imported there.
        environment: variables set for it.
        keep_messages: keep what it prints for `ChildDiedError` to quote; otherwise it goes to this process's own
            standard error.
    """

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, keep_messages: bool = True
    ):
        self._messages = tempfile.TemporaryFile() if keep_messages else None
        package_parent = str(Path(__file__).parent.parent)
        paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends its children
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (environment or {}),
        )
        self._buffer = bytearray()
        self._started = False

    def wait_until_started(self) -> None:
        """Waits until the process is ready for jobs: its start does not count against the first one.

        Raises:
            ChildDiedError: it ended, or takes longer than START_SECONDS.
        """
        if self._started:
            return
        try:
            self.head(time.monotonic() + START_SECONDS)
        except TimeoutError:
            raise ChildDiedError(f"it did not start within {START_SECONDS:g} s") from None
        self._started = True

    def send(self, job: Mapping[str, Any]) -> None:
        """Hands over a job.

        Raises:
            ChildDiedError: the process ended.
        """
        left = memoryview(json.dumps(job).encode() + b"\n")
        try:
            while left:  # a signal may cut a write short
                left = left[self._process.stdin.write(left) :]
        except OSError:
            raise ChildDiedError(self._last_words()) from None

    def head(self, deadline: float) -> dict[str, Any]:
        """The next answer's line; `deadline` is on the clock `time.monotonic`.

        Raises:
            TimeoutError: there is none in time.
            ChildDiedError: the process ended or the line is no JSON object.
        """
        while (end := self._buffer.find(b"\n")) < 0:
            self._fill(deadline)
        try:
            answer = json.loads(self.take(end + 1, deadline))
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ChildDiedError("it answered nonsense")
        return answer

    def take(self, size: int, deadline: float) -> bytes:
        """The next `size` bytes; errors as in `head`."""
        while len(self._buffer) < size:
            self._fill(deadline)
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def kill(self) -> None:
        """Ends the process at once and closes the pipes."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel; it ends when that lets go
            self._process.wait(timeout=KILL_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout, self._messages):
            if pipe is not None:
                pipe.close()

    def _fill(self, deadline: float) -> None:
        """Reads what has arrived, waiting for it until the deadline."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
        data = os.read(self._process.stdout.fileno(), _READ_BYTES)
        if not data:
            raise ChildDiedError(self._last_words())
        self._buffer += data

    def _last_words(self) -> str:
        """How the process ended, and the last line it printed."""
        try:
            code = self._process.wait(timeout=KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        if self._messages is None:
            return f"exit status {code}"
        self._messages.seek(0)
        lines = self._messages.read()[-2000:].decode(errors="replace").strip().splitlines()
        return f"exit status {code}" + (f", {lines[-1]}" if lines else "")


def serve(answer: Callable[[dict[str, Any]], tuple[dict[str, Any], bytes]]) -> None:
    """What the process does: answers jobs from standard input until that is closed or the parent is gone.

    Args:
        answer: a job to the head of its answer and the bytes that follow it.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed must not end up between the answers
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    _write(answers, {"ready": True}, b"")
    for line in sys.stdin.buffer:
        _write(answers, *answer(json.loads(line)))


def _write(answers, head: dict[str, Any], data: bytes) -> None:
    answers.write(json.dumps(head).encode() + b"\n" + data)
    answers.flush()


def _end_with_parent(parent: int) -> None:
    """Ends this process soon after its parent died, even while a job hangs."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(0)
