"""Runs a script that a real signal hits at a chosen place: `python interrupt.py PLACE SIGNAL SCRIPT [arguments...]`.

A place is `NAME NUMBER[ WORD]`: the process sends itself the signal when it comes for the NUMBERth time to the line
`faults.here("NAME", ...)` of the package (counting only visits whose detail holds WORD, when one is given).
"""

from __future__ import annotations

import itertools
import os
import runpy
import signal
import sys

from mer_r1_jax import faults


def arm(place: str, signal_name: str) -> None:
    """Puts the signal in a place."""
    name, number, *word = place.split()
    visits = itertools.count(1)

    def here(place: str, detail: object = "") -> None:
        if place == name and (not word or word[0] in str(detail)) and next(visits) == int(number):
            os.kill(os.getpid(), signal.Signals[signal_name])

    faults.here = here


if __name__ == "__main__":
    arm(*sys.argv[1:3])
    sys.argv = sys.argv[3:]
    runpy.run_path(sys.argv[0], run_name="__main__")
