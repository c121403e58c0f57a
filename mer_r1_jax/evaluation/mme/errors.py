"""The error of the MME-Emotion harness: one message that says what was found, what was expected and how to mend it."""

from __future__ import annotations


class MmeError(ValueError):
    """MME-Emotion data, predictions or results that cannot be used as they are."""
