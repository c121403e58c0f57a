"""Checks a data set before a run: every record, every clip, token lengths, answers that cannot be scored.

What each check needs (a decoder, a tokenizer, emotion wheels) is handed in, so that each can be left out.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mer_r1_jax.config.schema import DataConfig
from mer_r1_jax.data.problems import Problem
from mer_r1_jax.data.records import Record, scan_files
from mer_r1_jax.emotion.wheels import Wheels
from mer_r1_jax.media.clips import Clips, sound_remarks
from mer_r1_jax.media.opening import FileKey, MediaError, file_key
from mer_r1_jax.media.prompt import Prompt, PromptError

Load = Callable[[Record], Clips]
Build = Callable[[Record, Clips], Prompt]
MEDIA_COLUMNS = ("videos", "audios", "images")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file to check.

    Attributes:
        path: the data file.
        require: what every record must bring, of `target` and `solution`.
    """

    path: str
    require: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checks:
    """What is checked beyond the records themselves; None leaves a check out.

    Attributes:
        load: decodes a record's clips, raising MediaError.
        build: makes the prompt, raising PromptError where it is too long; needs `load`.
        target_length: tokens of a record's longest SFT target, raising ValueError where it cannot be tokenised.
        max_target_length: cap of those.
        wheels: emotion wheels the answers are scored on.
        threads: records checked at once.
    """

    load: Load | None = None
    build: Build | None = None
    target_length: Callable[[Record], int] | None = None
    max_target_length: int = 0
    wheels: Wheels | None = None
    threads: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileReport:
    """What was found in one data file.

    Attributes:
        file: its path.
        counts: name -> how many, in a fixed order.
        lengths: name -> {"min", "mean", "max"} over the records, for those that were measured.
        unread_columns: further column -> records that have it, of those not named in `data.extra_columns`.
        unknown_words: word of a solution that is on no wheel -> how often it stands there.
    """

    file: str
    counts: dict[str, int]
    lengths: dict[str, dict[str, float]]
    unread_columns: dict[str, int] = dataclasses.field(default_factory=dict)
    unknown_words: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was found in all data files.

    Attributes:
        files: one report each.
        problems: errors and warnings, in file and line order.
        unchecked: checks that were left out.
    """

    files: tuple[FileReport, ...]
    problems: tuple[Problem, ...]
    unchecked: tuple[str, ...]

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Problems that would stop a run or break a row of it."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """Problems that are worth a look but stop nothing."""
        return tuple(problem for problem in self.problems if problem.severity != "error")

    def to_json(self) -> dict[str, Any]:
        """The whole report as JSON-able data."""
        return {"ok": not self.errors, "errors": len(self.errors), "warnings": len(self.warnings)} | dataclasses.asdict(
            self
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Findings:
    """What one record's checks found: problems, sums for the counts, and values for the lengths."""

    problems: list[Problem]
    counts: collections.Counter
    lengths: dict[str, float]
    unknown_words: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def validate(
    files: Sequence[DataFile],
    media_root: str | os.PathLike = "",
    checks: Checks | None = None,
    *,
    question: str = DataConfig.question,
    extra_columns: Sequence[str] = (),
    progress: Callable[[], object] = lambda: None,
) -> Report:
    """Checks data files.

    Args:
        files: what to check; ids have to be unique within a file.
        media_root: folder the media paths are relative to; "" means each file's own folder.
        checks: what to check beyond the records.
        question: asked where a record brings none.
        extra_columns: columns that only reward functions read (`data.extra_columns`).
        progress: called once for every record that is done.
    """
    checks = checks or Checks()
    problems: list[Problem] = []
    reports = []
    clips_of: dict[str, dict[FileKey, str]] = {}
    for file in files:
        how = {"question": question, "require": file.require, "extra_columns": extra_columns}
        records, faults, unread = scan_files(file.path, media_root, **how)
        problems.extend(faults)
        findings = []
        for found in _check_all(records, checks):
            findings.append(found)
            progress()
        problems.extend(problem for found in findings for problem in found.problems)
        problems.extend(_check_file(file.path, records, findings, checks))
        problems.extend(_shared_clips(file.path, records, media_root, clips_of))
        report = _report(file.path, records, faults, findings)
        reports.append(dataclasses.replace(report, unread_columns=unread))
    order = {file.path: place for place, file in enumerate(files)}
    problems.sort(key=lambda problem: (order[problem.file], problem.line))
    return Report(files=tuple(reports), problems=tuple(problems), unchecked=_unchecked(checks))


def _unchecked(checks: Checks) -> tuple[str, ...]:
    left_out = {
        "clips": checks.load,
        "prompt lengths": checks.load and checks.build,
        "target lengths": checks.target_length,
        "emotion words": checks.wheels,
    }
    return tuple(name for name, check in left_out.items() if not check)


