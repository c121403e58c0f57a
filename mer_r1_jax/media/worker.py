"""The program a decoding process runs: `python -m mer_r1_jax.media.worker`.

A job holds the arguments of `decode_file`; the answer is the size of the entry whose bytes follow, or the error.
"""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Any

from mer_r1_jax.child import serve
from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.entry import decode_file
from mer_r1_jax.media.errors import MediaError


def main() -> None:
    """Serves jobs until the parent closes the pipe."""
    serve(_answer)


def limit_memory(megabytes: int) -> None:
    """Lets this process take so much memory beyond what its libraries took when they were loaded.

    The limit is on data (RLIMIT_DATA: the heap and private pages that can be written), not on addresses: allocators
    and threads reserve address space they never use, more of it the more cores there are. Allocations beyond it fail,
    so a bomb ends as an error of its clip; without a limit the system would end whichever process it likes.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _LOADED + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _data_bytes() -> int:
    """Bytes of data this process has, as RLIMIT_DATA counts them; 0 where the system does not tell."""
    try:
        found = re.search(r"^VmData:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0


_LOADED = _data_bytes()


def _answer(job: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    job["media"] = MediaConfig(**job["media"])
    limit_memory(job["media"].decode_memory_mb)
    try:
        data = decode_file(**job).to_bytes()
    except MediaError as error:
        return {"error": error.to_json()}, b""
    return {"size": len(data)}, data


if __name__ == "__main__":
    main()
