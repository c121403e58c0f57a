"""Writes the answer files of an evaluation that never ran: random answers, right with a probability, to real clips."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from support.unibench_standins import CLIPS, clip_name

from mer_r1_jax.data.records import Record
from mer_r1_jax.emotion.wheels import Wheels, load_wheels
from mer_r1_jax.evaluation.benchmarks.benchmark_folder import BenchmarkFolder
from mer_r1_jax.evaluation.benchmarks.benchmark_reader import VALENCE, BenchmarkData, Coverage, truth_of
from mer_r1_jax.evaluation.benchmarks.sets import LAYOUTS, SYNTHETIC, metric_of
from mer_r1_jax.evaluation.benchmarks.word_protocol import wheels_digest

WORDS = ("happy", "sad", "angry", "surprised", "calm", "afraid", "disgusted", "worried", "bored")
SKILL = {"slow": (0.75, 0.1), "fast": (0.8, 0.6)}  # mode -> probability of a true word, and of a wrong one beside it
REASONING = "The brows are low <script>alert(1)</script> and the voice is flat."


def write_answers(out: Path, root: Path, names=(*LAYOUTS, SYNTHETIC), clips: int = 60, wheels: Wheels | None = None):
    """Writes answers and coverage of benchmarks into `out`; clips are those of the stand-ins below `root`, in turn."""
    digest = wheels_digest(wheels or load_wheels())
    folder = BenchmarkFolder(Path(out))
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        data = _data(name, Path(root), clips, rng)
        fingerprint = {"benchmark": name, "model": {"weights": "none"}, "confidence": {"wheels": digest}}
        with folder.open_answers(name, fingerprint) as log:
            for record in data.records:
                log.append(_line(record, mode, data.metric, rng) for mode in SKILL)
        wheels_used = {"wheel_dir": "", "variant": "unibench"}
        folder.write_coverage(data, wheels=wheels_used, unusable={"broken": "no frames"}, silent=["quiet"])
    return folder


def _data(name: str, root: Path, clips: int, rng: np.random.Generator) -> BenchmarkData:
    layout = LAYOUTS.get(name, LAYOUTS["ovmerd_plus"])
    metric = metric_of(name)
    records = []
    for number in range(clips):
        video = f"{layout.video}/{clip_name(layout.name, number % CLIPS)}{'.avi' if name == 'iemocap' else '.mp4'}"
        words = {
            "set_f1": lambda: tuple(rng.choice(WORDS[:7], 2, replace=False)),
            "hit": lambda: (str(rng.choice([c for c in layout.categories if c != "neutral"])),),
            "waf": lambda: (),
        }[metric]()
        extra = {VALENCE: float(rng.choice([-1.2, -0.4, 0.0, 0.6, 1.8]))} if metric == "waf" else {}
        if name == SYNTHETIC:
            extra["oracle"] = list(words)
        subtitle = f"Line {number} <b>bold</b>"
        message = {"role": "user", "content": "Feel?"}
        records.append(
            Record(
                id=f"clip-{number}",
                messages=(message,),
                videos=(video,),
                subtitle=subtitle,
                solution=tuple(map(str, words)),
                extra=extra,
            )
        )
    coverage = Coverage(official=None if name == SYNTHETIC else layout.size, labelled=clips + 1, missing_clip=("gone",))
    absent = {"gone": truth_of(records[0], metric)}
    return BenchmarkData(
        name=name,
        metric=metric,
        media_root=root / layout.folder,
        records=tuple(records),
        coverage=coverage,
        absent=absent,
    )


def _line(record: Record, mode: str, metric: str, rng: np.random.Generator) -> dict:
    truth = truth_of(record, metric)
    right, wrong = SKILL[mode]
    true = list(record.solution) or [("happy" if truth > 0 else "sad") if truth else "calm"]
    words = [str(word) for word in true if rng.random() < right]
    if rng.random() < wrong or not words:
        words.append(str(rng.choice([word for word in WORDS if word not in true])))
    sure = [rng.beta(5, 2) if word in true else rng.beta(2, 3) for word in words]
    line = {
        "id": record.id,
        "mode": mode,
        "record": "0",
        "video": record.videos[0],
        "subtitle": record.subtitle,
        "truth": truth,
        "text": f"<think>{REASONING}</think>\n<answer>{', '.join(words)}</answer>",
        "reasoning": REASONING if mode == "slow" else "",
        "answer": ", ".join(words),
        "words": words,
        "confidences": [[round(float(p), 6)] * 5 for p in sure] if metric != "waf" else [[None] * 5 for _ in sure],
        "tokens": 30 if mode == "slow" else 9,
        "truncated": False,
        "well_formed": mode == "slow",
    }
    return line | ({"oracle": record.extra["oracle"]} if "oracle" in record.extra else {})


def request_of(out: Path, **changes):
    """A request for everything that is in the folder."""
    from mer_r1_jax.evaluation.benchmarks.sets import Request

    names = tuple(file.stem for file in sorted((Path(out) / "answers").glob("*.jsonl")))
    return dataclasses.replace(Request(benchmarks=names, modes=("slow", "fast"), out=Path(out)), **changes)
