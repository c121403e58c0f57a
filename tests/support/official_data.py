"""The official wheels and the official scorer's examples, which have a licence of their own and lie elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("MER_R1_SHARED", _ROOT.parent / "shared")) / "data"
EXAMPLES = FOLDER / "unibench" / "examples.json"
WHEELS = FOLDER / "emotion_wheel"
needs_official_data = pytest.mark.skipif(
    not EXAMPLES.is_file() or not WHEELS.is_dir(), reason="the official files are not at hand"
)
