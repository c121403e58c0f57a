"""report.html of an MME-Emotion evaluation: its scores beside the paper's, coverage, and items. Needs no model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mer_r1_jax.evaluation.bootstrap import signed
from mer_r1_jax.evaluation.clip_frames import clip_strips
from mer_r1_jax.evaluation.mme.mme_folder import RESULTS, MmeFolder
from mer_r1_jax.evaluation.mme.mme_reader import Benchmark, Item
from mer_r1_jax.evaluation.mme.mme_tasks import (
    COT,
    METRICS,
    PAPER_COT,
    PAPER_JUDGE,
    PAPER_OVERALL,
    TASKS,
    TOTAL,
    MmeError,
)
from mer_r1_jax.evaluation.mme.stages import Asked
from mer_r1_jax.evaluation.report_kit import FEW_CLIPS, NONE, Cell, Row, Table, cut, number, row, write_page
from mer_r1_jax.evaluation.result_log import FAILED, read_log

TEXT_SHOWN = 1200  # characters of a response
TITLES = {"slow": "slow", "fast": "fast", "response": "given responses"}
_STAGE_WORDS = {"predict": "no answer", "steps": "no steps", "judge": "no ratings"}


def make_mme_report(out: str | os.PathLike, num_examples: int = 6) -> Path:
    """Writes `<out>/report.html` from what lies in the folder.

    Args:
        out: the folder of an evaluation.
        num_examples: items of each protocol and mode shown, the first of each task in turn.

    Returns:
        The report's path.

    Raises:
        MmeError: there is no score, or a file is damaged.
    """
    folder = MmeFolder.of(out)
    scores = folder.scores()
    if not scores:
        raise MmeError(f"{folder.path}: holds no scores; evaluate something there first")
    benchmark, _ = folder.read_items()
    return write_page(
        folder.report,
        "mme/mme_report.html.jinja",
        title=f"MME-Emotion: {Path(out).resolve().name}",
        paper_judge=PAPER_JUDGE,
        protocols=[_protocol(folder, benchmark, score, num_examples) for score in scores],
        made_by=json.dumps(scores[0]["predictions"], indent=1, ensure_ascii=False),
    )


def _protocol(folder: MmeFolder, benchmark: Benchmark, score: Mapping[str, Any], count: int) -> dict[str, Any]:
    modes = {
        mode: table for mode, table in score["modes"].items() if table["pooled"]["rated"] or len(score["modes"]) == 1
    }
    return {
        "description": score["protocol"]["description"],
        "scores": _scores(modes),
        "overall": PAPER_OVERALL,
        "warnings": _warnings(score),
        "difference": _difference(score["slow_minus_fast"]),
        "coverage": _coverage(modes),
        "examples": _examples(folder, benchmark, score, list(modes), count),
        "fingerprint": json.dumps(score["protocol"], indent=1, ensure_ascii=False),
    }


def _scores(modes: Mapping[str, Mapping[str, Any]]) -> Table:
    """The main table: of each mode, counts, the three scores and CoT with failures as zero; the paper's beside them."""
    tables = list(modes.values())
    tasks = [task for task in TASKS if any(task in table["tasks"] for table in tables)]
    rows = [_row(task, TASKS[task].title, [table["tasks"].get(task) for table in tables]) for task in tasks]
    rows.append(_row("pooled", "all items together", [table["pooled"] for table in tables], "strong"))
    rows.append(_row("macro", "mean over tasks", [table["macro"] for table in tables]))
    groups = [Cell(TITLES.get(mode, mode), kind="group", span=2 + len(METRICS)) for mode in modes]
    own = ["rated", *("CoT" if metric == COT else metric.capitalize() for metric in METRICS), "CoT,\nfailures 0"]
    paper = [Cell(model, kind="paper") for model in PAPER_OVERALL]
    return Table(
        heads=(
            Row((Cell(""), *groups, Cell("the paper's,\nCoT", kind="group paper", span=len(paper)))),
            Row((Cell("Task"), *map(Cell, own * len(modes)), *paper)),
        ),
        rows=tuple(rows),
        kind="numbers main",
    )


def _row(name: str, title: str, tables: list[Mapping[str, Any] | None], kind: str = "") -> Row:
    cells = []
    for table in tables:
        cells.append(Cell(f"{table['rated']} of {table['n']}" if table and "n" in table else ""))
        cells += [_cell(table["drop"][metric] if table else None) for metric in METRICS]
        cells.append(_cell(table["zero"][COT] if table else None))
    if name == "pooled":
        paper = [f"{PAPER_OVERALL[model][COT]:.1f}" for model in PAPER_COT]
    else:
        paper = [f"{by_task[name]:.1f}" if name in by_task else "" for by_task in PAPER_COT.values()]
    return row(Cell(name, note=title), [*cells, *(Cell(value, kind="paper") for value in paper)], kind)


def _cell(score: Mapping[str, float | None] | None) -> Cell:
    if score is None or score["score"] is None:
        return Cell(NONE)
    return Cell(number(score["score"]), "" if score["low"] is None else f"{score['low']:.1f}–{score['high']:.1f}")


