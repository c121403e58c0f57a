"""MER-R1's recipe on Qwen2.5-Omni-7B: SFT on 5,000 clips, then RL on the rest of MER-Caption+, towers frozen.

`omni_7b.py:v5e:16x16` lays it out for a slice of SLICES; without one it is that of v5p:2x2x4. `omni_7b.py:v5e:2x4` and
`omni_7b.py:h100:1` train low-rank adapters, on eight chips of 16 GB and on one card of 80 GB, which cannot hold moments
of all weights; `omni_7b.py:h100:8` trains all of them on eight such cards. Training needs weights and data:
--config.model.path=... --config.data.sft_path=... --config.data.rl_path=...; what a run would take of it, `mer-r1 plan`
says without them.
"""

from mer_r1_jax.config.build import config_dict

# Slice -> prompts of a step, devices along mesh.tensor and mesh.decode_tensor (the rest are fsdp), and what the
# backward pass keeps. Four devices at most can share the heads, as there are four of keys.
SLICES = {
    "v5p:2x2x4": (16, 1, 4, "dots"),
    "v5e:16x16": (64, 4, 1, "attention"),
    "v6e:4x4": (16, 1, 4, "attention"),
}
# Likewise, with adapters in place of the weights: moments of all of them would not fit.
ADAPTED_SLICES = {"v5e:2x4": (8, 1, 4, "attention")}
# Cards of 80 GB -> prompts of a step, and parts the update is cut into.
CARDS = {"h100:8": (16, 2)}
# Card -> prompts of a step, with adapters in place of the weights.
ADAPTED = {"h100:1": 8}


def get_config(slice_name: str = "v5p:2x2x4"):
    """The recipe, laid out for a slice or for a card."""
    known = [*SLICES, *ADAPTED_SLICES, *CARDS, *ADAPTED]
    if slice_name not in known:
        raise ValueError(f"slice {slice_name!r}: expected one of {', '.join(known)}, or set mesh.* yourself")
    config = recipe()
    config.name = "omni_7b"
    config.model.preset = "7b"
    if slice_name in SLICES:
        lay_out(config, *SLICES[slice_name])
    elif slice_name in ADAPTED_SLICES:
        lay_out(config, *ADAPTED_SLICES[slice_name])
        adapt(config)
    elif slice_name in CARDS:
        lay_out_on_cards(config, *CARDS[slice_name])
        halve_moments(config)
    else:
        lay_out_on_cards(config, ADAPTED[slice_name])
        adapt(config)
    return config


def recipe():
    """The paper's settings (and those of the authors' earlier work); precisions, batch and media limits are ours."""
    config = config_dict()
    config.model.param_dtype = "float32"
    config.model.compute_dtype = "bfloat16"
    config.model.packed_rows = True  # the attention kernel skips what a packed row's mask forbids
    _media(config.media)
    config.data.max_prompt_length = 2048
    config.sft.max_steps = -1
    config.sft.num_train_epochs = 2.0
    config.sft.max_completion_length = 1024
    config.sft.optimizer.learning_rate = 2e-5
    config.rl.arm = "mer_r1"
    config.rl.max_steps = -1
    config.rl.num_train_epochs = 1.0
    config.rl.num_generations = 4
    config.rl.max_completion_length = 1024
    config.rl.temperature = 0.9
    config.rl.optimizer.learning_rate = 2e-6
    return config


def lay_out(config, prompts: int, tensor: int, decode_tensor: int, remat: str):
    """Parameters and optimizer cut over all chips; one prompt or more for each group of `tensor` chips."""
    config.model.remat = remat
    config.sft.prompts_per_step = config.rl.prompts_per_step = prompts
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = tensor
    config.mesh.decode_tensor = decode_tensor


def lay_out_on_cards(config, prompts: int, parts: int = 1):
    """The same for GPUs; an update in more than one part needs a second buffer of gradients."""
    lay_out(config, prompts, 1, 1, "nothing")
    config.model.packed_rows = False  # no kernel of a GPU skips what a packed row's mask forbids
    config.rl.decode_chunk = 128
    for phase in (config.sft, config.rl):
        phase.gradient_accumulation_steps = parts


def halve_moments(config):
    """Parameters stay in float32; moments as well would fill cards with them and the reference."""
    config.sft.optimizer.dtype = config.rl.optimizer.dtype = "bfloat16"


def adapt(config):
    """Low-rank adapters of the language model in place of its weights; rank and learning rates are ours, not tried."""
    config.model.frozen_dtype = "bfloat16"
    config.model.lora.rank = 32
    config.model.lora.alpha = 64.0
    config.sft.optimizer.learning_rate = 1e-4
    config.rl.optimizer.learning_rate = 1e-5


def _media(media):
    """Clips within a prompt of 2048 tokens: 8 frame pairs of 128 tokens, 30 seconds of 25 tokens, and the text."""
    media.fps = 2.0
    media.max_frames = 16
    media.video_min_pixels = 64 * 28 * 28
    media.video_max_pixels = 128 * 28 * 28
    media.image_max_pixels = 1024 * 28 * 28
    media.max_aspect_ratio = 16.0
    media.max_audio_seconds = 30.0
