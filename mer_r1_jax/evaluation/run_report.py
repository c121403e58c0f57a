"""report.html: one file that explains a run to somebody who saw nothing of it, without a network."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.evaluation import figures
from mer_r1_jax.evaluation.bootstrap import signed
from mer_r1_jax.evaluation.clip_frames import clip_strips
from mer_r1_jax.evaluation.figures import FAST, NEUTRAL, PRECISION, RECALL, SLOW, Line, Panel
from mer_r1_jax.evaluation.gate_figure import gate_figure
from mer_r1_jax.evaluation.narrative import tell_run, warnings_of
from mer_r1_jax.evaluation.report_kit import (
    Cell,
    Figure,
    Row,
    Table,
    WordMarks,
    cut,
    number,
    percent,
    row,
    text_table,
    write_page,
)
from mer_r1_jax.evaluation.run_record import (
    KeptEvaluation,
    ReportError,
    RunRecord,
    Stages,
    f1_difference,
    read_run,
    stages_of,
)

__all__ = ["ReportError", "make_report"]

DEFAULT_EXAMPLES = 24
COMPLETIONS_SHOWN, TEXT_SHOWN = 8, 600
# Rows of the headline table: label, score, whether it is a share shown in hundredths, digits otherwise.
TABLE_ROWS = (
    ("Precision", "precision", True, 1),
    ("Recall", "recall", True, 1),
    ("F1", "f1", True, 1),
    ("Expected F1, without the draw of the truth", "expected_f1", True, 1),
    ("Confidence on right categories", "confidence_correct", True, 1),
    ("Confidence on wrong categories", "confidence_wrong", True, 1),
    ("Confidence on the right words of the fast answers before RL", "fixed_confidence_correct", True, 1),
    ("Confidence on the wrong words of the fast answers before RL", "fixed_confidence_wrong", True, 1),
    ("F1 of sampled answers", "sampled_f1", True, 1),
    ("Expected F1 of sampled answers", "sampled_expected_f1", True, 1),
    ("Emotion words per answer", "mean_words", False, 2),
    ("Tokens per answer", "mean_length", False, 1),
    ("Distinct answers", "distinct_answers", False, 0),
    ("In the right format", "format_rate", True, 1),
    ("Cut at the length limit", "truncated_rate", True, 1),
)
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


def make_report(
    run_dir: str | os.PathLike, media_root: str | os.PathLike | None = None, num_examples: int | None = None
) -> Path:
    """Writes `<run_dir>/report.html` from what lies in the folder.

    Args:
        run_dir: a run's folder, finished or not. What is missing there is named in the report.
        media_root: folder of the clips; None = `data.media_root` of the run's configuration, or the folder of its
            `data.eval_path`, or its `data.synthetic_dir`.
        num_examples: clips shown, the first ones in order; None = `eval.num_examples` of the configuration.

    Returns:
        The path of the report.

    Raises:
        ReportError: there is no such folder, or the report cannot be written.
    """
    run = read_run(run_dir)
    configured = run.config.get("eval", {}).get("num_examples", DEFAULT_EXAMPLES)
    count = configured if num_examples is None else num_examples
    missing = list(run.missing)
    stages = stages_of(run, next(iter(run.evaluations))) if run.evaluations else None
    clips = _clips(run, stages, media_root, count, missing) if stages else []
    values = dict(
        title=run.config.get("train", {}).get("run_name") or run.config.get("name") or run.path.resolve().name,
        summary=tell_run(run),
        warnings=warnings_of(run),
        cards=_cards(stages.start, stages.end) if stages else [],
        tables=[_table(stages_of(run, benchmark)) for benchmark in run.evaluations],
        figures=_figures(run),
        clips=clips,
        clips_at=_named_step(stages) if stages else "",
        completions=_completions(run),
        config=_shown_json(run.config),
        environment=_shown_json(run.environment),
        missing=list(dict.fromkeys(missing)),
    )
    try:
        return write_page(run.path / "report.html", "run_report.html.jinja", **values)
    except OSError as error:
        raise ReportError(str(error)) from error


def _cards(start: KeptEvaluation | None, end: KeptEvaluation) -> list[dict[str, str]]:
    """The few numbers at the top: F1 of both modes at the end, with the paired change since the start of RL."""
    cards = []
    for mode in MODES:
        note, kind = "", ""
        if start is not None and start is not end and (change := f1_difference(end, mode, start, mode)):
            note = f"{signed(change.points)} since the start of RL [{signed(change.low)}, {signed(change.high)}]"
            kind = ("up" if change.points > 0 else "down") if change.is_clear else ""
        cards.append(
            {"label": f"{mode.capitalize()} F1", "value": percent(end.score(mode, "f1")), "note": note, "kind": kind}
        )
    if (gap := f1_difference(end, "slow", end, "fast")) is not None:
        note = f"points [{signed(gap.low)}, {signed(gap.high)}]"
        cards.append({"label": "Slow minus fast", "value": signed(gap.points), "note": note, "kind": ""})
    for label, name in (("Floor: majority answer", "majority_f1"), ("Ceiling: oracle", "oracle_f1")):
        if (value := end.reference(name)) is not None:
            cards.append({"label": label, "value": percent(value), "note": "F1", "kind": "reference"})
    return cards


def _named_step(stages: Stages) -> str:
    return f"RL step {stages.rl_step(stages.end)}" if stages.end_is_rl else "the end of SFT"


def _table(stages: Stages) -> Table:
    """Start and end side by side, slow and fast apart."""
    columns = []
    if stages.start is not None:
        is_sft = stages.start.phase == "sft"
        columns.append((f"After SFT (step {stages.start.step})" if is_sft else "Start of RL (after SFT)", stages.start))
    if stages.end_is_rl:
        columns.append((f"End ({_named_step(stages)})", stages.end))
    rows = []
    for label, name, is_share, digits in TABLE_ROWS:
        values = [evaluation.score(mode, name) for _, evaluation in columns for mode in MODES]
        if any(value is not None for value in values):
            cells = [percent(value) if is_share else number(value, digits) for value in values]
            rows.append(row(label, cells, "strong" if name == "f1" else ""))
    end = stages.end
    unscorable = f"; {end.n_unscorable} more cannot be scored" if end.n_unscorable else ""
    majority = ", ".join(end.scores.get("majority_answer") or [])
    return Table(
        heads=(
            Row((Cell(""), *(Cell(label, kind="stage", span=len(MODES)) for label, _ in columns))),
            Row((Cell(""), *(Cell(mode, kind=mode) for _ in columns for mode in MODES))),
        ),
        rows=tuple(rows),
        title=f"Scores on held-out clips: {end.benchmark} ({end.n_scored} clips{unscorable})",
        note=f"Floor: F1 {percent(end.reference('majority_f1'))} for the majority answer"
        f"{f' ({majority})' if majority else ''} on every clip. Ceiling: F1 {percent(end.reference('oracle_f1'))} for "
        "the oracle.",
        kind="scores",
    )


def _figures(run: RunRecord) -> list[Figure]:
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


def _clips(
    run: RunRecord, stages: Stages, media_root: str | os.PathLike | None, count: int, missing: list[str]
) -> list[dict[str, Any]]:
    """Rows of the table of clips: the first `count` of the last evaluation, in its order, so none is hand-picked."""
    if not stages.end.samples:
        return []
    emotion = run.config.get("emotion", {})
    marks = WordMarks(emotion.get("wheel_dir", ""), emotion.get("variant", "unibench"), missing)
    samples = dict(itertools.islice(stages.end.samples.items(), count))
    strips = clip_strips([sample.get("video") for sample in samples.values()], _media_root(run, media_root))
    rows = []
    for (clip, sample), strip in zip(samples.items(), strips, strict=True):
        if strip.problem:
            missing.append(f"frames of clip {clip}: {strip.problem}")
        truth = [str(word) for word in sample.get("truth") or []]
        before = stages.start.samples.get(clip, {}).get("slow") if stages.end_is_rl and stages.start else None
        slow_words = [str(word) for word in sample.get("slow", {}).get("words") or []]
        rows.append(
            {
                "id": clip,
                "strip": strip,
                "subtitle": sample.get("subtitle"),
                "truth": marks.truth(truth, slow_words),
                "reasoning": sample.get("slow", {}).get("reasoning"),
                "slow": _answer(sample.get("slow"), truth, marks),
                "fast": _answer(sample.get("fast"), truth, marks),
                "before": _answer(before, truth, marks),
            }
        )
    return rows


def _answer(answer: dict[str, Any] | None, truth: list[str], marks: WordMarks) -> dict[str, Any] | None:
    if not isinstance(answer, dict):
        return None
    f1 = answer.get("f1")
    f1 = float(f1) if isinstance(f1, int | float) else None
    verdict = "not scored" if f1 is None else "correct" if f1 > 0.995 else "wrong" if f1 < 0.005 else "partly"
    words = marks.answer(map(str, answer.get("words") or []), truth)
    return {"words": words, "f1": percent(f1), "verdict": verdict}


def _media_root(run: RunRecord, given: str | os.PathLike | None) -> Path:
    data = run.config.get("data", {})
    beside_records = os.path.dirname(data.get("eval_path") or "")
    return Path(given or data.get("media_root") or beside_records or data.get("synthetic_dir") or run.path)


def _completions(run: RunRecord) -> Table | None:
    if run.completions is None or not run.completions[1]:
        return None
    step, rows = run.completions
    shown = [[_shown(value) for value in row.values()] for row in rows[:COMPLETIONS_SHOWN]]
    title = f"{len(shown)} of {len(rows)} completions of RL step {step}"
    return text_table(list(rows[0]), shown, texts=0, title=title, kind="completions")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, float):
        return number(value, 3)
    return cut(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False), TEXT_SHOWN)


def _shown_json(content: dict[str, Any]) -> str:
    """Readable JSON without the user's home folder."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text
