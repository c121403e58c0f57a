"""Child processes that answer jobs one at a time, each within a time limit: the parent's side and the child's.

For work that may hang or bring its process down: decoding of clips, reward functions of a user's. A job is a line of
JSON, its answer a line of JSON that bytes may follow; both carry the job's number, drawn at random, so that neither a
late answer nor something else that ends up in the pipe is taken for the one that is waited for. What a child prints
reaches no pipe of answers, and it never outlives the run (`process_guard`).

Why not pebble 5.2.3 (LGPL-3), measured: a job that writes to file descriptors 3 to 30 leaves its pool without an answer
to the next, good job too; a process that the timed-out job started outlives the pool; and answers are pickled, so a
child can run code in the parent. `multiprocessing` besides imports the main program again in each spawned child, and
a forked child of a program that runs JAX can deadlock.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from json import dumps, loads  # by name: what a reward function makes of `json.dumps` is no answer
from os import getpid
from pathlib import Path
from typing import Any, TypeVar

from mer_r1_jax.faults import StopRequested

Answer = TypeVar("Answer")
Ask = Callable[[Mapping[str, Any], float], dict[str, Any]]  # a job and its time limit in seconds to its answer

START_SECONDS = 60.0  # a process may take this long to import its libraries
KILL_SECONDS = 5.0  # to wait for a process that ends
POLL_SECONDS = 0.2  # between two looks, while an answer is waited for, at whether the run is to stop
READY = "ready"  # the job number of a process's first line, which answers no job
MOST_FOREIGN_BYTES = 64 << 20  # in place of an answer, before its process counts as broken; no answer's line is longer
_READ_BYTES = 1 << 20
_GUARD = str(Path(__file__).with_name("process_guard.py"))


class ChildDiedError(Exception):
    """A process that ended, or answered with something else than an answer."""


class Countdown:
    """Seconds that pass only while this process runs.

    Between two looks that are meant to be POLL_SECONDS apart, at most twice that counts. More has passed where this
    process, its container or its machine stood still, and then its children may have stood still with it: a limit that
    would have ended meanwhile leaves them the rest of their time.
    """

    def __init__(self, seconds: float):
        self._left, self._looked = seconds, time.monotonic()

    def left(self) -> float:
        """Seconds left at this look, 0 at the end."""
        now = time.monotonic()
        self._left = max(0.0, self._left - min(now - self._looked, 2 * POLL_SECONDS))
        self._looked = now
        return self._left


class ProcessPool:
    """A fixed number of processes, each started when first needed. Safe to use from several threads.

    Args:
        command: a program that calls `serve`. This package can be imported there.
        processes: how many.
        prepare: called with a newly started process, before its first job; raises ChildDiedError if it is no use.
        environment: variables set for them.
        quotes_output: keep what they print for `ChildDiedError` to quote; otherwise it goes to this process's own
            standard error.
    """

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        *,
        prepare: Callable[[Ask], None] = lambda ask: None,
        environment: dict[str, str] | None = None,
        quotes_output: bool = True,
    ):
        self._begin = lambda: _Child(command, environment or {}, quotes_output)
        self._prepare = prepare
        self._slots: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(processes):
            self._slots.put(None)
        self._running: set[_Child] = set()
        self._finalizer = weakref.finalize(self, _kill_all, self._running)

    def ask(
        self,
        job: Mapping[str, Any],
        seconds: float,
        read: Callable[[dict[str, Any], bytes], Answer],
        asked: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Hands a job to a process and waits for its answer. The process is ended by whatever is raised.

        Args:
            job: what the process's `serve` is to answer.
            seconds: how long that may take, the start of a process not counted.
            read: makes something of an answer's head and bytes; raises ChildDiedError where they are no answer.
            asked: whether the run is to stop; looked at while waiting, for the start of a process too.

        Raises:
            TimeoutError: there is no answer in time.
            ChildDiedError: the process ended or answered nonsense.
            StopRequested: `asked` said so.
        """
        with self._child(asked) as child:
            return read(*child.ask(job, seconds, asked))

    def start(self) -> None:
        """Starts one process, unless there is one.

        Raises:
            ChildDiedError: it does not start.
        """
        with self._child():
            pass

    def close(self) -> None:
        """Ends all processes."""
        self._finalizer()

    @contextlib.contextmanager
    def _child(self, asked: Callable[[], bool] = lambda: False) -> Iterator[_Child]:
        """Lends a process that is ready for jobs. Whatever is raised meanwhile ends it; a new one takes its place."""
        child, healthy = self._slots.get(), None
        try:
            if not self._finalizer.alive:
                raise RuntimeError("got a job for a pool of processes that was closed; expected none after `close`")
            if child is None:
                child = self._begin()
                self._running.add(child)
                try:
                    child.answer_to(READY, START_SECONDS, asked)
                except TimeoutError:
                    raise ChildDiedError(f"it did not start within {START_SECONDS:g} s") from None
                self._prepare(lambda job, seconds: child.ask(job, seconds)[0])
            yield child
            healthy = child
        finally:
            if healthy is None and child is not None:
                child.kill()
                self._running.discard(child)
            self._slots.put(healthy)


