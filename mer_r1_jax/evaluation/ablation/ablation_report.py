"""Writes an ablation where people look: ablation.json, ablation.md with ablation.svg, ablation.html."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mer_r1_jax.evaluation.ablation.alikeness import OBJECTIVES
from mer_r1_jax.evaluation.ablation.arm_comparison import (
    PAPER_F1,
    PAPER_OFFICIAL,
    SFT,
    Ablation,
    RowResult,
    Versus,
    as_json,
)
from mer_r1_jax.evaluation.ablation.results import LAST_STEPS, SeedResult
from mer_r1_jax.evaluation.bootstrap import FEW_SEEDS, POINTS, signed
from mer_r1_jax.evaluation.figures import FAST, MUTED, SLOW, STYLE, data_uri, smooth, svg
from mer_r1_jax.evaluation.narrative import tell_ablation
from mer_r1_jax.evaluation.over_seeds import Mean, mean_over_seeds
from mer_r1_jax.evaluation.report_kit import (
    NONE,
    Table,
    counted,
    markdown,
    number,
    percent,
    render_page,
    span,
    text_table,
)
from mer_r1_jax.evaluation.run_record import IN_WORDS
from mer_r1_jax.foreign_text import for_markdown, printable
from mer_r1_jax.storage import atomic_files

FIGURE = "ablation.svg"
SAMPLED_NOTE = f"Sampled rewards are means over the last {LAST_STEPS} steps of RL."


def label(row: str) -> str:
    """A row's name for people."""
    return "SFT" if row == SFT else row.replace("control_", "control: ")


def write(folder: Path, ablation: Ablation, command: str, plan: Mapping[str, Any], setting: str) -> list[Path]:
    """Writes the four files and returns their paths.

    Args:
        folder: where.
        command: that made the ablation.
        plan: what was asked for, as JSON values.
        setting: what all runs have in common, in a sentence.
    """
    picture = draw(ablation)
    tables = tables_of(ablation)
    paragraphs = tell_ablation(ablation)
    text = "\n\n".join(
        ["## Ablation of the arms", for_markdown(setting), *paragraphs, f"![Scores, gains and curves]({FIGURE})"]
        + [markdown(table).rstrip() for table in tables]
        + [f"Made by\n\n```bash\n{printable(command)}\n```\n"]
    )
    html = render_page(
        "ablation/ablation_report.html.jinja",
        setting=setting,
        paragraphs=paragraphs,
        figure=data_uri(picture),
        tables=tables,
        command=command,
        plan=json.dumps(plan, indent=2, ensure_ascii=False),
    )
    content = json.dumps({"command": command, "plan": plan, **as_json(ablation)}, indent=1, allow_nan=False)
    files = {FIGURE: picture.decode(), "ablation.md": text, "ablation.html": html, "ablation.json": content + "\n"}
    for name, written in files.items():
        atomic_files.write_text(folder / name, written)
    return [folder / name for name in files]


def tables_of(ablation: Ablation) -> list[Table]:
    """The arms, the comparisons, how they answer and sample, how alike they are, and every seed."""
    found = [_arms(ablation), _versus(ablation), _answers(ablation), _sampled(ablation), *_alike(ablation)]
    found.append(_seeds(ablation))
    return [table for table in found if table.rows]


