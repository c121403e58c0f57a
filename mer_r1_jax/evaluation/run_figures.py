"""A run's curves: held-out scores, rewards, and the health of both phases, step by step."""

from __future__ import annotations

from collections.abc import Sequence

from mer_r1_jax.evaluation import figures
from mer_r1_jax.evaluation.figures import FAST, NEUTRAL, PRECISION, RECALL, SLOW, Line, Panel
from mer_r1_jax.evaluation.gate_figure import gate_figure
from mer_r1_jax.evaluation.report_kit import Figure, percent
from mer_r1_jax.evaluation.run_record import KeptEvaluation, RunRecord, Stages, stages_of

# Small curves: title, and metric -> (label, colour). Those without data are left out.
SMALL_PANELS = (
    ("Completion length (tokens)", {"completions/mean_length": ("", NEUTRAL)}),
    ("Cut at the length limit", {"completions/clipped_ratio": ("", NEUTRAL)}),
    ("Confidence, slow and fast", {"confidence/slow": ("slow", SLOW), "confidence/fast": ("fast", FAST)}),
    ("Calibration rewards", {"rewards/r_plus/mean": ("R+", RECALL), "rewards/r_minus/mean": ("R−", PRECISION)}),
    ("Format reward", {"rewards/format/mean": ("", NEUTRAL)}),
    (
        "Spread within groups",
        {"rewards/recall/group_std": ("recall", RECALL), "rewards/precision/group_std": ("precision", PRECISION)},
    ),
    (
        "Advantage: correlation within groups",
        {
            "advantages/corr/recall": ("with recall", RECALL),
            "advantages/corr/precision": ("with precision", PRECISION),
            "advantages/corr/categories": ("with categories named", NEUTRAL),
        },
    ),
    (
        "Share of the advantage's variance",
        {"advantages/share/calibration": ("calibration", SLOW), "advantages/share/format": ("format", NEUTRAL)},
    ),
    ("Words of a category named before, an answer", {"answers/mean_repeats": ("", NEUTRAL)}),
    ("KL to the reference", {"kl": ("", NEUTRAL)}),
    ("Entropy of the policy", {"entropy": ("", NEUTRAL)}),
    ("Gradient norm", {"grad_norm": ("", NEUTRAL)}),
    ("Groups without spread", {"frac_reward_zero_std": ("", NEUTRAL)}),
    ("Clipped tokens", {"clip_ratio/region_mean": ("", NEUTRAL)}),
    ("Sampler against trainer", {"sampling/sampling_logp_difference/mean": ("", NEUTRAL)}),
    ("Learning rate", {"learning_rate": ("", NEUTRAL)}),
    ("Tokens per second", {"perf/throughput": ("", NEUTRAL)}),
    ("Seconds per step", {"step_time": ("", NEUTRAL)}),
)


def run_figures(run: RunRecord) -> list[Figure]:
    """Draws what a run has curves of, held-out clips first."""
    found = []
    for benchmark, evaluations in run.evaluations.items():
        if panels := _held_out_panels(evaluations, stages_of(run, benchmark)):
            caption = f"Held-out clips ({benchmark}). Dashed: the majority answer as floor, the oracle as ceiling."
            found.append(Figure(caption, figures.draw(panels, 2)))
        if gated := gate_figure(stages_of(run, benchmark).end.scores.get("gate")):
            found.append(gated)
    reward = _panel(run, "rl", "Reward", {"reward": ("", NEUTRAL)})
    parts = {
        "rewards/recall/mean": ("recall", RECALL),
        "rewards/precision/mean": ("precision", PRECISION),
        "rewards/f1/mean": ("F1", NEUTRAL),
    }
    sampled = [panel for panel in (reward, _panel(run, "rl", "Recall, precision, F1", parts)) if panel.lines]
    if sampled:
        caption = "Sampled training completions, per RL step. Pale: each step; strong: running mean."
        found.append(Figure(caption, figures.draw(sampled, 2)))
    own = {name: _panel(run, "rl", name, {f"rewards/{name}/mean": ("", NEUTRAL)}) for name in _own_rewards(run)}
    if own := {name: panel for name, panel in own.items() if panel.lines}:
        unscored = [f"{name} {percent(float(run.series('rl', f'rewards/{name}/unscored')[1].mean()))}%" for name in own]
        caption = "Reward functions of this run's own, per RL step: mean over the completions that got a value. "
        caption += f"Unscored: {', '.join(unscored)}."
        found.append(Figure(caption, figures.draw(list(own.values()), 2)))
    if small := [panel for title, names in SMALL_PANELS if (panel := _panel(run, "rl", title, names)).lines]:
        found.append(Figure("Health of RL, per step.", figures.draw(small, 4, 2.7, 1.8)))
    sft_names = (("SFT loss", {"loss": ("", NEUTRAL)}), *SMALL_PANELS)
    if sft := [panel for title, names in sft_names if (panel := _panel(run, "sft", title, names)).lines]:
        found.append(Figure("Supervised fine-tuning, per step.", figures.draw(sft, 4, 2.7, 1.8)))
    return found


def _own_rewards(run: RunRecord) -> list[str]:
    """Names of reward functions of the user's, which alone have a count of faults."""
    found = {name.split("/")[1] for line in run.metrics.get("rl", []) for name in line if name.endswith("/faults")}
    return sorted(found)


def _held_out_panels(evaluations: Sequence[KeptEvaluation], stages: Stages) -> list[Panel]:
    """F1 of both modes, and their precision and recall, over the steps of RL (of SFT where there was no RL)."""
    if stages.end_is_rl:
        points = [point for point in evaluations if point is stages.start or stages.rl_step(point)]
        steps = [stages.rl_step(point) for point in points]
    else:
        points = [point for point in evaluations if point.phase == "sft" or point is stages.start]
        steps = [point.step for point in points]

    def line(mode: str, name: str, label: str, color: str) -> Line:
        values = [100 * value if (value := point.score(mode, name)) is not None else float("nan") for point in points]
        return Line(steps, values, label, color, markers=True)

    levels = tuple(
        (100 * value, label)
        for label, name in (("floor", "majority_f1"), ("ceiling", "oracle_f1"))
        if (value := stages.end.reference(name)) is not None
    )
    where = f"over {'RL' if stages.end_is_rl else 'SFT'} steps"
    return [
        Panel(f"F1 {where}", (line("slow", "f1", "slow", SLOW), line("fast", "f1", "fast", FAST)), levels),
        Panel(
            f"Precision and recall {where}",
            (
                line("slow", "precision", "slow precision", PRECISION),
                line("slow", "recall", "slow recall", RECALL),
                line("fast", "precision", "fast precision", "#c9a9e6"),
                line("fast", "recall", "fast recall", "#9fd3b8"),
            ),
        ),
    ]


def _panel(run: RunRecord, phase: str, title: str, names: dict[str, tuple[str, str]]) -> Panel:
    lines = []
    for name, (label, color) in names.items():
        steps, values = run.series(phase, name)
        if len(steps):
            lines.append(Line(steps, values, label, color))
    return Panel(title, tuple(lines))