class _Child:
    """One process and its pipes, on the parent's side; arguments as in `ProcessPool`."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], quotes_output: bool):
        self._messages = tempfile.TemporaryFile() if quotes_output else None
        package_parent = str(Path(__file__).parent.parent)
        paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", _GUARD, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends its children
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        )
        assert self._process.stdin and self._process.stdout
        self._jobs, self._answers = self._process.stdin, self._process.stdout
        os.set_blocking(self._jobs.fileno(), False)
        self._unsent = memoryview(b"")
        self._buffer = bytearray()

    def ask(
        self, job: Mapping[str, Any], seconds: float, asked: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, Any], bytes]:
        """Sends a job and waits for its answer; see `answer_to`."""
        number = secrets.token_hex(8)
        self._unsent = memoryview(dumps({**job, "job": number}).encode() + b"\n")
        return self.answer_to(number, seconds, asked)

    def answer_to(
        self, number: str, seconds: float, asked: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, Any], bytes]:
        """The head of the answer to the job of that number, and the bytes that follow it; errors as `ProcessPool.ask`.

        Lines that are no answer to it are passed over: something of the job's wrote into this pipe.
        """
        countdown, foreign = Countdown(seconds), 0
        while True:
            while (end := self._buffer.find(b"\n")) >= 0:
                line = bytes(self._buffer[: end + 1])
                del self._buffer[: end + 1]
                head = _head(line)
                if head is not None and head.pop("job", None) == number:
                    return head, self._take(head.pop("size", 0), countdown, asked)
                foreign += len(line)
            if foreign + len(self._buffer) > MOST_FOREIGN_BYTES:
                raise ChildDiedError(f"it wrote {MOST_FOREIGN_BYTES >> 20} MiB that are no answer")
            self._exchange(countdown, asked)

    def leave(self) -> None:
        """Lets go of the process's standard input, which its guard takes as the sign to end it."""
        self._jobs.close()

    def kill(self) -> None:
        """Ends the process with all that came of it, and closes the pipes."""
        self.leave()
        # The guard may have been stopped, or killed with others of its group left. What is stuck in the kernel stays.
        for sign in (signal.SIGCONT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=KILL_SECONDS)
        for pipe in (self._answers, self._messages):
            if pipe is not None:
                pipe.close()

    def _take(self, size: int, countdown: Countdown, asked: Callable[[], bool]) -> bytes:
        while len(self._buffer) < size:
            self._exchange(countdown, asked)
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _exchange(self, countdown: Countdown, asked: Callable[[], bool]) -> None:
        """Writes what is left of the job and reads what has arrived; waits for either, for POLL_SECONDS at most."""
        left = countdown.left()
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            if self._unsent:
                selector.register(self._jobs, selectors.EVENT_WRITE)
            ready = {key.fileobj for key, _ in selector.select(min(left, POLL_SECONDS))}
        if self._jobs in ready:
            try:
                self._unsent = self._unsent[self._jobs.write(self._unsent) or 0 :]
            except BrokenPipeError:  # told below, where the answers end
                self._unsent = memoryview(b"")
        if self._answers in ready:
            data = self._answers.read(_READ_BYTES)
            if not data:
                raise ChildDiedError(self._last_words())
            self._buffer += data
        elif self._process.poll() is not None:  # and something that it left holds the pipe open
            raise ChildDiedError(self._last_words())
        elif not ready and not left:
            raise TimeoutError
        elif asked():
            raise StopRequested("a signal came while a child process was waited for")

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


def _head(line: bytes) -> dict[str, Any] | None:
    """A line as the head of an answer; None where it is none."""
    try:
        head = loads(line)
    except (ValueError, RecursionError):
        return None
    size = head.get("size", 0) if isinstance(head, dict) else None
    return head if isinstance(size, int) and size >= 0 else None


def _kill_all(children: set[_Child]) -> None:
    leaving = list(children)
    for child in leaving:
        child.leave()  # all at once
    for child in leaving:
        child.kill()
    children.clear()


def serve(answer: Callable[[dict[str, Any]], tuple[dict[str, Any], bytes]]) -> None:
    """What the process does: answers jobs until nobody is left to ask.

    Args:
        answer: a job to the head of its answer and the bytes that follow it.
    """
    jobs, answers, this = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"), getpid()
    with open(os.devnull, "rb") as nothing:  # what reads standard input gets no job
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # whatever is printed must not end up between the answers

    def write(head: dict[str, Any], data: bytes) -> None:
        if getpid() != this:  # a fork of the job's own making, which came back from it
            os._exit(0)
        # A line of its own, whatever was written before it.
        answers.write(b"\n" + dumps(head).encode() + b"\n" + data)
        answers.flush()

    write({"job": READY}, b"")
    for line in jobs:
        job = loads(line)
        number = job.pop("job")
        head, data = answer(job)
        write({**head, "job": number, "size": len(data)}, data)
