"""What the commands share: errors of ours are messages to the user, never tracebacks."""

from __future__ import annotations

import contextlib
import logging as stdlib_logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import flags, logging

from mer_r1_jax import screen
from mer_r1_jax.config import command_line
from mer_r1_jax.config.build import from_mapping, to_json
from mer_r1_jax.parallel import set_gpu_memory, set_tpu_flags
from mer_r1_jax.storage.atomic_files import DISK_ERRORS, WriteError, explanation
from mer_r1_jax.training.signals import EXIT_SAVED

EXIT_ERROR = 2  # the run cannot go on as it is; the message on stderr says why and how to mend it
PRINT_CONFIG = "--print_config"
_SENT_AGAIN_AFTER = 0.05  # seconds


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
    """The exit status of a command that is done; one that a signal stopped ends here and now."""
    if code == EXIT_SAVED:
        left(code)
    return code


def left(code: int) -> NoReturn:
    """Ends the process here and now.

    Python's own way out waits for threads and for what still runs on the device, which may be a rollout of minutes.
    """
    stdlib_logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def keep_interrupts() -> None:
    """Ctrl-C is not lost where nothing can be raised.

    Python handles a signal wherever the main thread stands. In a callback of its garbage collection, of which jax has
    one, or in a `__del__`, what a handler raises is printed and forgotten, and the command would go on.
    """
    if not isinstance(sys.unraisablehook, _SentAgain):
        sys.unraisablehook = _SentAgain(sys.unraisablehook)


class _SentAgain:
    """A hook for what could not be raised: sends an interrupt again a moment later, and leaves all else to another."""

    def __init__(self, otherwise: Callable[[Any], Any]):
        self.otherwise = otherwise

    def __call__(self, unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self.otherwise(unraisable)
            return
        # To the main thread, so that a wait of its ends, and later, as it still stands where nothing can be raised.
        main = threading.main_thread().ident
        again = threading.Timer(_SENT_AGAIN_AFTER, signal.pthread_kill, (main, signal.SIGINT))
        again.daemon = True
        again.start()


def show(text: str) -> None:
    """Prints what somebody asked to see, who may stop reading at any line (`mer-r1 train --help | head`)."""
    try:
        screen.say(text)
    except BrokenPipeError:
        # Python flushes the same closed pipe once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def as_typed(command: str) -> str:
    """The command line of this process as `mer-r1 COMMAND ...`, for reports that say how they were made."""
    return f"mer-r1 {command} {shlex.join(sys.argv[1:])}".rstrip()


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """For `app.run(main, flags_parser=parse_flags)`: a mistake on the command line ends like every other.

    Every command begins here, before it touches a device or says a word, so what XLA has to know is set and the
    terminal is guarded here too. `--print_config` is answered here: the process ends with status 0.
    """
    screen.guard_terminal()
    keep_interrupts()
    set_tpu_flags()
    set_gpu_memory()
    with explained():
        asked = PRINT_CONFIG in arguments and "config" in flags.FLAGS
        rest = command_line.parse_flags([word for word in arguments if not (asked and word == PRINT_CONFIG)])
        if asked:
            show(to_json(from_mapping(flags.FLAGS.config or {})).rstrip())
            raise SystemExit(0)
    return rest
