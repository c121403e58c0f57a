"""Runs a script that a real signal hits at a chosen place: `python interrupt.py PLACE SIGNAL SCRIPT [arguments...]`.

A place is `before|after MODULE:NAME NUMBER[ WORD]`: the process sends itself the signal when it calls that function
for the NUMBERth time (counting only calls among whose arguments WORD appears, when one is given), or when that call
returns.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import runpy
import signal
import sys


def arm(place: str, signal_name: str) -> None:
    """Wraps the function of a place."""
    when, target, number, *word = place.split()
    module_name, _, name = target.partition(":")
    *holders, attribute = name.split(".")
    holder = functools.reduce(getattr, holders, importlib.import_module(module_name))
    function = getattr(holder, attribute)
    calls = itertools.count(1)

    @functools.wraps(function)
    def wrapped(*arguments, **named):
        counted = not word or any(word[0] in str(value) for value in (*arguments, *named.values()))
        here = counted and next(calls) == int(number)
        if here and when == "before":
            os.kill(os.getpid(), signal.Signals[signal_name])
        result = function(*arguments, **named)
        if here and when == "after":
            os.kill(os.getpid(), signal.Signals[signal_name])
        return result

    setattr(holder, attribute, wrapped)


if __name__ == "__main__":
    arm(*sys.argv[1:3])
    sys.argv = sys.argv[3:]
    runpy.run_path(sys.argv[0], run_name="__main__")
