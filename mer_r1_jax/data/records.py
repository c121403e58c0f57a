"""Records: one JSON object per line, or one row of another kind of data file (`row_files`), checked completely before
anything is compiled or decoded.

Columns (aliases in brackets): `id`, `messages` [`conversations` in ShareGPT form, `prompt`] or `question` [`problem`,
`query`, `prompt`], `system`, `videos` [`video`], `audios` [`audio`], `images` [`image`], `subtitle`, `solution` (a list
of emotion words or one text), `reasoning`, `use_audio_in_video`. Further columns are kept in `Record.extra` and reach
rewards; one that looks like a path, a label or a chat stops the file unless it is named as known.

A closing assistant turn, or `reasoning` together with `solution`, is the demonstration of a slow answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mer_r1_jax.config.schema import DataConfig
from mer_r1_jax.data.columns import NAMES, TEXTS, LineReader
from mer_r1_jax.data.foreign_columns import ForeignColumns
from mer_r1_jax.data.problems import Problem, RecordError, shown
from mer_r1_jax.emotion.answer_form import blocks_of
from mer_r1_jax.json_lines import Fault
from mer_r1_jax.row_files import EXPECTED, numbered_rows

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
        use_audio_in_video: whether its videos bring their own sound, interleaved; None = as `media.use_audio_in_video`.
        extra: all further columns.
        file, line: where the record was read; the line is its place in files that have no lines.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    subtitle: str | None = None
    solution: tuple[str, ...] = ()
    target: str | None = None
    use_audio_in_video: bool | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    file: str = ""
    line: int = 0

    @property
    def where(self) -> str:
        """`file:line` of the record."""
        return f"{self.file}:{self.line}"

    @property
    def has_media(self) -> bool:
        """Whether there is anything to see or hear."""
        return bool(self.videos or self.audios or self.images)

    @property
    def target_reasoning(self) -> str | None:
        """What stands in the target's think block."""
        blocks = blocks_of(self.target or "")
        return blocks and blocks[0]

    @property
    def target_answer(self) -> str | None:
        """What stands in the target's answer block."""
        blocks = blocks_of(self.target or "")
        return blocks and blocks[1]

    def content(self) -> dict[str, Any]:
        """The record without where it was read, as JSON-able data."""
        fields = dataclasses.asdict(self)
        left_out = {"file", "line"}
        if self.use_audio_in_video is None:
            left_out.add("use_audio_in_video")  # so that the hash of a file without it is what it has always been
        return {name: value for name, value in fields.items() if name not in left_out}


def read_records(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    media_root: str | os.PathLike = "",
    *,
    question: str = DataConfig.question,
    require: Sequence[str] = (),
    extra_columns: Sequence[str] = (),
) -> list[Record]:
    """Reads and checks data files.

    Args:
        path: the file (JSON lines, JSON, CSV, Parquet, Arrow, or a folder of `datasets`), or several whose records
            follow one another.
        media_root: folder the media paths are relative to; "" means each file's own folder.
        question: asked where a record brings neither `messages` nor `question`.
        require: what every record must bring: `target` (for SFT), `solution` (for RL and evaluation).
        extra_columns: columns that are not for the model, though they may look like it (`data.extra_columns`).

    Raises:
        RecordError: with every fault of every file: unreadable file or one of another kind, malformed JSON, missing,
            mistyped or wrongly typed columns, columns that look as if they were to be read and are not, a file without
            media, placeholder counts, placeholders or special tokens in text, duplicate ids, paths outside the root.
    """
    records, problems = scan_records(path, media_root, question=question, require=require, extra_columns=extra_columns)
    if problems:
        raise RecordError(problems)
    return records


def scan_records(path: str | os.PathLike | Sequence[str | os.PathLike], *args, **options) -> tuple[list, list[Problem]]:
    """As `read_records`, but returns the good records and the problems of the others instead of raising."""
    scan = scan_files(path, *args, **options)
    return scan.records, scan.problems


class Scan(NamedTuple):
    """What is in data files.

    Attributes:
        records: the good records.
        problems: what is wrong with the others, and with whole files.
        unread: column -> records that have it, of those that are not read and not named in `extra_columns`.
    """

    records: list[Record]
    problems: list[Problem]
    unread: dict[str, int]


def scan_files(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    media_root: str | os.PathLike = "",
    *,
    question: str = DataConfig.question,
    require: Sequence[str] = (),
    extra_columns: Sequence[str] = (),
) -> Scan:
    """As `read_records`, but returns all that was found instead of raising."""
    unknown = set(require) - set(REQUIRABLE)
    if unknown:
        raise ValueError(f"require: got {sorted(unknown)}; expected any of {', '.join(REQUIRABLE)}")
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    scan = Scan([], [], {})
    first_seen: dict[str, str] = {}
    for file in map(Path, paths):
        if read := [name for name in extra_columns if name in NAMES]:
            got = f"{', '.join(read)}, which the records are read from"
            mend = "take it out of the setting, or rename the column"
            scan.problems.append(_whole_file(file, got, "names of further columns", mend, "data.extra_columns"))
        _scan_file(file, scan, first_seen, extra_columns, (media_root or file.parent, question, require))
    return scan


def _scan_file(file: Path, scan: Scan, first_seen: dict[str, str], extra_columns: Sequence[str], how: tuple) -> None:
    """Adds the records and problems of one file."""
    faults: list[Fault] = []
    foreign = ForeignColumns(NAMES, extra_columns)
    first_record, first_problem = len(scan.records), len(scan.problems)
    for number, text in numbered_rows(file, faults, texts=TEXTS):
        reader = LineReader(str(file), number, *how)
        columns = reader.read(text)
        scan.problems.extend(reader.problems)
        foreign.add(number, reader.extra, reader.known)
        if columns is None:
            continue
        record = Record(file=str(file), line=number, **columns)
        if record.id in first_seen:
            scan.problems.append(_duplicate(record, first_seen[record.id]))
            continue
        first_seen[record.id] = record.where
        scan.records.append(record)
    scan.problems.extend(_of_file(file, fault) for fault in faults)
    scan.problems.extend(foreign.problems(str(file)))
    for name, count in foreign.unread.items():
        scan.unread[name] = scan.unread.get(name, 0) + count
    records = scan.records[first_record:]
    if len(scan.problems) == first_problem and not records:
        mend = "check that the file is complete"
        scan.problems.append(_whole_file(file, "no records", f"records in {EXPECTED}", mend))
    if records and not foreign.suspected and not any(record.has_media for record in records):
        subtitles = sum(record.subtitle is not None for record in records)
        scan.problems.extend(filter(None, [foreign.without_media(str(file), subtitles)]))
    scan.problems[first_problem:] = sorted(scan.problems[first_problem:], key=lambda problem: problem.line)


def dataset_hash(records: Iterable[Record]) -> str:
    """SHA-256 over the records' normalised content, in order; where they were read does not matter."""
    digest = hashlib.sha256()
    for record in records:
        text = json.dumps(record.content(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        # Records that no file was read for may hold half a surrogate pair.
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _of_file(file: Path, fault: Fault) -> Problem:
    return Problem(
        file=str(file), line=fault.line, field=fault.field, got=fault.got, expected=fault.expected, mend=fault.mend
    )


def _whole_file(file: Path, got: str, expected: str, mend: str, field: str = "") -> Problem:
    return Problem(file=str(file), line=0, field=field, got=got, expected=expected, mend=mend)


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
