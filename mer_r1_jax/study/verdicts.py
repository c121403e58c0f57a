"""What a family of claims comes to: t over seeds, Holm's levels, and each claim confirmed, refuted or undecided.

The rules are those of docs/study/protocol.md. Everything here is arithmetic on one number a seed.

Shape letter: S seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from scipy import special

from mer_r1_jax.evaluation.bootstrap import FEW_SEEDS, LEVEL, POINTS
from mer_r1_jax.evaluation.over_seeds import mean_over_seeds

ALPHA = 1 - LEVEL / 100  # of a family
Outcome = Literal["confirmed", "refuted", "undecided"]


@dataclasses.dataclass(frozen=True)
class Paired:
    """A measure of a claim: one paired difference a seed.

    Attributes:
        label: what is measured, for people.
        points_S: hundredths, one value a seed.
    """

    label: str
    points_S: tuple[float, ...]

    @classmethod
    def of(cls, label: str, after: Sequence[float], before: Sequence[float] | float = 0.0) -> Paired:
        """After minus before, both shares with the same seeds in the same order."""
        return cls(label, tuple((POINTS * (np.asarray(after, np.float64) - np.asarray(before, np.float64))).tolist()))

    @property
    def p_value(self) -> float:
        """Of no difference, two-sided, by t with seeds - 1 degrees of freedom; 1 with fewer than two seeds."""
        mean = mean_over_seeds(self.points_S)
        if mean.error is None:
            return 1.0
        if mean.error == 0:
            return float(mean.mean == 0)
        return float(2 * special.stdtr(len(self.points_S) - 1, -abs(mean.mean) / mean.error))

    def estimate(self, level: float = ALPHA) -> Estimate:
        """The mean with its interval.

        Args:
            level: share of such intervals that miss.
        """
        mean = mean_over_seeds(self.points_S)
        if mean.error is None:
            return Estimate(self.label, mean.mean, float("-inf"), float("inf"), len(self.points_S))
        half = float(special.stdtrit(len(self.points_S) - 1, 1 - level / 2)) * mean.error
        return Estimate(self.label, mean.mean, mean.mean - half, mean.mean + half, len(self.points_S))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds in points, with the ends of its interval."""

    label: str
    mean: float
    low: float
    high: float
    seeds: int

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.low > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.high < 0

    def is_within(self, points: float) -> bool:
        """Whether the whole interval lies within so many points of zero."""
        return -points < self.low and self.high < points


@dataclasses.dataclass(frozen=True)
class Claim:
    """A hypothesis as it is judged.

    Attributes:
        key: such as H4a.
        said: the claim, for people.
        measures: all that have to hold.
        rule: their intervals, in order -> whether they confirm it, and whether they refute it.
        beside: printed with it; they decide nothing.
        lacks: what was not measured; such a claim stays undecided.
    """

    key: str
    said: str
    measures: tuple[Paired, ...]
    rule: Callable[[Sequence[Estimate]], tuple[bool, bool]]
    beside: tuple[Paired, ...] = ()
    lacks: str = ""

    @property
    def p_value(self) -> float:
        """The largest of its measures': all have to hold."""
        return max((one.p_value for one in self.measures), default=1.0) if not self.lacks else 1.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        claim: it.
        outcome: of it.
        level: at which its intervals were taken.
        estimates: its measures with their intervals.
        beside: those that decide nothing, each at 5%.
        why: what else has to be said; "" where the numbers say it.
    """

    claim: Claim
    outcome: Outcome
    level: float
    estimates: tuple[Estimate, ...]
    beside: tuple[Estimate, ...]
    why: str = ""


def holm_levels(p_values: Sequence[float], alpha: float = ALPHA) -> list[float]:
    """The level of each of a family by Holm (1979), in the order they came.

    The smallest p-value is held against alpha / m, the next against alpha / (m - 1), and so on. From the first that is
    not rejected on all have its level, so that an interval at that level excludes zero exactly where Holm rejects.
    """
    levels, stopped = [alpha] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        level = stopped or alpha / (len(p_values) - rank)
        levels[place] = level
        if p_values[place] >= level:
            stopped = level
    return levels


def judge(claims: Sequence[Claim]) -> list[Verdict]:
    """Verdicts on a family of claims."""
    levels = holm_levels([claim.p_value for claim in claims])
    return [_verdict(claim, level) for claim, level in zip(claims, levels, strict=True)]


def _verdict(claim: Claim, level: float) -> Verdict:
    estimates = tuple(measure.estimate(level) for measure in claim.measures)
    beside = tuple(measure.estimate() for measure in claim.beside)

    def decided(outcome: Outcome, why: str = "") -> Verdict:
        return Verdict(claim, outcome, level, estimates, beside, why)

    if claim.lacks:
        return decided("undecided", f"not measured: {claim.lacks}")
    if (seeds := min(estimate.seeds for estimate in estimates)) < FEW_SEEDS:
        return decided("undecided", f"{seeds} of the {FEW_SEEDS} seeds that can decide anything")
    confirmed, refuted = claim.rule(estimates)
    if refuted:  # first: what is claimed has a size, and a smaller effect is not it
        return decided("refuted", "the rule that confirms it holds too" if confirmed else "")
    return decided("confirmed" if confirmed else "undecided")
