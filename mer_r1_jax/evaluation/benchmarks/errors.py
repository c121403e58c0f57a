"""The error of the benchmarks: one message that says what was found, what was expected and how to mend it."""

from __future__ import annotations


class BenchmarkError(ValueError):
    """A benchmark that cannot be read, answered or scored as asked."""
