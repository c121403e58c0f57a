"""How alike the arms are: the advantages each would give to the same sampled answers.

Arms whose advantages correlate by nearly one may still end far apart: a small difference that always points the same
way (to more words, or to fewer) adds up over the steps. The answers are those the arms' runs logged; the advantages are
made anew, by every arm's own formula.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.evaluation.ablation.results import LAST_STEPS
from mer_r1_jax.rl.advantage import Rewards, advantages, arm_of, zscore

OBJECTIVES = ("recall", "precision")
_COLUMNS = ("generation", "recall", "precision", "f1", "format", "r_plus", "r_minus")


@dataclasses.dataclass(frozen=True)
class Alikeness:
    """Correlations of advantages over the same sampled answers.

    Attributes:
        names: arms, then the objectives, whose z stands for an arm that rewards nothing else.
        correlation: (name, name) -> the mean of the runs' correlations.
        runs: how many runs it is the mean of.
        answers: sampled answers in all.
    """

    names: tuple[str, ...]
    correlation: dict[tuple[str, str], float]
    runs: int
    answers: int


def alikeness(folders: Sequence[Path], arms: Sequence[str], config: RlConfig) -> Alikeness | None:
    """Compares arms on what runs have sampled in their last steps; None where no table of completions was kept.

    Args:
        folders: runs, trained by whichever arm.
        arms: those to compare; arms that score words in a way of their own are left out.
        config: settings of the advantages.
    """
    names = [arm for arm in arms if arm_of(arm).candidates == "category" and not arm_of(arm).calibration_loss]
    found, answers = [], 0
    for folder in folders:
        given = [_given(rewards, names, config) for rewards in sampled_rewards(folder)]
        if given:
            columns = np.concatenate(given, axis=1)
            answers += columns.shape[1]
            found.append(_correlation(columns))
    if not found:
        return None
    mean = np.mean(found, axis=0)
    both = (*names, *OBJECTIVES)
    return Alikeness(
        names=both,
        correlation={(a, b): float(mean[i, j]) for i, a in enumerate(both) for j, b in enumerate(both)},
        runs=len(found),
        answers=answers,
    )


def sampled_rewards(folder: Path) -> Iterator[Rewards]:
    """Rewards of the last steps whose completions were kept and can be read."""
    for path in sorted((folder / "completions").glob("completions_*.parquet"))[-LAST_STEPS:]:
        rows = pq.read_table(path, columns=list(_COLUMNS)).to_pydict()
        generations = max(rows["generation"], default=0) + 1
        if generations > 1 and len(rows["generation"]) % generations == 0:
            yield _rewards({name: rows[name] for name in _COLUMNS[1:]}, generations)


def _rewards(rows: dict[str, list], generations: int) -> Rewards:
    """Columns of a table as groups [B, G]; what was not valid stands there as None."""
    array = {name: np.asarray(values, np.float32).reshape(-1, generations) for name, values in rows.items()}
    everywhere = np.ones_like(array["recall"], bool)
    return Rewards(
        recall_BG=np.nan_to_num(array["recall"]),
        precision_BG=np.nan_to_num(array["precision"]),
        f1_BG=np.nan_to_num(array["f1"]),
        format_BG=array["format"],
        valid_BG=everywhere,
        scored_BG=np.isfinite(array["f1"]),
        plus_BG=np.nan_to_num(array["r_plus"]),
        minus_BG=np.nan_to_num(array["r_minus"]),
        plus_valid_BG=np.isfinite(array["r_plus"]),
        minus_valid_BG=np.isfinite(array["r_minus"]),
    )


def _given(rewards: Rewards, arms: Sequence[str], config: RlConfig) -> np.ndarray:
    """float64 [arms and objectives, answers of the step]."""
    rows = [np.asarray(advantages(arm, rewards, config)) for arm in arms]
    rows += [np.asarray(zscore(x_BG, rewards.valid_BG)) for x_BG in (rewards.recall_BG, rewards.precision_BG)]
    return np.stack([row.ravel() for row in rows]).astype(np.float64)


def _correlation(columns: np.ndarray) -> np.ndarray:
    """Pearson's, 0 with what never varies."""
    centred = columns - columns.mean(axis=1, keepdims=True)
    norm = np.sqrt((centred**2).sum(axis=1))
    unit = centred / np.where(norm > 0, norm, 1.0)[:, None]
    return unit @ unit.T
