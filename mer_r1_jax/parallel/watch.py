"""A thread that ends this process when another process of the run has ended or has gone silent.

Without it a process that lost another waits in a collective: for ever on TPU, until an error of the network on CPU.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import jax

BEAT_SECONDS = 2.0  # between two signs of life, and two looks at those of the others
SILENT_SECONDS = 30.0  # without a sign of life a process counts as dead
_ALIVE, _ENDED = "mer_r1_jax/alive/", "mer_r1_jax/ended/"


class Watch:
    """Gives this process's signs of life and watches those of the others.

    Args:
        client: of jax's coordination service.
        process, processes: number of this process, and how many there are.
        exit_code: what this process ends with when another is lost.
    """

    def __init__(self, client: Any, process: int, processes: int, exit_code: int):
        self._client = client
        self._process = process
        self._exit_code = exit_code
        self._stop = threading.Event()
        self._beats = 0
        now = time.monotonic()
        self._heard = {other: (-1, now) for other in range(processes) if other != process}
        self._thread = threading.Thread(target=self._run, name="peer-watch", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch: from now on processes may come and go."""
        self._stop.set()
        self._thread.join()

    def tell(self, reason: str) -> None:
        """Tells the others that this process ends now, and why."""
        try:
            self._client.key_value_set(f"{_ENDED}{self._process}", reason, True)
            time.sleep(2 * BEAT_SECONDS)  # process 0 holds what was told: the others must have heard it
        except jax.errors.JaxRuntimeError:
            pass  # the others are gone already

    def wait_for_loss(self) -> None:
        """Waits as long as it can take to find that another process is gone; does not return if one is."""
        time.sleep(SILENT_SECONDS + 3 * BEAT_SECONDS)

    def _run(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                loss = self._look()
            except jax.errors.JaxRuntimeError as error:
                loss = f"process 0, which coordinates the run, cannot be reached ({str(error).splitlines()[0][:200]})"
            if loss and not self._stop.is_set():
                self._end(loss)

    def _look(self) -> str | None:
        """Gives a sign of life; what is lost, in words, or None."""
        self._beats += 1
        self._client.key_value_set(f"{_ALIVE}{self._process}", str(self._beats), True)
        for key, reason in self._client.key_value_dir_get(_ENDED):
            if (other := int(key.rpartition("/")[2])) != self._process:
                return f"process {other} ended: {reason}"
        now = time.monotonic()
        for key, beats in self._client.key_value_dir_get(_ALIVE):
            other = int(key.rpartition("/")[2])
            if other in self._heard and self._heard[other][0] != int(beats):
                self._heard[other] = (int(beats), now)
        silent = [other for other, (_, since) in self._heard.items() if now - since > SILENT_SECONDS]
        if silent:
            return f"process {', '.join(map(str, silent))} has given no sign of life for {SILENT_SECONDS:g} s"
        return None

    def _end(self, loss: str) -> None:
        told = (
            f"\nerror: process {self._process} ends, because {loss}\nThe newest checkpoint counts: mend that, then "
            f"start the same command on every host again (exit code {self._exit_code}).\n"
        )
        if self._process == 0:
            time.sleep(3 * BEAT_SECONDS)  # with this process the service goes: the others must have found out, too
        try:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, told.encode())
        except (OSError, ValueError):
            pass
        os._exit(self._exit_code)
