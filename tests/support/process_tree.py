"""Looks at other processes: which there are below one, and whether one has ended."""

from __future__ import annotations

import time
from pathlib import Path


def descendants(process: int) -> list[int]:
    """Ids of all processes below one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (state := _stat(int(entry.name))):
            parents[int(entry.name)] = int(state[1])
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def gone(process: int, seconds: float = 10.0) -> bool:
    """Whether a process ends within that time; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = _stat(process)
        if state is None or state[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def _stat(process: int) -> list[str] | None:
    """State, parent and what follows; None where there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
