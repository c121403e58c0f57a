"""Runs a training command and prints what its process has in use: `python memory_of_steps.py SCRIPT ...`.

The last line of standard output is JSON, phase -> bytes after every fourth step. Counted are the bytes that the C
library has handed out (with PYTHONMALLOC=malloc those of Python's objects too), not the pages the process holds: how
many of those stay behind after being freed depends on the machine.
"""

from __future__ import annotations

import collections
import ctypes
import gc
import json
import runpy
import sys

from mer_r1_jax import faults

EVERY = 4
_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


# Made once: each CDLL is a class of its own, and would be counted.
_mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
_mallinfo.restype = _Mallinfo


def in_use() -> int:
    """Bytes handed out and not given back, mapped blocks included."""
    told = _mallinfo()
    return told.uordblks + told.hblkhd


if __name__ == "__main__":
    noted: dict[str, list[int]] = collections.defaultdict(list)

    def here(place: str, detail: object = "") -> None:
        if place == "update_noted":
            phase, step = str(detail).split()
            if int(step) % EVERY == 0:
                gc.collect()
                noted[phase].append(in_use())

    faults.here = here
    sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print(json.dumps(noted))
