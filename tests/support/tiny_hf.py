"""Small Qwen2.5-Omni checkpoints made with transformers and torch, the oracles of the parity and weight tests.

`make_tiny_thinker` builds a Thinker of 3 text, 4 vision and 2 audio layers. Its weights are drawn far wider than the
usual 0.02, norm scales and biases included: with the default initialisation most mistakes of a port stay invisible.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

VOCAB_SIZE = 512
# The released ids keep their order and their distances, moved to the top of the small vocabulary.
ENDOFTEXT, IM_START, IM_END, AUDIO, AUDIO_BOS, AUDIO_EOS = 480, 481, 482, 483, 484, 485
VISION_BOS, VISION_EOS, VISION_PAD, IMAGE, VIDEO = 489, 490, 491, 492, 493
SPECIAL_IDS = (
    ENDOFTEXT,
    IM_START,
    IM_END,
    AUDIO,
    AUDIO_BOS,
    AUDIO_EOS,
    VISION_BOS,
    VISION_EOS,
    VISION_PAD,
    IMAGE,
    VIDEO,
)


def tiny_thinker_config(text=None, vision=None, audio=None, **overrides) -> Qwen2_5OmniThinkerConfig:
    """The configuration of the tiny Thinker; `text`, `vision`, `audio` and `overrides` replace single fields.

    `mrope_section` follows head_dim / 2 unless `text` gives `rope_parameters`; patch sizes, merge size, audio window
    and mel bins that shape the token counts stay the released ones.
    """
    text_fields = dict(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=32768,
    )  # fmt: skip
    text_fields.update(text or {})
    if "rope_parameters" not in text_fields:
        half = text_fields["hidden_size"] // text_fields["num_attention_heads"] // 2
        time = half // 4
        height = (half - time) // 2
        text_fields["rope_parameters"] = {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [time, height, half - time - height],
        }  # fmt: skip
    hidden = text_fields["hidden_size"]
    vision_fields = dict(
        depth=4, hidden_size=64, intermediate_size=80, num_heads=4, out_hidden_size=hidden, patch_size=14,
        temporal_patch_size=2, spatial_merge_size=2, window_size=112, fullatt_block_indexes=[1, 3],
    )  # fmt: skip
    vision_fields.update(vision or {})
    audio_fields = dict(
        encoder_layers=2, d_model=64, encoder_attention_heads=4, encoder_ffn_dim=96, num_mel_bins=128, n_window=100,
        max_source_positions=1500, output_dim=hidden,
    )  # fmt: skip
    audio_fields.update(audio or {})
    fields = dict(
        audio_token_index=AUDIO, image_token_index=IMAGE, video_token_index=VIDEO, audio_start_token_id=AUDIO_BOS,
        audio_end_token_id=AUDIO_EOS, vision_start_token_id=VISION_BOS, vision_end_token_id=VISION_EOS,
        pad_token_id=ENDOFTEXT, eos_token_id=IM_END, position_id_per_seconds=25, seconds_per_chunk=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    fields.update(overrides)
    return Qwen2_5OmniThinkerConfig(
        text_config=text_fields, vision_config=vision_fields, audio_config=audio_fields, **fields
    )


def spread_weights(model: torch.nn.Module, seed: int, special_ids=SPECIAL_IDS) -> None:
    """Redraws every parameter in place, wide enough that any misplaced one shows in the logits.

    Matrices get standard deviation 1.5 / sqrt(fan in), embeddings 1, biases 0.3, norm scales 1 ± 0.3. The rows of the
    output matrix that belong to special tokens are damped: a random model would else emit placeholders without media.
    """
    generator = torch.Generator().manual_seed(seed)
    head = model.lm_head.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter is head:
                value = noise * 4.0 / parameter.shape[1] ** 0.5
            elif name.endswith(("embed_tokens.weight", "audio_bos_eos_token.weight")):
                value = noise
            elif name.endswith(".bias"):
                value = 0.3 * noise
            elif parameter.ndim == 1:
                value = 1.0 + 0.3 * noise
            else:
                value = noise * 1.5 / parameter[0].numel() ** 0.5
            parameter.copy_(value)
        head[list(special_ids)] *= 0.02


def make_tiny_thinker(
    directory: str | Path | None,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    text: dict | None = None,
    vision: dict | None = None,
    audio: dict | None = None,
    **overrides,
) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """Builds a tiny random Thinker, saves it to `directory` (bare v4 names) unless that is None, and returns the model.

    Args:
        directory: where `config.json`, `generation_config.json` and `model.safetensors` go.
        seed: of the weights; the same seed gives the same weights.
        dtype: of the weights, rounded after they are drawn in float32.
        text, vision, audio: dicts that replace fields of the three sub-configurations.
        overrides: fields of the Thinker's configuration, e.g. `tie_word_embeddings=True`.

    Returns:
        The torch model in eval mode with eager attention, on the CPU.
    """
    config = tiny_thinker_config(text, vision, audio, **overrides)
    config._attn_implementation = "eager"
    model = Qwen2_5OmniThinkerForConditionalGeneration(config).float()
    spread_weights(model, seed, [i for i in SPECIAL_IDS if i < config.text_config.vocab_size])
    model = model.to(dtype).eval()
    model.generation_config.eos_token_id = IM_END
    model.generation_config.pad_token_id = ENDOFTEXT
    if directory is not None:
        model.save_pretrained(directory)
    return model
