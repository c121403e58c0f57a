"""What the runs of an ablation left: scores at their start and end, clip by clip, and their last sampled rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.evaluation.run_record import KeptEvaluation, RunRecord, read_run, stages_of

LAST_STEPS = 40  # of RL, whose sampled rewards are averaged
SCORES = ("precision", "recall", "f1")
COUNTS = ("mean_words", "mean_length", "distinct_answers", "format_rate", "truncated_rate")
# Metric of the sampled completions -> its name in the tables.
SAMPLED = {
    "reward": "reward",
    "rewards/recall/mean": "recall",
    "rewards/precision/mean": "precision",
    "rewards/f1/mean": "f1",
    "rewards/recall/std": "recall_std",
    "rewards/precision/std": "precision_std",
    "frac_reward_zero_std": "frac_reward_zero_std",
    "answers/mean_words": "mean_words",
    "completions/mean_length": "mean_length",
    "kl": "kl",
}


class AblationError(RuntimeError):
    """Runs of which no table can be made; the message says which and why."""


@dataclasses.dataclass(frozen=True, eq=False)
class SeedResult:
    """One run.

    Attributes:
        row: of the table.
        seed: the run's.
        run: the name of its folder.
        start: before its first step; None where it began untrained or was not evaluated.
        end: after its last step.
        between: (step of RL, evaluation) from the first to the last.
        sampled: means over the last steps of RL, by the names in SAMPLED; empty where there was no RL.
        reward_curve: (steps, sampled reward) of RL.
        seconds: "sft" and "rl" -> seconds of all steps together.
    """

    row: str
    seed: int
    run: str
    start: KeptEvaluation | None
    end: KeptEvaluation
    between: tuple[tuple[int, KeptEvaluation], ...]
    sampled: dict[str, float]
    reward_curve: tuple[np.ndarray, np.ndarray]
    seconds: dict[str, float]

    def score(self, mode: str, name: str) -> float:
        """Mean over the clips of the last evaluation that can be scored."""
        return float(np.mean([row[mode][name] for row in self.end.samples.values() if is_scored(row)]))

    def clip_scores(self, clips: Sequence[str], mode: str = "slow", name: str = "f1") -> np.ndarray:
        """float64 [clips] of the last evaluation."""
        return np.asarray([self.end.samples[clip][mode][name] for clip in clips], np.float64)

    def as_json(self) -> dict[str, Any]:
        """Scores and counts, without the clips' own."""
        return {
            "row": self.row,
            "seed": self.seed,
            "run": self.run,
            "start": _scores(self.start) if self.start else None,
            "end": _scores(self.end),
            "sampled_at_the_end": self.sampled,
            "seconds": self.seconds,
        }


def is_scored(sample: dict[str, Any]) -> bool:
    """Whether a clip is in the scores: its truth is on a wheel."""
    return all(sample[mode]["f1"] is not None for mode in MODES)


def read_result(folder: Path, row: str, seed: int) -> SeedResult:
    """Reads a finished run.

    Raises:
        AblationError: its last evaluation, or an answer of it, is not there.
    """
    run = read_run(folder)
    if not run.evaluations:
        raise AblationError(f"{folder} has no evaluation that can be read, but the run is finished: remove the folder")
    stages = stages_of(run, next(iter(run.evaluations)))
    end = stages.end
    if len(end.samples) != end.n or not any(map(is_scored, end.samples.values())):
        raise AblationError(
            f"{folder}/eval: the last evaluation has {len(end.samples)} answers that can be read, expected "
            f"{end.n or 'some'}: remove the run's folder and start again"
        )
    start = stages.start if stages.start is not end else None
    between = [(stages.rl_step(one), one) for one in run.evaluations[end.benchmark] if one.phase == "rl"]
    return SeedResult(
        row=row,
        seed=seed,
        run=folder.name,
        start=start,
        end=end,
        between=tuple(between),
        sampled=_sampled(run),
        reward_curve=run.series("rl", "reward"),
        seconds={phase: float(run.series(phase, "step_time")[1].sum()) for phase in run.metrics},
    )


def _sampled(run: RunRecord) -> dict[str, float]:
    found = {}
    for metric, name in SAMPLED.items():
        _, values = run.series("rl", metric)
        if len(values):
            found[name] = float(values[-LAST_STEPS:].mean())
    return found


def _scores(evaluation: KeptEvaluation) -> dict[str, Any]:
    return {
        "step": evaluation.step,
        "clips": evaluation.n_scored,
        "unscorable": evaluation.n_unscorable,
        **{mode: {name: evaluation.score(mode, name) for name in (*SCORES, *COUNTS)} for mode in MODES},
    }


def same_answers(one: KeptEvaluation, other: KeptEvaluation) -> tuple[int, int]:
    """How many clips have the same slow and fast answer, letter by letter, in both; and how many both have."""
    common = one.samples.keys() & other.samples.keys()
    same = sum(all(one.samples[c][mode]["text"] == other.samples[c][mode]["text"] for mode in MODES) for c in common)
    return same, len(common)
