"""Writes runs as an ablation leaves them: no SFT, two evaluations, a few metrics, no clips."""

from __future__ import annotations

import json
from pathlib import Path

from support.finished_run import write_evaluation

from mer_r1_jax.run.jobs import FINISHED
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.run_directory import RunDirectory
from mer_r1_jax.training.metrics import MetricsWriter


def write_run(folder: Path, arm="ad", seed=0, skill=0.9, finished=True, metrics=(), **rl) -> Path:
    """A run whose last evaluation, after 20 steps, is right with probability `skill`; `metrics` are of its steps."""
    config = {
        "name": "tiny",
        "rl": {"arm": arm, "max_steps": 20, **rl},
        "train": {"seed": seed, "output_dir": str(folder.parent)},
    }
    config["data"] = {"synthetic_dir": "data", "synthetic_world": "U", "synthetic_seed": 3}
    with RunDirectory.open(folder, config) as run, MetricsWriter(run) as writer:
        for step, values in enumerate(metrics or [{"reward": 1.0}], start=1):
            writer.write("rl", step, values)
        write_evaluation(run, "rl", 0, 0.2, 8)
        write_evaluation(run, "rl", 20, skill, 8)
    if finished:
        atomic_files.write_json(folder / FINISHED, {})
    return folder


def rescore(folder: Path, **scores: float) -> None:
    """Changes scores of a run's last evaluation; `slow_expected_f1` is expected_f1 of slow answers."""
    end = max((folder / "eval").glob("*.json"))
    content = json.loads(end.read_text())
    for name, value in scores.items():
        mode, _, score = name.partition("_")
        content[mode][score] = value
    atomic_files.write_json(end, content)
