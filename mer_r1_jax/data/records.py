"""Records: one JSON object per line, checked completely before anything is compiled or decoded.

Columns (aliases in brackets): `id`, `messages` [`conversations` in ShareGPT form] or `question` [`problem`, `query`],
`videos` [`video`], `audios` [`audio`], `images` [`image`], `subtitle`, `solution` (a list of emotion words or one comma
text), `reasoning`. Further columns are kept in `Record.extra` and reach rewards.

A closing assistant turn, or `reasoning` together with `solution`, is the demonstration of a slow answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mer_r1_jax.config.schema import DataConfig
from mer_r1_jax.data.columns import LineReader
from mer_r1_jax.data.problems import Problem, RecordError, shown

REQUIRABLE = ("target", "solution")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One prompt: what is shown, what is asked, and what is known about the answer.

    Attributes:
        id: unique in its data set; `<file stem>:<line>` where the file gives none.
        messages: turns as `{"role": ..., "content": ...}`, the last one the user's. Where any `<video>`, `<audio>` or
            `<image>` stands in them, each kind stands as often as its list is long; where none does, the media come
            first.
        videos, audios, images: media paths relative to the media root. An audio may be a video file: its audio track.
        subtitle: what is said in the clip, or None.
        solution: emotion words, () where unknown.
        target: demonstration of a slow answer, `<think>R</think>\\n<answer>W</answer>`, or None.
        extra: all further columns.
        file, line: where the record was read.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    subtitle: str | None = None
    solution: tuple[str, ...] = ()
    target: str | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    file: str = ""
    line: int = 0

    @property
    def where(self) -> str:
        """`file:line` of the record."""
        return f"{self.file}:{self.line}"

    @property
    def target_reasoning(self) -> str | None:
        """What stands in the target's think block."""
        return None if self.target is None else self.target.split("</think>")[0].removeprefix("<think>")

    @property
    def target_answer(self) -> str | None:
        """What stands in the target's answer block."""
        return None if self.target is None else self.target.split("<answer>")[1].removesuffix("</answer>")

    def content(self) -> dict[str, Any]:
        """The record without where it was read, as JSON-able data."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in ("file", "line")}


def read_records(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    media_root: str | os.PathLike = "",
    *,
    question: str = DataConfig.question,
    require: Sequence[str] = (),
) -> list[Record]:
    """Reads and checks JSON-lines files.

    Args:
        path: the file, or several whose records follow one another.
        media_root: folder the media paths are relative to; "" means each file's own folder.
        question: asked where a record brings neither `messages` nor `question`.
        require: what every record must bring: `target` (for SFT), `solution` (for RL and evaluation).

    Raises:
        RecordError: with every fault of every file: unreadable file, malformed JSON, missing, mistyped or wrongly typed
            columns, placeholder counts, placeholders or special tokens in text, duplicate ids, paths outside the root.
    """
    records, problems = scan_records(path, media_root, question=question, require=require)
    if problems:
        raise RecordError(problems)
    return records


def scan_records(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    media_root: str | os.PathLike = "",
    *,
    question: str = DataConfig.question,
    require: Sequence[str] = (),
) -> tuple[list[Record], list[Problem]]:
    """As `read_records`, but returns the good records and the problems of the others instead of raising."""
    unknown = set(require) - set(REQUIRABLE)
    if unknown:
        raise ValueError(f"require: got {sorted(unknown)}; expected any of {', '.join(REQUIRABLE)}")
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    records: list[Record] = []
    problems: list[Problem] = []
    first_seen: dict[str, str] = {}
    for file in map(Path, paths):
        before = len(records) + len(problems)
        for number, text in _lines(file, problems):
            reader = LineReader(str(file), number, media_root or file.parent, question, require)
            columns = reader.read(text)
            problems.extend(reader.problems)
            if columns is None:
                continue
            record = Record(file=str(file), line=number, **columns)
            if record.id in first_seen:
                problems.append(_duplicate(record, first_seen[record.id]))
                continue
            first_seen[record.id] = record.where
            records.append(record)
        if before == len(records) + len(problems):
            problems.append(
                _whole_file(file, "no records", "one JSON object per line", "check that the file is complete")
            )
    return records, problems


def dataset_hash(records: Iterable[Record]) -> str:
    """SHA-256 over the records' normalised content, in order; where they were read does not matter."""
    digest = hashlib.sha256()
    for record in records:
        text = json.dumps(record.content(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        # A lone surrogate is legal in JSON but not in UTF-8.
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _lines(file: Path, problems: list[Problem]) -> Iterable[tuple[int, str]]:
    """Yields (line number, text) of the lines that are not blank; adds problems for what cannot be read."""
    try:
        stream = open(file, "rb")
    except OSError as error:
        mend = "check the path; a data set is a JSON-lines file, not a folder"
        problems.append(_whole_file(file, f"{error.strerror or error}", "a readable JSON-lines file", mend))
        return
    with stream:
        for number, raw in enumerate(stream, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                text = raw.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                got = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
                problems.append(
                    Problem(
                        file=str(file), line=number, field="", got=got, expected="UTF-8", mend="save the file as UTF-8"
                    )
                )
                continue
            if number == 1 and text.startswith("["):
                mend = "write one object per line, e.g. `jq -c '.[]' data.json > data.jsonl`"
                problems.append(_whole_file(file, "a JSON array", "one JSON object per line", mend))
                return
            if text:
                yield number, text


def _whole_file(file: Path, got: str, expected: str, mend: str) -> Problem:
    return Problem(file=str(file), line=0, field="", got=got, expected=expected, mend=mend)


def _duplicate(record: Record, first: str) -> Problem:
    return Problem(
        file=record.file,
        line=record.line,
        field="id",
        got=f"{shown(record.id)}, which {first} has already",
        expected="an id that no other record has",
        mend="rename one of them, or leave the ids out",
        record_id=record.id,
    )
