"""A stand-in for MME-Emotion: its released layout with two short real clips a task, and a judge that follows a rule.

python tests/support/mme_standin.py DIR
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.clips import make_clip

FACES = ["happy", "sad", "angry", "surprise", "neutral"]
DEGREES = ["strong negative", "negative", "weak negative", "neutral", "weak positive", "positive", "strong positive"]
# Task -> label set, and (video_id, label, reasoning, answer) of its items; endings and separators as in the release.
ITEMS: dict[str, tuple[list[str], list[tuple[str, str, str, str]]]] = {
    "ER-Lab": (
        ["Anger", "Sadness", "Happiness", "Frustration", "Neutral"],
        [
            ("IEMOCAP/video/Ses01_F000.mp4", "Anger", "She shouts. Her fist is closed.", "anger"),
            ("IEMOCAP/video/Ses01_M001.mp4", "Sadness", "He laughs, which is wrong.", "happiness"),
        ],
    ),
    "ER-Wild": (
        FACES,
        [
            ("CAER/video/test_Happy_0001.avi", "happy", "A smile. Wrong: rain falls.", "happy"),
            ("MC-EIU/video/dia_1_utt_1.mkv", "sad", "", "sad"),
        ],
    ),
    "Noise-ER": (
        FACES,
        [
            ("MER2024/video/sample_00000001.mp4", "angry", "It hisses.", "sad"),
            ("MER2024/video/sample_00000002.mp4", "neutral", "Still.", "neutral"),
        ],
    ),
    "FG-ER": (
        ["Peace", "Anticipation", "Fear", "Doubt/Confusion", "Engagement"],
        [
            ("BOLD/video/a_0.mp4", "Peace;Anticipation;Fear", "She waits.", "Fear, Peace, Pain"),
            ("BOLD/video/b_0.mp4", "Doubt/Confusion", "He frowns.", "Doubt/Confusion"),
        ],
    ),
    "ML-ER": (
        ["happiness", "anger", "disgust", "sadness", "surprise"],
        [
            ("MAFW/video/00001.mp4", "anger,disgust", "Teeth. A wrong turn.", "disgust"),
            ("CMU-MOSEI/video/x_1.mp4", "sadness,surprise", "Eyes wide.", "sadness, surprise"),
        ],
    ),
    "SA": (
        ["neutral", "positive", "negative"],
        [
            ("CMU-MOSI/video/c_1.mp4", "negative", "He praises it, wrong.", "positive"),
            ("CH-SIMS_v2_s/video/aqgy_1.mp4", "positive", "A calm voice.", "positive"),
        ],
    ),
    "FG-SA": (
        DEGREES,
        [
            ("CMU-MOSI/video/d_1.mp4", "strong positive", "Praise.", "positive"),
            ("CMU-MOSI/video/e_1.mp4", "weak negative", "A shrug.", "weak negative"),
        ],
    ),
    "IR": (
        ["neutral", "questioning", "consoling", "agreeing"],
        [
            ("MC-EIU/video/dia_2_utt_1_ch.mkv", "consoling", "A hand on a shoulder.", "consoling"),
            ("MC-EIU/video/dia_3_utt_1_ch.mkv", "questioning", "Wrong tone. Wrong face.", "agreeing"),
        ],
    ),
}  # fmt: skip
COUNT = sum(len(items) for _, items in ITEMS.values())


def write_standin(root: Path, seconds: float = 0.6) -> Path:
    """Writes the stand-in and returns its folder; `responses/` holds a model's answers in the official form."""
    for number, (task, (label_set, items)) in enumerate(ITEMS.items()):
        stem = task.replace("-", "_")
        questions, clues, responses = [], [], []
        for place, (video_id, label, reasoning, answer) in enumerate(items):
            make_clip(
                root / task / video_id, seconds=seconds, size=(56, 56), seed=10 * number + place, **_codec(video_id)
            )
            response = f"<think>{reasoning}</think>\n<answer>{answer}</answer>"
            questions.append({"video_id": video_id, "label": label, "label_set": label_set})
            clues.append({"video_id": video_id, "audio_clue": f"A tone of {label}.\n", "ground_truth": label})
            # ER-Lab's responses name the clip without its ending.
            named = video_id.removesuffix(".mp4") if task == "ER-Lab" else video_id
            responses.append({"video_id": named, "ground_truth": label, "model_response": response})
        _write(root / task / "question" / f"{stem}.json", questions)
        _write(root / task / "audio_clue" / f"{stem}_qwen2_audio_clues.json", clues)
        _write(root / "responses" / f"{stem}.json", responses)
    return root


def _codec(video_id: str) -> dict[str, str]:
    return {"video_codec": "mpeg4", "audio_codec": "mp3"} if video_id.endswith(".avi") else {}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=2))


def is_extraction(body: dict[str, Any]) -> bool:
    """Whether a request asks for steps; else it asks for ratings."""
    return body["messages"][0]["content"].startswith("You split")


def data_of(body: dict[str, Any]) -> dict[str, Any]:
    """The JSON object a request is about."""
    message = body["messages"][7 if is_extraction(body) else 1]["content"]
    return json.loads(message if isinstance(message, str) else message[0]["text"])


def follow_rule(body: dict[str, Any]) -> str:
    """Steps: the reasoning's sentences, then the answer. Ratings: 0 where a step says "wrong"; the last by name."""
    data = data_of(body)
    if is_extraction(body):
        think = re.search(r"<think>(.*?)</think>", data["answer"], re.DOTALL)
        answer = re.search(r"<answer>(.*?)</answer>", data["answer"], re.DOTALL)
        steps = [part.strip() for part in think.group(1).split(".") if part.strip()] if think else []
        steps.append(f"The answer is {answer.group(1) if answer else None}.")
        return "<steps>\n" + "\n".join(f"Step {n}: {step}" for n, step in enumerate(steps, start=1)) + "\n</steps>"
    *earlier, last = data["steps"].values()
    named = [word.strip().lower() for word in last.removeprefix("The answer is ").rstrip(".").split(",")]
    hits = sum(label.lower() in named for label in data["true_labels"])
    ratings = [f"{int('wrong' not in step.lower())}/1" for step in earlier] + [f"{hits}/{len(data['true_labels'])}"]
    return "<score>" + ", ".join(f"Step {n}: {rating}" for n, rating in enumerate(ratings, start=1)) + "</score>"


if __name__ == "__main__":
    print(write_standin(Path(sys.argv[1])))
