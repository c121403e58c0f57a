"""Commands with a real terminal for their output, where libraries do send escapes."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def in_a_terminal(words: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None) -> tuple[int, bytes]:
    """Runs a command to its end; returns its exit status and all that its terminal got."""
    ours, theirs = pty.openpty()
    settings = {**environment, "TERM": "xterm-256color"}
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=settings, cwd=cwd) as process:
        os.close(theirs)
        got = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # how a terminal says that its program is gone
                break
            if not data:
                break
            got += data
    os.close(ours)
    return process.returncode, got
