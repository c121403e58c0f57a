"""Writes a run folder as a finished training leaves it: real clips, metrics, evaluations, completions."""

import json
from pathlib import Path

import av
import numpy as np

from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.run_directory import RunDirectory
from mer_r1_jax.training.metrics import MetricsWriter

TRUTHS = (["happy", "surprised"], ["sad"], ["angry", "disgusted"], ["afraid"])


def write_clip(path, seconds=1, size=48):
    """An H.264 clip whose grey level rises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(10 * seconds):
            picture = np.full((size, size, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def answer(words, truth, reasoning):
    """An answer's entry in the samples; its scores count exact words."""
    hits = len(set(words) & set(truth))
    precision, recall = hits / max(1, len(words)), hits / len(truth)
    think = f"<think>{reasoning}</think>\n<answer>{', '.join(words)}</answer>"
    return {
        "text": think,
        "reasoning": reasoning,
        "words": words,
        "categories": [[]] * 5,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(1e-9, precision + recall),
        "length": len(think) // 4,
        "confidence_correct": 0.6,
        "confidence_wrong": 0.2,
        "confidences": [[0.8, None, 0.9, 0.7, 0.8] for _ in words],
    }


def write_evaluation(run, phase, step, skill, clips, reasoning="the brows are low", records=None):
    """One evaluation in which a clip's slow answer is right with probability `skill`, the fast one with 0.5."""
    rng = np.random.default_rng([step, len(phase)])
    rows = []
    for number in range(clips):
        record = records[number] if records else None
        truth = record["solution"] if record else list(TRUTHS[number % len(TRUTHS)])
        slow = truth if rng.random() < skill else ["bored"]
        fast = [*truth[:1], "bored"] if rng.random() < 0.5 else ["calm", *truth]
        rows.append(
            {
                "id": record["id"] if record else f"clip-{number}",
                "video": record["videos"][0] if record else f"clips/{number}.mp4",
                "audio": record["audios"][0] if record else f"clips/{number}.mp4",
                "subtitle": record["subtitle"] if record else f"line {number}",
                "truth": truth,
                "slow": answer(slow, truth, reasoning),
                "fast": answer(fast, truth, None),
            }
        )

    def mean(mode, name):
        return float(np.mean([row[mode][name] for row in rows]))

    scores = {
        mode: {
            name: mean(mode, name) for name in ("precision", "recall", "f1", "confidence_correct", "confidence_wrong")
        }
        | {
            "distinct_answers": len({tuple(row[mode]["words"]) for row in rows}),
            "mean_words": float(np.mean([len(row[mode]["words"]) for row in rows])),
            "mean_length": mean(mode, "length"),
            "format_rate": 1.0,
            "truncated_rate": 0.0,
        }
        for mode in ("slow", "fast")
    }
    summary = {"step": step, "phase": phase, "benchmark": "synthetic", "n": clips, **scores}
    summary |= {"majority_answer": ["happy", "sad"], "majority_f1": 0.31, "oracle_f1": 0.85}
    stem = run.eval / f"synthetic_{step:05d}"
    stem.with_suffix(".samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    atomic_files.write_json(stem.with_suffix(".json"), summary)


def write_run(folder, *, rl_steps=40, sft_steps=60, clips=8, reasoning="the brows are low", config=None, records=None):
    """Writes the folder and returns its path; the clips lie in `<folder>/clips` unless `records` bring their own."""
    folder = Path(folder)
    config = {"name": "tiny", "rl": {"arm": "mer_r1"}, "eval": {"num_examples": clips}, **(config or {})}
    rng = np.random.default_rng(0)
    with RunDirectory.open(folder, config) as run, MetricsWriter(run) as writer:
        for step in range(1, sft_steps + 1):
            loss = 3 * np.exp(-step / 20) + 0.6 + rng.normal(0, 0.05)
            writer.write("sft", step, {"loss": loss, "grad_norm": 1 + rng.random(), "learning_rate": 1e-3})
        for step in range(1, rl_steps + 1):
            gain = step / rl_steps
            writer.write(
                "rl",
                step,
                {
                    "loss": rng.normal(0, 0.01),
                    "reward": 1 + 0.5 * gain + rng.normal(0, 0.1),
                    "rewards/recall/mean": 0.5 + 0.2 * gain + rng.normal(0, 0.05),
                    "rewards/precision/mean": 0.5 + 0.3 * gain + rng.normal(0, 0.05),
                    "confidence/slow": 0.5 + 0.2 * gain + rng.normal(0, 0.02),
                    "confidence/fast": 0.45 + rng.normal(0, 0.02),
                    "completions/mean_length": 50 - 5 * gain + rng.normal(0, 1),
                    "completions/clipped_ratio": 0.01,
                    "kl": 0.1 * gain + 0.01 * rng.random(),
                    "entropy": 1 - 0.3 * gain,
                    "grad_norm": float("nan") if step == 3 else 1 + rng.random(),
                    "step_time": 1 + 0.1 * rng.random(),
                    "skipped_steps": step >= 3,
                    "data/skipped": step % 20 == 0,
                },
            )
        columns = {"prompt": ["a question"] * 9, "completion": [reasoning] * 9, "reward": [0.5] * 9}
        writer.write_completions(rl_steps, columns)
        if records is None:
            for number in range(clips):
                write_clip(folder / "clips" / f"{number}.mp4")
        # Evaluations count the steps of both phases.
        write_evaluation(run, "rl", sft_steps, 0.3, clips, reasoning, records)
        write_evaluation(run, "rl", sft_steps + rl_steps // 2, 0.6, clips, reasoning, records)
        write_evaluation(run, "rl", sft_steps + rl_steps, 0.9, clips, reasoning, records)
    return folder
