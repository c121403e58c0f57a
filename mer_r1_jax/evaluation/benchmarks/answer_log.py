"""Answers of a policy, one JSON line a clip and mode, appended as they come: an interrupted evaluation goes on from it.

The first line says what the answers are made of (the fingerprint); a file with another one is refused. A line is
appended whole and synced; a last line that a kill has torn is dropped, and its clip is asked again. Nothing is ever
rewritten. The lines hold everything a score needs: clip, truth, the raw text, its words and their confidences.
"""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from mer_r1_jax.config.build import difference
from mer_r1_jax.evaluation.benchmarks.errors import BenchmarkError

VERSION = 1  # of the lines' form
_SHOWN = 12  # differing fields that a refusal lists


class AnswerLog:
    """The answers to one benchmark's clips. Use as a context manager; holds a lock on the file.

    Args:
        path: the file; made with its folder when absent.
        fingerprint: nested JSON values that the answers follow from.

    Attributes:
        answers: (clip, mode) -> line, those that were there and those appended.

    Raises:
        BenchmarkError: the file belongs to another fingerprint, is in use, or is damaged before its last line.
    """

    def __init__(self, path: str | pathlib.Path, fingerprint: Mapping[str, Any]):
        self.path = pathlib.Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")
        except OSError as error:
            raise BenchmarkError(f"{self.path} cannot be written: {error}; choose another --out") from error
        try:
            self._lock()
            self._drop_torn_line()
            header, self.answers = read_answers(self.path) if os.path.getsize(self.path) else (None, {})
            if header is None:
                self._write([{"version": VERSION, "fingerprint": _plain(fingerprint)}])
            else:
                _compare(self.path, header["fingerprint"], _plain(fingerprint))
        except BaseException:
            self._file.close()
            raise

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Adds answers and waits until they are on disk.

        Raises:
            BenchmarkError: a clip's answer in that mode is there already.
        """
        lines = list(lines)
        for line in lines:
            key = (line["id"], line["mode"])
            if key in self.answers:
                raise BenchmarkError(f"{self.path}: {key[0]} has a {key[1]} answer already")
            self.answers[key] = dict(line)
        self._write(lines)

    def close(self) -> None:
        """Releases the file."""
        self._file.close()

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BenchmarkError(
                f"{self.path} is in use by another process; wait for it, or choose another --out"
            ) from (error)

    def _drop_torn_line(self) -> None:
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):
            self._file.truncate(content.rfind(b"\n") + 1)

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        try:
            self._file.write(text.encode("utf-8", "surrogatepass"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise BenchmarkError(f"{self.path} cannot be written: {error}; what is in it stays, go on later") from error


def read_answers(path: str | pathlib.Path) -> tuple[dict[str, Any], dict[tuple[str, str], dict[str, Any]]]:
    """Reads an answer file, without its torn last line if it has one.

    Returns:
        The header, with `version` and `fingerprint`, and (clip, mode) -> line in the file's order.

    Raises:
        BenchmarkError: there is no such file, or a line of it is damaged or stands twice.
    """
    path = pathlib.Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BenchmarkError(f"{path}: no answers to score ({error.strerror}); run without --rescore first") from error
    rows = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            row = json.loads(line.decode("utf-8", "surrogatepass"))
            good = isinstance(row, dict) and ("fingerprint" in row if number == 1 else {"id", "mode"} <= row.keys())
        except ValueError:
            good = False
        if not good:
            raise BenchmarkError(f"{path}:{number}: damaged; the file can be used again without this line")
        rows.append(row)
    if not rows:
        raise BenchmarkError(f"{path}: no answers to score; run without --rescore first")
    if rows[0].get("version") != VERSION:
        raise BenchmarkError(f"{path}: got lines of version {rows[0].get('version')}, expected {VERSION}")
    answers = {(row["id"], row["mode"]): row for row in rows[1:]}
    if len(answers) < len(rows) - 1:
        raise BenchmarkError(f"{path}: {len(rows) - 1 - len(answers)} answers stand in it twice; remove one of each")
    return rows[0], answers


def check_model(folder: pathlib.Path, model: Any) -> None:
    """Refuses a folder of answers in which another model has answered some benchmark.

    Args:
        folder: of answer files.
        model: what the fingerprints say under `model`.

    Raises:
        BenchmarkError: naming the file and what differs.
    """
    for path in sorted(folder.glob("*.jsonl")):
        with open(path, "rb") as file:
            first = file.readline()
        if first.endswith(b"\n"):  # otherwise torn, and dropped when it is opened
            try:
                found = json.loads(first)["fingerprint"]["model"]
            except (ValueError, KeyError, TypeError) as error:
                raise BenchmarkError(f"{path}:1: damaged; remove the file, or choose another --out") from error
            _compare(path, {"model": found}, {"model": _plain(model)})


def _compare(path: pathlib.Path, found: Any, expected: Any) -> None:
    changed = difference(found, expected)
    if not changed:
        return
    listed = [f"  {name}: there {before!r}, now {after!r}" for name, (before, after) in list(changed.items())[:_SHOWN]]
    more = [f"  ... and {len(changed) - _SHOWN} more"] * (len(changed) > _SHOWN)
    raise BenchmarkError(
        f"{path} holds answers made from something else:\n"
        + "\n".join(listed + more)
        + "\nChoose another --out, or use what the answers were made with."
    )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
