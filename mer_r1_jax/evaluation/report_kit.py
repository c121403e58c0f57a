"""What all reports are made of: tables, figures, marked words and numbers, as a page of HTML or as Markdown.

A report is one self-contained HTML file from a template beside it, in one style (`page.html.jinja`, `kit.html.jinja`).
All text in it is escaped and printable, whoever wrote it: only what is `Markup` here is taken as HTML.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from mer_r1_jax.emotion.wheels import WheelError, Wheels, load_wheels
from mer_r1_jax.evaluation.bootstrap import POINTS, Difference, signed
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.storage import atomic_files

FEW_CLIPS = 100  # below this, intervals of F1 are wider than what RL usually gains
NONE = "–"  # in place of a number that was not measured


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a table. A line break in its text is one on the page.

    Attributes:
        text: what stands in it.
        note: the small print below.
        kind: CSS classes; "text" is for words, which stand on the left.
        span: columns it covers.
        head: names its row.
    """

    text: str
    note: str = ""
    kind: str = ""
    span: int = 1
    head: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """Cells side by side; `kind` are CSS classes, such as "strong"."""

    cells: tuple[Cell, ...]
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under rows of heads; `note` explains it, `kind` are CSS classes."""

    heads: tuple[Row, ...]
    rows: tuple[Row, ...]
    title: str = ""
    note: str = ""
    kind: str = "numbers"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture as a data URI, and what it shows."""

    caption: str
    source: str


def row(name: str | Cell, cells: Iterable[str | Cell], kind: str = "") -> Row:
    """A row that begins with its name."""
    first = dataclasses.replace(name, head=True) if isinstance(name, Cell) else Cell(name, head=True)
    return Row((first, *(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells)), kind)


def text_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1, strong: Iterable[int] = (), **about: str
) -> Table:
    """A table of texts only.

    Args:
        columns: heads.
        rows: of as many texts.
        texts: so many columns, the first ones, are words; the others are numbers.
        strong: numbers of the rows that stand out.
        about: title, note and kind of the table.
    """
    strong = set(strong)

    def cells(line: Sequence[str]) -> tuple[Cell, ...]:
        return tuple(Cell(text, kind="text" if place < texts else "") for place, text in enumerate(line))

    body = tuple(Row(cells(line), "strong" if number in strong else "") for number, line in enumerate(rows))
    return Table((Row(cells(columns)),), body, **about)


def markdown(table: Table) -> str:
    """A table in Markdown, under its title."""
    (head,) = table.heads
    lines = [[cell.text for cell in head.cells], [":-" if cell.kind == "text" else "-:" for cell in head.cells]]
    lines += [[f"**{cell.text}**" if row.kind == "strong" else cell.text for cell in row.cells] for row in table.rows]
    # Cells are numbers and names; what could begin another cell or HTML is written out.
    shown = [[re.sub(r"([|<])", r"\\\1", printable(text)) for text in line] for line in lines]
    body = "\n".join("| " + " | ".join(line) + " |" for line in shown)
    return f"### {table.title}\n\n{table.note}\n\n{body}\n"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in hundredths; a dash where it was not measured."""
    return NONE if value is None else f"{POINTS * value:.{digits}f}"


def number(value: float | None, digits: int = 1) -> str:
    """A number; a dash where it was not measured."""
    return NONE if value is None else f"{value:.{digits}f}"


def span(difference: Difference) -> str:
    """A difference and its interval."""
    return f"{signed(difference.points)} ({difference.interval})"


def counted(count: int, noun: str) -> str:
    """A number with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def share(value: float) -> str:
    """A share of the draws in per cent; what is not all of them is never rounded up to all, nor some down to none."""
    if 0 < value < 0.01:
        return "less than 1%"
    return "more than 99%" if 0.99 < value < 1 else f"{value:.0%}"


def cut(text: str, limit: int) -> str:
    """Text of at most so many characters, with an ellipsis where some are left out."""
    return text if len(text) <= limit else text[:limit] + " …"


@dataclasses.dataclass(frozen=True)
class Word:
    """An emotion word.

    Attributes:
        text: the word.
        mark: right, wrong or unknown (answers), found or missed (truth), "" when not marked.
        confidence: the probability the model gives it, as it is shown; "" where it is not known.
    """

    text: str
    mark: str
    confidence: str = ""


class WordMarks:
    """Marks single emotion words against the other side's; without wheels, as where they cannot be read, all are "".

    Args:
        wheel_dir, variant: of the wheels, as `load_wheels` takes them.
        missing: gets a line where they cannot be read.
    """

    def __init__(self, wheel_dir: str, variant: str, missing: list[str]):
        self._wheels: Wheels | None = None
        try:
            self._wheels = load_wheels(wheel_dir, variant)
        except (WheelError, OSError) as error:
            missing.append(f"marks of single words: {error}")

    def answer(self, words: Iterable[str], truth: Sequence[str]) -> list[Word]:
        """Words of an answer: right, wrong or unknown."""
        return [Word(word, self._of_answer(word, truth)) for word in words]

    def truth(self, words: Iterable[str], answer: Sequence[str]) -> list[Word]:
        """True words: found or missed."""
        marks = ("missed", "found")
        return [Word(word, "" if self._wheels is None else marks[self._shared(word, answer)]) for word in words]

    def _of_answer(self, word: str, truth: Sequence[str]) -> str:
        if self._wheels is None:
            return ""
        if not self._wheels.is_known(word):
            return "unknown"
        return "right" if self._shared(word, truth) else "wrong"

    def _shared(self, word: str, others: Sequence[str]) -> bool:
        """Whether a word has a category of the others on at least half of the wheels it is on."""
        assert (wheels := self._wheels) is not None  # asked only where there are wheels
        own = {wheel: wheels.category(word, wheel) for wheel in range(len(wheels))}
        hits = [category in wheels.categories(others, wheel) for wheel, category in own.items() if category is not None]
        return bool(hits) and 2 * sum(hits) >= len(hits)


def render_page(template: str, **values: Any) -> str:
    """A page's HTML. All of it is printable and escaped; a value the template names but is not given is an error.

    Args:
        template: its path below `mer_r1_jax/evaluation`.
        values: what it shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mer_r1_jax.evaluation", "."),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(written=time.strftime("%Y-%m-%d %H:%M"), **values)


@dataclasses.dataclass(frozen=True)
class Script:
    """A script of this package for a page: its text, and the Content Security Policy's source that lets it run."""

    text: markupsafe.Markup
    source: str


def script_of(name: str) -> Script:
    """Reads a script from this folder; it takes nothing from a run, so that its hash is that of the file."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Script(markupsafe.Markup(text), f"'sha256-{digest}'")


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Writes a page; half surrogates, which no file can hold, become "?"."""
    atomic_files.write_text(path, render_page(template, **values).encode("utf-8", "replace").decode())
    return path


def _shown(value: Any) -> Any:
    """A value as the page shows it: HTML made here as it is, any other text without what turns or hides it."""
    if isinstance(value, markupsafe.Markup | jinja2.Undefined) or value is None:
        return value
    return printable(value, one_line=False)
