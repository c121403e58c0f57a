"""Answers of a judge on disk: one small JSON file each, named by the hash of what was asked."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from mer_r1_jax.evaluation.judge.endpoint import JudgeAbortedError
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.atomic_files import WriteError, writing

log = logging.getLogger(__name__)


def question_key(model: str, prompt_version: str, request: dict[str, Any]) -> str:
    """SHA-256 over the judge's model, the prompt's version and the whole request; hexadecimal.

    The endpoint's address is not part of it: the same model elsewhere is the same judge.
    """
    text = json.dumps([model, prompt_version, request], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class AnswerCache:
    """A folder of answers. Several threads and processes may share it; a kill leaves whole answers only.

    Args:
        folder: made when first written to.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry of a question, or None; a damaged one counts as none, and is said to be."""
        path = self._path(key)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            log.warning("%s cannot be read (%s): the question is asked again", path, error)
            return None
        if isinstance(entry, dict) and isinstance(entry.get("answer"), str) and entry.get("key") == key:
            return entry
        log.warning("%s holds no answer to its question: it is asked again", path)
        return None

    def put(self, key: str, entry: dict[str, Any]) -> None:
        """Keeps an entry; it must have an `answer`.

        Raises:
            JudgeAbortedError: the folder cannot be written to; going on would pay for answers that are lost.
        """
        path = self._path(key)
        try:
            with writing("the judge's answer", path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.folder / ".lock", "a") as lock:
                    # Two processes with one question would share the file that is renamed.
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    atomic_files.write_json(path, entry | {"key": key})
        except WriteError as error:
            raise JudgeAbortedError(str(error)) from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
