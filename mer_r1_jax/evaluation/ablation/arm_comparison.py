"""The results of an ablation put together: means over seeds, paired gains, and whether the paper's order appears."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.evaluation.ablation.alikeness import Alikeness
from mer_r1_jax.evaluation.ablation.results import COUNTS, SCORES, AblationError, SeedResult, is_scored, same_answers
from mer_r1_jax.evaluation.bootstrap import LEVEL, Difference, paired_difference
from mer_r1_jax.evaluation.over_seeds import Mean, Order, Resampled, holm, mean_over_seeds
from mer_r1_jax.evaluation.run_record import EXPECTED_F1, is_number

SFT = "sft"
FAST = "fast "  # before the name of a row: its fast answers
PAPER_ORDER = ("baseline", "rd", "ad", "mer_r1")  # from the lowest to the highest
# MER-R1, means over sets of MER-UniBench: F1, and the official scores. Another model on other data.
PAPER_F1 = {"baseline": 70.55, "rd": 71.15, "ad": 71.60, "mer_r1": 73.15}
PAPER_OFFICIAL = {
    "baseline": 77.87, "rd": 80.18, "ad": 82.20, "mer_r1": 83.50, "sfcc_word": 81.81, "sfcc_recall_only": 82.87,
    "sfcc_reward_space": 81.91, "sfcc_mixed": 83.11,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Versus:
    """One row held against another, on the seeds and clips both have.

    Attributes:
        after, before: rows.
        difference: the score of slow answers of `after` minus that of `before`; interval over clips and seeds.
        by_seed: seed -> the same for that seed alone; interval over clips.
        holm_p: the p-value of `difference`, adjusted for all comparisons of its table.
    """

    after: str
    before: str
    difference: Difference
    by_seed: dict[int, Difference]
    holm_p: float = 1.0

    @property
    def is_clear(self) -> bool:
        """Whether the two differ at 95% after Holm's correction, over enough seeds to say so."""
        return self.difference.is_clear and self.holm_p < 1 - LEVEL / 100


