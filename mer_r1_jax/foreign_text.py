"""Text that is not ours (names of files, ids, models' answers, servers' replies) on its way to somebody's screen.

Such text can hold escape sequences that a terminal obeys, characters that turn the direction of a line, halves of
surrogate pairs that cannot be encoded, and square brackets that Rich reads as markup.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

_KEPT = frozenset("\n\t")
# Cc control, Cf format (bidirectional overrides, zero width), Cs half surrogates, Zl/Zp line separators
_ESCAPED = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_JOINERS = frozenset("\u200c\u200d")  # Persian, Indic scripts and emoji need them


def printable(text: object, limit: int | None = None, *, one_line: bool = True) -> str:
    """Text that any terminal, log, table, CSV or page can show, with what it cannot show written out as an escape.

    Args:
        text: anything; `str` is applied to it.
        limit: characters after which it is cut, with the number left out.
        one_line: also write out line breaks and tabs.
    """
    text = str(text)
    if text.isprintable() and (limit is None or len(text) <= limit):  # most texts; a page holds megabytes
        return text
    left_out = len(text) - limit if limit is not None and len(text) > limit else 0
    if left_out:
        text = text[:limit]
    shown = "".join(c if c.isprintable() else _escape(c, one_line) for c in text)
    return f"{shown}… ({left_out} characters more)" if left_out else shown


def _escape(character: str, one_line: bool) -> str:
    if character in _JOINERS or (character in _KEPT and not one_line):
        return character
    if unicodedata.category(character) not in _ESCAPED and not _is_noncharacter(character):
        return character
    return character.encode("unicode_escape").decode("ascii")


def _is_noncharacter(character: str) -> bool:
    """U+FFFE, U+FFFF and their like, which no XML may hold."""
    return ord(character) & 0xFFFE == 0xFFFE


def for_markdown(text: object) -> str:
    """Text for a Markdown page or a cell of its tables: no formatting, no HTML, no link, no further cell."""
    return re.sub(r"([\\`*_\[\]<>|#~!$])", r"\\\1", printable(text))


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON for a terminal, with letters of any script as they are and what a terminal would obey as JSON's escapes."""
    written = json.dumps(value, indent=indent, ensure_ascii=False)
    return "".join(c if c == "\n" or c.isprintable() or printable(c) == c else json.dumps(c)[1:-1] for c in written)


def would_run_in_a_spreadsheet(text: str) -> bool:
    """Whether a spreadsheet that opens a CSV may take a cell for a formula that calls, reads or sends something.

    A leading minus alone is none: names of clips begin with it (YouTube's ids), and negative numbers.
    """
    start = text.lstrip()
    return start.startswith(("=", "@")) or (start.startswith(("+", "-")) and any(c in start for c in "(|!"))
