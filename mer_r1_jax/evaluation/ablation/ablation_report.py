"""Writes an ablation where people look: ablation.json, ablation.md with ablation.svg, ablation.html."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mer_r1_jax.evaluation.ablation.alikeness import OBJECTIVES
from mer_r1_jax.evaluation.ablation.comparison import PAPER_F1, PAPER_OFFICIAL, Ablation, RowResult, Versus, as_json
from mer_r1_jax.evaluation.ablation.figure import draw
from mer_r1_jax.evaluation.ablation.narrative import SAMPLED_NOTE, counted, describe, label, span
from mer_r1_jax.evaluation.ablation.results import LAST_STEPS, SeedResult
from mer_r1_jax.evaluation.bootstrap import POINTS, Mean, mean_over_seeds, signed
from mer_r1_jax.evaluation.figures import data_uri
from mer_r1_jax.evaluation.report_kit import NONE, Table, markdown, number, percent, render_page, text_table
from mer_r1_jax.foreign_text import for_markdown, printable
from mer_r1_jax.training import durable

FIGURE = "ablation.svg"


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
    paragraphs = describe(ablation)
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
    files = {FIGURE: picture, "ablation.md": text.encode(), "ablation.html": html.encode()}
    files["ablation.json"] = (content + "\n").encode()
    for name, data in files.items():
        durable.write_atomically(folder / name, lambda file, data=data: file.write(data))
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
        cells.append(_mean(row.means["fast", "f1"]))
        cells += [span(row.gain.difference) if row.gain else NONE, span(row.slow_minus_fast)]
        cells += [number(known.get(row.row), 2) for known in (PAPER_F1, PAPER_OFFICIAL)]
        rows.append(tuple(cells))
    best = max(
        (n for n, row in enumerate(ablation.rows) if not row.row.startswith("control_")),
        key=lambda n: ablation.rows[n].means["slow", "f1"].mean,
    )
    known_levels = (("F1 of the best constant answer", ablation.floor), ("of one who knows the cues", ablation.ceiling))
    levels = [f"{name} {percent(value)}" for name, value in known_levels if value is not None]
    return text_table(
        title="Arms",
        note=f"{len(ablation.clips)} held-out clips, in points: mean ± standard error over seeds; gains and gaps with "
        f"their 95% bootstrap interval over clips and seeds, paired. {'; '.join(levels)}. The two last columns are the "
        "paper's: means over sets of MER-UniBench, of another model on other data, here for their order only.",
        columns=(
            "row", "seeds", "slow precision", "slow recall", "slow F1", "fast F1", "slow F1 over SFT",
            "slow − fast F1", "paper: F1", "paper: official",
        ),
        rows=rows,
        strong=[best],
    )  # fmt: skip


def _versus(ablation: Ablation) -> Table:
    return text_table(
        title="Comparisons",
        note="Points of slow F1, the same clips and seeds on both sides, with 95% bootstrap intervals over clips and "
        "seeds. Clear: the interval excludes zero.",
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
        "yes" if versus.difference.is_clear else "no",
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
    return text_table(
        title="Every seed",
        note="In points; the gain over SFT of the same seed with its 95% interval over clips. " + SAMPLED_NOTE,
        columns=(
            "row", "seed", "slow P", "slow R", "slow F1", "fast P", "fast R", "fast F1", "slow F1 over SFT", "words",
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
