"""Commands started as the processes of one run, over 127.0.0.1."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from support.small_run import QUICK_COMPILES, environment


def start_processes(words: list[str], count: int, devices: int, cache: Path | None = None) -> list[subprocess.Popen]:
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
        started.append(
            subprocess.Popen(
                [sys.executable, *words], env=values, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return started


def end_of(process: subprocess.Popen, timeout: float) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    try:
        output, told = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output, told
