"""Writes that fail in the kernel."""

import contextlib
import resource


@contextlib.contextmanager
def largest_file(size):
    """Makes every write beyond `size` bytes of a file fail, after those that fit were written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
