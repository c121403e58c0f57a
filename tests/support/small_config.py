"""The configuration of the small run of `support.small_run`: `--config=tests/support/small_config.py:<its folder>`."""

from mer_r1_jax.config.build import config_dict


def get_config(folder):
    """A Thinker of width 32 that learns six clips by heart in a few seconds and then has rewards to learn from."""
    config = config_dict()
    config.name = "small"
    _model(config.model, folder)
    _media(config.media)
    _data(config.data, folder)
    _phases(config)
    config.eval.eval_steps = 3
    config.eval.prompts_per_batch = 2
    config.train.output_dir = f"{folder}/runs"
    config.train.save_steps = 4
    return config


def _model(model, folder):
    model.preset = "tiny"
    model.tokenizer_path = f"{folder}/tokenizer"
    model.compute_dtype = "float32"
    model.initializer_range = 0.1
    model.text_hidden_size = 32
    model.text_layers = 1
    model.text_heads = 2
    model.text_kv_heads = 2
    model.text_mlp_size = 64
    model.vision_hidden_size = 32
    model.vision_layers = 1
    model.vision_heads = 2
    model.vision_mlp_size = 32
    model.audio_hidden_size = 32
    model.audio_layers = 1
    model.audio_heads = 2
    model.audio_mlp_size = 32


def _media(media):
    media.min_frames = media.max_frames = 2
    media.video_min_pixels = media.image_min_pixels = 28 * 28
    media.video_max_pixels = media.image_max_pixels = 56 * 56
    media.max_aspect_ratio = 4.0
    media.max_audio_seconds = 0.5
    media.decode_workers = 1


def _data(data, folder):
    data.sft_path = f"{folder}/sft.jsonl"
    data.rl_path = f"{folder}/rl.jsonl"
    data.eval_path = f"{folder}/eval.jsonl"
    data.system_prompt = "You"
    data.question = "Feel?"
    data.max_prompt_length = 64
    data.prompt_buckets = (64,)
    data.max_quarantined_fraction = 0.5


def _phases(config):
    config.sft.max_steps = 40
    config.sft.prompts_per_step = 4
    config.sft.max_completion_length = 40
    config.sft.train_vision_tower = True
    config.sft.train_audio_tower = True
    config.sft.optimizer.learning_rate = 1e-2
    config.rl.max_steps = 6
    config.rl.prompts_per_step = 4
    config.rl.num_generations = 4
    config.rl.max_completion_length = 24
    config.rl.max_fast_context = 24
    config.rl.max_answer_words = 4
    config.rl.optimizer.learning_rate = 1e-3
