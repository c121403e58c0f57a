"""Runs a script that something hits at a chosen place: `python interrupt.py PLACE WHAT SCRIPT [arguments...]`.

A place is `NAME NUMBER[ WORD][ +SECONDS]`: where the process comes for the NUMBERth time to the line
`faults.here("NAME", ...)` of the package (counting only visits whose detail holds WORD, when one is given), or so many
seconds later, while it goes on. What comes there is the name of a signal, which the process sends itself; the name of
an error of the system such as ENOSPC, which is raised there; or `fill=FILE`: FILE takes all the room its disk has left.
"""

from __future__ import annotations

import errno
import itertools
import os
import runpy
import signal
import sys
import threading
import time

from mer_r1_jax import faults

NOTICED_SECONDS = 0.2  # a signal is taken by a thread


def arm(place: str, what: str) -> None:
    """Puts it in a place."""
    name, number, *further = place.split()
    word = [part for part in further if not part.startswith("+")]
    later = [float(part) for part in further if part.startswith("+")]
    visits = itertools.count(1)

    def here(place: str, detail: object = "") -> None:
        if place == name and (not word or word[0] in str(detail)) and next(visits) == int(number):
            if later:
                threading.Timer(*later, strike, (what,)).start()
            else:
                strike(what)

    faults.here = here


def strike(what: str) -> None:
    """Lets it come."""
    if what.startswith("fill="):
        fill(what.removeprefix("fill="))
    elif hasattr(errno, what):
        raise OSError(getattr(errno, what), os.strerror(getattr(errno, what)))
    else:
        os.kill(os.getpid(), signal.Signals[what])
        time.sleep(NOTICED_SECONDS)


def fill(path: str) -> None:
    """Writes a file until nothing more fits on its disk."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"0" * size)
            except OSError:
                pass


if __name__ == "__main__":
    arm(*sys.argv[1:3])
    sys.argv = sys.argv[3:]
    runpy.run_path(sys.argv[0], run_name="__main__")
