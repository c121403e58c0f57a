"""Emotion wheels: from a folder of tables to "which category is this word in".

A wheel folder holds `wheel1` to `wheel5` (columns level1, level2, level3; a blank cell repeats the one above),
`synonym` (column pairs word_runN, synonym_runN) and `format` (columns name, format: a base word and a comma list of its
surface forms), each as `.csv` or `.xlsx`. The official MER-UniBench folder (zeroQiaoba/AffectGPT, `emotion_wheel/`) has
this shape, and so has the folder shipped with this package. The lookup follows the released scorer, quirks included:

* base words of w: every name in `format` that is w or has w among its forms. The official table lists "fear" under
  "fearless", so "fear" is joyful on wheels 2 to 5; its `mer2026` version mends 17 such rows.
* wheel words of a base word b: every word of `synonym` that is b or has b among its synonyms, in any column pair.
* category of w on wheel k: of the union over w's base words, sorted by code point, *the first* that is on the wheel.
  It is a first match, not a composition of single-valued lookups; "surprised" goes through "amazed".
* where a word recurs on a wheel, its later place (depth first) wins: official wheel 2 has "overwhelmed" under bad.
* a word that reaches no wheel word is dropped: "neutral" has no category.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import importlib.resources
import pathlib
from collections.abc import Iterable, Iterator

WHEEL_NAMES = ("wheel1", "wheel2", "wheel3", "wheel4", "wheel5")
VARIANTS = ("unibench", "mer2026")


class WheelError(ValueError):
    """A wheel folder that cannot be read; the message names the file, what was expected and how to mend it."""


@dataclasses.dataclass(frozen=True)
class Wheels:
    """Five wheels with every lookup made beforehand. Words are lower-cased and trimmed before they are looked up.

    Attributes:
        names: the wheels' names, in order; their index is the `wheel` argument of the methods.
        variant: "unibench" or "mer2026"; it decides the word forms read and whether an undefined F is NaN or 0.
        levels: per level (1, 2) and wheel, a dict from surface form to category.
        cores: per wheel, its level-1 categories in the order of the file.
        base_words: surface form -> its base words, sorted.
        wheel_words: base word -> its wheel words, sorted.
    """

    names: tuple[str, ...]
    variant: str
    levels: tuple[tuple[dict[str, str], ...], tuple[dict[str, str], ...]]
    cores: tuple[tuple[str, ...], ...]
    base_words: dict[str, tuple[str, ...]]
    wheel_words: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.names)

    def category(self, word: str, wheel: int, level: int = 1) -> str | None:
        """The category of `word` on wheel `wheel` (0-based), or None when the word is to be dropped."""
        return self.levels[level - 1][wheel].get(word.strip().lower())

    def categories(self, words: Iterable[str], wheel: int, level: int = 1) -> set[str]:
        """The set of categories of `words` on one wheel; words without one are left out."""
        found = (self.category(word, wheel, level) for word in words)
        return {category for category in found if category is not None}

    def is_known(self, word: str) -> bool:
        """Whether any wheel has a category for `word`."""
        return any(self.category(word, wheel) is not None for wheel in range(len(self)))

    def groups(self, wheel: int) -> tuple[str, ...]:
        """The level-1 categories of one wheel, in the order of its file."""
        return self.cores[wheel]

    def forms(self, wheel: int) -> dict[str, tuple[str, ...]]:
        """Level-1 category -> the surface forms that map to it, sorted; every category of the wheel is present."""
        forms: dict[str, list[str]] = {core: [] for core in self.groups(wheel)}
        for form, category in self.levels[0][wheel].items():
            forms[category].append(form)
        return {category: tuple(sorted(found)) for category, found in forms.items()}


def load_wheels(wheel_dir: str | pathlib.Path = "", variant: str = "unibench") -> Wheels:
    """Reads a wheel folder.

    Args:
        wheel_dir: folder with the tables; "" = the wheels shipped with this package.
        variant: "unibench" reads `format`, "mer2026" reads `mer2026/format` (our own wheels have one table for both).

    Raises:
        WheelError: unknown variant, missing or doubled file, missing column, empty table, first cell blank.
    """
    if variant not in VARIANTS:
        raise WheelError(f"unknown wheel variant {variant!r}: expected one of {', '.join(VARIANTS)}")
    if str(wheel_dir) == "":
        return _shipped(variant)
    folder = pathlib.Path(wheel_dir)
    if not folder.is_dir():
        raise WheelError(
            f"{folder}: no such folder; expected one with wheel1..wheel5, synonym and format (.csv or .xlsx). "
            "Leave emotion.wheel_dir empty to use the wheels shipped with the package"
        )
    return _read_folder(folder, folder / "mer2026" if variant == "mer2026" else folder, variant)


@functools.cache  # nobody changes what a `Wheels` holds, nor the files of the package
def _shipped(variant: str) -> Wheels:
    with importlib.resources.as_file(importlib.resources.files("mer_r1_jax.emotion") / "wheels") as shipped:
        return _read_folder(shipped, shipped, variant)


def _read_folder(folder: pathlib.Path, format_folder: pathlib.Path, variant: str) -> Wheels:
    trees = [_read_tree(_find(folder, name)) for name in WHEEL_NAMES]
    wheel_words = _read_synonyms(_find(folder, "synonym"))
    base_words = _read_forms(_find(format_folder, "format"))
    candidates = {
        form: sorted({word for base in bases for word in wheel_words.get(base, ())})
        for form, bases in base_words.items()
    }

    def level(number: int) -> tuple[dict[str, str], ...]:
        return tuple(_first_match(candidates, _places(tree, number)) for tree in trees)

    cores = tuple(tuple(tree) for tree in trees)
    return Wheels(WHEEL_NAMES, variant, (level(1), level(2)), cores, base_words, wheel_words)


def _first_match(candidates: dict[str, list[str]], places: dict[str, str]) -> dict[str, str]:
    found = {}
    for form, words in candidates.items():
        category = next((places[word] for word in words if word in places), None)
        if category is not None:
            found[form] = category
    return found


Tree = dict[str, dict[str, list[str]]]


def _places(tree: Tree, level: int) -> dict[str, str]:
    """Every word of a wheel -> its core (level 1) or its second-level word (level 2). Later assignments win."""
    places = {}
    for core, children in tree.items():
        places[core] = core if level == 1 else min(children)
        for child, leaves in children.items():
            for word in (child, *leaves):
                places[word] = core if level == 1 else child
    return places


def _read_tree(path: pathlib.Path) -> Tree:
    tree: Tree = {}
    above: list[str | None] = [None, None, None]
    for number, row in _rows(path, _read_table(path), ("level1", "level2", "level3")):
        above = [cell or previous for cell, previous in zip(row, above, strict=True)]
        if None in above:
            blank = above.index(None) + 1
            raise WheelError(
                f"{path}, row {number}: level{blank} is blank and there is nothing above it to repeat; fill the cell"
            )
        core, child, leaf = (cell for cell in above if cell is not None)
        tree.setdefault(core, {}).setdefault(child, []).append(leaf)
    return tree


def _read_synonyms(path: pathlib.Path) -> dict[str, tuple[str, ...]]:
    """Base word -> the words that are it or list it as a synonym, sorted."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    table = _read_table(path)
    run = 0
    while f"word_run{run + 1}" in table[0]:
        run += 1
        for _, (word, synonyms) in _rows(path, table, (f"word_run{run}", f"synonym_run{run}")):
            if word:
                for base in (word, *_split(synonyms)):
                    found[base].add(word)
    if not run:
        found_columns = ", ".join(table[0])
        raise WheelError(f"{path}: no column word_run1; found {found_columns}; expected pairs word_runN, synonym_runN")
    return {base: tuple(sorted(words)) for base, words in found.items()}


