"""Decoding processes with a time limit per clip: one that hangs, dies or exits is replaced, and its clip reported."""

from __future__ import annotations

import queue
import sys
import time
import weakref
from collections.abc import Sequence

from mer_r1_jax.child import Child, ChildDiedError
from mer_r1_jax.media.entry import CorruptEntryError, Entry
from mer_r1_jax.media.errors import MediaError

WORKER = (sys.executable, "-m", "mer_r1_jax.media.worker")
ATTEMPTS = 2  # a process that dies is often killed for another's sake; a clip that kills two is to blame itself


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
        died: ChildDiedError | None = None
        for _ in range(ATTEMPTS):
            worker = self._slots.get()
            healthy = None
            try:
                if worker is None:
                    worker = _Worker(self._command)
                    self._running.add(worker)
                answer = worker.run(job, self.timeout)
                healthy = worker
            except ChildDiedError as error:
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
            "Re-encode the clip; if all clips fail like this, look at the machine's memory and media.decode_memory_mb.",
        )

    def close(self) -> None:
        """Ends all processes."""
        self._finalizer()


class _Worker(Child):
    """A decoding process."""

    def run(self, job: dict, timeout: float) -> Entry | MediaError:
        """Sends a job and waits for its answer.

        Raises:
            TimeoutError: if there is none in time.
            ChildDiedError: if the process ended.
        """
        self.wait_until_started()
        deadline = time.monotonic() + timeout
        self.send(job)
        answer = self.head(deadline)
        if "error" in answer:
            return MediaError(**answer["error"])
        try:
            return Entry.from_bytes(self.take(answer["size"], deadline))
        except CorruptEntryError as error:
            raise ChildDiedError(str(error)) from None


def _kill_all(workers: set[_Worker]) -> None:
    for worker in list(workers):
        worker.kill()
    workers.clear()
