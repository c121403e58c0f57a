"""How predictions become scores: which extractor and judge, which prompts, what the judge is shown.

Scores of different protocols are not comparable; each has files of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from mer_r1_jax.evaluation.mme import prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything besides items and predictions that a score follows from.

    Attributes:
        extractor: model that turns responses into steps.
        judge: model that rates steps.
        images: the judge is shown frames.
        max_frames: at most, one a second from the start.
        frame_side: pixels of a frame's longer side at most.
        reasks: further attempts at a reply that cannot be read.
    """

    extractor: str
    judge: str
    images: bool = True
    max_frames: int = 10
    frame_side: int = 512
    reasks: int = 2

    def steps_fingerprint(self) -> dict[str, Any]:
        """What the steps follow from."""
        return {"extractor": self.extractor, "prompt": prompts.STEPS_VERSION, "reasks": self.reasks}

    def fingerprint(self) -> dict[str, Any]:
        """What the ratings follow from, the steps included."""
        shown = {"max_frames": self.max_frames, "frame_side": self.frame_side} if self.images else {}
        judge = {"judge": self.judge, "prompt": prompts.JUDGE_VERSION, "reasks": self.reasks, "images": self.images}
        return {"steps": self.steps_fingerprint(), "steps_key": self.steps_key, **judge, **shown}

    @property
    def steps_key(self) -> str:
        """Short and stable, for file names."""
        return _digest(self.steps_fingerprint())

    @property
    def key(self) -> str:
        """Short and stable, for file names."""
        return _digest(self.fingerprint())


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def digest_of(*values: Any) -> str:
    """What a result was made from, to notice when that has changed."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:16]


def describe(fingerprint: dict[str, Any]) -> str:
    """A protocol's fingerprint as one line for people."""
    steps = fingerprint["steps"]
    frames = f"up to {fingerprint['max_frames']} frames" if fingerprint["images"] else "no frames"
    rated = f"rated by {fingerprint['judge']} ({fingerprint['prompt']}), which is shown {frames}"
    return f"Steps by {steps['extractor']} ({steps['prompt']}), {rated}"
