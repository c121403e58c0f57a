"""The configuration of plans that compile in seconds."""

from mer_r1_jax.config.build import config_dict, from_mapping


def tiny_config(**rl):
    """One layer of everything, four chips, four prompts: a program that compiles in seconds."""
    config = config_dict()
    config.model.preset = "tiny"
    config.model.text_layers = config.model.audio_layers = config.model.vision_layers = 2
    config.media.max_frames = 4
    config.media.video_min_pixels, config.media.video_max_pixels = 28 * 28, 56 * 56
    config.media.max_aspect_ratio = 4.0
    config.media.max_audio_seconds = 1.0
    config.data.max_prompt_length = 64
    config.data.prompt_buckets = (64,)
    config.rl.max_steps = 8
    config.rl.prompts_per_step = 4
    config.rl.max_completion_length = 32
    config.rl.max_fast_context = 16
    config.rl.max_answer_words = 4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    for name, value in rl.items():
        setattr(config.rl, name, value)
    return from_mapping(config)
