"""A stand-in for a full Omni directory: Thinker, talker and vocoder tensors in shards, a nested config, odd files.

The talker and the vocoder are only tensors with the right prefixes: nothing here runs them, they have to survive.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.tiny_hf import make_tiny_thinker

EXTRA_TENSORS = {"talker": 5, "token2wav": 3}


def older_config(config: dict) -> dict:
    """A Thinker's `config.json` of transformers 5 in the older key style that hub directories use."""
    config = json.loads(json.dumps(config))
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"mrope_section": rope["mrope_section"], "rope_type": "default", "type": "default"}
    text["tie_word_embeddings"] = config["tie_word_embeddings"]
    config["vision_config"].pop("rope_parameters", None)
    return config


def extra_tensors(seed: int) -> dict[str, torch.Tensor]:
    """Talker and vocoder tensors of several dtypes and sizes, an odd number of bytes among them."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "talker.codec_head.weight": noise(24, 16).bfloat16(),
        "talker.model.embed_tokens.weight": noise(24, 16).bfloat16(),
        "talker.model.layers.0.mlp.up_proj.weight": noise(7, 3).bfloat16(),
        "talker.model.norm.weight": noise(3).bfloat16(),
        "talker.thinker_to_talker_proj.bias": noise(5).half(),
        "token2wav.code2wav_bigvgan_model.conv_pre.weight": noise(4, 5, 7),
        "token2wav.code2wav_dit_model.steps": torch.arange(3, dtype=torch.uint8),
        "token2wav.code2wav_dit_model.norm.weight": noise(9),
    }


def make_omni_directory(directory: str | Path, seed: int = 0, *, dtype=torch.bfloat16, shards: int = 3, **thinker):
    """Writes the directory and returns the torch Thinker in it.

    Args:
        directory: made if need be.
        seed: of all weights.
        dtype: of the Thinker's weights.
        shards: safetensors files; tensors of all three parts end up in most of them.
        thinker: passed to make_tiny_thinker.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model = make_tiny_thinker(directory, seed, dtype=dtype, **thinker)
    thinker_config = older_config(json.loads((directory / "config.json").read_text()))
    (directory / "model.safetensors").unlink()
    from_v5 = {"model.language_model.": "model.", "model.visual.": "visual.", "model.audio_tower.": "audio_tower."}
    tensors = dict(extra_tensors(seed + 1))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and thinker_config["tie_word_embeddings"]:
            continue
        for new, old in from_v5.items():
            name = name.replace(new, old) if name.startswith(new) else name
        tensors[f"thinker.{name}"] = tensor.contiguous()
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": True,
        "thinker_config": thinker_config,
        "talker_config": {"model_type": "qwen2_5_omni_talker", "hidden_size": 16},
        "token2wav_config": {"model_type": "qwen2_5_omni_token2wav"},
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "spk_dict.pt").write_bytes(bytes(range(256)) * 3 + b"not really a torch file")
    (directory / "preprocessor_config.json").write_text('{"feature_size": 128}\n')
    (directory / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}\n')
    return model
