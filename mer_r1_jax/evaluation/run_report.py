"""report.html: one file that explains a run to somebody who saw nothing of it, without a network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.evaluation.bootstrap import signed
from mer_r1_jax.evaluation.clip_players import Patience
from mer_r1_jax.evaluation.narrative import headline, tell_training, warnings_of
from mer_r1_jax.evaluation.report_kit import (
    Cell,
    Row,
    Table,
    cut,
    number,
    percent,
    row,
    script_of,
    text_table,
    write_page,
)
from mer_r1_jax.evaluation.run_clips import BY_RL, VERDICTS, clip_section, named_step, without_home
from mer_r1_jax.evaluation.run_figures import run_figures
from mer_r1_jax.evaluation.run_record import (
    KeptEvaluation,
    ReportError,
    RunRecord,
    Stages,
    f1_difference,
    read_run,
    stages_of,
)
from mer_r1_jax.evaluation.run_title import run_name, title_of

__all__ = ["ReportError", "make_report"]

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


def make_report(
    run_dir: str | os.PathLike,
    media_root: str | os.PathLike | None = None,
    num_examples: int | None = None,
    under_way: str = "",
    patience: Patience | None = None,
) -> Path:
    """Writes `<run_dir>/report.html` from what lies in the folder.

    Args:
        run_dir: a run's folder, finished or not. What is missing there is named in the report.
        media_root: folder of the clips; None = `data.media_root` of the run's configuration, or the folder of its
            `data.eval_path`, or its `data.synthetic_dir`.
        num_examples: clips shown, the first ones in order; None = `eval.num_examples` of the configuration.
        under_way: how far the run has come, in words, while it goes on; "" says nothing about it.
        patience: with the clips' files; None waits for all of them.

    Returns:
        The path of the report.

    Raises:
        ReportError: there is no such folder, or the report cannot be written.
    """
    run = read_run(run_dir)
    missing = list(run.missing)
    stages = stages_of(run, next(iter(run.evaluations))) if run.evaluations else None
    section = clip_section(run, stages, media_root, num_examples, missing, patience) if stages else None
    values = dict(
        title=title_of(run),
        name=run_name(run),
        under_way=under_way,
        verdict=headline(stages) if stages else ("", ""),
        summary=tell_training(run),
        warnings=warnings_of(run),
        cards=_cards(stages.start, stages.end) if stages else [],
        tables=[_table(stages_of(run, benchmark)) for benchmark in run.evaluations],
        figures=run_figures(run),
        section=section if section and section.clips else None,
        verdicts=VERDICTS,
        by_rl=BY_RL,
        script=script_of("clip_filters.js"),
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


def _table(stages: Stages) -> Table:
    """Start and end side by side, slow and fast apart."""
    columns = []
    if stages.start is not None:
        is_sft = stages.start.phase == "sft"
        columns.append((f"After SFT (step {stages.start.step})" if is_sft else "Start of RL (after SFT)", stages.start))
    if stages.end_is_rl:
        columns.append((f"End ({named_step(stages)})", stages.end))
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
    return without_home(json.dumps(content, indent=2, ensure_ascii=False))
