"""MER-R1's recipe on Qwen2.5-Omni-3B: that of `omni_7b.py`, for the smaller model, smaller slices and GPUs.

`omni_3b.py:h100:1` lays it out for one H100 of 80 GB, `omni_3b.py:h100:8` for eight.
"""

from mer_r1_jax.config.build import other_config

# Slice -> prompts of a step, devices along mesh.tensor (the rest are fsdp), and what the backward pass keeps.
SLICES = {
    "v5e:4x4": (16, 1, "attention"),
    "v5p:2x2x4": (16, 1, "dots"),
}
# Cards of 80 GB -> prompts of a step, and parts the update is cut into. One card has room for 2 prompts: 4 of them in 4
# parts take 78.1 of 72.8 GiB, as parts need a second buffer of gradients. Eight cards have not been planned.
CARDS = {
    "h100:1": (2, 1),
    "h100:8": (16, 2),
}


def get_config(slice_name: str = "v5e:4x4"):
    """The recipe, laid out for a slice or for GPUs."""
    if slice_name not in SLICES and slice_name not in CARDS:
        known = ", ".join([*SLICES, *CARDS])
        raise ValueError(f"slice {slice_name!r}: expected one of {known}, or set mesh.* yourself")
    omni_7b = other_config("omni_7b", __file__)
    config = omni_7b.recipe()
    config.name = "omni_3b"
    config.model.preset = "3b"
    if slice_name in SLICES:
        omni_7b.lay_out(config, *SLICES[slice_name])
    else:
        _lay_out_on_cards(config, omni_7b, *CARDS[slice_name])
    return config


def _lay_out_on_cards(config, omni_7b, prompts: int, parts: int):
    """Parameters stay in float32; moments in bfloat16, or they and the reference would fill a card by themselves."""
    omni_7b.lay_out(config, prompts, 1, "nothing")
    config.model.packed_rows = False  # no kernel of a GPU skips what a packed row's mask forbids
    config.rl.decode_chunk = 128
    for phase in (config.sft, config.rl):
        phase.gradient_accumulation_steps = parts
        phase.optimizer.dtype = "bfloat16"