def _warnings(score: Mapping[str, Any]) -> list[str]:
    judge = score["protocol"]["judge"]
    lines = ["The judge is the paper's, but the prompts are not: compare with care."]
    if judge != PAPER_JUDGE:
        lines = [
            f"The judge is {judge}; the paper's was {PAPER_JUDGE}. Scores of different judges, and of different "
            "prompts, cannot be compared: the paper's columns are there for orientation."
        ]
    for mode, table in score["modes"].items():
        lines += [f"{TITLES.get(mode, mode)}: {line}" for line in _mode_warnings(table["pooled"])]
    if score["absent_tasks"]:
        lines.append(f"Tasks that are not in the data folder: {', '.join(score['absent_tasks'])}.")
    if score["limit"]:
        lines.append(f"Only the first {score['limit']} items of each task were asked.")
    if score["without_clue"]:
        lines.append(
            f"Items without an audio clue: {score['without_clue']}; the judge was told that the sound is unknown."
        )
    if not score["protocol"]["images"]:
        lines.append("The judge saw no frames.")
    return lines


def _mode_warnings(pooled: Mapping[str, Any]) -> list[str]:
    lines = []
    if pooled["rated"] < pooled["n"]:
        lines.append(
            f"{pooled['n'] - pooled['rated']} of {pooled['n']} items have no ratings. The scores leave them out, as "
            "the official code does; the last column counts them as zero."
        )
    if pooled["n"] < FEW_CLIPS:
        lines.append(f"{pooled['n']} items are few; the whole set has {TOTAL}.")
    if pooled["without_reasoning"]:
        lines.append(
            f"{pooled['without_reasoning']} rated answers have no step of reasoning, so that their reasoning scores 0."
        )
    return lines


def _difference(paired: Mapping[str, Any] | None) -> str:
    if paired is None:
        return ""
    parts = []
    for metric in METRICS:
        found, name = paired[metric], "CoT" if metric == COT else metric
        parts.append(f"{name} {signed(found['score'])} ({signed(found['low'])} to {signed(found['high'])})")
    return f"Slow minus fast over the {paired['items']} items rated in both: {', '.join(parts)} points."


def _coverage(modes: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for mode, table in modes.items():
        for task, counts in table["tasks"].items():
            reasons = [
                f"{_STAGE_WORDS[stage]}: {count} {reason}"
                for stage, by_reason in counts["failed"].items()
                for reason, count in by_reason.items()
            ]
            cells = [TASKS[task].count, counts["n"], counts["rated"], number(counts["mean_steps"])]
            cells = [*map(str, [*cells, counts["without_reasoning"]]), Cell("; ".join(reasons) or "none", kind="text")]
            rows.append(row(TITLES.get(mode, mode), [Cell(task, kind="text"), *cells]))
    heads = ("in the release", "asked", "rated", "steps, mean", "without reasoning")
    first, last = (Cell("Answers"), Cell("Task", kind="text")), Cell("not rated, and why", kind="text")
    return Table((Row((*first, *map(Cell, heads), last)),), tuple(rows))


def _examples(
    folder: MmeFolder, benchmark: Benchmark, score: Mapping[str, Any], modes: list[str], count: int
) -> list[dict[str, Any]]:
    """The first item of each task, then the second, and so on: in order, so that none is chosen."""
    _, predictions = read_log(folder.predictions, RESULTS)
    _, steps = read_log(folder.path / f"steps.{score['protocol']['steps_key']}.jsonl", RESULTS)
    _, judged = read_log(folder.path / f"judge.{score['protocol']['key']}.jsonl", RESULTS)
    by_task: dict[str, list[Item]] = {}
    for item in benchmark.items:
        by_task.setdefault(item.task, []).append(item)
    longest = max(map(len, by_task.values()), default=0)
    in_turn = [items[place] for place in range(longest) for items in by_task.values() if place < len(items)]
    shown = in_turn[:count]
    strips = clip_strips([item.video for item in shown], benchmark.root)
    examples = []
    for item, strip in zip(shown, strips, strict=True):
        if item.video is None:
            strip = dataclasses.replace(strip, problem="the clip is not there")
        answers = [
            _answer(
                TITLES.get(mode, mode), *(log.get(Asked(item, mode).key, {}) for log in (predictions, steps, judged))
            )
            for mode in modes
        ]
        examples.append(
            {
                "id": f"{item.task} · {item.video_id}",
                "truth": item.labels,
                "subtitle": None,
                "strip": strip,
                "answers": answers,
            }
        )
    return examples


def _answer(mode: str, prediction: Mapping, split: Mapping, rated: Mapping) -> dict[str, Any]:
    text = prediction.get("text", "")
    scores = list(rated.get("scores", ()))
    steps = list(split.get("steps", ()))
    rated_steps = (
        list(zip(steps, scores, strict=True)) if len(scores) == len(steps) else [(step, "–") for step in steps]
    )
    problems = [row["message"] for row in (prediction, split, rated) if FAILED in row]
    return {
        "mode": mode,
        "text": cut(text, TEXT_SHOWN),
        "steps": rated_steps,
        "problem": problems[0] if problems else "",
    }
