"""What can go wrong with a judge: one question, or all of them."""

from __future__ import annotations


class JudgeError(RuntimeError):
    """One question the judge did not answer, after every allowed retry.

    Attributes:
        reason: a short slug for counting: rate_limited, server_error, timeout, connection, bad_reply, no_text,
            truncated, filtered, refused.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class JudgeAbortedError(RuntimeError):
    """The judge cannot be used as it is, so the rest is not asked either; what was answered is kept in the cache."""
