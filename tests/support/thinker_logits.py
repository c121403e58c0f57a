"""Logits of Thinker directories by whichever transformers is on the path; a script for the second version.

python thinker_logits.py INPUTS.npz OUT.npz DIRECTORY...     writes `version` and `logits_0`, `logits_1`, ...
"""

import sys

import numpy as np
import torch
import transformers


def mixed_inputs(image: int, audio: int, audio_bos: int, audio_eos: int, vision_bos: int, vision_eos: int) -> dict:
    """Text, one audio clip of 100 mel frames and one image of 4 merged patches, as numpy arrays."""
    rng = np.random.default_rng(7)
    ids = [1, 5, 6, audio_bos, *[audio] * 25, audio_eos, vision_bos, *[image] * 4, vision_eos, 9, 10, 11]
    return {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "input_features": rng.standard_normal((1, 128, 100), np.float32),
        "feature_attention_mask": np.ones((1, 100), np.int64),
        "pixel_values": rng.standard_normal((16, 1176), np.float32),
        "image_grid_thw": np.array([[1, 4, 4]]),
    }


def logits_of(model, inputs: dict) -> np.ndarray:
    """float32 logits (batch, length, vocabulary)."""
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
    tensors = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    with torch.no_grad():
        return model.eval()(**tensors).logits.float().numpy()


def logits_of_directory(directory, inputs: dict) -> np.ndarray:
    """As logits_of, of the Thinker in a Hugging Face directory."""
    cls = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    return logits_of(cls.from_pretrained(directory, attn_implementation="eager", torch_dtype="auto"), inputs)


def main() -> None:
    torch.set_num_threads(1)
    inputs_file, out, *directories = sys.argv[1:]
    inputs = dict(np.load(inputs_file))
    results = {f"logits_{i}": logits_of_directory(directory, inputs) for i, directory in enumerate(directories)}
    np.savez(out, version=transformers.__version__, **results)


if __name__ == "__main__":
    main()
