"""A run in plain words: what was trained, what it gained on held-out clips, and what to be wary of."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from mer_r1_jax.evaluation.bootstrap import Difference, mean_interval
from mer_r1_jax.evaluation.report_kit import FEW_CLIPS, percent
from mer_r1_jax.evaluation.run_record import Evaluation, RunRecord


@dataclasses.dataclass(frozen=True)
class Stages:
    """The evaluations a run is told by. Evaluations count steps over both phases.

    Attributes:
        start: after SFT, where RL starts; None when it was not evaluated.
        end: the last one, or `start`.
        end_is_rl: whether `end` was made by RL.
        sft_steps: steps done before RL, to be taken off an evaluation's step.
    """

    start: Evaluation | None
    end: Evaluation | None
    end_is_rl: bool
    sft_steps: int

    def rl_step(self, evaluation: Evaluation) -> int:
        """Steps of RL done at an evaluation; 0 at one of SFT."""
        return max(0, evaluation.step - self.sft_steps) if evaluation.phase == "rl" else 0


def stages_of(run: RunRecord, benchmark: str) -> Stages:
    """Picks start and end: RL before its first update or else the last of SFT; the last of RL or else of SFT."""
    evaluations = run.evaluations.get(benchmark, [])
    sft_steps = _sft_steps(run, evaluations)
    sft = [evaluation for evaluation in evaluations if evaluation.phase == "sft"]
    untrained = [evaluation for evaluation in evaluations if evaluation.phase == "rl" and evaluation.step <= sft_steps]
    trained = [evaluation for evaluation in evaluations if evaluation.phase == "rl" and evaluation.step > sft_steps]
    start = untrained[-1] if untrained else sft[-1] if sft else None
    return Stages(start, trained[-1] if trained else start, bool(trained), sft_steps)


def _sft_steps(run: RunRecord, evaluations: Sequence[Evaluation]) -> int:
    """Steps of SFT: its last line, or the first evaluation of RL when the last steps fell between two lines."""
    lines = [line["step"] for line in run.metrics.get("sft", [])]
    logged = int(max(lines, default=0))
    every = run.config.get("train", {}).get("logging_steps", 1)
    first_of_rl = min((evaluation.step for evaluation in evaluations if evaluation.phase == "rl"), default=logged)
    return first_of_rl if lines and logged <= first_of_rl < logged + every else logged


def f1_difference(new: Evaluation, new_mode: str, old: Evaluation, old_mode: str) -> Difference | None:
    """F1 of `new_mode` in `new` minus that of `old_mode` in `old`, paired by clip; None without common clips."""
    pairs = []
    for clip, row in new.samples.items():
        values = row.get(new_mode, {}).get("f1"), old.samples.get(clip, {}).get(old_mode, {}).get("f1")
        if all(isinstance(value, int | float) for value in values):
            pairs.append(values)
    if len(pairs) < 2:
        return None
    seed = zlib.crc32(f"{new.benchmark} {new.phase} {new.step} {new_mode} {old_mode}".encode())
    return mean_interval(np.asarray([a - b for a, b in pairs]), seed)


def describe(run: RunRecord) -> list[str]:
    """The summary: a few paragraphs of plain words."""
    return [paragraph for paragraph in (_what_ran(run), *_what_it_gained(run)) if paragraph]


def warnings_of(run: RunRecord) -> list[str]:
    """What a careful reader should know before trusting the numbers."""
    found = []
    for phase in run.metrics:
        for name, words in _COUNTED.items():
            values = run.series(phase, name)[1]
            count = values[-1:].sum() if name in _RUNNING_TOTALS else values.sum()
            if count > 0:
                found.append(f"{phase.upper()}: {words}: {count:.0f}.")
    for benchmark in run.evaluations:
        found += _warnings_of_answers(stages_of(run, benchmark).end)
    return found


_COUNTED = {
    "skipped_steps": "updates skipped because a loss or gradient was not finite",
    "data/skipped": "prompts left out, with weight zero, for a clip that broke",
    "data/silent_audio": "prompts whose clip had no sound and was given silence",
    "data/audio_cut": "prompts whose sound was cut at media.max_audio_seconds",
    "data/audio_filled": "seconds of sound that clips leave out, at a late start or in gaps, filled with silence",
    "data/mute_audio": "prompts whose sound track holds nothing but silence",
    "data/cancelled_audio": "prompts whose sound is lost when its channels are averaged: they cancel out",
}
_RUNNING_TOTALS = {"skipped_steps"}  # the others count one step each


def _warnings_of_answers(end: Evaluation | None) -> list[str]:
    if end is None:
        return []
    found, name = [], end.benchmark
    if end.n_scored < FEW_CLIPS:
        found.append(f"{name}: only {end.n_scored} held-out clips; differences of a few points mean little.")
    if end.n_unscorable:
        found.append(
            f"{name}: {end.n_unscorable} of {end.n} held-out clips have a truth on no wheel and are in no score, "
            "neither of answers nor of floor and ceiling."
        )
    if skipped := end.scores.get("skipped"):
        found.append(f"{name}: {len(skipped)} held-out clips could not be used and are in no score.")
    floor, distinct = end.reference("majority_f1"), end.score("slow", "distinct_answers")
    if floor is not None and (end.score("slow", "f1") or 0) <= floor:
        found.append(f"{name}: slow answers score no better than the same majority answer given to every clip.")
    if distinct is not None and distinct < max(3, 0.05 * end.n):
        found.append(
            f"{name}: only {distinct:.0f} distinct slow answers to {end.n} clips: the policy may have collapsed."
        )
    for mode in ("slow", "fast"):
        if (rate := end.score(mode, "format_rate")) is not None and rate < 0.9 and mode == "slow":
            found.append(f"{name}: {100 * (1 - rate):.0f}% of the slow answers are not in the think/answer format.")
        if (rate := end.score(mode, "truncated_rate")) is not None and rate > 0.1:
            found.append(f"{name}: {100 * rate:.0f}% of the {mode} answers were cut at the length limit.")
    return found


def _what_ran(run: RunRecord) -> str:
    steps = {phase: lines[-1]["step"] for phase, lines in run.metrics.items() if lines}
    if not steps:
        return "No training step is on record."
    parts = []
    if "sft" in steps:
        losses = run.series("sft", "loss")[1]
        losses = losses[np.isfinite(losses)]
        fall = f", in which the loss went from {losses[0]:.2f} to {losses[-1]:.2f}" if len(losses) > 1 else ""
        parts.append(f"{steps['sft']:.0f} steps of supervised fine-tuning{fall}")
    if "rl" in steps:
        arm = run.config.get("rl", {}).get("arm")
        parts.append(
            f"{steps['rl']:.0f} steps of reinforcement learning" + (f" with the {arm} advantage" if arm else "")
        )
    return f"The model was trained by {', then by '.join(parts)}."


def _what_it_gained(run: RunRecord) -> list[str]:
    if not run.evaluations:
        return ["It was not evaluated on held-out clips, so nothing can be said about what it learnt."]
    stages = stages_of(run, next(iter(run.evaluations)))
    paragraphs = []
    if stages.start is not None:
        paragraphs.append(
            _standing(stages.start, "Before reinforcement learning" if stages.end_is_rl else "At the end")
        )
    if stages.end_is_rl:
        paragraphs.append(_gain(stages))
    paragraphs.append(_frame(stages.end))
    return paragraphs


def _standing(evaluation: Evaluation, when: str) -> str:
    slow, fast = evaluation.score("slow", "f1"), evaluation.score("fast", "f1")
    text = f"{when}, slow answers scored F1 {percent(slow)} and fast answers {percent(fast)}"
    text += f" on {evaluation.n_scored} held-out clips"
    difference = f1_difference(evaluation, "slow", evaluation, "fast")
    if difference is None:
        return text + "."
    return f"{text}: slow is {_compared(difference)} fast, {difference}."


def _gain(stages: Stages) -> str:
    start, end = stages.start, stages.end
    text = f"After RL step {stages.rl_step(end)}, slow answers score F1 {percent(end.score('slow', 'f1'))}"
    text += f" and fast answers {percent(end.score('fast', 'f1'))}."
    if start is not None:
        for mode in ("slow", "fast"):
            if (change := f1_difference(end, mode, start, mode)) is not None:
                text += f" RL {_changed(change)} {mode} F1, {change}."
    if (gap := f1_difference(end, "slow", end, "fast")) is not None:
        text += f" Slow now stands {_compared(gap)} fast, {gap}."
    before, after = (e.score("slow", "mean_length") if e else None for e in (start, end))
    if before and after:
        text += f" A slow answer is {after:.0f} tokens long on average, {100 * after / before:.0f}% of what it was."
    return text


def _frame(end: Evaluation | None) -> str:
    if end is None:
        return ""
    floor, ceiling, slow = end.reference("majority_f1"), end.reference("oracle_f1"), end.score("slow", "f1")
    parts = []
    if floor is not None:
        answer = ", ".join(end.scores.get("majority_answer") or [])
        parts.append(f"The same answer for every clip{f' ({answer})' if answer else ''} would score {percent(floor)}.")
    if ceiling is not None:
        parts.append(f"An oracle that is told the cues, noise included, reaches {percent(ceiling)}.")
    if None not in (floor, ceiling, slow) and ceiling > floor:
        covered = 100 * (slow - floor) / (ceiling - floor)
        parts.append(
            "Slow thinking is still below the first of the two."
            if covered < 0
            else f"Slow thinking has covered {covered:.0f}% of the way between the two."
        )
    return " ".join(parts)


def _compared(difference: Difference) -> str:
    side = "above" if difference.points > 0 else "below"
    return side if difference.is_clear else "not clearly apart from"


def _changed(difference: Difference) -> str:
    if not difference.is_clear:
        return "did not clearly change"
    return "raised" if difference.points > 0 else "lowered"
