"""From a set's official folder to records with truths, and an account of everything that is not as it should be."""

from __future__ import annotations

import csv
import dataclasses
import math
import pathlib
from collections.abc import Iterable
from typing import Any

from mer_r1_jax.data.paths import MediaPathError, resolve_media
from mer_r1_jax.data.records import Record, read_records
from mer_r1_jax.emotion.answer_form import split_words
from mer_r1_jax.evaluation.benchmarks.pickled_labels import NAME, SPLIT, refusal
from mer_r1_jax.evaluation.benchmarks.sets import HIT, LAYOUTS, SET_F1, SYNTHETIC, WAF, BenchmarkError, SetLayout

VALENCE = "valence"  # extra column of a record whose truth is a number
NEUTRAL = "neutral"  # what an empty open-vocabulary label is read as; it has no category and is never scored
_VIDEO_ENDINGS = (".mp4", ".avi")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """What a set's folder holds, and what is missing in it, by name.

    Attributes:
        official: clips of the official test split; None where there is none.
        labelled: names with a usable label.
        missing_clip: labelled, but without a video file; they cannot be answered.
        missing_label: without a usable label; they are not answered.
        missing_subtitle: no row of the subtitle file; answered without one.
        empty_subtitle: a row without text, as in the official data; answered without one.
        missing_audio: no sound file of its own; the video file's track is used.
    """

    official: int | None
    labelled: int
    missing_clip: tuple[str, ...] = ()
    missing_label: tuple[str, ...] = ()
    missing_subtitle: tuple[str, ...] = ()
    empty_subtitle: tuple[str, ...] = ()
    missing_audio: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkData:
    """A benchmark, ready to be asked.

    Attributes:
        name: of the benchmark.
        metric: set_f1 | hit | waf.
        media_root: folder of the records' paths.
        records: the clips that can be asked. `solution` holds the true words, for hit the one label; for waf it is
            empty and `extra["valence"]` holds the number.
        coverage: what is there and what is missing.
        absent: truths of the labelled clips that have no file.
        limited: `records` are the first ones only.
    """

    name: str
    metric: str
    media_root: pathlib.Path
    records: tuple[Record, ...]
    coverage: Coverage
    absent: dict[str, Any] = dataclasses.field(default_factory=dict)
    limited: bool = False

    def first(self, limit: int) -> BenchmarkData:
        """The first so many clips; 0 = all."""
        if not 0 < limit < len(self.records):
            return self
        return dataclasses.replace(self, records=self.records[:limit], limited=True)


def truth_of(record: Record, metric: str) -> list[str] | str | float:
    """A record's truth as `emotion.predictions` takes it: words, one word, or a number."""
    if metric == WAF:
        return record.extra[VALENCE]
    return record.solution[0] if metric == HIT else list(record.solution)


def read_set(name: str, root: str | pathlib.Path, *, question: str) -> BenchmarkData:
    """Reads one of the nine sets from its official folder below `root`.

    Args:
        name: of the set, a key of `sets.LAYOUTS`.
        root: folder of the official folders.
        question: what every clip is asked.

    Raises:
        BenchmarkError: the folder, its labels or its subtitles are not there, or labels are pickled or malformed.
    """
    layout = LAYOUTS[name]
    folder = pathlib.Path(root) / layout.folder
    if not folder.is_dir():
        raise BenchmarkError(
            f"{layout.title}: no folder {folder}; --benchmark_root names the folder that holds {layout.folder}/ with "
            f"{layout.video}/, {layout.audio}/, {layout.labels} and {layout.subtitles} (docs/benchmarks.md)"
        )
    truths, unlabelled = _truths(layout, folder)
    subtitles = _subtitles(layout, folder)
    if layout.metric == SET_F1:  # the official loader takes its names from the subtitles
        unlabelled += [name for name in subtitles if name not in truths and name not in unlabelled]
    records, missing = [], {"clip": [], "subtitle": [], "empty": [], "audio": []}
    for clip, truth in truths.items():
        video = _media(folder, layout.video, clip, _VIDEO_ENDINGS)
        if video is None:
            missing["clip"].append(clip)
            continue
        audio = _media(folder, layout.audio, clip, (".wav",))
        if audio is None:
            missing["audio"].append(clip)
        subtitle = subtitles.get(clip)
        if not subtitle:
            missing["subtitle" if subtitle is None else "empty"].append(clip)
        records.append(
            Record(
                id=clip,
                messages=({"role": "user", "content": question},),
                videos=(video,),
                audios=(audio or video,),
                subtitle=subtitle or None,
                solution=() if layout.metric == WAF else tuple(truth),
                extra={VALENCE: truth} if layout.metric == WAF else {},
                file=str(folder / layout.labels),
            )
        )
    coverage = Coverage(
        official=layout.size,
        labelled=len(truths),
        missing_clip=tuple(missing["clip"]),
        missing_label=tuple(unlabelled),
        missing_subtitle=tuple(missing["subtitle"]),
        empty_subtitle=tuple(missing["empty"]),
        missing_audio=tuple(missing["audio"]),
    )
    if not records:
        raise BenchmarkError(
            f"{layout.title}: none of {len(truths)} labelled clips has a file in {folder / layout.video}; expected "
            f"<name>.mp4 or <name>.avi, such as {next(iter(truths), 'a name')}.mp4"
        )
    return BenchmarkData(
        name=name,
        metric=layout.metric,
        media_root=folder,
        records=tuple(records),
        coverage=coverage,
        absent={clip: truths[clip][0] if layout.metric == HIT else truths[clip] for clip in coverage.missing_clip},
    )


