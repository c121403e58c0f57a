"""The synthetic world on one machine: real mp4 clips, a tiny Thinker trained from scratch, SFT then MER-R1.

`synthetic.py` is the full run of `make train`; `synthetic.py:smoke` runs the same pipeline in a few minutes, and
`synthetic.py:rl` the RL of the full run alone, from the export that --config.model.path names.
"""

from mer_r1_jax.config.build import config_dict
from mer_r1_jax.data.synthetic.wording import QUESTION


def get_config(setting: str = "full"):
    """The run's configuration; `setting` is full, smoke or rl."""
    config = config_dict()
    config.name = "synthetic" if setting == "full" else f"synthetic_{setting}"
    _model(config.model, sizes=setting != "rl")
    _media(config.media)
    config.data.question = QUESTION  # of its records, so what the trained model is asked about other clips
    config.data.max_prompt_length = 192
    config.data.prompt_buckets = (144, 192)
    config.data.synthetic_dir = "synthetic_data_smoke" if setting == "smoke" else "synthetic_data"
    config.data.synthetic_sft_clips = 4000
    config.data.synthetic_rl_clips = 1200
    config.data.synthetic_eval_clips = 1000
    config.data.cache_dir = f"{config.data.synthetic_dir}/cache"
    _sft(config.sft)
    _rl(config.rl)
    config.eval.eval_steps = 50
    config.eval.prompts_per_batch = 64
    config.train.save_steps = 50
    if setting == "smoke":
        _smoke(config)
    elif setting == "rl":
        config.sft.max_steps = 0
    elif setting != "full":
        raise ValueError(f"setting {setting!r}: expected full, smoke or rl")
    return config


def _model(model, sizes: bool):
    model.preset = "tiny"
    model.compute_dtype = "float32"
    model.initializer_range = 0.05
    model.remat = "nothing"
    if not sizes:  # an export has its own
        return
    model.text_hidden_size = 96
    model.text_layers = 3
    # Qwen's base, 1e6, would leave most of these few frequencies almost still over a prompt of 192 tokens.
    model.text_rope_theta = 100.0
    model.vision_layers = 2
    model.audio_layers = 2


def _media(media):
    # Clips are 84 x 84 pixels and two seconds long: two frame pairs of nine tokens, fifty tokens of voice.
    media.fps = 2.0
    media.min_frames = 4
    media.max_frames = 4
    media.video_min_pixels = 28 * 28
    media.video_max_pixels = 84 * 84
    media.image_min_pixels = 28 * 28
    media.image_max_pixels = 84 * 84
    media.max_aspect_ratio = 2.0
    media.max_audio_seconds = 2.0
    media.max_clip_seconds = 60.0


def _sft(sft):
    sft.max_steps = 2000
    sft.prompts_per_step = 16
    sft.max_completion_length = 64
    sft.train_vision_tower = True
    sft.train_audio_tower = True
    sft.optimizer.learning_rate = 2e-3


def _rl(rl):
    rl.max_steps = 100
    rl.prompts_per_step = 12
    rl.num_generations = 8
    rl.max_completion_length = 64
    rl.max_fast_context = 32
    rl.max_answer_words = 8
    rl.optimizer.learning_rate = 2e-4


def _smoke(config):
    config.data.synthetic_sft_clips = 64
    config.data.synthetic_rl_clips = 32
    config.data.synthetic_eval_clips = 16
    config.sft.max_steps = 6
    config.sft.prompts_per_step = 8
    config.rl.max_steps = 3
    config.rl.prompts_per_step = 2
    config.rl.num_generations = 4
    config.eval.eval_steps = 0
    config.eval.prompts_per_batch = 16
    config.train.save_steps = 3
