"""The extractor's steps and the judge's ratings from what they wrote: tolerant of form, strict about counts.

What cannot be read for certain is refused, never guessed at: whoever asked asks again, or counts a failure.
"""

from __future__ import annotations

import re
from fractions import Fraction

from mer_r1_jax.evaluation.mme.judging import MAX_STEPS

_STEPS_BLOCK = re.compile(r"<steps?>(.*?)</steps?>", re.DOTALL | re.IGNORECASE)
_SCORE_BLOCK = re.compile(r"<scores?>(.*?)</scores?>", re.DOTALL | re.IGNORECASE)
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_LONGEST = 50_000  # characters of a reply; the patterns take quadratic time on some
_STEP = re.compile(r"\bstep\s*#?\s*(\d{1,3})\b[\s*_]*[:.)\-–—=][\s*_]*", re.IGNORECASE)
_RATING = re.compile(
    r"\bstep\s*#?\s*(\d{1,3})\b[\s*_]*[:.)\-–—=]+[\s*_`]*(\d{1,3})(?:\s*/\s*(\d{1,3}))?(?!\d|[./]\s*\d)", re.IGNORECASE
)


class UnreadableReplyError(ValueError):
    """A reply that does not say what was asked for; the message says what it lacks, for the one who wrote it."""


def parse_steps(reply: str) -> list[str]:
    """Steps, at least one, in order; numbering must run from 1 without gaps.

    Raises:
        UnreadableReplyError: no steps, an empty one, too many, or numbers out of order.
    """
    text = _block(reply, _STEPS_BLOCK, "<steps>")
    marks = list(_STEP.finditer(text))
    if not marks:
        raise UnreadableReplyError('it has no line that begins with "Step 1:"')
    _check_numbers([int(mark.group(1)) for mark in marks])
    if len(marks) > MAX_STEPS:
        raise UnreadableReplyError(f"it has {len(marks)} steps, expected at most {MAX_STEPS}")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    steps = [" ".join(text[mark.end() : end].split()).strip("*_ ") for mark, end in zip(marks, ends, strict=True)]
    if not all(steps):
        raise UnreadableReplyError(f"step {steps.index('') + 1} is empty")
    return steps


def parse_scores(reply: str, steps: int, labels: int = 1) -> list[Fraction]:
    """One rating for each step: 0 or 1, and hits / labels for the last.

    Args:
        reply: what the judge wrote.
        steps: it was given.
        labels: the item has; the last rating's denominator.

    Raises:
        UnreadableReplyError: another number of ratings, or one that cannot be.
    """
    text = _block(reply, _SCORE_BLOCK, "<score>")
    found = list(_RATING.finditer(text))
    if len(found) != steps:
        raise UnreadableReplyError(f"it has {len(found)} ratings, expected {steps}, one for each step")
    _check_numbers([int(match.group(1)) for match in found])
    return [
        _rating(number, match.group(2), match.group(3), labels if number == steps else 1)
        for number, match in enumerate(found, start=1)
    ]


def _rating(number: int, hits: str, total: str | None, labels: int) -> Fraction:
    given = f"{hits}/{total}" if total else hits
    if total is None and labels > 1:
        raise UnreadableReplyError(f"the rating of step {number} is {given}, expected the number of hits/{labels}")
    if total is not None and int(total) != labels or int(hits) > labels:
        expected = (
            " or ".join(f"{count}/{labels}" for count in range(labels + 1))
            if labels < 3
            else f"0/{labels} to {labels}/{labels}"
        )
        raise UnreadableReplyError(f"the rating of step {number} is {given}, expected {expected}")
    return Fraction(int(hits), labels)


def _block(reply: str, pattern: re.Pattern[str], tag: str) -> str:
    """What stands in the one block of a reply; all of it where there is no tag. Thoughts before it do not count."""
    if len(reply) > _LONGEST:
        raise UnreadableReplyError(f"it has {len(reply)} characters, expected at most {_LONGEST}")
    reply = _THOUGHTS.sub("", reply, count=1)
    blocks = list(dict.fromkeys(block.strip() for block in pattern.findall(reply)))
    if len(blocks) > 1:
        raise UnreadableReplyError(f"it has {len(blocks)} blocks in {tag}, expected one")
    return blocks[0] if blocks else reply


def _check_numbers(numbers: list[int]) -> None:
    if numbers != list(range(1, len(numbers) + 1)):
        shown = ", ".join(map(str, numbers[:30]))
        raise UnreadableReplyError(f"its steps are numbered {shown}, expected 1 to {len(numbers)} in order")
