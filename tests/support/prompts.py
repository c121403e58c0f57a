"""What is needed to build prompts in tests: a small model's configuration, clips of noise, records."""

from __future__ import annotations

import dataclasses

import numpy as np
from support.tiny_tokenizer import tiny_tokenizer

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.clips import AudioInput, Clips, VisionInput, laid_out
from mer_r1_jax.media.mel import log_mel
from mer_r1_jax.media.prompt import Prompt, PromptBuilder
from mer_r1_jax.media.tokenizer import SPECIAL_TOKENS
from mer_r1_jax.omni.config import ThinkerConfig

RATE = 16_000


@dataclasses.dataclass(frozen=True)
class TinyRecord:
    """The columns of a record that media reads."""

    messages: tuple[dict[str, str], ...]
    id: str = "clip-1"
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    subtitle: str | None = None
    use_audio_in_video: bool | None = None
    file: str = "data.jsonl"


def ask(text: str, **columns) -> TinyRecord:
    """A record with one question."""
    return TinyRecord(({"role": "user", "content": text},), **columns)


def tiny_thinker() -> ThinkerConfig:
    """A small model whose special ids are those of the tiny tokenizer."""
    tokenizer = tiny_tokenizer()
    ids = {field: tokenizer.convert_tokens_to_ids(token) for field, token in SPECIAL_TOKENS.items()}
    return ThinkerConfig.tiny(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_ids=(tokenizer.eos_token_id,), **ids
    )


def builder(media: MediaConfig | None = None, max_prompt_length: int = 2048) -> PromptBuilder:
    """A prompt builder with the usual system turn."""
    media = media or MediaConfig()
    return PromptBuilder(tiny_tokenizer(), media, tiny_thinker(), "You are a helpful assistant.", max_prompt_length)


def noise_video(frames: int = 4, height: int = 56, width: int = 84, fps: float = 2.0, seed: int = 0) -> VisionInput:
    """A video of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return laid_out(pixels, fps, tiny_thinker().vision)


def noise_image(height: int = 56, width: int = 56, seed: int = 1) -> VisionInput:
    """An image of noise."""
    return noise_video(1, height, width, 0.0, seed)


def noise_samples(seconds: float = 1.0, seed: int = 0) -> np.ndarray:
    """Noise to listen to, float32[samples]."""
    return (0.1 * np.random.default_rng(seed).normal(size=round(seconds * RATE))).astype(np.float32)


def noise_audio(seconds: float = 1.0, seed: int = 0) -> AudioInput:
    """An audio clip of noise."""
    samples = noise_samples(seconds, seed)
    return AudioInput(log_mel(samples, tiny_thinker().audio.num_mel_bins, RATE), samples.size / RATE)


def make_clips(videos=(), audios=(), images=(), own=()) -> Clips:
    """Clips of a record; `own` are the videos' own audio tracks."""
    return Clips(
        videos=tuple(videos),
        video_audios=tuple(own) or (None,) * len(videos),
        audios=tuple(audios),
        images=tuple(images),
    )


def simple_prompt(name: str = "clip-1", text: str = "What does she feel?", **clips) -> Prompt:
    """A prompt about some clips."""
    return builder().build(dataclasses.replace(ask(text), id=name), make_clips(**clips))