@dataclasses.dataclass(frozen=True, eq=False)
class RowResult:
    """One row of the table.

    Attributes:
        row: its name.
        results: its runs, by seed.
        means: (mode, score or count) -> mean over the seeds; counts that were not measured are left out.
        gain: over SFT of the same seeds; None for SFT itself.
        slow_minus_fast: of its score; interval over clips and seeds.
        stretch: from the last evaluation but one to the last; None without two in RL.
    """

    row: str
    results: tuple[SeedResult, ...]
    means: dict[tuple[str, str], Mean]
    gain: Versus | None
    slow_minus_fast: Difference
    stretch: Stretch | None


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The last part of RL, to see whether it had come to its end.

    Attributes:
        first, last: steps of RL.
        difference: slow score after the last minus that after the first; interval over clips and seeds.
    """

    first: int
    last: int
    difference: Difference


@dataclasses.dataclass(frozen=True, eq=False)
class Ablation:
    """All there is to say.

    Attributes:
        rows: in the order of the table, SFT first; rows without a finished run are left out.
        clips: ids of the held-out clips all runs were scored on.
        score: what differences are of: EXPECTED_F1 where the clips' world is known to all runs, else f1.
        versus: arms against the first of them, neighbours in the paper's order, controls against what they control.
        order: of the paper's arms among those compared; None with fewer than two.
        order_seeds: seeds that all arms of `order` have.
        floor, ceiling: F1 of the best constant answer, and of the oracle (None where unknown), in [0, 1].
        same_start: run -> (clips it answered before its first step as its SFT did at its end, clips in all).
        missing: runs that were asked for and are not finished.
        alike: how alike the arms' advantages are; None where no sampled answers were kept.
    """

    rows: tuple[RowResult, ...]
    clips: tuple[str, ...]
    score: str
    versus: tuple[Versus, ...]
    order: Order | None
    order_seeds: tuple[int, ...]
    floor: float | None
    ceiling: float | None
    same_start: dict[str, tuple[int, int]]
    missing: tuple[str, ...]
    alike: Alikeness | None = None

    @property
    def sft(self) -> RowResult:
        """What all arms began with; `compare` makes no ablation without it."""
        return self.rows[0]

    def row(self, name: str) -> RowResult | None:
        """A row by its name."""
        return next((row for row in self.rows if row.row == name), None)


def compare(
    results: Sequence[SeedResult],
    rows: Sequence[str],
    missing: Sequence[str] = (),
    alike: Alikeness | None = None,
    seed: int = 0,
) -> Ablation:
    """Puts finished runs together.

    Args:
        results: every finished run.
        rows: names in the order of the table, SFT first.
        missing: names of runs that are not finished.
        alike: of the arms' advantages.
        seed: of the bootstrap.

    Raises:
        AblationError: nothing is finished, or the runs were not scored on the same clips.
    """
    if not any(result.row == SFT for result in results):
        raise AblationError("no run of SFT is finished, so there is nothing to hold the arms against yet")
    clips = _common_clips(results)
    by_row = {row: {result.seed: result for result in results if result.row == row} for row in rows}
    known = all(
        is_number(result.end.samples[c][mode].get(EXPECTED_F1)) for result in results for c in clips for mode in MODES
    )
    score = EXPECTED_F1 if known else "f1"
    runs = _Runs({row: dict(sorted(found.items())) for row, found in by_row.items() if found}, clips, score, seed)
    pairs = [pair for pair in _pairs(list(runs.by_row)) if runs.common_seeds(*pair)]
    order_rows = [row for row in PAPER_ORDER if row in runs.by_row]
    order_seeds = runs.common_seeds(*order_rows) if len(order_rows) > 1 else ()
    end = results[0].end
    return Ablation(
        rows=_with_corrected_gains([_row(row, runs) for row in runs.by_row]),
        clips=clips,
        score=score,
        versus=tuple(_corrected([_versus(*pair, runs) for pair in pairs])),
        order=runs.resampled(order_seeds).order(order_rows) if order_seeds else None,
        order_seeds=order_seeds,
        floor=end.reference("majority_f1"),
        ceiling=end.reference("oracle_f1"),
        same_start={
            result.run: same_answers(result.start, runs.by_row[SFT][result.seed].end)
            for result in results
            if result.row != SFT and result.start is not None and result.seed in runs.by_row[SFT]
        },
        missing=tuple(missing),
        alike=alike,
    )


@dataclasses.dataclass(eq=False)
class _Runs:
    """Finished runs by row and seed, and the bootstrap draws over them."""

    by_row: dict[str, dict[int, SeedResult]]
    clips: tuple[str, ...]
    score: str
    seed: int
    _drawn: dict[tuple[int, ...], Resampled] = dataclasses.field(default_factory=dict)

    def common_seeds(self, *rows: str) -> tuple[int, ...]:
        """The seeds that all of the rows have."""
        return tuple(seed for seed in self.by_row[rows[0]] if all(seed in self.by_row[row] for row in rows))

    def scores(self, row: str, seeds: Sequence[int], mode: str = "slow") -> np.ndarray:
        """The score, float64 [seeds, clips]."""
        return np.stack([self.by_row[row][seed].clip_scores(self.clips, mode, self.score) for seed in seeds])

    def resampled(self, seeds: tuple[int, ...]) -> Resampled:
        """Draws over those seeds of every row that has them: slow answers by row, fast ones by FAST + row."""
        if seeds not in self._drawn:
            rows = [row for row in self.by_row if set(seeds) <= self.by_row[row].keys()]
            scores = {row: self.scores(row, seeds) for row in rows}
            scores |= {FAST + row: self.scores(row, seeds, "fast") for row in rows}
            self._drawn[seeds] = Resampled(scores, self.seed)
        return self._drawn[seeds]


def _common_clips(results: Sequence[SeedResult]) -> tuple[str, ...]:
    """The clips that can be scored, which every run has to have answered, with the same truth."""
    first = results[0]
    for result in results:
        if result.end.samples.keys() != first.end.samples.keys():
            other = sorted(result.end.samples.keys() ^ first.end.samples.keys())
            raise AblationError(
                f"{result.run} and {first.run} were not scored on the same clips: {len(other)} stand in one of them "
                f"only, such as {other[0]}"
            )
        if other := [c for c, row in result.end.samples.items() if row["truth"] != first.end.samples[c]["truth"]]:
            raise AblationError(f"{result.run} and {first.run} disagree about the truth of {len(other)} clips")
    scored = tuple(c for c in first.end.samples if all(is_scored(result.end.samples[c]) for result in results))
    if len(scored) < 2:
        raise AblationError(f"{first.run} was scored on {len(scored)} clip(s), expected at least two")
    return scored


def _pairs(present: Sequence[str]) -> list[tuple[str, str]]:
    """(after, before): every arm against the baseline, neighbours in the paper's order, controls against mer_r1."""
    arms = [row for row in present if row != SFT and not row.startswith("control_")]
    pairs = [(arm, "baseline") for arm in arms if "baseline" in arms and arm != "baseline"]
    in_order = [arm for arm in PAPER_ORDER if arm in arms]
    pairs += list(zip(in_order[1:], in_order, strict=False))
    pairs += [("mer_r1", arm) for arm in arms if arm.startswith("sfcc_") and "mer_r1" in arms]
    controls = [row for row in present if row in ("control_permuted", "control_sft")]
    pairs += [("mer_r1", control) for control in controls if "mer_r1" in arms]
    return list(dict.fromkeys(pairs))


