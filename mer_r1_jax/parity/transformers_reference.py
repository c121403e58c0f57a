"""transformers on the same tensors, for comparison. The one module that needs torch; nothing else imports it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from mer_r1_jax.parity.processor_inputs import ProcessorInputs


def load_reference(directory: str) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """transformers' Thinker in float32 on the CPU."""
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def torch_inputs(inputs: ProcessorInputs) -> dict[str, Any]:
    """Keyword arguments of transformers' `forward` and `generate`."""
    given = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    use_audio_in_video = given.pop("use_audio_in_video")
    tensors = {name: torch.as_tensor(np.asarray(value)) for name, value in given.items() if value is not None}
    for name, tensor in tensors.items():
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor.long()
    return tensors | {"use_audio_in_video": use_audio_in_video}


@torch.no_grad()
def run_reference(model_or_directory: Any, inputs: ProcessorInputs, *, generate: int = 0) -> dict[str, np.ndarray]:
    """The outputs of `parity.run_port` as transformers computes them."""
    # Any: transformers' annotations allow for outputs that this model does not give.
    model: Any = load_reference(model_or_directory) if isinstance(model_or_directory, str) else model_or_directory
    given = torch_inputs(inputs)
    lengths = given["feature_attention_mask"].sum(-1) if "feature_attention_mask" in given else None
    position_ids, _ = model.model.get_rope_index(
        given["input_ids"],
        given.get("image_grid_thw"),
        given.get("video_grid_thw"),
        given["attention_mask"],
        given["use_audio_in_video"],
        lengths,
        given.get("video_second_per_grid"),
    )
    outputs = {"logits": model(**given).logits, "position_ids": position_ids}
    if lengths is not None:
        audio = model.get_audio_features(given["input_features"], given["feature_attention_mask"])
        outputs["audio_features"] = audio.last_hidden_state
    if "pixel_values" in given:
        images = model.get_image_features(given["pixel_values"], given["image_grid_thw"])
        outputs["image_features"] = torch.cat(list(images.pooler_output))
    if "pixel_values_videos" in given:
        videos = model.get_video_features(given["pixel_values_videos"], given["video_grid_thw"])
        outputs["video_features"] = torch.cat(list(videos.pooler_output))
    if generate:
        sequences = model.generate(**given, max_new_tokens=generate, do_sample=False)
        outputs["greedy_ids"] = sequences[:, given["input_ids"].shape[1] :]
    return {name: value.numpy() for name, value in outputs.items()}
