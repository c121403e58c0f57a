"""How a program that a signal stops leaves what it is doing."""

from __future__ import annotations


class StopRequested(Exception):
    """Raised to leave a rollout, an evaluation or a wait early, because a signal asked for it."""
