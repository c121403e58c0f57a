"""What a run has left in its folder, read back for the report. What is absent or broken is named, never hidden."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pyarrow.parquet as pq

from mer_r1_jax.evaluation.bootstrap import Difference, mean_interval
from mer_r1_jax.json_lines import json_texts
from mer_r1_jax.training.metrics import PHASES, read_metrics


class ReportError(RuntimeError):
    """A folder of which no report can be made."""


@dataclasses.dataclass(frozen=True)
class KeptEvaluation:
    """One evaluation: its JSON file and, where present, the answers beside it.

    Attributes:
        scores: content of `eval/<benchmark>_<step>.json`.
        samples: rows of the `.samples.jsonl` beside it, by clip id.
    """

    scores: dict[str, Any]
    samples: dict[str, dict[str, Any]]

    benchmark = property(lambda self: self.scores["benchmark"])
    phase = property(lambda self: self.scores["phase"])
    step = property(lambda self: self.scores["step"])
    n = property(lambda self: self.scores.get("n", 0))
    n_unscorable = property(lambda self: self.scores.get("n_unscorable", 0))  # clips in no score: truth on no wheel
    n_asked = property(lambda self: self.n + len(self.scores.get("skipped", ())))  # with those that could not be used
    n_scored = property(lambda self: self.n - self.n_unscorable)

    def score(self, mode: str, name: str) -> float | None:
        """A score of "slow" or "fast", or None when it was not measured."""
        return _number(self.scores.get(mode, {}).get(name))

    def reference(self, name: str) -> float | None:
        """`majority_f1` or `oracle_f1`, or None when unknown."""
        return _number(self.scores.get(name))


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """Everything the report shows.

    Attributes:
        path: the run's folder.
        config, environment: the run's JSON files; empty when absent.
        metrics: phase -> lines of metrics.jsonl, by step.
        evaluations: benchmark -> its evaluations in the order of the run. The first benchmark is the headline.
        completions: (step, rows) of the newest table of sampled completions, or None.
        missing: in words, what is not there or could not be read.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: dict[str, list[dict[str, Any]]]
    evaluations: dict[str, list[KeptEvaluation]]
    completions: tuple[int, list[dict[str, Any]]] | None
    missing: tuple[str, ...]

    def series(self, phase: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of one metric, float64; lines without it are left out."""
        points = [
            (line["step"], line[name]) for line in self.metrics.get(phase, []) if _number(line.get(name)) is not None
        ]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.asarray(steps, np.float64), np.asarray(values, np.float64)


def read_run(run_dir: str | os.PathLike) -> RunRecord:
    """Reads a run's folder.

    Raises:
        ReportError: there is no such folder.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise ReportError(f"{path} is not a folder: expected a run's folder, such as runs/synthetic")
    missing: list[str] = []
    config = _read_object(path / "config.json", "the configuration", missing)
    environment = _read_object(path / "env.json", "versions and platform", missing)
    metrics = _read_metrics(path / "metrics.jsonl", missing)
    evaluations = _read_evaluations(path / "eval", missing)
    completions = _read_completions(path / "completions", missing)
    return RunRecord(path, config, environment, metrics, evaluations, completions, tuple(missing))


@dataclasses.dataclass(frozen=True)
class Stages:
    """The evaluations a run is told by. Evaluations count steps over both phases.

    Attributes:
        start: after SFT, where RL starts; None when it was not evaluated.
        end: the last one; `start` where RL made none.
        end_is_rl: whether `end` was made by RL.
        sft_steps: steps done before RL, to be taken off an evaluation's step.
    """

    start: KeptEvaluation | None
    end: KeptEvaluation
    end_is_rl: bool
    sft_steps: int

    def rl_step(self, evaluation: KeptEvaluation) -> int:
        """Steps of RL done at an evaluation; 0 at one of SFT."""
        return max(0, evaluation.step - self.sft_steps) if evaluation.phase == "rl" else 0


def stages_of(run: RunRecord, benchmark: str) -> Stages:
    """Picks start and end: RL before its first update or else the last of SFT; the last of RL or else of SFT.

    Args:
        run: the run.
        benchmark: on which it was evaluated.
    """
    evaluations = run.evaluations[benchmark]
    sft_steps = _sft_steps(run, evaluations)
    sft = [evaluation for evaluation in evaluations if evaluation.phase == "sft"]
    untrained = [evaluation for evaluation in evaluations if evaluation.phase == "rl" and evaluation.step <= sft_steps]
    trained = [evaluation for evaluation in evaluations if evaluation.phase == "rl" and evaluation.step > sft_steps]
    start = untrained[-1] if untrained else sft[-1] if sft else None
    end = trained[-1] if trained else start
    assert end is not None, benchmark  # a benchmark is there because of an evaluation, of SFT or of RL
    return Stages(start, end, bool(trained), sft_steps)


def _sft_steps(run: RunRecord, evaluations: Sequence[KeptEvaluation]) -> int:
    """Steps of SFT: its last line, or the first evaluation of RL when the last steps fell between two lines."""
    lines = [line["step"] for line in run.metrics.get("sft", [])]
    logged = int(max(lines, default=0))
    every = run.config.get("train", {}).get("logging_steps", 1)
    first_of_rl = min((evaluation.step for evaluation in evaluations if evaluation.phase == "rl"), default=logged)
    return first_of_rl if lines and logged <= first_of_rl < logged + every else logged


EXPECTED_F1 = "expected_f1"  # where the clips' world is known: F1 without the draw of the truth, half of its noise
IN_WORDS = {"f1": "F1", EXPECTED_F1: "expected F1"}


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a JSON file is a score rather than missing."""
    return isinstance(value, int | float)


def f1_difference(
    new: KeptEvaluation, new_mode: str, old: KeptEvaluation, old_mode: str, name: str = "f1"
) -> Difference | None:
    """F1 of `new_mode` in `new` minus that of `old_mode` in `old`, paired by clip; None without common clips.

    Args:
        new, new_mode, old, old_mode: the two sides.
        name: the score: f1, or EXPECTED_F1, which is None where the clips' world is not known.
    """
    pairs = []
    for clip, row in new.samples.items():
        values = row.get(new_mode, {}).get(name), old.samples.get(clip, {}).get(old_mode, {}).get(name)
        if all(map(is_number, values)):
            pairs.append(values)
    if len(pairs) < 2:
        return None
    seed = zlib.crc32(f"{new.benchmark} {new.phase} {new.step} {new_mode} {old_mode}".encode())
    return mean_interval(np.asarray([a - b for a, b in pairs]), seed)


def _read_object(path: Path, what: str, missing: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
        missing.append(f"{what}: {path.name} holds no JSON object")
    except FileNotFoundError:
        missing.append(f"{what}: there is no {path.name}")
    except (OSError, ValueError) as error:
        missing.append(f"{what}: {path.name} cannot be read ({error})")
    return {}


def _read_metrics(path: Path, missing: list[str]) -> dict[str, list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    try:
        lines = read_metrics(path)
    except (OSError, UnicodeDecodeError) as error:
        missing.append(f"training curves: {path.name} cannot be read ({type(error).__name__})")
    phases = {phase: [line for line in lines if line.get("phase") == phase and "step" in line] for phase in PHASES}
    for phase, found in phases.items():
        if lines and not found:
            missing.append(f"{phase.upper()} curves: {path.name} has no line of that phase")
    return {phase: sorted(found, key=lambda line: line["step"]) for phase, found in phases.items()}


def _read_evaluations(folder: Path, missing: list[str]) -> dict[str, list[KeptEvaluation]]:
    found: dict[str, list[KeptEvaluation]] = {}
    for path in sorted(folder.glob("*.json")):
        problems: list[str] = []
        scores = _read_object(path, "an evaluation", problems)
        if scores and not ({"benchmark", "phase", "step"} <= scores.keys() and scores["phase"] in PHASES):
            problems.append(f"an evaluation: {path.name} lacks benchmark, phase or step")
        if problems:
            missing += problems
            continue
        samples = _read_samples(path.with_suffix(".samples.jsonl"), missing)
        found.setdefault(scores["benchmark"], []).append(KeptEvaluation(scores, samples))
    if not found:
        missing.append("scores on held-out clips: no evaluation was written to eval/")
    for evaluations in found.values():
        evaluations.sort(key=lambda evaluation: (PHASES.index(evaluation.phase), evaluation.step))
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _read_samples(path: Path, missing: list[str]) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        missing.append(f"answers clip by clip: there is no {path.name}")
        return {}
    rows, broken = {}, 0
    for line in json_texts(path.read_text(encoding="utf-8", errors="replace")):
        try:
            row = json.loads(line)
            rows[str(row["id"])] = row
        except (ValueError, KeyError, TypeError):
            broken += 1
    if broken:
        missing.append(f"{broken} answers: as many lines of {path.name} cannot be read")
    return rows


def _read_completions(folder: Path, missing: list[str]) -> tuple[int, list[dict[str, Any]]] | None:
    for path in sorted(folder.glob("completions_*.parquet"), reverse=True):
        try:
            step = int(path.stem.removeprefix("completions_"))
            return step, pq.read_table(path).to_pylist()
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            missing.append(f"sampled completions: {path.name} cannot be read ({type(error).__name__})")
    missing.append("sampled completions: there is no table in completions/")
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)
