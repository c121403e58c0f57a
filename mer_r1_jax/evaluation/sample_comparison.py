"""What changed between two policies, or between two inputs of one: scores of the same clips, clip by clip.

Samples files (`eval/<benchmark>_<step>.samples.jsonl`) hold everything needed, so a comparison runs no model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.evaluation.bootstrap import POINTS, Difference, paired_difference
from mer_r1_jax.evaluation.run_record import EXPECTED_F1, is_number
from mer_r1_jax.json_lines import json_texts

SCORES = ("f1", "precision", "recall")
GAP = "slow minus fast f1"


class CompareError(ValueError):
    """Samples that cannot be compared; the message says what is wrong and how to mend it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """One score of the same clips before and after.

    Attributes:
        name: what is compared.
        ids: the clips.
        before, after: float64 [seeds, clips]; the numbers of seeds may differ.
        seed: of the interval's resampling.
    """

    name: str
    ids: tuple[str, ...]
    before: np.ndarray
    after: np.ndarray
    seed: int = 0

    @functools.cached_property
    def difference(self) -> Difference:
        """After minus before: seeds averaged for each clip, interval over clips."""
        return paired_difference(self.after, self.before, seed=self.seed)

    @functools.cached_property
    def by_seed(self) -> list[Difference]:
        """The same for every seed by itself; where one side has a single seed, each is held against that one."""
        seeds = max(len(self.before), len(self.after))
        if {len(self.before), len(self.after)} - {1, seeds}:
            return []
        pairs = zip(self._repeated(self.after, seeds), self._repeated(self.before, seeds), strict=True)
        return [paired_difference(after, before, seed=self.seed) for after, before in pairs]

    @staticmethod
    def _repeated(scores: np.ndarray, seeds: int) -> np.ndarray:
        return np.broadcast_to(scores, (seeds, scores.shape[1]))

    def as_json(self) -> dict[str, Any]:
        """The comparison in points, without the clips' own scores."""
        return {
            "name": self.name,
            "before": POINTS * float(self.before.mean()),
            "after": POINTS * float(self.after.mean()),
            "difference": dataclasses.asdict(self.difference),
            "by_seed": [dataclasses.asdict(difference) for difference in self.by_seed],
        }


def pooled(comparisons: Sequence[Comparison]) -> Comparison:
    """One comparison of several seeds' policies, over the clips that all of them have.

    Raises:
        CompareError: they have fewer than two clips in common.
    """
    first = comparisons[0]
    common = [clip for clip in first.ids if all(clip in other.ids for other in comparisons)]
    if len(common) < 2:
        raise CompareError(f"{first.name}: {len(common)} clips in common, expected at least two")

    def rows(part: str) -> np.ndarray:
        picked = []
        for comparison in comparisons:
            at = {clip: column for column, clip in enumerate(comparison.ids)}
            picked.append(getattr(comparison, part)[:, [at[clip] for clip in common]])
        return np.concatenate(picked)

    return dataclasses.replace(first, ids=tuple(common), before=rows("before"), after=rows("after"))


@dataclasses.dataclass(frozen=True, eq=False)
class SamplesComparison:
    """Two sets of samples files held against each other.

    Attributes:
        comparisons: every score of slow and fast answers, expected F1 where all files have it, and the gap between
            the two.
        gaps: slow minus fast F1 at "before" and "after", each with its own interval.
        lengths: "before" and "after": means over clips of a slow answer's tokens and of its reasoning's words, and the
            distinct slow answers of each file.
        unscorable: clips in no score, because their truth is on no wheel.
    """

    comparisons: tuple[Comparison, ...]
    gaps: dict[str, Difference]
    lengths: dict[str, dict[str, Any]]
    unscorable: int = 0

    @property
    def reasoning_kept(self) -> float | None:
        """Length of the reasoning after, as a share of what it was; None where there was none."""
        before = self.lengths["before"]["reasoning_words"]
        return self.lengths["after"]["reasoning_words"] / before if before else None

    def as_json(self) -> dict[str, Any]:
        """Everything, in points."""
        return {
            "comparisons": [comparison.as_json() for comparison in self.comparisons],
            "slow_minus_fast": {side: dataclasses.asdict(gap) for side, gap in self.gaps.items()},
            "lengths": self.lengths,
            "reasoning_kept": self.reasoning_kept,
            "unscorable": self.unscorable,
        }


