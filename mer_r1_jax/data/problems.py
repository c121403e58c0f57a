"""What is wrong with a data set, said so that it can be put right: where, got, expected, mend."""

from __future__ import annotations

import dataclasses
import re

from mer_r1_jax.emotion.answer_form import TAGS
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.json_lines import cut

MAX_LISTED = 20  # problems an error message spells out; the total is always stated
MAX_SHOWN = 80  # characters of an offending value a message shows


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Problem:
    """One fault of a data file.

    Attributes:
        file: path of the data file.
        line: 1-based line, or place of the record in a file that has no lines; 0 where the whole file is at fault.
        field: column, or column and place in it, e.g. `messages[1].content`; "" for the whole line.
        got: what is there.
        expected: what should be; "" where `got` is a whole message.
        mend: how to put it right; "" where `got` is a whole message.
        record_id: the record's id where it is known.
        severity: `error` stops a run, `warning` does not.
    """

    file: str
    line: int
    field: str
    got: str
    expected: str
    mend: str
    record_id: str = ""
    severity: str = "error"

    @property
    def where(self) -> str:
        """`file:line`, or the file alone."""
        return f"{self.file}:{self.line}" if self.line else self.file

    def __str__(self) -> str:
        place = f"{self.where}: {self.field}" if self.field else self.where
        text = f"got {self.got}; expected {self.expected}; to mend it, {self.mend}" if self.expected else self.got
        return printable(f"{place}: {text}")


class LineProblems:
    """The problems of one line, collected by all who read a part of it.

    Args:
        file, line: where the line stands.

    Attributes:
        record_id: the record's id as soon as it is known.
        found: the problems, in the order they were added.
    """

    def __init__(self, file: str, line: int):
        self.file, self.line = file, line
        self.record_id = ""
        self.found: list[Problem] = []

    def add(self, field: str, got: str, expected: str, mend: str) -> None:
        """Adds a problem of the line."""
        self.found.append(
            Problem(
                file=self.file,
                line=self.line,
                field=field,
                got=got,
                expected=expected,
                mend=mend,
                record_id=self.record_id,
            )
        )


class RecordError(ValueError):
    """All faults of the data files that were read, raised together.

    Attributes:
        problems: every fault found, in file and line order. The message lists the first `MAX_LISTED`.
    """

    def __init__(self, problems: list[Problem]):
        self.problems = tuple(problems)
        listed = [f"  {problem}" for problem in self.problems[:MAX_LISTED]]
        left_out = len(self.problems) - len(listed)
        if left_out:
            listed.append(f"  ... and {left_out} more")
        noun = "problem" if len(self.problems) == 1 else "problems"
        super().__init__("\n".join([f"{len(self.problems)} {noun} in the data:", *listed]))


def shown(value: object) -> str:
    """A value as a message shows it: its repr, cut to `MAX_SHOWN` characters."""
    return cut(value, MAX_SHOWN)


PLACEHOLDER = re.compile(r"<(?:video|audio|image)>")
SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]{1,64}\|>")
STRUCTURE_TAG = re.compile("|".join(("</?subtitle>", *TAGS)))

_NAMES = {PLACEHOLDER: "a media placeholder", SPECIAL_TOKEN: "a special token", STRUCTURE_TAG: "a tag"}


def check_text(problems: LineProblems, field: str, text: str, *forbidden: re.Pattern) -> None:
    """Adds a problem for each of the forbidden patterns that stands in the text."""
    for pattern in forbidden:
        found = pattern.search(text)
        if found:
            mend = f"take {found.group()} out of the text; the model would read it as structure, not as words"
            problems.add(field, f"{found.group()} in {shown(text)}", f"a text without {_NAMES[pattern]}", mend)