def _read_forms(path: pathlib.Path) -> dict[str, tuple[str, ...]]:
    """Surface form -> the base words it is a form of, sorted."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for number, (name, forms) in _rows(path, _read_table(path), ("name", "format")):
        if not name:
            raise WheelError(f"{path}, row {number}: the column 'name' is blank; every row needs a base word")
        for form in (name, *_split(forms)):
            found[form].add(name)
    return {form: tuple(sorted(names)) for form, names in found.items()}


def _split(cell: str) -> list[str]:
    return [word.strip() for word in cell.split(",") if word.strip()]


def _find(folder: pathlib.Path, name: str) -> pathlib.Path:
    found = [path for path in (folder / f"{name}.csv", folder / f"{name}.xlsx") if path.is_file()]
    if not found:
        raise WheelError(
            f"{folder / name}.csv or .xlsx is missing; a wheel folder holds wheel1..wheel5, synonym and format "
            "(the mer2026 variant: mer2026/format)"
        )
    if len(found) == 2:
        raise WheelError(f"{found[0]} and {found[1].name} both exist; remove one, so that it is clear which is meant")
    return found[0]


def _rows(path: pathlib.Path, table: list[list[str]], columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, as (1-based row number, the cells of `columns`)."""
    missing = [column for column in columns if column not in table[0]]
    if missing:
        raise WheelError(f"{path}: no column {', '.join(missing)}; found {', '.join(table[0])}")
    index = [table[0].index(column) for column in columns]
    empty = True
    for number, row in enumerate(table[1:], start=2):
        cells = [row[i] if i < len(row) else "" for i in index]
        if any(cells):
            empty = False
            yield number, cells
    if empty:
        raise WheelError(f"{path}: no row below the header; expected words in {', '.join(columns)}")


def _read_table(path: pathlib.Path) -> list[list[str]]:
    """All cells of a csv file or of the first sheet of an xlsx file, lower-case and trimmed; a blank cell is ""."""
    try:
        if path.suffix == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = [list(row) for row in csv.reader(file)]
        else:
            rows = _sheet(path)
    except Exception as error:  # openpyxl and zipfile raise many kinds; all mean the same to the user
        raise WheelError(f"{path}: cannot be read as {path.suffix[1:]}: {error}; replace the file") from error
    return [["" if cell is None else str(cell).strip().lower() for cell in row] for row in rows] or [[]]


def _sheet(path: pathlib.Path) -> list[list]:
    import openpyxl  # only the official folder needs it

    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        return [list(row) for row in book.worksheets[0].iter_rows(values_only=True)]
    finally:
        book.close()
