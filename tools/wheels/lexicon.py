"""Builds the wheels shipped with the package from the lexicon beside this file.

    python -m tools.wheels.lexicon

rewrites `wheel1.csv` to `wheel5.csv`, `synonym.csv` and `format.csv` in `mer_r1_jax/emotion/wheels`. The lexicon is
written by hand: families of words that mean nearly the same, with the place of each family on the five wheels (the
README of the tables names the literature). A family:

    [annoyance]
    at: anger/annoyance | anger/annoyance | anger/irritation | angry/annoyed | negative and forceful/irritation
    adj: *annoy|ed, *irritable, vex|ed, irritate|ing
    noun: annoyance, irritation
    verb: bother
    phrase: *fed up

One place a wheel, "-" for none. A star makes a word a wheel word (it stands on the wheels, and the family's other words
are its synonyms). A bar ends the verb stem of a participle, whose forms are then added; `worr|ied` has the stem worry.
A surface form belongs to one family: a word written out anywhere goes before a form made by rule, an earlier family
before a later one. So no word of ours has two categories on a wheel.
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib

from tools.wheels import inflection

LEXICON = pathlib.Path(__file__).parent / "lexicon.txt"
TABLES = pathlib.Path(__file__).parents[2] / "mer_r1_jax/emotion/wheels"
NUM_WHEELS = 5


class LexiconError(ValueError):
    """A mistake in the lexicon; the message names the line."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One word: its spelling, part of speech, verb stem if it is a participle, and whether it stands on the wheels."""

    word: str
    part: str
    stem: str | None
    on_wheel: bool


@dataclasses.dataclass(frozen=True)
class Family:
    """Words that mean nearly the same; `places` holds (level1, level2) per wheel, or None."""

    name: str
    places: tuple[tuple[str, str] | None, ...]
    entries: tuple[Entry, ...]

    @property
    def wheel_words(self) -> list[str]:
        return [entry.word for entry in self.entries if entry.on_wheel]


def read_lexicon(path: pathlib.Path) -> list[Family]:
    """The families of a lexicon file, checked: no word twice, a wheel word and five places in each family."""
    families: list[Family] = []
    owner: dict[str, str] = {}
    block: dict[str, list[str]] = {}
    name = ""
    lines = [*path.read_text(encoding="utf-8").splitlines(), "[end]"]
    for number, line in enumerate(lines, start=1):
        line = line.split("#")[0].strip()
        if line.startswith("["):
            if name:
                families.append(_family(name, block, f"{path}, before line {number}"))
            name, block = line.strip("[]"), {}
        elif line:
            key, _, cell = line.partition(":")
            if key not in ("at", *inflection.PARTS) or not cell:
                raise LexiconError(f"{path}, line {number}: got {line!r}; expected at:, adj:, noun:, verb: or phrase:")
            block.setdefault(key, []).append(cell)
            for entry in _entries(key, cell) if key != "at" else ():
                if entry.word in owner:
                    raise LexiconError(f"{path}, line {number}: {entry.word!r} stands in [{owner[entry.word]}] already")
                owner[entry.word] = name
    return families


def _family(name: str, block: dict[str, list[str]], where: str) -> Family:
    cells = [cell.strip() for cell in "|".join(block.get("at", [])).split("|")]
    if len(cells) != NUM_WHEELS or not all(cell == "-" or cell.count("/") == 1 for cell in cells):
        raise LexiconError(f"{where}: [{name}] needs 'at:' with five places 'level1/level2' or '-', got {cells}")
    pairs = [None if cell == "-" else cell.split("/") for cell in cells]
    places = tuple(None if pair is None else (pair[0], pair[1]) for pair in pairs)
    lines = [(part, cell) for part in inflection.PARTS for cell in block.get(part, [])]
    entries = tuple(entry for part, cell in lines for entry in _entries(part, cell))
    family = Family(name, places, entries)
    if not family.wheel_words:
        raise LexiconError(f"{where}: [{name}] has no wheel word; mark one with a star")
    return family


def _entries(part: str, cell: str) -> list[Entry]:
    return [_entry(part, word.strip()) for word in cell.split(",") if word.strip()]


def _entry(part: str, text: str) -> Entry:
    on_wheel, text = text.startswith("*"), text.lstrip("*")
    if "|" not in text:
        return Entry(text, part, None, on_wheel)
    stem, ending = text.split("|")
    if ending == "ied":
        return Entry(stem + ending, part, stem + "y", on_wheel)
    drops_e = ending.split()[0] == "ing" and stem.endswith("e")
    word = (stem[:-1] if drops_e else stem) + ending
    return Entry(word, part, stem, on_wheel)


def word_forms(families: list[Family]) -> dict[str, list[str]]:
    """Base word -> its surface forms, each form in one family only."""
    owner = {entry.word: family.name for family in families for entry in family.entries}
    forms = {}
    for family in families:
        for entry in family.entries:
            found = inflection.inflections(entry.word, entry.part, entry.stem)
            forms[entry.word] = [form for form in found if owner.setdefault(form, family.name) == family.name]
    return forms


def build_tables(families: list[Family]) -> dict[str, list[list[str]]]:
    """File name -> rows, header first, of the seven tables of a wheel folder."""
    tables = {f"wheel{k + 1}.csv": _wheel_rows(families, k) for k in range(NUM_WHEELS)}
    synonyms = [["word_run1", "synonym_run1"]]
    for family in families:
        first, *others = family.wheel_words
        synonyms.append([first, ", ".join(entry.word for entry in family.entries if not entry.on_wheel)])
        synonyms += [[word, first] for word in others]
    tables["synonym.csv"] = synonyms
    forms = word_forms(families)
    tables["format.csv"] = [["name", "format"], *([name, ",".join(forms[name])] for name in sorted(forms))]
    return tables


def _wheel_rows(families: list[Family], wheel: int) -> list[list[str]]:
    tree: dict[str, dict[str, list[str]]] = {}
    for family in families:
        if (place := family.places[wheel]) is not None:
            core, child = place
            tree.setdefault(core, {}).setdefault(child, []).extend(family.wheel_words)
    rows = [["level1", "level2", "level3"]]
    for core, children in tree.items():
        for child, words in children.items():
            for word in words:
                rows.append([core, child, word])
                core = child = ""  # a blank cell repeats the one above
            core, child = "", ""
    return rows


def main() -> None:
    for name, rows in build_tables(read_lexicon(LEXICON)).items():
        with open(TABLES / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
