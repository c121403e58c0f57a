"""Directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from mer_r1_jax.omni.hf.config_json import CONFIG_FILE
from mer_r1_jax.storage.atomic_files import writing


class ExportError(ValueError):
    """An export that cannot be made; the message says what is wrong and how to mend it."""


@contextlib.contextmanager
def staged(
    directory: Path, *, overwrite: bool, inputs: Sequence[Path] = (), marker: str = CONFIG_FILE
) -> Iterator[Path]:
    """Gives an empty directory `<name>.partial` beside the target and renames it to the target at the end.

    When the block fails the partial directory is removed; when the process is killed it stays until the next export to
    the same place. An earlier export that is replaced waits as `<name>.replaced` while the names change hands.

    Args:
        directory: the target.
        overwrite: whether an earlier export (a directory with the file `marker`) may be replaced.
        inputs: directories that are being read and must not be touched.
        marker: a file that every such export has.

    Raises:
        WriteError: there is no room, or no permission.
        ExportError: the target is a file, one of `inputs` or around one, or holds something that may not be replaced.
    """
    partial = directory.with_name(f"{directory.name}.partial")
    replaced = directory.with_name(f"{directory.name}.replaced")
    with writing("the export", directory):
        _check_inputs(directory, (partial, replaced), inputs)
        if replaced.exists() and not directory.exists():
            os.rename(replaced, directory)  # a kill between the two renames below
        _check_target(directory, overwrite, marker)
        yield from _staged(directory, partial, replaced)


def _check_inputs(directory: Path, beside: Sequence[Path], inputs: Sequence[Path]) -> None:
    for path in inputs:
        if path.resolve() in {target.resolve() for target in (directory, *beside)}:
            raise ExportError(f"{directory}: is also read from; choose another output directory")
        if directory.resolve() in path.resolve().parents:
            raise ExportError(f"{directory}: contains {path}, which is read from; choose another output directory")


def _staged(directory: Path, partial: Path, replaced: Path) -> Iterator[Path]:
    for leftover in (partial, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            _flush(path)
        _flush(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if directory.exists():
        os.rename(directory, replaced)
    os.rename(partial, directory)
    _flush(directory.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _check_target(directory: Path, overwrite: bool, marker: str) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ExportError(f"{directory}: is a file; expected a new directory")
    if not any(directory.iterdir()):
        return
    if not overwrite:
        raise ExportError(f"{directory}: exists and is not empty; choose another directory or ask to overwrite it")
    if not (directory / marker).is_file():
        raise ExportError(f"{directory}: holds no {marker}, so it is no earlier export and will not be replaced")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