def _arms(ablation: Ablation) -> Table:
    rows = []
    for row in ablation.rows:
        cells = [label(row.row), str(len(row.results))]
        cells += [_mean(row.means["slow", name]) for name in ("precision", "recall", "f1")]
        cells += [_mean(row.means["slow", ablation.score])] * (ablation.score != "f1")
        cells.append(_mean(row.means["fast", ablation.score]))
        cells += [span(row.gain.difference) if row.gain else NONE, span(row.slow_minus_fast)]
        cells += [number(known.get(row.row), 2) for known in (PAPER_F1, PAPER_OFFICIAL)]
        rows.append(tuple(cells))
    best = max(
        (n for n, row in enumerate(ablation.rows) if not row.row.startswith("control_")),
        key=lambda n: ablation.rows[n].means["slow", ablation.score].mean,
    )
    score = IN_WORDS[ablation.score]
    known_levels = (("F1 of the best constant answer", ablation.floor), ("of one who knows the cues", ablation.ceiling))
    levels = [f"{name} {percent(value)}" for name, value in known_levels if value is not None]
    return text_table(
        title="Arms",
        note=f"{len(ablation.clips)} held-out clips, in points: mean ± standard error over seeds; gains and gaps with "
        f"their 95% interval over clips and seeds, paired. {'; '.join(levels)}. The two last columns are the "
        "paper's: means over sets of MER-UniBench, of another model on other data, here for their order only.",
        columns=(
            "row", "seeds", "slow precision", "slow recall", "slow F1", *[f"slow {score}"] * (score != "F1"),
            f"fast {score}", f"slow {score} over SFT", f"slow − fast {score}", "paper: F1", "paper: official",
        ),
        rows=rows,
        strong=[best],
    )  # fmt: skip


def _versus(ablation: Ablation) -> Table:
    return text_table(
        title="Comparisons",
        note=f"Points of slow {IN_WORDS[ablation.score]}, the same clips and seeds on both sides, with 95% intervals "
        "over clips and seeds (crossed analysis of variance), each for its own comparison. Clear: at 95% for all "
        f"comparisons of this table together (Holm), with at least {FEW_SEEDS} seeds.",
        columns=("row", "against", "points", "clear", "seeds one by one", "seeds in favour"),
        rows=[_versus_cells(versus) for versus in ablation.versus],
        texts=2,
    )


def _versus_cells(versus: Versus) -> tuple[str, ...]:
    each = list(versus.by_seed.values())
    return (
        label(versus.after),
        label(versus.before),
        span(versus.difference),
        "too few seeds" if versus.difference.has_few_seeds else "yes" if versus.is_clear else "no",
        ", ".join(signed(difference.points) for difference in each),
        f"{sum(difference.points > 0 for difference in each)} of {len(each)}",
    )


def _answers(ablation: Ablation) -> Table:
    def cells(row: RowResult) -> tuple[str, ...]:
        columns = [("slow", "mean_words", 2), ("slow", "mean_length", 1), ("slow", "distinct_answers", 0)]
        columns += [("fast", "mean_words", 2), ("fast", "distinct_answers", 0)]
        return (label(row.row), *(_mean(row.means.get((mode, name)), 1, digits) for mode, name, digits in columns))

    return text_table(
        title="How they answer",
        note="At the end, mean ± standard error over seeds: emotion words, tokens and distinct answers.",
        columns=("row", "slow words", "slow tokens", "distinct slow", "fast words", "distinct fast"),
        rows=[cells(row) for row in ablation.rows],
    )


def _sampled(ablation: Ablation) -> Table:
    names = ("reward", "recall", "precision", "f1", "recall_std", "precision_std", "frac_reward_zero_std", "kl")
    rows = []
    for row in ablation.rows:
        found = [result.sampled for result in row.results]
        if all(set(names) <= sampled.keys() for sampled in found):
            means = [mean_over_seeds([sampled[name] for sampled in found]) for name in names]
            rows.append((label(row.row), *(_mean(mean, 1, 3) for mean in means)))
    return text_table(
        title="What was sampled",
        note=f"{SAMPLED_NOTE} Mean ± standard error over seeds. Reward: F1 + rl.format_weight × format, whatever the "
        "arm; spreads are over all samples of a step.",
        columns=(
            "row", "reward", "recall", "precision", "F1", "spread of recall", "spread of precision",
            "groups without spread", "KL",
        ),
        rows=rows,
    )  # fmt: skip


def _alike(ablation: Ablation) -> list[Table]:
    alike = ablation.alike
    if alike is None:
        return []
    arms = [name for name in alike.names if name not in OBJECTIVES]
    return [
        text_table(
            title="How alike the arms are",
            note=f"Correlation of the advantages that each arm gives to the same {alike.answers} answers, sampled in "
            f"the last {LAST_STEPS} steps of {counted(alike.runs, 'run')}; the last two columns are with recall and "
            "with precision alone, each normalised over its group.",
            columns=("row", *arms, *OBJECTIVES),
            rows=[(arm, *(f"{alike.correlation[arm, name]:.3f}" for name in alike.names)) for arm in arms],
        )
    ]


