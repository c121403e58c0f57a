"""The job of `mer-r1 bench --platform=gpu`: one MER-R1 step of 3B at its real size, for one card.

Records, tags and answers are those of the synthetic world, drawn out to the length that reasoning has. Pictures and
sound are random, since no part of a step is faster for what they show, and so are weights. The settings are those that
ship for one card of 80 GB (`omni_3b.py:h100:1`): trained parameters in float32, moments and reference in bfloat16.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from typing import Any

import numpy as np

from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.data.records import Record
from mer_r1_jax.media.clips import AudioInput, Clips, laid_out
from mer_r1_jax.media.mel import mel_frames
from mer_r1_jax.media.prompt import PromptBuilder
from mer_r1_jax.peers.omni import OmniJob, make_job
from mer_r1_jax.planning.flops import TRAINED, text_flops
from mer_r1_jax.run.setup import Setup, make_setup
from mer_r1_jax.training.prompts import LoadedPrompt

SAMPLING_RATE = 16_000  # of sound, in Hz


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealSize:
    """Sizes of a job.

    Attributes:
        preset: of the model.
        dtype: the policy computes in on both sides.
        prompts, generations: of a step.
        completion: tokens sampled for each; those both sides learn from have 80 to 95 % of them.
        longest_prompt: the one bucket, in tokens.
        frames, height, width: of the videos; sides are multiples of 28.
        audio_seconds: of the longest track; each further one is half a second shorter.
        torch_rows: rows of a micro-batch of the torch loop.
    """

    preset: str
    dtype: str
    prompts: int
    generations: int
    completion: int
    longest_prompt: int
    frames: int
    height: int
    width: int
    audio_seconds: float
    torch_rows: int


SIZES = {
    "3b": RealSize(
        preset="3b",
        dtype="bfloat16",
        prompts=4,
        generations=8,
        completion=512,
        longest_prompt=2048,
        frames=16,
        height=252,
        width=392,
        audio_seconds=25.0,
        torch_rows=8,
    ),
    # For the tests: both sides must learn the same from it.
    "tiny": RealSize(
        preset="tiny",
        dtype="float32",
        prompts=2,
        generations=2,
        completion=192,
        longest_prompt=512,
        frames=4,
        height=56,
        width=84,
        audio_seconds=4.0,
        torch_rows=3,
    ),
}


def real_job(size: RealSize, folder: pathlib.Path, devices: Any = None, seed: int = 0) -> OmniJob:
    """The job of a size.

    Args:
        size: of it.
        folder: where the world's few clips are made, which give the records.
        devices: of the mesh; None takes all.
        seed: of pictures and sound.
    """
    setup = make_setup(from_mapping(_configuration(size, folder)), devices=devices)
    try:
        by_clip = {record.videos: record for record in setup.data.sft}  # a clip has a record of every annotator
        records = [
            _drawn_out(setup, record, int(size.completion * (0.95 - 0.05 * number)))
            for number, record in enumerate(list(by_clip.values())[: size.prompts])
        ]
        return make_job(setup, records, _prompts(setup, records, size, np.random.default_rng(seed)))
    finally:
        setup.close()


def useful_flops(job: OmniJob) -> float:
    """Operations that an update is there for: three passes over real tokens, each prompt once, none done again."""
    text = job.setup.backbone.config.text
    passes = 0.0
    for prompt, length_G in zip(job.prompts, job.script.length_BG, strict=True):
        sets = tuple((1, int(length)) for length in length_G)
        passes += text_flops(text, prompt=len(prompt.ids), sets=sets, scored=int(length_G.sum()))
    return TRAINED * passes


def _configuration(size: RealSize, folder: pathlib.Path) -> Any:
    config = importlib.import_module("mer_r1_jax.configs.omni_3b").get_config("h100:1")
    config.model.preset, config.model.compute_dtype = size.preset, size.dtype
    rl, data, media = config.rl, config.data, config.media
    rl.prompts_per_step, rl.num_generations, rl.max_completion_length = size.prompts, size.generations, size.completion
    # A schedule would only make the two sides' learning rates harder to compare.
    rl.optimizer.lr_scheduler_type, rl.optimizer.warmup_ratio = "constant", 0.0
    rl.optimizer.dtype = size.dtype
    rl.max_steps = config.sft.max_steps = 1
    data.max_prompt_length, data.prompt_buckets = size.longest_prompt, (size.longest_prompt,)
    data.synthetic_dir, data.cache_dir = str(folder / "world"), ""
    data.synthetic_sft_clips, data.synthetic_rl_clips, data.synthetic_eval_clips = 2 * size.prompts, 2, 2
    media.max_frames, media.max_audio_seconds, media.decode_workers = size.frames, size.audio_seconds, 0
    media.video_min_pixels = media.video_max_pixels = size.height * size.width
    return config


def _drawn_out(setup: Setup, record: Record, tokens: int) -> Record:
    """The record with its reasoning said again and again, up to so many tokens of the whole demonstration."""
    thought, answer = record.target_reasoning or "", record.target_answer or ""
    text = thought
    while len(setup.tags.slow_target(f"{text} {thought}", answer)[0]) <= tokens:
        text = f"{text} {thought}"
    return dataclasses.replace(record, target=f"<think>{text}</think>\n<answer>{answer}</answer>")


def _prompts(setup: Setup, records: list[Record], size: RealSize, rng: np.random.Generator) -> list[LoadedPrompt]:
    """Prompts around random pictures and sound."""
    config, thinker = setup.config, setup.backbone.config
    builder = PromptBuilder(
        setup.tokenizer, config.media, thinker, config.data.system_prompt, config.data.max_prompt_length
    )
    prompts = []
    for number, record in enumerate(records):
        frames = rng.integers(0, 256, (size.frames, size.height, size.width, 3), dtype=np.uint8)
        seconds = size.audio_seconds - 0.5 * number
        mel = rng.standard_normal((mel_frames(int(seconds * SAMPLING_RATE)), thinker.audio.num_mel_bins)).astype(
            np.float32
        )
        clips = Clips(
            videos=tuple(laid_out(frames, config.media.fps, thinker.vision) for _ in record.videos),
            video_audios=tuple(None for _ in record.videos),
            audios=tuple(AudioInput(mel, seconds) for _ in record.audios),
        )
        prompts.append(LoadedPrompt(builder.build(record, clips), silent_audio=0, audio_cut=0))
    return prompts
