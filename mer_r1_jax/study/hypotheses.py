"""H1 to H5 on the numbers of a stage, as docs/study/protocol.md has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mer_r1_jax.study.verdicts import Claim, Estimate, Paired

SFT, BASELINE, RD, AD, MER_R1 = "sft", "baseline", "rd", "ad", "mer_r1"
CALIBRATED = ("mer_r1", "sfcc_word", "sfcc_recall_only", "sfcc_reward_space", "sfcc_mixed", "sfcc_loss")
LEAST_GAIN = 1.0  # points: of H2's E and of H4a
NO_CHANGE = 0.75  # points: within them a confidence has not changed (H4b)
SPREADS = ("recall_spread_over_rl", "precision_spread_over_rl")

Rows = Mapping[str, Mapping[str, Sequence[float]]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The numbers of a stage at one size of groups, and where its hypotheses are judged.

    Attributes:
        worlds: world -> row (sft or an arm; NAME@1 at calibration weight 1) -> measure -> one share a seed. Measures
            are the lab's; arms have SPREADS too.
        calibrated_in: world of H4a and H4b.
        calibrated_by: measure of H4a.
        sign_in: worlds of H2's sign.
    """

    worlds: Mapping[str, Rows]
    calibrated_in: str = "T"
    calibrated_by: str = "sampled_f1"
    sign_in: tuple[str, ...] = ("U", "O")

    def difference(self, label: str, world: str, after: tuple[str, str], before: tuple[str, str]) -> Paired:
        """One (row, measure) minus another, seed by seed.

        Raises:
            KeyError: one was not measured.
        """
        rows = self.worlds[world]
        return Paired.of(label, rows[after[0]][after[1]], rows[before[0]][before[1]])

    def versus(self, label: str, world: str, measure: str, after: str, before: str) -> Paired:
        """A measure of one row minus that of another."""
        return self.difference(f"{label}, {after} − {before}, {world}", world, (after, measure), (before, measure))

    def spread_gap(self, world: str) -> float:
        """Spread of precision minus that of recall within groups: the mean over seeds and over `ad` and `rd`."""
        rows = self.worlds[world]
        recall, precision = (np.mean([rows[arm][spread] for arm in (AD, RD)]) for spread in SPREADS)
        return float(precision - recall)


def registered(stage: Stage) -> list[Claim]:
    """The six claims of the registered family, at weight 0.1."""
    return [
        _claim("H1", "after SFT reasoning makes answers narrower, more precise, and worse by F1", _h1, stage),
        _claim("H2", "normalising apart keeps the noisier reward from owning the sum", _h2, stage),
        _claim("H3", "ad finds more than the F1 reward does", _h3, stage),
        *(calibration_claims(stage, MER_R1)),
        _claim("H5", "after RL slow answers are ahead of fast ones", _h5, stage),
    ]


def second_weight(stage: Stage) -> list[Claim]:
    """H4a and H4b of every calibrated arm at weight 1."""
    return [claim for arm in CALIBRATED for claim in calibration_claims(stage, f"{arm}@1")]


def calibration_claims(stage: Stage, arm: str) -> list[Claim]:
    """H4a and H4b of one arm."""
    suffix = "" if arm == MER_R1 else f" {arm}"
    return [
        _claim(f"H4a{suffix}", f"{arm} raises F1 over ad by a point or more", lambda s: _h4a(s, arm), stage),
        _claim(
            f"H4b{suffix}", f"{arm} is surer of right words and less sure of wrong ones", lambda s: _h4b(s, arm), stage
        ),
    ]


Judged = tuple[list[Paired], Callable[[Sequence[Estimate]], tuple[bool, bool]], list[Paired]]


def _claim(key: str, said: str, of: Callable[[Stage], Judged], stage: Stage) -> Claim:
    try:
        measures, rule, beside = of(stage)
    except KeyError as missing:  # a world, an arm or a measure of it
        return Claim(key, said, (), lambda _: (False, False), lacks=str(missing.args[0]))
    return Claim(key, said, tuple(measures), rule, tuple(beside))


def _all_above(estimates: Sequence[Estimate]) -> tuple[bool, bool]:
    return all(one.is_above_zero for one in estimates), any(one.is_below_zero for one in estimates)


