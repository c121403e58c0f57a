"""SHA-256 sums of an export's files, written beside them and checked before the files are read.

The list has the form of `sha256sum`, so `sha256sum -c mer_r1.sha256` checks it too. It covers what nobody edits by hand
(weights, their index, the tokenizer's vocabulary) and leaves out what people do edit: config.json and other settings.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from mer_r1_jax.omni.hf.tensor_files import INDEX_FILE, WeightError, weight_files
from mer_r1_jax.storage.atomic_files import sha256_of

SUMS_FILE = "mer_r1.sha256"
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
_LINE = re.compile(r"([0-9a-f]{64})[ \t]+\*?(\S.*)")
_MAX_BYTES = 10_000_000  # of the list

_log = logging.getLogger(__name__)


def write_sums(directory: Path, sums: dict[str, str]) -> None:
    """Writes the list: `sums` maps each file's name to its sum."""
    lines = [f"{value}  {name}\n" for name, value in sorted(sums.items())]
    (directory / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def check_sums(files: Sequence[Path], error: type[Exception]) -> int:
    """Compares files of one folder with the list beside them.

    Args:
        files: those about to be read. A file the list does not name, or a folder without a list, is taken as it is.
        error: raised with a message.

    Returns:
        Number of files that were compared.
    """
    files = list(files)
    wanted = read_sums(files[0].parent / SUMS_FILE, error) if files else {}
    listed = [file for file in files if file.name in wanted]
    for file in listed:
        if not file.is_file():  # a named pipe or a device would be read for ever
            raise error(f"{file}: not a regular file, but {SUMS_FILE} lists it; copy it again from the export")
    damaged = [file.name for file in listed if sha256_of(file) != wanted[file.name]]
    if damaged:
        raise error(
            f"{files[0].parent}: {', '.join(damaged)} {'is' if len(damaged) == 1 else 'are'} not as exported: got "
            f"another SHA-256 than {SUMS_FILE} says, so bytes were damaged or replaced. Copy the export again; if you "
            f"changed the file on purpose, remove its line from {SUMS_FILE}"
        )
    if listed:
        _log.info("%s: %d of %d files compared with %s", files[0].parent, len(listed), len(files), SUMS_FILE)
    return len(listed)


def check_weights(directory: Path) -> None:
    """Compares the weights of a directory, and their index, with its list of sums. Raises WeightError."""
    index = directory / INDEX_FILE
    check_sums([*weight_files(directory), *([index] if index.is_file() else [])], WeightError)


def read_sums(path: Path, error: type[Exception]) -> dict[str, str]:
    """File name -> hexadecimal SHA-256 of a list of sums; empty where there is no list. Raises `error`."""
    if not path.is_file():
        return {}
    mend = "copy it again from the export, or delete it to load the folder unchecked"
    if path.stat().st_size > _MAX_BYTES:
        raise error(f"{path}: {path.stat().st_size} bytes, expected a short list of sums; {mend}")
    sums = {}
    for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), 1):
        match = _LINE.fullmatch(line.strip())
        if line.strip() and match is None:
            raise error(f"{path}:{number}: expected a SHA-256 sum in hexadecimal and a file's name; {mend}")
        if match is not None:
            sums[match[2].removeprefix("./")] = match[1]
    return sums
