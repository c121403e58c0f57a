"""Runs and ablations in plain words. Every sentence follows from the numbers; none is there whatever they are.

A run: what was trained, what it gained on held-out clips, and what to be wary of. An ablation: the order of its arms,
their gains, the controls, and what to be wary of. Both speak of differences with the same few words.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mer_r1_jax.evaluation.ablation.arm_comparison import PAPER_ORDER, Ablation, RowResult, Versus
from mer_r1_jax.evaluation.ablation.results import SeedResult
from mer_r1_jax.evaluation.bootstrap import FEW_SEEDS, LEVEL, POINTS, Difference
from mer_r1_jax.evaluation.report_kit import FEW_CLIPS, counted, percent, share, span
from mer_r1_jax.evaluation.run_record import (
    EXPECTED_F1,
    IN_WORDS,
    KeptEvaluation,
    RunRecord,
    Stages,
    f1_difference,
    stages_of,
)

CERTAIN = LEVEL / 100  # share of the draws from which on an order is called shown


def tell_run(run: RunRecord) -> list[str]:
    """A run in a few paragraphs: the verdict, what was trained, and what it gained on held-out clips."""
    said = verdict(stages_of(run, next(iter(run.evaluations)))) if run.evaluations else ""
    return [said, *tell_training(run)] if said else tell_training(run)


def tell_training(run: RunRecord) -> list[str]:
    """What was trained, and what it gained on held-out clips, in a few paragraphs."""
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


def _warnings_of_answers(end: KeptEvaluation) -> list[str]:
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


def _standing(evaluation: KeptEvaluation, when: str) -> str:
    slow, fast = evaluation.score("slow", "f1"), evaluation.score("fast", "f1")
    text = f"{when}, slow answers scored F1 {percent(slow)} and fast answers {percent(fast)}"
    text += f" on {evaluation.n_scored} held-out clips"
    difference = f1_difference(evaluation, "slow", evaluation, "fast")
    if difference is None:
        return text + "."
    return f"{text}: slow is {_compared(difference)} fast, {difference}.{_expected_gap(evaluation)}"


def verdict(stages: Stages) -> str:
    """Who is ahead, slow or fast answers, before RL and after it, and by which score; "" without a comparison."""
    return " ".join(headline(stages)).strip()


def headline(stages: Stages) -> tuple[str, str]:
    """Who is ahead, slow or fast answers, before RL and after it, and apart from that what its numbers are.

    By expected F1 where the clips' world is known, else by F1. Both are "" where nothing can be compared.
    """
    shown = [stages.end] if stages.start is None or stages.start is stages.end else [stages.start, stages.end]
    # One score for both: the start of a run that an earlier version began has F1 alone.
    by_expected = all(f1_difference(one, "slow", one, "fast", EXPECTED_F1) for one in shown)
    name = EXPECTED_F1 if by_expected else "f1"
    *earlier, after = (f1_difference(one, "slow", one, "fast", name) for one in shown)
    before = earlier[0] if earlier else None
    if after is None:
        return "", ""
    said = f"{'After RL' if stages.end_is_rl else 'At the end'} {_ahead(after)}."
    if before is not None:
        said = f"Before RL {_ahead(before)}; after it {_ahead(after)}."
        if before.is_clear and after.is_clear and before.points < 0 < after.points:
            said = f"RL turned the order round, as the paper has it. {said}"
    # Single runs of the control moved by as much as 3.5 points either way, clearly so over their clips.
    clips = counted(after.clips, "held-out clip")
    return said, (
        f"In points of {IN_WORDS[name]}, slow minus fast, 95% intervals over {clips}: of this one run, as another seed "
        "may differ by more."
    )


def _ahead(gap: Difference) -> str:
    lead = (
        "neither is clearly ahead" if not gap.is_clear else f"{'slow' if gap.points > 0 else 'fast'} answers are ahead"
    )
    return f"{lead}, {span(gap)}"


def _expected_gap(evaluation: KeptEvaluation) -> str:
    """The same comparison without the draw of the truth, where the clips' world is known."""
    gap = f1_difference(evaluation, "slow", evaluation, "fast", EXPECTED_F1)
    if gap is None:
        return ""
    return f" By expected F1, which leaves out the luck of each clip's truth, slow is {_compared(gap)} fast, {gap}."