def _seeds(ablation: Ablation) -> Table:
    rows = []
    for row in ablation.rows:
        for result in row.results:
            rows.append((label(row.row), str(result.seed), *_seed_cells(row, result)))
    gain = f"slow {IN_WORDS[ablation.score]} over SFT"
    return text_table(
        title="Every seed",
        note="In points; the gain over SFT of the same seed with its 95% interval over clips. " + SAMPLED_NOTE,
        columns=(
            "row", "seed", "slow P", "slow R", "slow F1", "fast P", "fast R", "fast F1", gain, "words",
            "tokens", "distinct", "sampled reward", "sampled recall", "sampled precision", "s of SFT", "s of RL",
        ),
        rows=rows,
        texts=2,
    )  # fmt: skip


def _seed_cells(row: RowResult, result: SeedResult) -> list[str]:
    cells = [percent(result.score(mode, name)) for mode in ("slow", "fast") for name in ("precision", "recall", "f1")]
    gain = row.gain.by_seed.get(result.seed) if row.gain else None
    cells.append(span(gain) if gain else NONE)
    for name, digits in (("mean_words", 2), ("mean_length", 1), ("distinct_answers", 0)):
        cells.append(number(result.end.score("slow", name), digits))
    for name in ("reward", "recall", "precision"):
        cells.append(number(result.sampled.get(name), 3))
    cells += [number(result.seconds.get(phase) or None, 0) for phase in ("sft", "rl")]
    return cells


def _mean(mean: Mean | None, factor: float = POINTS, digits: int = 1) -> str:
    if mean is None:
        return NONE
    error = "" if mean.error is None else f" ± {factor * mean.error:.{digits}f}"
    return f"{factor * mean.mean:.{digits}f}{error}"


COLORS = ("#475569", "#2a8c5f", "#8a4fbf", "#1f5fbf", "#b3261e", "#0f766e", "#a16207", "#be185d", "#4d7c0f")
ROOM_FOR_LEVELS = 0.45  # rows above the first one, for the names of the dashed lines
_CONTROL = (0, (4, 2))  # dashes of a control's curve


def draw(ablation: Ablation) -> bytes:
    """The figure as SVG."""
    rows = list(ablation.rows)
    trained = [row for row in rows if any(len(result.reward_curve[0]) for result in row.results)]
    colors = {row.row: COLORS[number % len(COLORS)] for number, row in enumerate(trained)}
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "ablation"}):
        figure = Figure(figsize=(11, 2.2 + 0.28 * len(rows) + (3.2 if trained else 0)), layout="constrained")
        grid = figure.add_gridspec(
            2 if trained else 1, 2, height_ratios=[1.4 + 0.28 * len(rows), 3.2][: 1 + bool(trained)]
        )
        _scores(figure.add_subplot(grid[0, 0]), rows, ablation)
        if gained := [row for row in rows if row.gain]:
            _gains(figure.add_subplot(grid[0, 1]), gained, IN_WORDS[ablation.score])
        if trained:
            _held_out_curves(figure.add_subplot(grid[1, 0]), trained, colors)
            _reward_curves(figure.add_subplot(grid[1, 1]), trained, colors)
        return svg(figure)


