"""What whichever transformers is on the path makes of exported directories; a script for the second version.

python thinker_logits.py INPUTS.npz OUT.npz DIRECTORY...     writes `version`, and of each directory `logits_0`,
`logits_1`, ..., and in the same way `ends_0` (the tokens its generate() stops at) and `answer_0` (what that gives)
"""

import json
import sys
from pathlib import Path

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


def outputs_of_directory(directory, inputs: dict) -> dict[str, np.ndarray]:
    """As logits_of, of the Thinker in a Hugging Face directory, loaded by the class its config.json is for.

    Returns:
        `logits`, `ends` and `answer`: what follows a prompt of three tokens, greedily, as users ask for it.
    """
    silent = json.loads((Path(directory) / "config.json").read_text()).get("enable_audio_output") is False
    cls = getattr(transformers, f"Qwen2_5Omni{'' if silent else 'Thinker'}ForConditionalGeneration")
    model = cls.from_pretrained(directory, attn_implementation="eager", torch_dtype="auto")
    thinker = model.thinker if silent else model
    ends = thinker.generation_config.eos_token_id
    prompt = {"input_ids": torch.tensor([[1, 5, 9]]), "attention_mask": torch.ones((1, 3), dtype=torch.int64)}
    if silent and transformers.__version__.startswith("4."):
        found = model.generate(**prompt, return_audio=False, thinker_max_new_tokens=12, thinker_do_sample=False)
    else:
        found = thinker.generate(**prompt, max_new_tokens=12, do_sample=False)
    logits = logits_of(thinker, inputs)
    return {"logits": logits, "ends": np.atleast_1d(-1 if ends is None else ends), "answer": found.numpy()[0, 3:]}


def main() -> None:
    torch.set_num_threads(1)
    inputs_file, out, *directories = sys.argv[1:]
    inputs = dict(np.load(inputs_file))
    results = {}
    for number, directory in enumerate(directories):
        results |= {f"{name}_{number}": value for name, value in outputs_of_directory(directory, inputs).items()}
    np.savez(out, version=transformers.__version__, **results)


if __name__ == "__main__":
    main()