def _gain(stages: Stages) -> str:
    start, end = stages.start, stages.end
    text = f"After RL step {stages.rl_step(end)}, slow answers score F1 {percent(end.score('slow', 'f1'))}"
    text += f" and fast answers {percent(end.score('fast', 'f1'))}."
    if start is not None:
        for mode in ("slow", "fast"):
            if (change := f1_difference(end, mode, start, mode)) is not None:
                text += f" RL {_changed(change)} {mode} F1, {change}."
    if (gap := f1_difference(end, "slow", end, "fast")) is not None:
        text += f" Slow now stands {_compared(gap)} fast, {gap}.{_expected_gap(end)}"
    before, after = (e.score("slow", "mean_length") if e else None for e in (start, end))
    if before and after:
        text += f" A slow answer is {after:.0f} tokens long on average, {100 * after / before:.0f}% of what it was."
    return text


def _frame(end: KeptEvaluation) -> str:
    floor, ceiling, slow = end.reference("majority_f1"), end.reference("oracle_f1"), end.score("slow", "f1")
    parts = []
    if floor is not None:
        answer = ", ".join(end.scores.get("majority_answer") or [])
        parts.append(f"The same answer for every clip{f' ({answer})' if answer else ''} would score {percent(floor)}.")
    if ceiling is not None:
        parts.append(f"An oracle that is told the cues, noise included, reaches {percent(ceiling)}.")
    if floor is not None and ceiling is not None and slow is not None and ceiling > floor:
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


def tell_ablation(ablation: Ablation) -> list[str]:
    """An ablation in a few paragraphs: the order, the gains, the controls, and what to be wary of."""
    paragraphs = [_order(ablation), _between_arms(ablation), _alike(ablation), _gains_over_sft(ablation)]
    paragraphs += [*_controls(ablation), _wary(ablation)]
    return [paragraph for paragraph in paragraphs if paragraph]


def _order(ablation: Ablation) -> str:
    order = ablation.order
    if order is None:
        return ""
    seeds = len(ablation.order_seeds)
    means = {
        row.row: POINTS
        * sum(r.score("slow", ablation.score) for r in row.results if r.seed in ablation.order_seeds)
        / seeds
        for row in ablation.rows
    }
    observed = ", ".join(f"{row} {means[row]:.1f}" for row in order.observed)
    if order.observed != order.expected:
        verdict = "does not appear in these means"
    elif order.share >= CERTAIN:
        verdict = "appears, and is certain as far as these clips and seeds can tell"
    else:
        verdict = "appears in these means, but is not certain"
    steps = "; ".join(f"{high} above {low} in {share(value)}" for low, high, value in order.steps)
    held, score = f"{sum(order.by_seed)} of {len(order.by_seed)} seeds", IN_WORDS[ablation.score]
    return (
        f"The paper's order, {' < '.join(order.expected)}, {verdict}. Slow {score} after RL, from the "
        f"lowest: {observed}. The order holds in {held} and in {share(order.share)} of the bootstrap draws over seeds "
        f"and clips; {share(order.chance)} would be chance. Step by step: {steps}. The commonest order in the draws is "
        f"{' < '.join(order.commonest)} ({share(order.commonest_share)})."
    )


def _between_arms(ablation: Ablation) -> str:
    between = [versus for versus in ablation.versus if not versus.before.startswith("control_")]
    if not between:
        return ""
    if all(versus.difference.has_few_seeds for versus in between):
        return f"With fewer than {FEW_SEEDS} seeds no comparison between arms is called clear."
    clear = [versus for versus in between if versus.is_clear]
    said = (
        f"Clear (at 95%, corrected for their number) are {len(clear)} of {counted(len(between), 'comparison')} between "
        "arms"
    )
    return said + (": " + "; ".join(_above(versus) for versus in clear) if clear else "") + "."


def _above(versus: Versus) -> str:
    return f"{versus.after} against {versus.before} {span(versus.difference)}"


def _alike(ablation: Ablation) -> str:
    alike = ablation.alike
    if alike is None:
        return ""
    arms = [arm for arm in PAPER_ORDER if arm in alike.names]
    pairs = [f"{alike.correlation[a, b]:.2f} ({b} with {a})" for a, b in itertools.pairwise(arms)]
    if not pairs:
        return ""
    return (
        f"On the same sampled answers the advantages of neighbours correlate by {', '.join(pairs)}. That alone does "
        "not say how far apart arms end: small differences that always point one way, such as to fewer words, add up."
    )


