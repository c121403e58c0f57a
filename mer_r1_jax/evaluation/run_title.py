"""The title of a run's report: which model was trained, how, and on what."""

from __future__ import annotations

import os
from pathlib import PurePath, PurePosixPath
from typing import Any

from mer_r1_jax.evaluation.run_record import RunRecord


def run_name(run: RunRecord) -> str:
    """What the user called it."""
    return run.config.get("train", {}).get("run_name") or run.config.get("name") or run.path.resolve().name


def model_name(folder: PurePath) -> str:
    """What people call a model: its folder's name, and that of its run where it is a run's export."""
    run = folder.parents[1].name if folder.parts[-2:] == ("export", "hf") else ""
    return run or folder.name


def title_of(run: RunRecord) -> str:
    """What was trained, in one line; the run's name where nothing is on record."""
    model, trained = _model(run.config.get("model", {})), _phases(run)
    data = _data(run.config.get("data", {})) if trained else ""
    told = ", ".join(filter(None, (trained, data)))
    return ": ".join(filter(None, (model, told))) or str(run_name(run))


def _model(model: dict[str, Any]) -> str:
    if path := model.get("path"):
        name = model_name(PurePosixPath(str(path)))
    elif preset := model.get("preset"):
        name = f"{str(preset).capitalize()} model from random weights"
    else:
        return ""
    rank = (model.get("lora") or {}).get("rank")
    return f"{name} with adapters of rank {rank}" if rank else name


def _phases(run: RunRecord) -> str:
    """SFT, RL or both: those that have a step on record."""
    arm = run.config.get("rl", {}).get("arm")
    names = {"sft": "SFT", "rl": f"RL with {arm}" if arm else "RL"}
    return ", then ".join(name for phase, name in names.items() if run.metrics.get(phase))


def _data(data: dict[str, Any]) -> str:
    """The records it was trained on last: a file with its folder, which often carries the set's name."""
    if path := data.get("rl_path") or data.get("sft_path"):
        return f"on {'/'.join(PurePosixPath(os.path.expanduser(str(path))).parts[-2:])}"
    if data.get("synthetic_dir"):  # whose world a configuration names since there is more than one
        return f"on synthetic clips (world {data.get('synthetic_world', 'concluding')})"
    return ""
