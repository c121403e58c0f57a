"""Decoding in processes of their own, with limits of time and memory per clip: `python -m mer_r1_jax.media.pool`.

The pool replaces a process that hangs, dies or exits, and reports its clip. A job holds the arguments of `decode_file`;
its answer is the entry's bytes, or the error.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.decoded import CorruptEntryError, Entry, decode_file
from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.process_pool import ChildDiedError, ProcessPool, serve

WORKER = (sys.executable, "-m", "mer_r1_jax.media.pool")
ATTEMPTS = 2  # a process that dies is often killed for another's sake; a clip that kills two is to blame itself


class WorkerPool:
    """A fixed number of decoding processes, started when first needed. Safe to use from several threads.

    Args:
        workers: processes.
        timeout: seconds one clip may take.
        command: the program they run.
        asked: whether whoever waits for clips waits no longer; looked at while one is decoded.
    """

    def __init__(
        self,
        workers: int,
        timeout: float,
        command: Sequence[str] = WORKER,
        asked: Callable[[], bool] = lambda: False,
    ):
        self.timeout = timeout
        self._pool, self._asked = ProcessPool(command, workers), asked

    def decode(self, job: dict[str, Any]) -> Entry:
        """Decodes one file in a process; the arguments of `decode_file`, with `media` as a plain dict.

        Raises:
            MediaError: what the process reports, or reason "timeout" or "worker_died".
            StopRequested: `asked` said so.
        """
        died: ChildDiedError | None = None
        for _ in range(ATTEMPTS):
            try:
                answer = self._pool.ask(job, self.timeout, _read, self._asked)
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
        self._pool.close()


def _read(head: dict[str, Any], data: bytes) -> Entry | MediaError:
    if "error" in head:
        return MediaError(**head["error"])
    try:
        return Entry.from_bytes(data)
    except CorruptEntryError as error:
        raise ChildDiedError(str(error)) from None


def main() -> None:
    """Answers jobs: what a decoding process runs."""
    loaded = _data_bytes()

    def answer(job: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        job["media"] = MediaConfig(**job["media"])
        _limit_memory(loaded + (job["media"].decode_memory_mb << 20))
        try:
            return {}, decode_file(**job).to_bytes()
        except MediaError as error:
            return {"error": error.to_json()}, b""

    serve(answer)


def _limit_memory(limit: int) -> None:
    """Lets this process take so many bytes of memory, those its libraries took when they were loaded among them.

    The limit is on data (RLIMIT_DATA: the heap and private pages that can be written), not on addresses: allocators
    and threads reserve address space they never use, more of it the more cores there are. Allocations beyond it fail,
    so a bomb ends as an error of its clip; without a limit the system would end whichever process it likes.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _data_bytes() -> int:
    """Bytes of data this process has, as RLIMIT_DATA counts them; 0 where the system does not tell."""
    try:
        found = re.search(r"^VmData:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0


if __name__ == "__main__":
    main()
