"""MME-Emotion's official layout, read and checked.

<root>/<task>/question/<task_>.json                            list of video_id, label, label_set
<root>/<task>/audio_clue/<task_>_qwen2_audio_clues.json        list of video_id, audio_clue (ground_truth)
<root>/<task>/<video_id> or <root>/<video_id>                  the clips

`<task_>` has underscores for hyphens. A response file, as the official code reads it, is a list of video_id,
ground_truth, model_response; ER-Lab's video_id lacks its .mp4 there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mer_r1_jax.data.paths import MediaPathError, resolve_media
from mer_r1_jax.evaluation.mme.mme_tasks import TASKS, MmeError, Task

_SHOWN = 10  # problems listed in one error


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        task: the task's name.
        video_id: the clip, as the question file names it.
        labels: the truth, at least one.
        label_set: labels there are to choose from.
        audio_clue: what can be heard, in words, for the judge; "" where there is none.
        video: the clip's path relative to the root; None where it is not there.
    """

    task: str
    video_id: str
    labels: tuple[str, ...]
    label_set: tuple[str, ...]
    audio_clue: str
    video: str | None

    @property
    def key(self) -> str:
        """Unique over all tasks."""
        return f"{self.task}/{self.video_id}"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The items that are asked.

    Attributes:
        root: the folder clips are relative to.
        items: in the order of the tasks and their files.
        absent: tasks whose question file is not there.
        limit: first so many items of each task; 0 = all.
    """

    root: Path
    items: tuple[Item, ...]
    absent: tuple[str, ...]
    limit: int = 0

    @property
    def clueless(self) -> int:
        """Items without an audio clue."""
        return sum(not item.audio_clue for item in self.items)

    @property
    def clipless(self) -> int:
        """Items whose clip is not there."""
        return sum(item.video is None for item in self.items)


def read_benchmark(root: str | Path, tasks: Sequence[str] = (), limit: int = 0) -> Benchmark:
    """Reads the question and clue files of every task that is there, or of the tasks named.

    Args:
        root: the benchmark's folder.
        tasks: names; () = all. One that is named and not there is an error, else it is noted as absent.
        limit: first so many items of each task; 0 = all.

    Raises:
        MmeError: nothing there, or a file that cannot be used; all its problems are listed.
    """
    root = Path(root)
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise MmeError(f"tasks: got {', '.join(unknown)}; expected some of {', '.join(TASKS)}")
    items: list[Item] = []
    absent = []
    for task in TASKS.values():
        if tasks and task.name not in tasks:
            continue
        file = root / task.name / "question" / f"{task.stem}.json"
        if not file.is_file():
            absent.append(task.name)
            continue
        items += _read_task(root, task, file)[: limit or None]
    if absent and (tasks or not items):
        example = Path(absent[0]) / "question" / f"{TASKS[absent[0]].stem}.json"
        raise MmeError(
            f"{root}: no question file of {', '.join(absent)}; expected {example} and the like. The folder is that of "
            "the data set Karl28/MME-Emotion, unpacked"
        )
    return Benchmark(root, tuple(items), tuple(absent), limit)


def _read_task(root: Path, task: Task, file: Path) -> list[Item]:
    clues = _read_clues(root / task.name / "audio_clue" / f"{task.stem}_qwen2_audio_clues.json")
    rows, problems = _rows(file), []
    items: dict[str, Item] = {}
    for number, row in enumerate(rows, start=1):
        item = _item(root, task, row, clues)
        if isinstance(item, str):
            problems.append(f"entry {number}: {item}")
        elif item.video_id in items:
            problems.append(f"entry {number}: video_id {item.video_id!r} is there already")
        else:
            items[item.video_id] = item
    _raise(file, problems)
    return list(items.values())


def _item(root: Path, task: Task, row: Any, clues: dict[str, str]) -> Item | str:
    """The item of an entry, or what is wrong with it."""
    if not isinstance(row, dict):
        return f"got {type(row).__name__}, expected an object"
    video_id, label, label_set = row.get("video_id"), row.get("label", row.get("ground_truth")), row.get("label_set")
    if not (isinstance(video_id, str) and video_id.strip()):
        return f"video_id is {video_id!r}, expected the clip's path"
    if not isinstance(label, str):
        return f"label is {label!r}, expected text"
    labels = [part.strip() for part in (label.split(task.separator) if task.separator else [label])]
    labels = list(dict.fromkeys(part for part in labels if part))
    if not labels:
        return "label is empty, expected at least one"
    if not (isinstance(label_set, list) and label_set and all(isinstance(entry, str) for entry in label_set)):
        return f"label_set is {label_set!r}, expected a list of labels"
    try:
        video = _find_clip(root, task, video_id)
    except MediaPathError as error:
        return str(error)
    clue = clues.get(_bare(video_id), "")
    return Item(task.name, video_id, tuple(labels), tuple(label_set), clue, video)


def _find_clip(root: Path, task: Task, video_id: str) -> str | None:
    for folder in (task.name, task.stem, ""):
        for ending in ("", ".mp4"):  # the official code, too, appends it where it is missing
            relative = f"{folder}/{video_id}{ending}" if folder else video_id + ending
            if resolve_media(root, relative).is_file():
                return relative
    return None


def _read_clues(file: Path) -> dict[str, str]:
    """Clip without ending -> clue; nothing where there is no file."""
    if not file.is_file():
        return {}
    clues, problems = {}, []
    for number, row in enumerate(_rows(file), start=1):
        good = isinstance(row, dict) and isinstance(row.get("video_id"), str)
        if not good or not isinstance(row.get("audio_clue"), str):
            problems.append(f"entry {number}: expected an object with video_id and audio_clue, both text")
            continue
        clues[_bare(row["video_id"])] = row["audio_clue"].strip()
    _raise(file, problems)
    return clues


def response_files(folder: str | Path) -> dict[str, Path]:
    """Task -> its response file: `<task_>.json` or `<task>.json`.

    Raises:
        MmeError: there is none.
    """
    found = {}
    for task in TASKS.values():
        for file in (Path(folder) / f"{task.stem}.json", Path(folder) / f"{task.name}.json"):
            if file.is_file():
                found.setdefault(task.name, file)
    if not found:
        expected = ", ".join(f"{task.stem}.json" for task in TASKS.values())
        raise MmeError(
            f"{folder}: no response file; expected some of {expected}, JSON lists of video_id and model_response"
        )
    return found


def read_responses(files: Mapping[str, Path], items: Iterable[Item]) -> dict[str, str]:
    """Responses of a model that was asked elsewhere.

    Args:
        files: as `response_files` finds them.
        items: that are to be answered; responses to others are left aside.

    Returns:
        key -> response, for the items that have one. A null response counts as none.

    Raises:
        MmeError: an entry that cannot be used.
    """
    by_task: dict[str, dict[str, Item]] = {}
    for item in items:
        by_task.setdefault(item.task, {})[_bare(item.video_id)] = item
    responses: dict[str, str] = {}
    for name, file in files.items():
        responses |= _responses_of(file, by_task.get(name, {}))
    return responses


def _responses_of(file: Path, of_clip: dict[str, Item]) -> dict[str, str]:
    found: dict[str, str] = {}
    problems = []
    for number, row in enumerate(_rows(file), start=1):
        if not isinstance(row, dict) or not isinstance(row.get("video_id"), str) or "model_response" not in row:
            problems.append(f"entry {number}: expected an object with video_id and model_response")
            continue
        item, response = of_clip.get(_bare(row["video_id"])), row["model_response"]
        if item is None or response is None:
            continue
        if not isinstance(response, str):
            problems.append(f"entry {number}: model_response is {response!r}, expected text")
        elif item.key in found:
            problems.append(f"entry {number}: {row['video_id']!r} is answered twice")
        else:
            found[item.key] = response
    _raise(file, problems)
    return found


def _bare(video_id: str) -> str:
    """A clip's name without the ending, which files of one task write or leave out."""
    return str(Path(video_id).with_suffix("")) if Path(video_id).suffix in (".mp4", ".avi", ".mkv") else video_id


def _rows(file: Path) -> list[Any]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise MmeError(f"{file}: cannot be read ({error}); expected a JSON list") from error
    if not isinstance(rows, list) or not rows:
        raise MmeError(f"{file}: got {'an empty list' if rows == [] else type(rows).__name__}, expected a JSON list")
    return rows


def _raise(file: Path, problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] * (len(problems) > _SHOWN)
        raise MmeError(f"{file} cannot be used:\n  " + "\n  ".join(problems[:_SHOWN] + more))