def _gains_over_sft(ablation: Ablation) -> str:
    arms = [row for row in ablation.rows if not row.row.startswith("control_")]
    gains = {row.row: row.gain.difference for row in arms if row.gain}
    if not gains:
        return ""
    listed = "; ".join(f"{row} {span(gain)}" for row, gain in gains.items())
    said = f"Points of slow {IN_WORDS[ablation.score]} over SFT: {listed}."
    if not all(gain.has_few_seeds for gain in gains.values()):
        clear = sum(row.gain.is_clear and row.gain.difference.points > 0 for row in arms if row.gain)
        said += f" {clear} of {counted(len(gains), 'arm')} gain clearly (corrected for their number)."
    if ablation.ceiling is not None and ablation.score == "f1":  # the ceiling is one of F1, luck included
        room = POINTS * (ablation.ceiling - ablation.sft.means["slow", ablation.score].mean)
        said += f" From SFT to the ceiling there are {room:.1f} points."
    return said + _stretch([row for row in arms if row.gain])


def _stretch(arms: Sequence[RowResult]) -> str:
    """Whether longer RL would have gone on."""
    found = {row.row: row.stretch for row in arms if row.stretch}
    if not found:
        return ""
    listed = "; ".join(f"{row} {span(stretch.difference)}" for row, stretch in found.items())
    stretches = {(stretch.first, stretch.last) for stretch in found.values()}
    where = " and ".join(f"from step {first} to {last}" for first, last in sorted(stretches))
    return f" In the last stretch of RL, {where}, it changes by: {listed}."


def _controls(ablation: Ablation) -> list[str]:
    said = []
    against = {versus.before: versus for versus in ablation.versus if versus.before.startswith("control_")}

    def beside(name: str) -> str:
        return f" mer_r1 is {span(against[name].difference)} ahead of it." if name in against else ""

    if (row := ablation.row("control_permuted")) and row.gain:
        change = row.gain.difference
        meaning = (
            "RL gains without any information from the rewards, so part of every arm's gain is not theirs"
            if change.low > 0
            else "rewards that say nothing gain nothing"
        )
        said.append(
            f"Control: with rewards permuted within each group slow {IN_WORDS[ablation.score]} changes by "
            f"{span(change)}: {meaning}." + beside("control_permuted")
        )
    if (row := ablation.row("control_sft")) and row.gain:
        arm = ablation.row("mer_r1") or next(r for r in ablation.rows if r.gain)
        costs = f"{_seconds(row.results, 'sft'):.0f} s of steps, where the RL of {arm.row} takes"
        said.append(
            f"Control: further SFT in place of RL gains {span(row.gain.difference)} "
            f"({costs} {_seconds(arm.results, 'rl'):.0f} s)." + beside("control_sft")
        )
    if (row := ablation.row("control_plateau")) and row.gain:
        change = row.gain.difference
        meaning = "SFT had not come to its end" if change.low > 0 else "no clear gain is left in longer SFT"
        said.append(f"Control: a fifth more steps of SFT from the start gain {span(change)}: {meaning}.")
    return said


def _seconds(results: Sequence[SeedResult], phase: str) -> float:
    return sum(result.seconds.get(phase, 0.0) for result in results) / len(results)


def _wary(ablation: Ablation) -> str:
    seeds = max(len(row.results) for row in ablation.rows)
    said = []
    if seeds == 1:
        said.append("There is one seed only: intervals say what other clips would change, not what other seeds would.")
    elif seeds < FEW_SEEDS:
        said.append(
            f"Intervals are over clips and seeds together, but {seeds} seeds say little about others: look at the "
            "seeds one by one."
        )
    said.append("Each interval stands for its own comparison: among many, one excludes zero by chance now and then.")
    differing = {run: pair for run, pair in ablation.same_start.items() if pair[0] < pair[1]}
    if differing:
        worst = ", ".join(f"{run} on {same} of {clips} clips" for run, (same, clips) in differing.items())
        said.append(
            "Before its first step a run should answer as SFT did at its end; these do so on some clips only: "
            + worst
            + "."
        )
    elif ablation.same_start:
        said.append(
            f"Before its first step every run that starts from a checkpoint ({len(ablation.same_start)}) answers all "
            "clips as SFT did at its end, letter by letter."
        )
    if ablation.missing:
        said.append(f"Not finished, and not in the tables: {', '.join(ablation.missing)}.")
    return " ".join(said)
