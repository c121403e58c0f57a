"""Text that is not ours (names of files, ids, models' answers, servers' replies) on its way to somebody's screen.

Such text can hold escape sequences that a terminal obeys, characters that turn the direction of a line, halves of
surrogate pairs that cannot be encoded, and square brackets that Rich reads as markup.
"""

from __future__ import annotations

import unicodedata

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
    left_out = len(text) - limit if limit is not None and len(text) > limit else 0
    if left_out:
        text = text[:limit]
    shown = "".join(_escape(c, one_line) for c in text)
    return f"{shown}… ({left_out} characters more)" if left_out else shown


def _escape(character: str, one_line: bool) -> str:
    if character in _JOINERS or (character in _KEPT and not one_line):
        return character
    if unicodedata.category(character) not in _ESCAPED:
        return character
    return character.encode("unicode_escape").decode("ascii")


def would_run_in_a_spreadsheet(text: str) -> bool:
    """Whether a spreadsheet that opens a CSV may take a cell for a formula that calls, reads or sends something.

    A leading minus alone is none: names of clips begin with it (YouTube's ids), and negative numbers.
    """
    start = text.lstrip()
    return start.startswith(("=", "@")) or (start.startswith(("+", "-")) and any(c in start for c in "(|!"))