def _check_all(records: Sequence[Record], checks: Checks) -> Iterator[_Findings]:
    """Checks records in threads, in order; a thread keeps nothing of a clip but what was found."""
    with concurrent.futures.ThreadPoolExecutor(checks.threads) as pool:
        yield from pool.map(lambda record: _check_record(record, checks), records)


def _check_record(record: Record, checks: Checks) -> _Findings:
    found = _Findings(problems=[], counts=collections.Counter(), lengths={})
    try:
        if checks.load is not None:
            _check_clips(record, checks.load, checks.build, found)
        if checks.target_length is not None and record.target is not None:
            _check_target(record, checks.target_length, checks.max_target_length, found)
        if checks.wheels is not None and record.solution:
            _check_solution(record, checks.wheels, found)
    except Exception as error:
        error.add_note(f"while checking {record.where}")  # a fault of ours, but the line says how to meet it again
        raise
    return found


def _check_clips(record: Record, load: Load, build: Build | None, found: _Findings) -> None:
    began = time.monotonic()
    try:
        clips = load(record)
    except MediaError as first:
        found.counts["broken"] += 1
        for field, error in _broken_files(record, load) or [("", first)]:
            found.counts[f"broken: {error.reason}"] += 1
            got, mend = f"{error.path}: {error.found}", error.mend[:1].lower() + error.mend[1:].rstrip(".")
            found.problems.append(_problem(record, field, got, error.expected, mend))
        return
    if any(getattr(record, column) for column in MEDIA_COLUMNS):
        found.lengths["decode_ms"] = 1e3 * (time.monotonic() - began)
    found.counts["silent_audio"] += clips.silent_audio
    found.counts["audio_cut"] += clips.audio_cut
    found.counts["mute_audio"] += clips.mute_audio
    found.counts["cancelled_audio"] += clips.cancelled_audio
    found.counts["audio_filled"] += clips.audio_filled > 0
    if clips.audio_filled:
        found.lengths["audio_filled_seconds"] = clips.audio_filled
    if clips.silent_audio:
        got, expected = f"{clips.silent_audio} clip(s) without sound", "an audio track"
        mend = "add one; as media.missing_audio says, it will be replaced by silence or left out"
        found.problems.append(_problem(record, "audios", got, expected, mend, "warning"))
    for got, expected, mend in sound_remarks(clips):
        found.problems.append(_problem(record, "audios", got, expected, mend, "warning"))
    if build is None:
        return
    try:
        prompt = build(record, clips)
    except PromptError as error:
        found.counts["bad_prompt"] += 1
        found.problems.append(_problem(record, "messages", str(error).removeprefix(f"{record.id}: "), "", ""))
        return
    found.lengths["prompt_tokens"] = len(prompt.ids)
    found.lengths["frames"] = prompt.stats["frames"]
    found.lengths["audio_seconds"] = prompt.stats["audio_seconds"]


def _check_target(record: Record, target_length: Callable[[Record], int], most: int, found: _Findings) -> None:
    try:
        length = target_length(record)
    except ValueError as error:
        found.counts["bad_target"] += 1
        found.problems.append(_problem(record, "target", str(error), "", ""))
        return
    found.lengths["target_tokens"] = length
    if length > most:
        found.counts["bad_target"] += 1
        expected = f"at most sft.max_completion_length = {most}"
        mend = "shorten the reasoning, or raise sft.max_completion_length"
        found.problems.append(_problem(record, "target", f"a target of {length} tokens", expected, mend))


def _check_solution(record: Record, wheels: Wheels, found: _Findings) -> None:
    unknown = [word for word in record.solution if not wheels.is_known(word)]
    found.counts["words"] += len(record.solution)
    found.counts["unknown_words"] += len(unknown)
    found.unknown_words.update(unknown)
    found.lengths["solution_words"] = len(record.solution)
    if len(unknown) == len(record.solution):
        found.counts["unscorable"] += 1
        expected = "at least one word on an emotion wheel"
        mend = "correct the words (lower-case English, one feeling each); RL does with the rest as rl.unscorable says"
        found.problems.append(_problem(record, "solution", ", ".join(unknown), expected, mend, "warning"))


