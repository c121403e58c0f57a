"""report.html of an MME-Emotion evaluation: its scores beside the paper's, coverage, and items. Needs no model."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mer_r1_jax.evaluation.clip_strip import clip_strips
from mer_r1_jax.evaluation.mme.errors import MmeError
from mer_r1_jax.evaluation.mme.folder import RESULTS, MmeFolder
from mer_r1_jax.evaluation.mme.reader import Benchmark, Item
from mer_r1_jax.evaluation.mme.stages import Asked
from mer_r1_jax.evaluation.mme.tasks import COT, METRICS, PAPER_COT, PAPER_JUDGE, PAPER_OVERALL, TASKS, TOTAL
from mer_r1_jax.evaluation.page import render_page
from mer_r1_jax.evaluation.result_log import FAILED, read_log
from mer_r1_jax.storage import durable

FEW_ITEMS = 100  # below this a score says little
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
    html = render_page(
        "mme/report.html.jinja",
        title=f"MME-Emotion: {Path(out).resolve().name}",
        written=time.strftime("%Y-%m-%d %H:%M"),
        metrics=METRICS,
        paper_judge=PAPER_JUDGE,
        protocols=[_protocol(folder, benchmark, score, num_examples) for score in scores],
        made_by=json.dumps(scores[0]["predictions"], indent=1, ensure_ascii=False),
    )
    durable.write_atomically(folder.report, lambda file: file.write(html.encode("utf-8", "replace")))
    return folder.report


def _protocol(folder: MmeFolder, benchmark: Benchmark, score: Mapping[str, Any], count: int) -> dict[str, Any]:
    modes = {
        mode: table for mode, table in score["modes"].items() if table["pooled"]["rated"] or len(score["modes"]) == 1
    }
    tasks = [task for task in TASKS if any(task in table["tasks"] for table in modes.values())]
    rows = [_row(TASKS[task].title, task, [table["tasks"].get(task) for table in modes.values()]) for task in tasks]
    rows.append(_row("all items together", "pooled", [table["pooled"] for table in modes.values()], strong=True))
    rows.append(_row("mean over tasks", "macro", [table["macro"] for table in modes.values()]))
    return {
        "description": score["protocol"]["description"],
        "modes": [TITLES.get(mode, mode) for mode in modes],
        "rows": rows,
        "overall": PAPER_OVERALL,
        "warnings": _warnings(score),
        "difference": _difference(score["slow_minus_fast"]),
        "coverage": [line for mode, table in modes.items() for line in _coverage(mode, table)],
        "examples": _examples(folder, benchmark, score, list(modes), count),
        "fingerprint": json.dumps(score["protocol"], indent=1, ensure_ascii=False),
    }


def _row(title: str, name: str, tables: list[Mapping[str, Any] | None], strong: bool = False) -> dict[str, Any]:
    """A line of the main table: of each mode, counts, the three scores and CoT with failures as zero."""
    cells = []
    for table in tables:
        found = [table["drop"][metric] for metric in METRICS] if table else [None] * len(METRICS)
        counts = f"{table['rated']} of {table['n']}" if table and "n" in table else ""
        cells.append(
            {"counts": counts, "scores": list(map(_cell, found)), "zero": _cell(table["zero"][COT] if table else None)}
        )
    if name == "pooled":
        paper = [f"{PAPER_OVERALL[model][COT]:.1f}" for model in PAPER_COT]
    else:
        paper = [f"{row[name]:.1f}" if name in row else "" for row in PAPER_COT.values()]
    return {"title": title, "name": name, "cells": cells, "paper": paper, "strong": strong}


def _cell(score: Mapping[str, float | None] | None) -> dict[str, str]:
    if score is None or score["score"] is None:
        return {"value": "–", "interval": ""}
    interval = "" if score["low"] is None else f"{score['low']:.1f}–{score['high']:.1f}"
    return {"value": f"{score['score']:.1f}", "interval": interval}


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
    if pooled["n"] < FEW_ITEMS:
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
        parts.append(f"{name} {found['score']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})")
    return f"Slow minus fast over the {paired['items']} items rated in both: {', '.join(parts)} points."


def _coverage(mode: str, table: Mapping[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for task, row in table["tasks"].items():
        reasons = [
            f"{_STAGE_WORDS[stage]}: {count} {reason}"
            for stage, counts in row["failed"].items()
            for reason, count in counts.items()
        ]
        steps = "–" if row["mean_steps"] is None else f"{row['mean_steps']:.1f}"
        lines.append(
            {
                "mode": TITLES.get(mode, mode),
                "task": task,
                "released": TASKS[task].count,
                "n": row["n"],
                "rated": row["rated"],
                "steps": steps,
                "without_reasoning": row["without_reasoning"],
                "failed": "; ".join(reasons) or "none",
            }
        )
    return lines


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
        answers = [
            _answer(
                TITLES.get(mode, mode), *(log.get(Asked(item, mode).key, {}) for log in (predictions, steps, judged))
            )
            for mode in modes
        ]
        examples.append(
            {
                "id": item.video_id,
                "task": item.task,
                "truth": item.labels,
                "strip": strip.source,
                "problem": "the clip is not there" if item.video is None else strip.problem or "",
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
        "text": text if len(text) <= TEXT_SHOWN else text[:TEXT_SHOWN] + " …",
        "steps": rated_steps,
        "problem": problems[0] if problems else "",
    }
