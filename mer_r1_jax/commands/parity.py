"""Runs the port on raw processor tensors: mer-r1 parity --model=HF_DIR --inputs=case.npz --out=out.npz

The inputs are what transformers' Qwen2_5OmniProcessor returns, saved with numpy.savez: input_ids, attention_mask and,
as far as there are such media, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw,
video_second_per_grid, input_features, feature_attention_mask, use_audio_in_video. The result holds logits,
position_ids, audio_features, image_features, video_features and, with --generate, greedy_ids.

--reference also runs transformers (torch has to be installed) and prints the worst differences.
"""

from __future__ import annotations

import pathlib
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained
from mer_r1_jax.storage import atomic_files

if TYPE_CHECKING:
    from mer_r1_jax.parity.processor_inputs import ProcessorInputs

_MODEL = flags.DEFINE_string("model", None, "Hugging Face directory of a Thinker or a full Omni model.", required=True)
_INPUTS = flags.DEFINE_string("inputs", None, ".npz file of processor tensors.", required=True)
_OUT = flags.DEFINE_string("out", None, ".npz file to write.", required=True)
_GENERATE = flags.DEFINE_integer("generate", 0, "New tokens to choose greedily.", lower_bound=0)
_REFERENCE = flags.DEFINE_bool("reference", False, "Compare with transformers.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    from mer_r1_jax.omni.hf.config_json import load_config
    from mer_r1_jax.omni.hf.load import load_params
    from mer_r1_jax.parity.port import run_port
    from mer_r1_jax.parity.processor_inputs import ProcessorInputs

    with explained():
        inputs = ProcessorInputs.of(_read(_INPUTS.value))
        config = load_config(_MODEL.value, param_dtype="float32", compute_dtype="float32")
        outputs = run_port(load_params(_MODEL.value, config), config, inputs, generate=_GENERATE.value)
        arrays: dict[str, Any] = {**outputs}  # beside them numpy takes settings by name
        # An open file, because savez would append .npz to another name.
        atomic_files.write_atomically(pathlib.Path(_OUT.value), lambda file: np.savez(file, **arrays))
        screen.say(f"{_OUT.value}: " + ", ".join(f"{name} {array.shape}" for name, array in outputs.items()))
        if _REFERENCE.value:
            _compare(outputs, _transformers(inputs), inputs.attention_mask == 1)


def _read(path: str) -> dict[str, np.ndarray]:
    from mer_r1_jax.parity.processor_inputs import InputError

    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: {error}; expected an .npz file written by numpy.savez") from error


def _transformers(inputs: ProcessorInputs) -> dict[str, np.ndarray]:
    """The same outputs from transformers in float32 on the CPU."""
    from mer_r1_jax.parity.processor_inputs import InputError

    try:
        from mer_r1_jax.parity.transformers_reference import run_reference
    except ImportError as error:
        raise InputError(
            f"--reference needs torch beside transformers ({error}); install torch or leave it out"
        ) from error
    return run_reference(_MODEL.value, inputs, generate=_GENERATE.value)


def _compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], real_BT: np.ndarray) -> None:
    """Prints the worst difference of every output; logits and positions of padding mean nothing and are left out."""
    for name, expected in theirs.items():
        got = ours[name]
        if name == "greedy_ids":
            same = got.shape == expected.shape and (got == expected).all()
            screen.say(
                f"{name}: {'equal' if same else f'DIFFER, ours {got.tolist()}, transformers {expected.tolist()}'}"
            )
            continue
        if name == "logits":
            got, expected = got[real_BT], expected[real_BT]
        if name == "position_ids":
            got, expected = got[:, real_BT], expected[:, real_BT]
        worst = np.abs(got.astype(np.float64) - expected).max(initial=0)
        screen.say(f"{name}: worst difference {worst:.3g}, largest value {np.abs(expected).max(initial=0):.3g}")
