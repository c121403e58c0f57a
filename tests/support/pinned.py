"""Versions that files of requirements name."""

import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def pinned_versions(path: Path, python: str = "") -> dict[str, str]:
    """Canonical name -> version of lines `name==version` whose markers hold on a Python such as 3.12; "" = this one."""
    python = python or f"{sys.version_info.major}.{sys.version_info.minor}"
    lines = [line.partition("#")[0].removesuffix("\\\n").strip().removesuffix("\\") for line in path.open()]
    found = [Requirement(line) for line in lines if line and not line.startswith("--")]
    held = [one for one in found if one.marker is None or one.marker.evaluate({"python_version": python})]
    assert len({one.name for one in held}) == len(held), f"{path}: a package with two versions on Python {python}"
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in held}
