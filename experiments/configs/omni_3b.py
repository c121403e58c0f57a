"""MER-R1's recipe on Qwen2.5-Omni-3B: that of `omni_7b.py`, for the smaller model and smaller slices."""

import importlib.util
import pathlib

# Slice -> prompts of a step, devices along mesh.tensor (the rest are fsdp), and what the backward pass keeps.
SLICES = {
    "v5e:4x4": (16, 1, "attention"),
    "v5p:2x2x4": (16, 1, "dots"),
}


def get_config(slice_name: str = "v5e:4x4"):
    """The recipe, laid out for a slice."""
    if slice_name not in SLICES:
        raise ValueError(f"slice {slice_name!r}: expected one of {', '.join(SLICES)}, or set mesh.* yourself")
    omni_7b = _neighbour("omni_7b")
    config = omni_7b.recipe()
    config.name = "omni_3b"
    config.model.preset = "3b"
    omni_7b.lay_out(config, *SLICES[slice_name])
    return config


def _neighbour(name):
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