def _scores(axes: Axes, rows: list[RowResult], ablation: Ablation) -> None:
    """Slow and fast F1 of every seed as dots, the mean and its standard error as a bar."""
    for place, row in enumerate(rows):
        for mode, color, offset in (("slow", SLOW, -0.16), ("fast", FAST, 0.16)):
            mean = row.means[mode, ablation.score]
            values = POINTS * np.asarray(mean.values)
            axes.plot(values, np.full(values.shape, place + offset), "o", color=color, alpha=0.35, markersize=4, mew=0)
            axes.errorbar(
                POINTS * mean.mean, place + offset, xerr=POINTS * (mean.error or 0.0), fmt="|", color=color,
                markersize=9, capsize=0, elinewidth=2, label=mode if place == 0 else None,
            )  # fmt: skip
    levels = [(ablation.sft.means["slow", ablation.score].mean, "slow after SFT")]
    # The ceiling is one of F1, the luck of each truth included.
    if ablation.ceiling is not None and ablation.score == "f1" and not _far_away(ablation.ceiling, rows):
        levels.append((ablation.ceiling, "ceiling"))
    for value, _ in levels:
        axes.axvline(POINTS * value, color=MUTED, linestyle=_CONTROL, linewidth=1, zorder=0)
    middle = sum(axes.get_xlim()) / 2
    for value, name in levels:
        side, offset = ("left", 3) if POINTS * value < middle else ("right", -3)  # towards the middle, inside the axes
        axes.annotate(name, (POINTS * value, 1), xycoords=("data", "axes fraction"), xytext=(offset, -2),
                      textcoords="offset points", ha=side, va="top", color=MUTED, fontsize=8)  # fmt: skip
    axes.set_title(f"{_title(ablation)} of held-out clips: seeds, mean ± standard error")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=2)
    _name_rows(axes, rows)
    axes.set_ylim(top=-0.5 - ROOM_FOR_LEVELS)


def _title(ablation: Ablation) -> str:
    words = IN_WORDS[ablation.score]
    return words[0].upper() + words[1:]


def _far_away(value: float, rows: list[RowResult]) -> bool:
    """Whether a level would squeeze the rows into a corner."""
    means = [row.means[mode, "f1"].mean for row in rows for mode in ("slow", "fast")]
    return value - max(means) > 2 * (max(means) - min(means) + 0.02)


def _gains(axes: Axes, rows: list[RowResult], score: str) -> None:
    """Gains over SFT with their 95% intervals, every seed's as a dot."""
    axes.axvline(0, color=MUTED, linewidth=1)
    for place, row in enumerate(rows):
        assert row.gain is not None  # of rows that have gained, or lost
        gain = row.gain.difference
        axes.plot([gain.low, gain.high], [place, place], color=SLOW, linewidth=2, solid_capstyle="butt")
        axes.plot(gain.points, place, "o", color=SLOW, markersize=6)
        seeds = [difference.points for difference in row.gain.by_seed.values()]
        axes.plot(seeds, np.full(len(seeds), place + 0.22), "o", color=SLOW, alpha=0.35, markersize=4, mew=0)
    axes.set_title(f"Points of slow {score} over SFT, 95% interval")
    _name_rows(axes, rows)


def _name_rows(axes: Axes, rows: list[RowResult]) -> None:
    axes.set_yticks(range(len(rows)), [label(row.row) for row in rows])
    axes.tick_params(axis="y", labelcolor="#1e293b")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False, axis="y")


def _held_out_curves(axes: Axes, rows: list[RowResult], colors: dict[str, str]) -> None:
    for row in rows:
        steps = sorted(set.intersection(*({step for step, _ in result.between} for result in row.results)))
        values = [POINTS * np.mean([_slow_f1_at(result, step) for result in row.results]) for step in steps]
        axes.plot(steps, values, marker="o", markersize=3.5, linewidth=1.6, **_look(row, colors))
    axes.set_title("Slow F1 of held-out clips over steps of RL, mean of the seeds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.legend(loc="best", ncols=2)


def _slow_f1_at(result: SeedResult, step: int) -> float:
    """Of the evaluation after a step of RL; NaN, a gap in the curve, where it has none."""
    score = dict(result.between)[step].score("slow", "f1")
    return np.nan if score is None else score


def _reward_curves(axes: Axes, rows: list[RowResult], colors: dict[str, str]) -> None:
    for row in rows:
        shortest = min(len(result.reward_curve[0]) for result in row.results)
        if shortest:
            mean = np.mean([result.reward_curve[1][:shortest] for result in row.results], axis=0)
            axes.plot(row.results[0].reward_curve[0][:shortest], smooth(mean), linewidth=1.6, **_look(row, colors))
    axes.set_title("Sampled reward over steps of RL, running mean")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _look(row: RowResult, colors: dict[str, str]) -> dict:
    style = _CONTROL if row.row.startswith("control_") else "-"
    return {"color": colors[row.row], "label": label(row.row), "linestyle": style}
