"""One run as a process of its own: `python -m mer_r1_jax.run.job CONFIG.json`, as `mer-r1 train` does it.

It is stopped (saved, exit code 75) when the process that started it is gone, so that nothing trains on unseen.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from mer_r1_jax.cli import ended, explained
from mer_r1_jax.config.build import load_config
from mer_r1_jax.run.train import train

PARENT_CHECK_SECONDS = 1.0


def main(arguments: list[str]) -> int:
    """Runs, or goes on with, the run of a saved configuration; returns the exit code of `run.train.train`."""
    threading.Thread(target=_stop_with_parent, args=(os.getppid(),), daemon=True).start()
    with explained():
        code = train(load_config(arguments[0]))
    return ended(code)


def _stop_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
