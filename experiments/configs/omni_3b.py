"""MER-R1's recipe on Qwen2.5-Omni-3B: that of `omni_7b.py`, for the smaller model, smaller slices and GPUs.

`omni_3b.py:v5e:2x4` lays it out for eight v5e chips, which Kaggle lends; `omni_3b.py:h100:1` for one H100 of 80 GB,
`omni_3b.py:h100:8` for eight. `omni_3b.py:rtx4090:1` and `:l4:1` train low-rank adapters on one card of 24 GB, which
cannot hold moments of all weights.
"""

from mer_r1_jax.config.build import other_config

# Slice -> prompts of a step, devices along mesh.tensor and mesh.decode_tensor (the rest are fsdp), and what the
# backward pass keeps. Two devices at most can share the heads, as there are two of keys.
SLICES = {
    "v5e:4x4": (16, 1, 2, "attention"),
    "v5e:2x4": (8, 1, 2, "attention"),
    "v5p:2x2x4": (16, 1, 2, "dots"),
}
# Cards of 80 GB -> prompts of a step, and parts the update is cut into.
CARDS = {
    "h100:1": (6, 1),
    "h100:8": (16, 2),
}
# Cards of 24 GB -> prompts of a step, with adapters in place of the weights.
ADAPTED = {"rtx4090:1": 4, "l4:1": 4}


def get_config(slice_name: str = "v5e:4x4"):
    """The recipe, laid out for a slice or for GPUs."""
    known = [*SLICES, *CARDS, *ADAPTED]
    if slice_name not in known:
        raise ValueError(f"slice {slice_name!r}: expected one of {', '.join(known)}, or set mesh.* yourself")
    omni_7b = other_config("omni_7b", __file__)
    config = omni_7b.recipe()
    config.name = "omni_3b"
    config.model.preset = "3b"
    if slice_name in SLICES:
        omni_7b.lay_out(config, *SLICES[slice_name])
    elif slice_name in ADAPTED:
        omni_7b.lay_out_on_cards(config, ADAPTED[slice_name])
        omni_7b.adapt(config)
    else:
        omni_7b.lay_out_on_cards(config, *CARDS[slice_name])
        omni_7b.halve_moments(config)
    return config