def _h1(stage: Stage) -> Judged:
    def measured(world: str) -> list[Paired]:
        sides = (
            ("E", "f1", "fast", "slow"),
            ("recall", "recall", "fast", "slow"),
            ("precision", "precision", "slow", "fast"),
        )
        return [
            stage.difference(f"{name}, {a} − {b}, {world}", world, (SFT, f"{a}_{score}"), (SFT, f"{b}_{score}"))
            for name, score, a, b in sides
        ]

    return measured("U"), _all_above, measured("O") if "O" in stage.worlds else []


def _h2(stage: Stage) -> Judged:
    gain = stage.versus("E", "U", "slow_f1", AD, RD)
    recalls = [stage.versus("recall", world, "slow_recall", AD, RD) for world in stage.sign_in]
    gaps = [stage.spread_gap(world) for world in stage.sign_in]

    def rule(estimates: Sequence[Estimate]) -> tuple[bool, bool]:
        e, *rest = estimates
        signs = all(one.is_above_zero if gap > 0 else one.is_below_zero for one, gap in zip(rest, gaps, strict=True))
        return e.is_above_zero and rest[0].is_above_zero and signs and 0 not in gaps, e.high < LEAST_GAIN

    beside = [stage.versus("E", world, "slow_f1", AD, RD) for world in stage.sign_in if world != "U"]
    for world in stage.sign_in:
        rows = stage.worlds[world]
        precision, recall = (np.mean([rows[arm][spread] for arm in (AD, RD)], axis=0) for spread in SPREADS[::-1])
        beside.append(Paired.of(f"σ_P − σ_R, {world}", precision, recall))
    return [gain, *recalls], rule, beside


def _h3(stage: Stage) -> Judged:
    def rule(estimates: Sequence[Estimate]) -> tuple[bool, bool]:
        (recall,) = estimates
        return recall.is_above_zero, recall.high <= 0

    beside = [stage.versus("E", "U", "slow_f1", AD, BASELINE)]
    if "O" in stage.worlds:
        beside += [
            stage.versus(name, "O", measure, AD, BASELINE)
            for name, measure in (("recall", "slow_recall"), ("E", "slow_f1"))
        ]
    return [stage.versus("recall", "U", "slow_recall", AD, BASELINE)], rule, beside


def _h4a(stage: Stage, arm: str) -> Judged:
    def rule(estimates: Sequence[Estimate]) -> tuple[bool, bool]:
        (gain,) = estimates
        return gain.is_above_zero and gain.mean >= LEAST_GAIN, gain.high < LEAST_GAIN

    label = "sampled E" if stage.calibrated_by == "sampled_f1" else "greedy E"
    measures = [stage.versus(label, stage.calibrated_in, stage.calibrated_by, arm, AD)]
    beside = [
        stage.versus("greedy E", world, "slow_f1", arm, AD)
        for world in stage.worlds
        if (world, "slow_f1") != (stage.calibrated_in, stage.calibrated_by) and arm in stage.worlds[world]
    ]
    return measures, rule, beside


def _h4b(stage: Stage, arm: str) -> Judged:
    def rule(estimates: Sequence[Estimate]) -> tuple[bool, bool]:
        right, wrong = estimates
        unchanged = right.is_within(NO_CHANGE) and wrong.is_within(NO_CHANGE)
        return right.is_above_zero and wrong.is_below_zero, wrong.is_above_zero or unchanged

    def measured(world: str) -> list[Paired]:
        return [
            stage.versus(f"confidence in {side} words", world, f"confidence_{side}", arm, AD)
            for side in ("right", "wrong")
        ]

    others = [world for world in stage.worlds if world != stage.calibrated_in and arm in stage.worlds[world]]
    return measured(stage.calibrated_in), rule, [one for world in others for one in measured(world)]


def _h5(stage: Stage) -> Judged:
    def measured(world: str) -> list[Paired]:
        return [
            stage.difference(f"E, slow − fast, {arm}, {world}", world, (arm, "slow_f1"), (arm, "fast_f1"))
            for arm in (BASELINE, AD, MER_R1)
        ]

    return measured("U"), _all_above, [one for world in stage.worlds if world != "U" for one in measured(world)]