def _check_file(
    file: str, records: Sequence[Record], findings: Sequence[_Findings], checks: Checks
) -> Iterator[Problem]:
    """What only shows over a whole file: nothing scorable, a sound track that is never heard."""
    unscorable = sum(found.counts["unscorable"] for found in findings)
    if unscorable and unscorable == sum(bool(record.solution) for record in records):
        expected, mend = "answers with words on an emotion wheel", "check the language and the column of the labels"
        yield _whole_file(file, "solution", f"{unscorable} unscorable answers of {unscorable}", expected, mend, "error")
    if records and not any(record.has_media for record in records):
        got, expected = (
            f"no clip, sound or picture in any of the {len(records)} records",
            "`videos`, `audios` or `images`",
        )
        mend = "name the files; now the subtitles are all that is seen"
        yield _whole_file(file, "videos", got, expected, mend, "warning")
    mute = sum(bool(record.videos) and not record.audios and not record.use_audio_in_video for record in records)
    if mute and mute == len(records):
        got, expected = f"no `audios` in any of the {mute} records with videos", "the voice beside the picture"
        mend = 'name the same files, e.g. "audios": ["clip.mp4"]; only then is the sound heard'
        yield _whole_file(file, "audios", got, expected, mend, "warning")


def _shared_clips(
    file: str, records: Sequence[Record], media_root: str | os.PathLike, clips_of: dict[str, dict[FileKey, str]]
) -> Iterator[Problem]:
    """Clips another file has too, for held-out clips must not be training clips; and clips under two names."""
    root = Path(media_root or Path(file).parent)
    spellings: dict[FileKey, set[str]] = collections.defaultdict(set)
    for record in records:
        for column in MEDIA_COLUMNS:
            for path in getattr(record, column):
                spellings[file_key(root / path)].add(path)
    twice = [sorted(names) for names in spellings.values() if len(names) > 1]
    if twice:
        got = f"{len(twice)} file(s) under more than one name, e.g. {' and '.join(map(repr, min(twice)[:2]))}"
        mend = "write each file's name in one way; they are taken for one clip, whatever they are called"
        yield _whole_file(file, "", got, "one name for a file", mend, "warning")
    clips = {key: min(names) for key, names in spellings.items()}
    for other, theirs in clips_of.items():
        if shared := clips.keys() & theirs.keys():
            got = f"{len(shared)} clip(s) that {other} has too, e.g. {root / min(clips[key] for key in shared)}"
            mend = "take them out of one of the files if one is for evaluation"
            yield _whole_file(file, "", got, "clips that were not seen in training", mend, "warning")
    clips_of[file] = clips


def _report(
    file: str, records: Sequence[Record], faults: Sequence[Problem], findings: Sequence[_Findings]
) -> FileReport:
    sums = sum((found.counts for found in findings), collections.Counter())
    counts = {
        "records": len(records),
        "bad_lines": len({fault.line for fault in faults}),
        **{column: sum(len(getattr(record, column)) for record in records) for column in MEDIA_COLUMNS},
        "subtitles": sum(record.subtitle is not None for record in records),
        "solutions": sum(bool(record.solution) for record in records),
        "targets": sum(record.target is not None for record in records),
        **{
            name: sums[name]
            for name in (
                "broken",
                "silent_audio",
                "audio_cut",
                "audio_filled",
                "mute_audio",
                "cancelled_audio",
                "bad_prompt",
                "bad_target",
                "words",
                "unknown_words",
                "unscorable",
            )
        },
        **{name: sums[name] for name in sorted(sums) if name.startswith("broken: ")},
    }
    values: dict[str, list[float]] = collections.defaultdict(list)
    for found in findings:
        for name, value in found.lengths.items():
            values[name].append(value)
    lengths = {
        name: {"min": min(many), "mean": statistics.fmean(many), "max": max(many)}
        for name, many in sorted(values.items())
    }
    words = sum((found.unknown_words for found in findings), collections.Counter())
    return FileReport(file=file, counts=counts, lengths=lengths, unknown_words=dict(words.most_common()))


def _broken_files(record: Record, load: Load) -> list[tuple[str, MediaError]]:
    """(column and place, error) of each file of a record that fails on its own; loading it whole stops at the first."""
    broken = []
    for column in MEDIA_COLUMNS:
        for place, path in enumerate(getattr(record, column)):
            alone = {other: (path,) if other == column else () for other in MEDIA_COLUMNS}
            try:
                load(dataclasses.replace(record, **alone))
            except MediaError as error:
                broken.append((f"{column}[{place}]", error))
    return broken


def _problem(record: Record, field: str, got: str, expected: str, mend: str, severity: str = "error") -> Problem:
    return Problem(
        file=record.file,
        line=record.line,
        field=field,
        got=got,
        expected=expected,
        mend=mend,
        record_id=record.id,
        severity=severity,
    )


def _whole_file(file: str, field: str, got: str, expected: str, mend: str, severity: str) -> Problem:
    return Problem(file=file, line=0, field=field, got=got, expected=expected, mend=mend, severity=severity)
