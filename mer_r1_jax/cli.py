"""What the commands under experiments/ share: errors of ours are messages to the user, never tracebacks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from absl import logging

from mer_r1_jax import screen
from mer_r1_jax.config import command_line
from mer_r1_jax.parallel.tpu_flags import set_tpu_flags

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
            raise
        screen.say(f"\nerror: {error}", error=True)
        raise SystemExit(EXIT_ERROR) from error


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """For `app.run(main, flags_parser=parse_flags)`: a mistake on the command line ends like every other.

    Every command begins here, before it touches a device or says a word, so the TPU compiler's flags are set and the
    terminal is guarded here too.
    """
    screen.guard_terminal()
    set_tpu_flags()
    with explained():
        return command_line.parse_flags(arguments)
