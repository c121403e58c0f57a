"""The one way to a terminal and into a log. Whatever is shown through here is text: nothing in it is obeyed.

Names of files, ids, models' answers and servers' replies end up in messages everywhere. So consoles, plain lines,
progress bars and the handlers of logs are made here and nowhere else, and each writes out as an escape what a terminal
would obey. Square brackets are brackets: Rich's markup is off, styles are given as arguments.
"""

from __future__ import annotations

import io
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import IO, Any

from absl import logging as absl_logging
from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from mer_r1_jax.foreign_text import printable
from mer_r1_jax.storage.atomic_files import explanation

_LOG_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _PlainConsole(Console):
    """A console of Rich's to which every text, cells and titles of tables included, is plain and printable."""

    def print(self, *objects: Any, **settings: Any) -> None:
        if all(isinstance(one, str) for one in objects):
            settings.setdefault("soft_wrap", True)  # a path that is broken in two cannot be copied
        super().print(*objects, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        settings |= {"markup": False, "emoji": False}
        return super().render_str(printable(text, one_line=False), **settings)


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console for tables and lines with a style; long lines of text are not broken.

    Args:
        stderr: write to standard error.
        quiet: write nothing.
    """
    return _PlainConsole(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)


def say(*texts: object, error: bool = False, sep: str = " ", stream: IO[str] | None = None) -> None:
    """Prints a line, at once.

    Args:
        error: on standard error.
        sep: between the texts.
        stream: where to instead.
    """
    line = printable(sep.join(map(str, texts)), one_line=False)
    print(line, file=stream or (sys.stderr if error else sys.stdout), flush=True)


def bar(**settings: Any) -> tqdm:
    """A progress bar of tqdm's.

    Args:
        settings: of tqdm; texts are made printable.
    """
    return _PlainBar(**settings)


@contextmanager
def stage_bar(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """One bar for work in several stages: gives `show(stage, units there, units in all)`."""
    with bar(unit=unit) as one:

        def show(stage: str, there: int, total: int) -> None:
            one.set_description(stage, refresh=False)
            one.total, one.n = total, there
            one.refresh()

        yield show


class _PlainBar(tqdm):
    def __init__(self, **settings: Any):
        if "desc" in settings:
            settings["desc"] = printable(settings["desc"])
        super().__init__(**settings)

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
        super().set_description(printable(desc or ""), refresh)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        super().set_postfix_str(printable(s), refresh)


class PlainFormatter(logging.Formatter):
    """What another formatter makes of a record, printable. Further lines are indented: none passes for a record.

    Args:
        inner: the other formatter; None = time, level and name before the message.
    """

    def __init__(self, inner: logging.Formatter | None = None):
        super().__init__()
        self._inner = inner or logging.Formatter(_LOG_LINE)

    def format(self, record: logging.LogRecord) -> str:
        return printable(self._inner.format(record), one_line=False).replace("\n", "\n  ")


def log_file(path: Any) -> logging.Handler:
    """A handler that writes a log to a file."""
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(PlainFormatter())
    return handler


class _LogFile(logging.FileHandler):
    """A log file; when it cannot be written that is said once, without a traceback for every line."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by logging inside `except`."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._tell(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # lines that found no room are tried once more, and must not hide what ended the run
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            say(explanation("the log", self.baseFilename, error), error=True)


def guard_terminal() -> None:
    """Makes logs and tracebacks on the terminal printable too, and letters that its encoding lacks no error."""
    # Absl's, whose formatter writes the head of a line, and the one for what comes before that is set up.
    for handler in (absl_logging.get_absl_handler().python_handler, logging.lastResort):
        if handler is not None and not isinstance(handler.formatter, PlainFormatter):
            handler.setFormatter(PlainFormatter(handler.formatter or logging.Formatter()))
            handler.addFilter(_is_said_here_only)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = _show_bug
    threading.excepthook = lambda args: _show_bug(args.exc_type, args.exc_value, args.exc_traceback)


def _is_said_here_only(record: logging.LogRecord) -> bool:
    """Whether a record belongs on the terminal, too: of Orbax's tracebacks those that no log file keeps.

    What fails in a thread of Orbax's is logged there with pages of its insides, and then raised to whoever saves, who
    says once what could not be saved and why.
    """
    if not record.exc_info or "orbax" not in PurePath(record.pathname).parts:
        return True
    return not any(isinstance(handler, _LogFile) for handler in logging.getLogger().handlers)


def _show_bug(kind: Any, value: Any, trace: Any) -> None:
    """A traceback as Python shows it, printable."""
    if issubclass(kind, SystemExit):
        return
    # Ctrl-C is no bug. Python ends the process as that signal ends one, whatever is shown here.
    if issubclass(kind, KeyboardInterrupt):
        say("interrupted", error=True)
        return
    say("".join(traceback.format_exception(kind, value, trace)).rstrip("\n"), error=True)
