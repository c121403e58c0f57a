"""One stage's results as JSON lines, appended as they come: a killed evaluation goes on after the last whole line.

The first line is the fingerprint: everything besides its input that a result follows from. A later line of a key counts
instead of an earlier one, so that what failed can be tried again; nothing is ever rewritten.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mer_r1_jax.evaluation.mme.errors import MmeError

VERSION = 1  # of the lines' form
FAILED = "failed"  # a line with it says why there is no result


class StageLog:
    """Results of one stage by key. Use as a context manager; holds a lock on the file.

    Args:
        path: the file; made with its folder when absent.
        fingerprint: JSON values.

    Attributes:
        rows: key -> its line, failures included.

    Raises:
        MmeError: the file is of another fingerprint, in use, damaged, or cannot be written.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")
        except OSError as error:
            raise MmeError(f"{path} cannot be written ({error}); choose another --out") from error
        try:
            self._lock()
            self._drop_torn_line()
            fingerprint = json.loads(json.dumps(fingerprint))
            if not os.path.getsize(path):
                self._write({"version": VERSION, "fingerprint": fingerprint})
            header, self.rows = read_log(path)
            _compare(path, header["fingerprint"], fingerprint)
        except BaseException:
            self._file.close()
            raise

    def done(self, key: str) -> bool:
        """Whether there is a result, not a failure."""
        return key in self.rows and FAILED not in self.rows[key]

    def add(self, key: str, result: Mapping[str, Any]) -> None:
        """Appends a result and waits until it is on disk. A failure that is noted already is not noted again."""
        row = {"key": key, **result}
        if self.rows.get(key) == row:
            return
        self.rows[key] = row
        self._write(row)

    def fail(self, key: str, reason: str, message: str) -> None:
        """Notes that there is no result: a short slug for counting, and the whole story."""
        self.add(key, {FAILED: reason, "message": message})

    def close(self) -> None:
        """Releases the file."""
        self._file.close()

    def __enter__(self) -> StageLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MmeError(f"{self.path} is in use by another process; wait for it, or choose another --out") from error

    def _drop_torn_line(self) -> None:
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):
            self._file.truncate(content.rfind(b"\n") + 1)

    def _write(self, row: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise MmeError(f"{self.path} cannot be written ({error}); what is in it stays, go on later") from error


def read_log(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The header, with `fingerprint`, and key -> line, without a torn last line.

    Raises:
        MmeError: there is no such file, or a line of it is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MmeError(f"{path}: no results there ({error.strerror}); run without --rescore first") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line.decode("utf-8"))
            good = isinstance(row, dict) and ("fingerprint" if number == 1 else "key") in row
        except (ValueError, RecursionError):
            good = False
        if not good:
            raise MmeError(f"{path}:{number}: damaged; take this line out to use the others")
        rows.append(row)
    if not rows:
        raise MmeError(f"{path}: no results there; run without --rescore first")
    if rows[0].get("version") != VERSION:
        raise MmeError(f"{path}: got lines of version {rows[0].get('version')}, expected {VERSION}")
    return rows[0], {row["key"]: row for row in rows[1:]}


def _compare(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        lines = [f"  {name}: there {found.get(name)!r}, now {wanted.get(name)!r}" for name in names]
        raise MmeError(
            f"{path} holds results made from something else:\n" + "\n".join(lines) + "\nChoose another --out, or use "
            "what they were made with."
        )
