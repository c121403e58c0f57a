"""What interrupts a run: the exception by which a signal stops it, and the places where tests do worse.

A place is a line of the code, `faults.here("rl_saved")`. In a product run the call does nothing. A test replaces `here`
(tests/support/interrupt.py does so in a process of its own), so it depends on the place's name only and survives when
functions are moved or renamed.
"""

from __future__ import annotations


class StopRequested(Exception):
    """Raised to leave a rollout, an evaluation or a wait early, because a signal asked for it."""


def here(place: str, detail: object = "") -> None:
    """Marks a place; does nothing.

    Args:
        place: the place's name, in snake_case. Another place has another name, unless both are the same moment, such as
            the end of a save on a disk and in a bucket.
        detail: what tells visits apart, such as a file's name or a step.
    """
