"""What the commands under experiments/ share: errors of ours are messages to the user, never tracebacks."""

from __future__ import annotations

import contextlib
import logging as stdlib_logging
import os
import sys
from collections.abc import Iterator, Sequence

from absl import logging

from mer_r1_jax import screen
from mer_r1_jax.config import command_line
from mer_r1_jax.parallel.tpu_flags import set_tpu_flags
from mer_r1_jax.storage.durable import DISK_ERRORS, WriteError, explanation
from mer_r1_jax.training.signals import EXIT_SAVED

EXIT_ERROR = 2  # the run cannot go on as it is; the message on stderr says why and how to mend it


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns an error class of this package into its message and exit code 2; anything else is a bug and is shown whole.

    Every module raises its own exception class for what a user can mend, so the class tells the two apart.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax reports every step of every save at level INFO
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("mer_r1_jax."):
            if not (isinstance(error, OSError) and error.errno in DISK_ERRORS):
                raise
            error = _of_disk(error)
        screen.say(f"\nerror: {error}", error=True)
        raise SystemExit(EXIT_ERROR) from error


def _of_disk(error: OSError) -> WriteError:
    """A full or broken disk, or missing permissions, met where nobody said what was being written or read."""
    path = error.filename or os.getcwd()
    what = "a file" if error.filename else "a file (which one is not known)"
    return WriteError(error.errno, explanation(f"{what} of this command", path, error, "read or written"))


def ended(code: int) -> int:
    """The exit status of a command that is done; one that a signal stopped ends here and now.

    Python's own way out waits for what still runs on the device, which may be a rollout of minutes.
    """
    if code == EXIT_SAVED:
        stdlib_logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """For `app.run(main, flags_parser=parse_flags)`: a mistake on the command line ends like every other.

    Every command begins here, before it touches a device or says a word, so the TPU compiler's flags are set and the
    terminal is guarded here too.
    """
    screen.guard_terminal()
    set_tpu_flags()
    with explained():
        return command_line.parse_flags(arguments)
