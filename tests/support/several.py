"""Commands started as the processes of one run, over 127.0.0.1."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, NamedTuple

from support.compile_flags import QUICK_COMPILES
from support.small_run import environment


class Started(NamedTuple):
    """A process under way, and the files it writes to."""

    process: subprocess.Popen
    output: IO[str]
    told: IO[str]


def start_processes(words: list[str], count: int, devices: int, cache: Path | None = None) -> list[Started]:
    """Starts `python WORDS` as `count` processes of `devices` emulated CPU devices each; 1 is a run like any other."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    started = []
    for process in range(count):
        values = environment(cache) | {
            "XLA_FLAGS": f"{QUICK_COMPILES} --xla_force_host_platform_device_count={devices}",
        }
        if count > 1:
            values |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(process),
            }
        # Files, not pipes: a process whose pipe is full while another one is waited for would hold up both.
        output, told = (tempfile.TemporaryFile("w+") for _ in range(2))
        process = subprocess.Popen([sys.executable, *words], env=values, stdout=output, stderr=told, text=True)
        started.append(Started(process, output, told))
    return started


def end_of(started: Started, timeout: float) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    try:
        status = started.process.wait(timeout)
    finally:
        started.process.kill()
    texts = []
    for file in (started.output, started.told):
        file.seek(0)
        texts.append(file.read())
        file.close()
    return status, *texts
