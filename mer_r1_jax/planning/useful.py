"""The operations a program is there for, counted from the architecture alone: what a model-FLOP utilisation divides.

Matrix products of one forward pass, and twice as many for the backward pass of what is trained; nothing that is
computed a second time to save memory, and of attention only the pairs that a mask lets see each other. Padding counts
as tokens: a plan takes every row to be full. Written independently of what traces and compiles, so that the counts
check each other.
"""

from __future__ import annotations

from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.omni.config import AudioConfig, TextConfig, ThinkerConfig, VisionConfig

FORWARD, TRAINED = 1, 3  # passes' worth of operations
_AUDIO_FRAMES_PER_UNIT = 100  # of a unit of two seconds, after the second convolution


def text_flops(text: TextConfig, *, prompt: int, sets: tuple[tuple[int, int], ...], scored: int) -> float:
    """Forward pass of the decoder over one packed row.

    Args:
        text: the decoder.
        prompt: tokens of the prompt.
        sets: (continuations, tokens of each); each sees the prompt and itself.
        scored: positions that are multiplied with the unembedding.
    """
    D, h = text.hidden_size, text.head_dim
    H, K = text.num_attention_heads, text.num_key_value_heads
    weights = 2 * D * h * (H + K) + 3 * D * text.intermediate_size
    tokens = prompt + sum(count * length for count, length in sets)
    pairs = prompt * (prompt + 1) // 2 + sum(
        count * (length * prompt + length * (length + 1) // 2) for count, length in sets
    )
    layer = 2 * weights * tokens + 4 * H * h * pairs
    return float(text.num_hidden_layers * layer + 2 * D * text.vocab_size * scored)


def tower_flops(thinker: ThinkerConfig, shape: BatchShape) -> float:
    """Forward pass of both towers over the clips of one row."""
    total = 0.0
    if shape.vision_clips:
        total += shape.vision_clips * _vision_flops(thinker.vision, shape.frame_pairs, shape.patches)
    if shape.audio_clips:
        total += shape.audio_clips * _audio_flops(thinker.audio, shape.audio_units)
    return total


def _vision_flops(vision: VisionConfig, pairs: int, patches: int) -> float:
    d, tokens = vision.hidden_size, pairs * patches
    window = min(patches, vision.window_cells**2 * vision.merge_unit)
    full = len(vision.fullatt_block_indexes)
    seen = full * patches + (vision.depth - full) * window
    layers = vision.depth * 2 * (4 * d * d + 3 * d * vision.intermediate_size) * tokens + 4 * d * tokens * seen
    merged = vision.merge_unit * d
    merger = 2 * (merged * merged + merged * vision.out_hidden_size) * (tokens // vision.merge_unit)
    return float(2 * vision.patch_values * d * tokens + layers + merger)


def _audio_flops(audio: AudioConfig, units: int) -> float:
    d, frames = audio.d_model, units * _AUDIO_FRAMES_PER_UNIT
    convolutions = 2 * 3 * audio.num_mel_bins * d * 2 * frames + 2 * 3 * d * d * frames
    layer = 2 * (4 * d * d + 2 * d * audio.encoder_ffn_dim) * frames + 4 * d * frames * _AUDIO_FRAMES_PER_UNIT
    return float(convolutions + audio.encoder_layers * layer + 2 * d * audio.output_dim * (frames // 2))
