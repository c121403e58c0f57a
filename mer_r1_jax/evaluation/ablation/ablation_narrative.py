"""An ablation in plain words. Every sentence follows from the numbers; none is there whatever they are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mer_r1_jax.evaluation.ablation.arm_comparison import PAPER_ORDER, SFT, Ablation, RowResult, Versus
from mer_r1_jax.evaluation.ablation.results import LAST_STEPS
from mer_r1_jax.evaluation.bootstrap import LEVEL, POINTS, Difference, signed

CERTAIN = LEVEL / 100  # share of the draws from which on an order is called shown
FEW_SEEDS = 5


def describe(ablation: Ablation) -> list[str]:
    """A few paragraphs: the order, the gains, the controls, and what to be wary of."""
    paragraphs = [_order(ablation), _between_arms(ablation), _alike(ablation), _gains(ablation)]
    paragraphs += [*_controls(ablation), _wary(ablation)]
    return [paragraph for paragraph in paragraphs if paragraph]


def label(row: str) -> str:
    """A row's name for people."""
    return "SFT" if row == SFT else row.replace("control_", "control: ")


def span(difference: Difference) -> str:
    """A difference and its interval."""
    return f"{signed(difference.points)} ({signed(difference.low)} to {signed(difference.high)})"


def counted(count: int, noun: str) -> str:
    """A number with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def share(value: float) -> str:
    """A share of the draws in per cent; what is not all of them is never rounded up to all, nor some down to none."""
    if 0 < value < 0.01:
        return "less than 1%"
    return "more than 99%" if 0.99 < value < 1 else f"{value:.0%}"


def _order(ablation: Ablation) -> str:
    order = ablation.order
    if order is None:
        return ""
    seeds = len(ablation.order_seeds)
    means = {
        row.row: POINTS * sum(r.score("slow", "f1") for r in row.results if r.seed in ablation.order_seeds) / seeds
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
    held = f"{sum(order.by_seed)} of {len(order.by_seed)} seeds"
    return (
        f"The paper's order, {' < '.join(order.expected)}, {verdict}. Slow F1 after RL, from the lowest: {observed}. "
        f"The order holds in {held} and in {share(order.share)} of the bootstrap draws over seeds and clips; "
        f"{share(order.chance)} would be chance. Step by step: {steps}. The commonest order in the draws is "
        f"{' < '.join(order.commonest)} ({share(order.commonest_share)})."
    )


def _between_arms(ablation: Ablation) -> str:
    between = [versus for versus in ablation.versus if not versus.before.startswith("control_")]
    if not between:
        return ""
    clear = [versus for versus in between if versus.difference.is_clear]
    said = (
        f"Clear (their interval excludes zero) are {len(clear)} of {counted(len(between), 'comparison')} between arms"
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
        f"On the same sampled answers the advantages of neighbours correlate by {', '.join(pairs)}: the nearer to one, "
        "the less two arms can differ in what they teach."
    )


def _gains(ablation: Ablation) -> str:
    arms = [row for row in ablation.rows if row.gain and not row.row.startswith("control_")]
    if not arms:
        return ""
    listed = "; ".join(f"{row.row} {span(row.gain.difference)}" for row in arms)
    clear = sum(row.gain.difference.low > 0 for row in arms)
    said = f"Points of slow F1 over SFT: {listed}. {clear} of {counted(len(arms), 'arm')} gain clearly."
    if ablation.ceiling is not None:
        room = POINTS * (ablation.ceiling - ablation.row(SFT).means["slow", "f1"].mean)
        said += f" From SFT to the ceiling there are {room:.1f} points."
    return said + _stretch(arms)


def _stretch(arms: Sequence[RowResult]) -> str:
    """Whether longer RL would have gone on."""
    found = [row for row in arms if row.stretch]
    if not found:
        return ""
    listed = "; ".join(f"{row.row} {span(row.stretch.difference)}" for row in found)
    stretches = {(row.stretch.first, row.stretch.last) for row in found}
    where = " and ".join(f"from step {first} to {last}" for first, last in sorted(stretches))
    return f" In the last stretch of RL, {where}, it changes by: {listed}."


def _controls(ablation: Ablation) -> list[str]:
    said = []
    against = {versus.before: versus for versus in ablation.versus if versus.before.startswith("control_")}

    def beside(name: str) -> str:
        return f" mer_r1 is {span(against[name].difference)} ahead of it." if name in against else ""

    if row := ablation.row("control_permuted"):
        change = row.gain.difference
        meaning = (
            "RL gains without any information from the rewards, so part of every arm's gain is not theirs"
            if change.low > 0
            else "rewards that say nothing gain nothing"
        )
        said.append(f"Control: with rewards permuted within each group slow F1 changes by {span(change)}: {meaning}."
                    + beside("control_permuted"))  # fmt: skip
    if row := ablation.row("control_sft"):
        arm = ablation.row("mer_r1") or next(r for r in ablation.rows if r.gain)
        costs = f"{_seconds(row.results, 'sft'):.0f} s of steps, where the RL of {arm.row} takes"
        said.append(
            f"Control: further SFT in place of RL gains {span(row.gain.difference)} "
            f"({costs} {_seconds(arm.results, 'rl'):.0f} s)." + beside("control_sft")
        )
    if row := ablation.row("control_plateau"):
        change = row.gain.difference
        meaning = "SFT had not come to its end" if change.low > 0 else "no clear gain is left in longer SFT"
        said.append(f"Control: a fifth more steps of SFT from the start gain {span(change)}: {meaning}.")
    return said


def _seconds(results: Sequence, phase: str) -> float:
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
    said.append("Each interval stands for its own comparison; among many, some exclude zero by chance.")
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


SAMPLED_NOTE = f"Sampled rewards are means over the last {LAST_STEPS} steps of RL."
