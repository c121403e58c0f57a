"""From somebody's set of clips to data files: what clips become, how they are split, and what is left out and why.

Whoever knows a layout gives drafts of records (`mer2025`, `labelled_table`); here each is checked as a line of a data
file is, the drafts are divided by a seed, and the files are written with an account of everything that is not in them.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mer_r1_jax.config.schema import DataConfig
from mer_r1_jax.data.columns import LineReader
from mer_r1_jax.data.paths import MediaPathError, resolve_media
from mer_r1_jax.emotion.answer_form import split_label
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.json_lines import Fault, JsonLineError, parse_value
from mer_r1_jax.row_files import MAX_PYTHON_LIST, numbered_rows, python_list
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.atomic_files import writing

ACCOUNT = "counts.json"  # beside the data files
MAX_WORDS = 64  # of one label
_NAMED = 5  # clips that the account names for each reason


class ConversionError(ValueError):
    """A set that cannot be converted as it was asked; the message says what was got, expected, and how to mend it."""


class LabelError(ValueError):
    """A label that cannot be read; the message is the reason, the same for all labels of its kind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A clip that is to become a record.

    Attributes:
        name: of the clip; the record's id.
        row: its columns, under our names.
        split: data file it belongs to by its set's own division, such as `test`; "" leaves it to the seed.
        remarks: what it lacks, or has in place of another; counted where it becomes a record.
    """

    name: str
    row: dict[str, Any]
    split: str = ""
    remarks: list[str] = dataclasses.field(default_factory=list)


class Account:
    """What was left out and why, and what is worth a look: reason -> how many, and the first of them by name."""

    def __init__(self):
        self.left_out: dict[str, list[str]] = collections.defaultdict(list)
        self.noticed: dict[str, list[str]] = collections.defaultdict(list)

    def leave_out(self, reason: str, name: str) -> None:
        """Counts a clip, or a row, that becomes no record."""
        self.left_out[printable(reason, 200)].append(name)

    def notice(self, what: str, name: str) -> None:
        """Counts what is no fault, but worth a look."""
        self.noticed[printable(what, 200)].append(name)

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON-able data."""
        return {"left_out": _counted(self.left_out), "noticed": _counted(self.noticed)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
    """How drafts without a split of their own are divided.

    Attributes:
        sft: clips for SFT, drawn from those with reasoning.
        held_out: clips for evaluation, drawn first, from all with a label.
        seed: of the draw. The rest is for RL.
    """

    sft: int = 0
    held_out: int = 0
    seed: int = 0


def convert(
    drafts: Iterable[Draft], account: Account, division: Division, root: str | os.PathLike, out: str | os.PathLike
) -> dict[str, int]:
    """Checks, divides and writes drafts: `sft.jsonl`, `rl.jsonl`, `eval.jsonl`, a file of each own split, the account.

    Args:
        drafts: the clips; a name twice, and what no data file may hold, is left out.
        account: is given what is left out.
        division: of drafts without a split of their own.
        root: folder the media paths are relative to.
        out: folder of the files; it may be there, they may not.

    Returns:
        file -> records in it.

    Raises:
        ConversionError: nothing is left, the division asks for more than there is, or a file is there already.
    """
    root, out = Path(root), Path(out)
    there = sorted(path.name for path in out.glob("*.jsonl")) if out.is_dir() else []
    if there:
        raise ConversionError(
            f"--out: got {printable(out)}, which has {printable(', '.join(there), 200)} already; expected a folder "
            "without data files; choose another, or remove them"
        )
    kept = list(_checked(drafts, account, root))
    if not kept:
        reasons = ", ".join(f"{reason} ({len(names)})" for reason, names in account.left_out.items()) or "there is none"
        raise ConversionError(f"got no clip that can be a record: {reasons}; expected one or more; correct --root")
    files = divided(kept, division)
    written = {f"{split}.jsonl": len(rows) for split, rows in files.items() if rows}
    with writing("the data files", out):
        out.mkdir(parents=True, exist_ok=True)
        for split, rows in files.items():
            if rows:
                text = "".join(json.dumps(draft.row, ensure_ascii=False) + "\n" for draft in rows)
                atomic_files.write_text(out / f"{split}.jsonl", text)
        settings = {"root": str(root), "division": dataclasses.asdict(division)}
        atomic_files.write_json(out / ACCOUNT, settings | {"written": written} | account.to_json())
    return written


def divided(drafts: Sequence[Draft], division: Division) -> dict[str, list[Draft]]:
    """Drafts by file, each in the order they came; what is drawn follows from names and seed, not from that order.

    Raises:
        ConversionError: more clips are asked for than there are.
    """
    own = {draft.name: draft.split for draft in drafts if draft.split}
    free = sorted((draft for draft in drafts if not draft.split), key=lambda draft: draft.name)
    free = [free[place] for place in np.random.default_rng(division.seed).permutation(len(free))]
    held_out = [draft.name for draft in free][: division.held_out]
    if len(held_out) < division.held_out:
        raise ConversionError(
            f"--eval: got {division.held_out}, expected at most the {len(free)} clips that can be drawn; lower it"
        )
    reasoned = [draft.name for draft in free[len(held_out) :] if "reasoning" in draft.row]
    if len(reasoned) < division.sft:
        raise ConversionError(
            f"--sft: got {division.sft}, expected at most the {len(reasoned)} clips with a reasoning that are left; "
            "lower it, or add the file of reasonings"
        )
    split_of = dict.fromkeys(held_out, "eval") | dict.fromkeys(reasoned[: division.sft], "sft") | own
    files: dict[str, list[Draft]] = {"sft": [], "rl": [], "eval": []}
    for draft in drafts:
        files.setdefault(split_of.get(draft.name, "rl"), []).append(draft)
    return files


def words_of(cell: Any) -> list[str]:
    """The emotion words of a label: a list, a list as Python writes it, or a text in any form that `split_label` reads.

    Raises:
        LabelError: it is none, or beyond the limits.
    """
    if isinstance(cell, str):
        if len(cell) > MAX_PYTHON_LIST:
            raise LabelError(f"a label of more than {MAX_PYTHON_LIST} characters")
        if cell.strip().startswith("["):
            try:
                cell = python_list(cell)
            except ValueError:
                raise LabelError("a label that begins like a list and is none of words") from None
        else:
            cell = [cell]
    if isinstance(cell, bool) or not isinstance(cell, list | tuple):
        raise LabelError("a label that is no word and no list")
    if not all(isinstance(word, str) for word in cell):
        raise LabelError("a label with an entry that is no word")
    words = [word for entry in cell for word in split_label(entry)]
    if len(words) > MAX_WORDS:
        raise LabelError(f"a label of more than {MAX_WORDS} words")
    return list(dict.fromkeys(words))


def read_table(
    path: str | os.PathLike, columns: Sequence[str], account: Account, *, texts: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, row) of a table; rows that cannot be read are counted.

    Args:
        path: of a file of any kind that is read; a `.csv` may have one column alone.
        columns: that every row must have, empty or not.
        account: is given the rows that are left out.
        texts: columns whose cells are text, also where one looks like a list.

    Raises:
        ConversionError: the file cannot be read to its end, or has no such column.
    """
    path, faults = Path(path), list[Fault]()
    is_csv = path.suffix.lower() == ".csv"
    for number, text in numbered_rows(path, faults, one_column=is_csv, texts=texts):
        try:
            row = parse_value(text)
        except JsonLineError as error:
            faults.append(dataclasses.replace(error.fault, line=number))
            continue
        missing = [column for column in columns if not isinstance(row, dict) or column not in row]
        if missing:
            found = printable(", ".join(map(str, row)) if isinstance(row, dict) else "no columns", 200)
            expected = f"the column {', '.join(missing)}"
            raise ConversionError(f"{path}:{number}: got {found}; expected {expected}; correct the name")
        yield number, row
    for fault in faults:
        if not fault.line or fault.is_end:  # how many rows are lost behind it, nobody knows
            raise ConversionError(f"{path}{f':{fault.line}' if fault.line else ''}: {fault}")
        account.leave_out(f"a row of {path.name} that cannot be read: {fault.got}", f"{path.name}:{fault.line}")


def present(root: Path, relative: str) -> bool:
    """Whether a path leads to a file below the root."""
    try:
        return resolve_media(root, relative).is_file()
    except MediaPathError:
        return False


def below(root: Path, path: str) -> str:
    """A path relative to the root, where it is absolute and leads into it; others as they are."""
    if not os.path.isabs(path):
        return path
    for one in (os.path.abspath(root), os.path.realpath(root)):
        if path.startswith(one.rstrip(os.sep) + os.sep):
            return os.path.relpath(path, one)
    return path


def _checked(drafts: Iterable[Draft], account: Account, root: Path) -> Iterator[Draft]:
    seen: set[str] = set()
    for draft in drafts:
        if draft.name in seen:
            account.leave_out("a name that another clip has already", draft.name)
            continue
        row = {"id": draft.name, **draft.row}
        reader = LineReader("", 0, root, DataConfig.question, ("solution",) if "solution" in row else ())
        if reader.read(json.dumps(row)) is None:
            first = reader.problems[0]
            account.leave_out(f"`{first.field}` is not {first.expected}", draft.name)
            continue
        seen.add(draft.name)
        for remark in draft.remarks:
            account.notice(remark, draft.name)
        yield dataclasses.replace(draft, row=row)


def _counted(reasons: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    return {reason: {"count": len(names), "such_as": names[:_NAMED]} for reason, names in sorted(reasons.items())}
