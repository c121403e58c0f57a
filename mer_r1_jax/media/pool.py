"""Decoding processes with a time limit per clip: one that hangs, dies or exits is replaced, and its clip reported.

Plain child processes and pipes rather than `multiprocessing`: a forked child of a program that runs JAX can deadlock, a
spawned one would import the main program again.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import mer_r1_jax
from mer_r1_jax.media.entry import CorruptEntryError, Entry
from mer_r1_jax.media.errors import MediaError

START_SECONDS = 60.0  # a process may take this long to import its libraries
WORKER = (sys.executable, "-m", "mer_r1_jax.media.worker")
ATTEMPTS = 2  # a process that dies is often killed for another's sake; a clip that kills two is to blame itself
KILL_SECONDS = 5.0  # to wait for a killed process
_READ_BYTES = 1 << 20


class WorkerDiedError(Exception):
    """A process that ended, or answered with something else than an answer."""


class WorkerPool:
    """A fixed number of decoding processes, started when first needed. Safe to use from several threads."""

    def __init__(self, workers: int, timeout: float, command: Sequence[str] = WORKER):
        """
        Args:
            workers: processes.
            timeout: seconds one clip may take.
            command: the program they run.
        """
        self.timeout = timeout
        self._command = tuple(command)
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._slots.put(None)
        self._running: set[_Worker] = set()
        self._finalizer = weakref.finalize(self, _kill_all, self._running)

    def decode(self, job: dict) -> Entry:
        """Decodes one file in a process; the arguments of `decode_file`, with `media` as a plain dict.

        Raises:
            MediaError: what the process reports, or reason "timeout" or "worker_died".
        """
        died: WorkerDiedError | None = None
        for _ in range(ATTEMPTS):
            worker = self._slots.get()
            healthy = None
            try:
                if worker is None:
                    worker = _Worker(self._command)
                    self._running.add(worker)
                answer = worker.run(job, self.timeout)
                healthy = worker
            except WorkerDiedError as error:
                died = error
                continue
            except TimeoutError:
                raise MediaError(
                    job["path"],
                    "timeout",
                    f"no end of decoding after {self.timeout:g} s",
                    "a clip that decodes within media.decode_timeout",
                    "Re-encode or cut the clip, or raise media.decode_timeout.",
                ) from None
            finally:
                if healthy is None and worker is not None:
                    worker.kill()
                    self._running.discard(worker)
                self._slots.put(healthy)
            if isinstance(answer, MediaError):
                raise answer
            return answer
        raise MediaError(
            job["path"],
            "worker_died",
            f"a decoding process that ended while reading it, {ATTEMPTS} times ({died})",
            "a clip that decodes",
            "Re-encode the clip; if all clips fail like this, look at the machine's memory.",
        )

    def close(self) -> None:
        """Ends all processes."""
        self._finalizer()


class _Worker:
    """One process and its two pipes."""

    def __init__(self, command: Sequence[str]):
        # The tail of what it prints is part of the error message when it dies.
        self._messages = tempfile.TemporaryFile()
        package_parent = str(Path(mer_r1_jax.__file__).parent.parent)
        paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends its children
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        self._buffer = bytearray()
        self._started = False

    def run(self, job: dict, timeout: float) -> Entry | MediaError:
        """Sends a job and waits for its answer.

        Raises:
            TimeoutError: if there is none in time.
            WorkerDiedError: if the process ended.
        """
        if not self._started:
            try:
                self._line(time.monotonic() + START_SECONDS)
            except TimeoutError:
                raise WorkerDiedError(f"it did not start within {START_SECONDS:g} s") from None
            self._started = True
        deadline = time.monotonic() + timeout
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
        except OSError:
            raise WorkerDiedError(self._last_words()) from None
        answer = self._line(deadline)
        if "error" in answer:
            return MediaError(**answer["error"])
        try:
            return Entry.from_bytes(self._take(answer["size"], deadline))
        except CorruptEntryError as error:
            raise WorkerDiedError(str(error)) from None

    def kill(self) -> None:
        """Ends the process at once and closes the pipes."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel; it ends when that lets go
            self._process.wait(timeout=KILL_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout, self._messages):
            pipe.close()

    def _line(self, deadline: float) -> dict:
        while (end := self._buffer.find(b"\n")) < 0:
            self._fill(deadline)
        try:
            return json.loads(self._take(end + 1, deadline))
        except ValueError:
            raise WorkerDiedError("it answered nonsense") from None

    def _take(self, size: int, deadline: float) -> bytes:
        while len(self._buffer) < size:
            self._fill(deadline)
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _fill(self, deadline: float) -> None:
        """Reads what has arrived, waiting for it until the deadline."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
        data = os.read(self._process.stdout.fileno(), _READ_BYTES)
        if not data:
            raise WorkerDiedError(self._last_words())
        self._buffer += data

    def _last_words(self) -> str:
        """How the process ended, and the last line it printed."""
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        self._messages.seek(0)
        lines = self._messages.read()[-2000:].decode(errors="replace").strip().splitlines()
        return f"exit status {code}" + (f", {lines[-1]}" if lines else "")


def _kill_all(workers: set[_Worker]) -> None:
    for worker in list(workers):
        worker.kill()
    workers.clear()