def read_synthetic(eval_file: str | pathlib.Path, media_root: str | pathlib.Path, *, question: str) -> BenchmarkData:
    """The synthetic world's held-out clips.

    Raises:
        RecordError: the file cannot be used.
    """
    root = pathlib.Path(media_root or pathlib.Path(eval_file).parent)
    records = tuple(read_records(eval_file, root, question=question, require=("solution",)))
    gone = tuple(record.id for record in records if not all((root / video).is_file() for video in record.videos))
    absent = {record.id: list(record.solution) for record in records if record.id in set(gone)}
    present = tuple(record for record in records if record.id not in absent)
    if not present:
        raise BenchmarkError(f"{eval_file}: none of its {len(records)} clips is in {root}")
    return BenchmarkData(
        name=SYNTHETIC,
        metric=SET_F1,
        media_root=root,
        records=present,
        coverage=Coverage(official=None, labelled=len(records), missing_clip=gone),
        absent=absent,
    )


def _truths(layout: SetLayout, folder: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    """Truth by clip, and the names whose label cannot be used."""
    path = folder / layout.labels
    table = path.with_suffix(".csv")
    if not table.is_file():
        if path.suffix == ".npz" and path.is_file():
            raise BenchmarkError(refusal(path))
        raise BenchmarkError(f"{layout.title}: no labels: expected {path}, or {table.name} made from it")
    truths: dict[str, Any] = {}
    unusable: list[str] = []
    for number, row in _rows(table, (NAME, layout.label_column, *([SPLIT] if layout.split else []))):
        name = row[NAME].strip()
        if (layout.split and row[SPLIT] != layout.split) or not name.startswith(layout.prefix):
            continue
        truth = _truth(layout, row[layout.label_column])
        if truth is None:
            unusable.append(name)
        elif truths.setdefault(name, truth) != truth:
            raise BenchmarkError(f"{table}:{number}: {name} is labelled twice, {truths[name]!r} and {truth!r}")
    if not truths:
        split = f" with split {layout.split}" if layout.split else ""
        raise BenchmarkError(f"{table}: no label can be used; expected rows{split} with {layout.label_column}")
    return truths, unusable


def _truth(layout: SetLayout, cell: str) -> list[str] | float | None:
    """A label as a list of words (one for hit), or as a number; None when it cannot be used."""
    cell = cell.strip()
    if layout.metric == SET_F1:
        return split_words(cell) or [NEUTRAL]
    if layout.metric == HIT:
        if cell in layout.categories:
            return [cell]
        number = _number(cell)
        if number is None or not number.is_integer() or not 0 <= number < len(layout.categories):
            return None
        return [layout.categories[int(number)]]
    return _number(cell)


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _subtitles(layout: SetLayout, folder: pathlib.Path) -> dict[str, str]:
    path = folder / layout.subtitles
    if not path.is_file():
        raise BenchmarkError(f"{layout.title}: no subtitles: expected {path} with name and {layout.subtitle_column}")
    return {
        row[NAME].strip(): row[layout.subtitle_column].strip() for _, row in _rows(path, (NAME, layout.subtitle_column))
    }


def _rows(path: pathlib.Path, columns: tuple[str, ...]) -> Iterable[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV with a header that names the columns."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                found = ", ".join(reader.fieldnames or ()) or "nothing"
                raise BenchmarkError(f"{path}: no column {', '.join(missing)}; found {found}")
            for row in reader:
                yield reader.line_num, {column: row[column] or "" for column in columns}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BenchmarkError(
            f"{path}: cannot be read as CSV in UTF-8: {error}; to mend it, save it so (a text in another encoding: "
            "`iconv -f GB18030 -t UTF-8`)"
        ) from error


def _media(folder: pathlib.Path, kind: str, clip: str, endings: tuple[str, ...]) -> str | None:
    """Path of a clip's file relative to the set's folder; None when there is none, or it would leave the folder."""
    for ending in endings:
        path = f"{kind}/{clip}{ending}"
        try:
            if resolve_media(folder, path).is_file():
                return path
        except MediaPathError:
            return None
    return None