def _row(row: str, runs: _Runs) -> RowResult:
    results = tuple(runs.by_row[row].values())
    names = dict.fromkeys((*SCORES, runs.score))
    means = {(mode, name): mean_over_seeds([r.score(mode, name) for r in results]) for mode in MODES for name in names}
    for mode in MODES:
        for name in COUNTS:
            values = [result.end.score(mode, name) for result in results]
            present = [value for value in values if value is not None]
            if len(present) == len(values):
                means[mode, name] = mean_over_seeds(present)
    return RowResult(
        row=row,
        results=results,
        means=means,
        gain=_versus(row, SFT, runs) if row != SFT and runs.common_seeds(row, SFT) else None,
        slow_minus_fast=runs.resampled(runs.common_seeds(row)).difference(row, FAST + row),
        stretch=_stretch(results, runs),
    )


def _stretch(results: Sequence[SeedResult], runs: _Runs) -> Stretch | None:
    """Of the seeds together, where all were evaluated after the same steps."""
    pairs = [result.between[-2:] for result in results]
    steps = {tuple(step for step, _ in pair) for pair in pairs}
    if len(steps) != 1 or len(next(iter(steps))) != 2:
        return None
    ((first, last),) = steps
    evaluations = [evaluation for pair in pairs for _, evaluation in pair]
    clips = [
        clip
        for clip in runs.clips
        if all(clip in one.samples and is_number(one.samples[clip]["slow"].get(runs.score)) for one in evaluations)
    ]
    if len(clips) < 2:
        return None
    scores = {
        name: np.asarray(
            [[pair[place][1].samples[clip]["slow"][runs.score] for clip in clips] for pair in pairs], np.float64
        )
        for place, name in enumerate(("before", "after"))
    }
    return Stretch(first, last, Resampled(scores, runs.seed).difference("after", "before"))


def _versus(after: str, before: str, runs: _Runs) -> Versus:
    seeds = runs.common_seeds(after, before)
    pairs = zip(seeds, runs.scores(after, seeds), runs.scores(before, seeds), strict=True)
    return Versus(
        after=after,
        before=before,
        difference=runs.resampled(seeds).difference(after, before),
        by_seed={one: paired_difference(a, b, seed=runs.seed) for one, a, b in pairs},
    )


def _corrected(family: Sequence[Versus]) -> list[Versus]:
    """The same comparisons with p-values adjusted for being that many."""
    adjusted = holm([versus.difference.p_value for versus in family])
    return [dataclasses.replace(versus, holm_p=p) for versus, p in zip(family, adjusted, strict=True)]


def _with_corrected_gains(rows: Sequence[RowResult]) -> tuple[RowResult, ...]:
    """All gains over SFT are one family."""
    gains = iter(_corrected([row.gain for row in rows if row.gain]))
    return tuple(dataclasses.replace(row, gain=next(gains)) if row.gain else row for row in rows)


def as_json(ablation: Ablation) -> dict[str, Any]:
    """Everything, as JSON values; scores in [0, 1], differences in points."""
    return {
        "clips": len(ablation.clips),
        "score": ablation.score,
        "floor_f1": ablation.floor,
        "ceiling_f1": ablation.ceiling,
        "rows": [_row_json(row) for row in ablation.rows],
        "versus": [_versus_json(versus) for versus in ablation.versus],
        "order": None
        if ablation.order is None
        else dataclasses.asdict(ablation.order) | {"seeds": list(ablation.order_seeds)},
        "runs": [result.as_json() for row in ablation.rows for result in row.results],
        "answered_as_sft_before_the_first_step": {
            run: {"same": same, "clips": clips} for run, (same, clips) in ablation.same_start.items()
        },
        "advantages": _alike_json(ablation.alike),
        "missing": list(ablation.missing),
    }


def _alike_json(alike: Alikeness | None) -> dict[str, Any] | None:
    if alike is None:
        return None
    correlation = {one: {other: alike.correlation[one, other] for other in alike.names} for one in alike.names}
    return {"correlation": correlation, "runs": alike.runs, "answers": alike.answers}


def _row_json(row: RowResult) -> dict[str, Any]:
    means: dict[str, dict[str, Any]] = {}
    for (mode, name), mean in row.means.items():
        means.setdefault(mode, {})[name] = dataclasses.asdict(mean)
    return {
        "row": row.row,
        "seeds": [result.seed for result in row.results],
        **means,
        "gain_over_sft": _versus_json(row.gain) if row.gain else None,
        "slow_minus_fast": dataclasses.asdict(row.slow_minus_fast),
        "last_stretch": dataclasses.asdict(row.stretch) if row.stretch else None,
        "paper": {"f1": PAPER_F1.get(row.row), "official": PAPER_OFFICIAL.get(row.row)},
    }


def _versus_json(versus: Versus) -> dict[str, Any]:
    return {
        "after": versus.after,
        "before": versus.before,
        "slow": dataclasses.asdict(versus.difference),
        "holm_p": versus.holm_p,
        "clear": versus.is_clear,
        "by_seed": {str(seed): dataclasses.asdict(difference) for seed, difference in versus.by_seed.items()},
    }
