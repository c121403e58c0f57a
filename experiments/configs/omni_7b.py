"""MER-R1's recipe on Qwen2.5-Omni-7B: SFT on 5,000 clips, then RL on the rest of MER-Caption+, towers frozen.

Name the weights and the data to train: --config.model.path=... --config.data.sft_path=... --config.data.rl_path=...
Without them `experiments/plan.py` says what a run would take of a TPU slice.
"""

from mer_r1_jax.config.build import config_dict


def get_config():
    """The paper's settings; where it is silent, the mesh and precisions that fit v5p:2x2x4."""
    config = config_dict()
    config.name = "omni_7b"
    config.model.preset = "7b"
    config.model.param_dtype = "float32"
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "nothing"
    media(config.media)
    config.data.max_prompt_length = 2048
    config.sft.max_steps = -1
    config.sft.num_train_epochs = 2.0
    config.sft.prompts_per_step = 16
    config.sft.max_completion_length = 1024
    config.sft.optimizer.learning_rate = 2e-5
    config.rl.arm = "mer_r1"
    config.rl.max_steps = -1
    config.rl.num_train_epochs = 1.0
    config.rl.prompts_per_step = 16
    config.rl.num_generations = 4
    config.rl.max_completion_length = 1024
    config.rl.temperature = 0.9
    config.rl.optimizer.learning_rate = 2e-6
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config


def media(media):
    """Clips within a prompt of 2048 tokens: 8 frame pairs of 128 tokens, 30 seconds of 25 tokens, and the text."""
    media.fps = 2.0
    media.max_frames = 16
    media.video_min_pixels = 64 * 28 * 28
    media.video_max_pixels = 128 * 28 * 28
    media.image_max_pixels = 1024 * 28 * 28
    media.max_audio_seconds = 30.0
