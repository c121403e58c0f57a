"""Results as JSON lines, appended as they come: whatever a kill leaves goes on after the last whole line.

The first line says what the results are made of (the fingerprint); a file with another one is refused. A line is
appended whole and synced; a last line that a kill has torn is dropped, and its result is made again. Nothing is ever
rewritten.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pathlib
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar, Self

from mer_r1_jax import faults
from mer_r1_jax.config.build import difference
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.atomic_files import writing

VERSION = 1  # of the lines' form
FAILED = "failed"  # a line with it says why there is no result
_SHOWN = 12  # differing fields that a refusal lists


@dataclasses.dataclass(frozen=True)
class LogForm:
    """What the lines of one kind of log are, and how its errors speak of them.

    Attributes:
        key: fields that tell one line from another.
        lines: what they are, in the plural.
        error: raised where a log cannot be used.
        last_counts: a later line of a key counts instead of an earlier one, so that what failed can be tried again;
            otherwise a second line of a key is refused.
    """

    key: tuple[str, ...]
    lines: str
    error: type[Exception]
    last_counts: bool = False

    def key_of(self, row: Mapping[str, Any]) -> Hashable:
        """A line's key: the value of its one key field, or the tuple of several."""
        values = tuple(row[name] for name in self.key)
        return values[0] if len(values) == 1 else values


class ResultLog:
    """The results of one piece of work. Use as a context manager; holds a lock on the file.

    Args:
        path: the file; made with its folder when absent.
        form: of its lines.
        fingerprint: nested JSON values that the results follow from.

    Attributes:
        rows: key -> line, those that were there and those appended, failures included.

    Raises:
        form.error: the file belongs to another fingerprint, is in use, is damaged, or cannot be written.
    """

    def __init__(self, path: str | pathlib.Path, form: LogForm, fingerprint: Mapping[str, Any]):
        self.path, self.form = pathlib.Path(path), form
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)
        except OSError as error:
            raise form.error(f"{self.path} cannot be written: {error}; choose another --out") from error
        try:
            self._lock()
            self._drop_torn_line()
            if not os.path.getsize(self.path):
                self._write([{"version": VERSION, "fingerprint": fingerprint}])
            header, self.rows = read_log(self.path, form)
            _compare(self.path, form, header["fingerprint"], fingerprint)
        except BaseException:
            self._file.close()
            raise

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines and waits until they are on disk. A line that is there already word for word is not added again.

        Raises:
            form.error: there is a line of that key, and the form allows one only.
        """
        added = []
        for row in map(dict, rows):
            key = self.form.key_of(row)
            if key in self.rows and not self.form.last_counts:
                raise self.form.error(f"{self.path}: {self.form.lines} of {_named(key)} are there already")
            if self.rows.get(key) != row:
                self.rows[key] = row
                added.append(row)
        self._write(added)
        faults.here("answers_appended", self.path)

    def done(self, key: Hashable) -> bool:
        """Whether there is a result, not a failure."""
        return key in self.rows and FAILED not in self.rows[key]

    def close(self) -> None:
        """Releases the file."""
        self._file.close()

    def __enter__(self) -> ResultLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise self.form.error(
                f"{self.path} is in use by another process; wait for it, or choose another --out"
            ) from error

    def _drop_torn_line(self) -> None:
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):
            self._file.truncate(content.rfind(b"\n") + 1)

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        # Names of files need not be Unicode: Python reads their odd bytes as lone surrogates, which pass here.
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with writing(f"the file of {self.form.lines}", self.path):
            atomic_files.append(self._file, text.encode("utf-8", "surrogatepass"))
            os.fsync(self._file.fileno())


def read_log(path: str | pathlib.Path, form: LogForm) -> tuple[dict[str, Any], dict[Any, dict[str, Any]]]:
    """Reads a log, without its torn last line if it has one.

    Returns:
        The header, with `version` and `fingerprint`, and key -> line in the file's order.

    Raises:
        form.error: there is no such file, or a line of it is damaged, or stands twice where the form allows one.
    """
    path = pathlib.Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise form.error(f"{path}: no {form.lines} to score ({error.strerror}); run without --rescore first") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line.decode("utf-8", "surrogatepass"))
            good = isinstance(row, dict) and ({"fingerprint"} if number == 1 else set(form.key)) <= row.keys()
        except (ValueError, RecursionError):
            good = False
        if not good:
            raise form.error(f"{path}:{number}: damaged; the file can be used again without this line")
        rows.append(row)
    if not rows:
        raise form.error(f"{path}: no {form.lines} to score; run without --rescore first")
    if rows[0].get("version") != VERSION:
        raise form.error(f"{path}: got lines of version {rows[0].get('version')}, expected {VERSION}")
    by_key = {form.key_of(row): row for row in rows[1:]}
    if (twice := len(rows) - 1 - len(by_key)) and not form.last_counts:
        raise form.error(f"{path}: {twice} {form.lines} stand in it twice; remove one of each")
    return rows[0], by_key


def check_fingerprint(path: pathlib.Path, form: LogForm, part: Mapping[str, Any]) -> None:
    """Refuses a log whose fingerprint has other values in some of its fields. A first line that is torn says nothing.

    Args:
        path: a file that is there.
        form: of its lines.
        part: top-level fields of a fingerprint.

    Raises:
        form.error: naming the file and what differs, or that its first line is damaged.
    """
    with open(path, "rb") as file:
        first = file.readline()
    if not first.endswith(b"\n"):
        return
    try:
        fingerprint = json.loads(first)["fingerprint"]
        found = {name: fingerprint[name] for name in part}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise form.error(f"{path}:1: damaged; remove the file, or choose another --out") from error
    _compare(path, form, found, part)


def _compare(path: pathlib.Path, form: LogForm, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    changed = difference(found, json.loads(json.dumps(expected)))
    if not changed:
        return
    listed = [f"  {name}: there {before!r}, now {after!r}" for name, (before, after) in list(changed.items())[:_SHOWN]]
    more = [f"  ... and {len(changed) - _SHOWN} more"] * (len(changed) > _SHOWN)
    raise form.error(
        f"{path} holds {form.lines} made from something else:\n"
        + "\n".join(listed + more)
        + f"\nChoose another --out, or use what the {form.lines} were made with."
    )


def _named(key: Hashable) -> str:
    return " / ".join(map(str, key)) if isinstance(key, tuple) else str(key)


@dataclasses.dataclass(frozen=True)
class ResultFolder:
    """A folder that an evaluation goes on from, and is scored from without a model. Subclasses say what lies where.

    Attributes:
        path: the folder.
    """

    path: pathlib.Path
    error: ClassVar[type[Exception]]
    kept_scores: ClassVar[str]  # pattern of the files of scores

    @classmethod
    def of(cls, path: str | os.PathLike) -> Self:
        """The evaluation in a folder that is there or will be."""
        return cls(pathlib.Path(path))

    @property
    def report(self) -> pathlib.Path:
        """The report."""
        return self.path / "report.html"

    def keep(self, name: str, content: Any) -> None:
        """Writes a JSON file of the folder.

        Raises:
            self.error: there can be no such file.
        """
        try:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.error(f"{self.path} cannot be made ({error}); choose another --out") from error
        atomic_files.write_json(self.path / name, content)

    def scores(self) -> list[dict[str, Any]]:
        """Every score that is kept.

        Raises:
            self.error: one cannot be read.
        """
        found = []
        for path in sorted(self.path.glob(self.kept_scores)):
            try:
                found.append(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                raise self.error(f"{path}: cannot be read ({error}); remove it and score again") from error
        return found
