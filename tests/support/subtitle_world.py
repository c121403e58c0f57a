"""A world in which only the words matter, and a policy trained on it in seconds.

The subtitle decides which cue the reasoning names, and the named cue alone decides the answer; in some training records
reasoning and answer contradict the subtitle together, so the answer has to be read off the reasoning. Frames and sound
differ from clip to clip and mean nothing. So it is known beforehand what every swap must do.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

from support.clips import make_clip
from support.tiny_tokenizer import tiny_tokenizer

from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.config.schema import RunConfig

# subtitle, what the reasoning says, answer
CUES = (
    ("I never wanted it to end.", "The brows are raised", "surprised"),
    ("the words are worried", "the voice trembles", "afraid"),
    ("what a joyful person", "calm is the person", "happy"),
    ("it is disgusted with you", "furious brows", "angry"),
)
FILMS = 5  # clips whose frames and sound are shown; none says anything
HELD_OUT = 12


def write_world(folder: Path) -> Path:
    """Writes clips, sft.jsonl, eval.jsonl and the tokenizer; returns the folder."""
    for number in range(FILMS):
        make_clip(folder / f"{number}.mp4", seconds=1.0, size=(56, 56), seed=number, frequency=200.0 * (number + 1))
    sft = []
    for spoken, film, copy in itertools.product(range(4), range(FILMS), range(4)):
        thought = spoken if copy else (spoken + 1 + film % 3) % 4  # one in four contradicts the subtitle
        sft.append(_row(f"sft-{len(sft)}", film, CUES[spoken], CUES[thought]))
    held_out = [_row(f"eval-{n}", n % FILMS, CUES[n % 4], CUES[n % 4]) for n in range(HELD_OUT)]
    for row in held_out:
        del row["reasoning"]
    for name, rows in (("sft", sft), ("eval", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def _row(name: str, film: int, spoken: tuple, thought: tuple) -> dict:
    return {
        "id": name,
        "question": "What does the person feel?",
        "videos": [f"{film}.mp4"],
        "audios": [f"{film}.mp4"],
        "subtitle": spoken[0],
        "reasoning": thought[1],
        "solution": [thought[2]],
    }


def run_config(world: Path, runs: Path, steps: int = 100) -> RunConfig:
    """SFT on the world and an export; held-out clips are left to whoever asks."""
    values = dataclasses.asdict(RunConfig(name="subtitles"))
    values["model"] |= {"preset": "tiny", "tokenizer_path": str(world / "tokenizer"), "compute_dtype": "float32"}
    values["model"] |= {"initializer_range": 0.05, "text_layers": 2, "vision_layers": 1, "audio_layers": 1}
    values["media"] |= {"min_frames": 2, "max_frames": 2, "video_min_pixels": 28 * 28, "video_max_pixels": 56 * 56}
    values["media"] |= {"max_aspect_ratio": 4.0, "max_audio_seconds": 1.0, "decode_workers": 0}
    values["data"] |= {"sft_path": str(world / "sft.jsonl")}
    values["data"] |= {"cache_dir": str(world / "cache"), "prompt_buckets": (160,), "max_prompt_length": 160}
    values["sft"] |= {"max_steps": steps, "prompts_per_step": 8, "max_completion_length": 40}
    values["sft"]["optimizer"] |= {"learning_rate": 4e-3}
    values["rl"] |= {"max_completion_length": 40, "max_fast_context": 32, "max_answer_words": 4}
    values["eval"] |= {"prompts_per_batch": 16}
    values["train"] |= {"output_dir": str(runs), "save_steps": 1000, "report_to": (), "log_completions": False}
    return from_mapping(values)