def compare_samples(
    before: Sequence[str | pathlib.Path], after: Sequence[str | pathlib.Path], seed: int = 0
) -> SamplesComparison:
    """Compares evaluations by their samples files, one file a seed.

    Args:
        before, after: files; the n-th of each side belong together, and a single file stands for all.
        seed: of the intervals' resampling.

    Raises:
        CompareError: a file cannot be read, or the files are not about the same clips.
    """
    if len(before) != len(after) and 1 not in (len(before), len(after)):
        raise CompareError(
            f"got {len(before)} files before and {len(after)} after; expected as many, or a single one on one side"
        )
    sides = {"before": [_read(path) for path in before], "after": [_read(path) for path in after]}
    common = _common_ids(sides, (*before, *after))
    files = [*sides["before"], *sides["after"]]
    ids = tuple(clip for clip in common if all(rows[clip]["slow"]["f1"] is not None for rows in files))
    if len(ids) < 2:
        raise CompareError(
            f"{before[0]}: {len(ids)} of {len(common)} clips can be scored, expected at least two; the truths of the "
            "others are on no wheel"
        )

    def scores(side: str, mode: str, name: str) -> np.ndarray:
        return np.asarray([[rows[clip][mode][name] for clip in ids] for rows in sides[side]], np.float64)

    # Where the clips' world is known, F1 without the draw of their truths, which is half of its noise.
    drawn = all(is_number(rows[clip][mode].get(EXPECTED_F1)) for rows in files for clip in ids for mode in MODES)
    comparisons = [
        Comparison(
            f"{mode} {name.replace('_', ' ')}", ids, scores("before", mode, name), scores("after", mode, name), seed
        )
        for mode in MODES
        for name in (*SCORES, *([EXPECTED_F1] if drawn else []))
    ]
    gap = {side: scores(side, "slow", "f1") - scores(side, "fast", "f1") for side in sides}
    comparisons.append(Comparison(GAP, ids, gap["before"], gap["after"], seed))
    return SamplesComparison(
        comparisons=tuple(comparisons),
        gaps={side: paired_difference(values, np.zeros_like(values), seed=seed) for side, values in gap.items()},
        lengths={side: _lengths([list(rows.values()) for rows in files]) for side, files in sides.items()},
        unscorable=len(common) - len(ids),
    )


def _read(path: str | pathlib.Path) -> dict[str, dict[str, Any]]:
    """Rows of a samples file by clip."""
    try:
        rows = [json.loads(line) for line in json_texts(pathlib.Path(path).read_text(encoding="utf-8"))]
    except (OSError, ValueError, RecursionError) as error:
        raise CompareError(f"{path}: cannot be read as a samples file, one JSON object a line ({error})") from error
    for number, row in enumerate(rows, 1):
        scores = [row.get(mode, {}).get(name) for mode in MODES for name in SCORES] if isinstance(row, dict) else [None]
        numbers = [isinstance(score, int | float) for score in scores]
        unscorable = isinstance(row, dict) and not any(numbers) and all(_names_scores(row.get(mode)) for mode in MODES)
        if not (all(numbers) or unscorable) or not isinstance(row.get("id"), str):
            raise CompareError(
                f"{path}:{number}: expected `id`, and `slow` and `fast` with numbers {', '.join(SCORES)}; "
                "use the *.samples.jsonl files of a run's eval folder"
            )
    by_id = {row["id"]: row for row in rows}
    if len(by_id) < len(rows):
        raise CompareError(f"{path}: {len(rows) - len(by_id)} clips stand in it twice")
    return by_id


def _names_scores(answer: Any) -> bool:
    """Whether an answer says of every score that there is none, as where its truth is on no wheel."""
    return isinstance(answer, dict) and all(name in answer and answer[name] is None for name in SCORES)


def _common_ids(sides: dict[str, list[dict[str, Any]]], paths: Sequence[str | pathlib.Path]) -> tuple[str, ...]:
    """The clips, which every file has to have, with the same truth."""
    files = [*sides["before"], *sides["after"]]
    first = files[0]
    for path, rows in zip(paths, files, strict=True):
        if other := sorted(first.keys() ^ rows.keys()):
            raise CompareError(
                f"{path} and {paths[0]} are not about the same clips: {len(other)} stand in one of them only, "
                f"such as {other[0]}; compare evaluations of the same held-out data"
            )
        if other := [clip for clip in first if rows[clip].get("truth") != first[clip].get("truth")]:
            raise CompareError(
                f"{path} and {paths[0]} disagree about the truth of {len(other)} clips, such as {other[0]}; "
                "compare evaluations of the same held-out data"
            )
    if len(first) < 2:
        raise CompareError(f"{paths[0]}: {len(first)} clips, expected at least two")
    return tuple(first)


def _lengths(files: list[list[dict[str, Any]]]) -> dict[str, Any]:
    slow = [[row["slow"] for row in rows] for rows in files]
    everything = [answer for answers in slow for answer in answers]
    return {
        "slow_tokens": float(np.mean([answer.get("length", np.nan) for answer in everything])),
        "reasoning_words": float(np.mean([len((answer.get("reasoning") or "").split()) for answer in everything])),
        "distinct_slow_answers": [len({tuple(sorted(a.get("words", ()))) for a in answers}) for answers in slow],
    }
