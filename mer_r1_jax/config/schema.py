"""The configuration schema: one frozen dataclass per section, a comment on every field. This file is the truth.

`experiments/configs/*.py` build an ml_collections config from it, the command line overrides fields of that, and
`mer_r1_jax.config.build` turns the result back into these dataclasses, refusing unknown names and wrong types. Names of
RL settings are TRL's. "Ours" marks a choice the paper leaves open.
"""

from __future__ import annotations

import dataclasses

MAX_ASPECT_RATIO = 200.0  # of a picture's sides: transformers' processors take none beyond it


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which backbone, and in which precision."""

    path: str = ""  # Hugging Face directory (or gs://) of weights, tokenizer, processor files; "" = random weights
    preset: str = "7b"  # architecture when `path` is empty: tiny | 3b | 7b
    tokenizer_path: str = ""  # tokenizer and processor files when `path` is empty; "" = `path`
    text_hidden_size: int = 0  # width of the language model, for `preset`s without a `path`; 0 = the preset's
    text_layers: int = 0  # likewise its layers
    text_heads: int = 0  # likewise its attention heads
    text_kv_heads: int = 0  # likewise its key and value heads
    text_mlp_size: int = 0  # likewise the width of its feed-forward layers
    text_rope_theta: float = 0.0  # likewise the base of its rotary frequencies
    vision_hidden_size: int = 0  # width of the vision tower; 0 = the preset's
    vision_layers: int = 0  # likewise its layers
    vision_heads: int = 0  # likewise its attention heads
    vision_mlp_size: int = 0  # likewise the width of its feed-forward layers
    audio_hidden_size: int = 0  # width of the audio tower; 0 = the preset's
    audio_layers: int = 0  # likewise its layers
    audio_heads: int = 0  # likewise its attention heads
    audio_mlp_size: int = 0  # likewise the width of its feed-forward layers
    initializer_range: float = 0.02  # standard deviation of random weights
    param_dtype: str = "float32"  # dtype the parameters are kept in
    compute_dtype: str = "bfloat16"  # dtype of activations and matrix products
    remat: str = "nothing"  # what the backward pass keeps of a layer: nothing | attention | dots | everything
    packed_rows: bool = False  # score a prompt's completions in one row with it (for block-sparse attention kernels)
    train_vision_tower: bool = False  # RL and SFT update the vision tower (frozen)
    train_audio_tower: bool = False  # RL and SFT update the audio tower (frozen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """How clips become tensors. Defaults follow qwen-omni-utils; the shipped configs narrow them to the prompt cap."""

    fps: float = 2.0  # frames sampled per second of video
    min_frames: int = 4  # fewest frames sampled
    max_frames: int = 768  # most frames sampled
    video_min_pixels: int = 128 * 28 * 28  # fewest pixels of a resized video frame
    video_max_pixels: int = 768 * 28 * 28  # most pixels of a resized video frame
    video_total_pixels: int = 90_316_800  # pixels of all frames together: 0.9 * 128000 * 28 * 28
    image_min_pixels: int = 4 * 28 * 28  # fewest pixels of a resized image
    image_max_pixels: int = 16_384 * 28 * 28  # most pixels of a resized image
    max_aspect_ratio: float = MAX_ASPECT_RATIO  # pictures with sides further apart are refused; less plans less padding
    sampling_rate: int = 16_000  # Hz of the audio the mel spectrogram is made from
    max_audio_seconds: float = 300.0  # audio beyond this is cut (counted in data/audio_cut)
    max_clip_seconds: float = 600.0  # a clip longer than this is refused rather than decoded
    use_audio_in_video: bool = False  # interleave a video's own audio with its frames (a separate item)
    missing_audio: str = "error"  # a clip without an audio track: error | skip (no audio item) | silence (counted)
    decode_timeout: float = 30.0  # seconds one clip may take to decode before it counts as broken
    decode_workers: int = 2  # worker processes that decode; 0 decodes in the main process, without a time limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the records are and how prompts are built from them."""

    sft_path: str = ""  # JSON lines with assistant turns (or a `reasoning` column) for SFT
    rl_path: str = ""  # JSON lines with a `solution` for RL
    eval_path: str = ""  # JSON lines held out for evaluation
    media_root: str = ""  # folder the media paths are relative to and may not leave; "" = the JSON file's folder
    system_prompt: str = "You are a helpful assistant."  # system turn when a record brings none
    question: str = (  # asked when a record brings neither `messages` nor `question` (ours)
        "Look at the face and body, listen to the voice and read the subtitle. What does the person feel? "
        "Reason inside <think></think>, then list the emotion words inside <answer></answer>."
    )
    max_prompt_length: int = 2048  # tokens of a prompt, media included; a longer one is an error, never cut
    prompt_buckets: tuple[int, ...] = ()  # token lengths prompts are padded to; () = four even steps up to the cap
    cache_dir: str = ""  # decoded clips are kept here, keyed by file content and media settings; "" = no cache
    max_quarantined_fraction: float = 0.02  # share of an epoch's clips that may break before the run stops
    synthetic_dir: str = ""  # folder the embedded world is made in, or found; "" = no embedded world
    synthetic_sft_clips: int = 0  # clips of the embedded world for SFT
    synthetic_rl_clips: int = 0  # likewise for RL
    synthetic_eval_clips: int = 0  # likewise held out
    synthetic_seed: int = 0  # seed of the embedded world


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmotionConfig:
    """Emotion wheels: how words become categories."""

    wheel_dir: str = ""  # folder with wheel1..5.xlsx, synonym.xlsx, format.csv; "" = the wheels shipped here
    variant: str = "unibench"  # which of a wheel folder's word-form tables: unibench | mer2026


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 2e-6  # peak
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # global gradient norm is clipped to this
    warmup_ratio: float = 0.03  # share of the steps spent warming up (ours)
    lr_scheduler_type: str = "linear"  # after warm-up: linear | cosine | constant (ours: linear)
    dtype: str = "float32"  # dtype of both moments


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning, the cold start."""

    max_steps: int = 0  # optimizer steps; 0 skips SFT, -1 means num_train_epochs
    num_train_epochs: float = 2.0  # used when max_steps is -1
    prompts_per_step: int = 16  # prompts of one optimizer step
    gradient_accumulation_steps: int = 1  # micro-batches a step is cut into
    max_completion_length: int = 1024  # tokens of a target; a longer one is an error
    fast_fraction: float = 0.25  # share of the loss given to fast targets, which follow an empty think block (ours)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=2e-5))
    train_vision_tower: bool = False  # overrides model.train_vision_tower upwards during SFT
    train_audio_tower: bool = False  # overrides model.train_audio_tower upwards during SFT


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlConfig:
    """Group-relative policy optimisation and the method on top of it. Names are TRL's; defaults are the method's."""

    arm: str = "mer_r1"  # how rewards become advantages: baseline | rd | ad | mer_r1 | sfcc_* (rl/advantage.py)
    max_steps: int = 0  # optimizer steps; 0 skips RL, -1 means num_train_epochs
    num_train_epochs: float = 1.0  # used when max_steps is -1
    prompts_per_step: int = 16  # unique prompts of one rollout (TRL's batch counts completions: prompts x generations)
    num_generations: int = 4  # completions sampled for each prompt (verl: rollout.n)
    gradient_accumulation_steps: int = 1  # micro-batches the update is cut into
    num_iterations: int = 1  # updates made from one rollout
    max_completion_length: int = 1024  # tokens sampled at most (verl: max_response_length)
    temperature: float = 0.9  # sampling temperature; policy log-probabilities use logits / temperature too
    top_p: float = 1.0  # nucleus; training wants 1
    top_k: int = 0  # 0 = off
    min_p: float = 0.0  # 0 = off
    decode_chunk: int = 0  # tokens decoded before completions that ended make room; 0 = all in one loop (ours)
    beta: float = 0.04  # KL weight at the start (verl: kl_loss_coef; TRL's default is 0)
    beta_decay: float = 0.75  # beta(t) = beta * (1 - beta_decay * min(1, t / (0.5 * max_steps)))
    epsilon: float = 0.2  # lower clip (verl: clip_ratio_low)
    epsilon_high: float = 0.2  # upper clip (verl: clip_ratio_high)
    delta: float = 0.0  # the unclipped ratio is cut at this, two-sided clipping; 0 = off (TRL: None)
    loss_type: str = "dapo"  # token averaging: grpo | bnpo | dr_grpo | dapo (verl: loss_agg_mode)
    importance_sampling_level: str = "token"  # token | sequence (GSPO)
    scale_rewards: str = "group"  # divisor of z: group | batch | none
    mask_truncated_completions: bool = False  # leave completions that hit the length cap out of the loss
    calibration_weight: float = 0.1  # lambda, weight of the slow-fast calibration
    format_weight: float = 0.1  # weight of z(format reward)
    reward_funcs: tuple[str, ...] = ()  # reward functions of your own, package.module.function (docs/method.md)
    reward_weights: tuple[float, ...] = ()  # weight of each one's z in the advantage; () = 1 each
    reward_timeout: float = 60.0  # seconds one call of a reward function may take (ours)
    max_faulty_rollouts: int = 5  # rollouts in a row in which a function gave only faults before the run stops (ours)
    word_penalty: float = 0.0  # taken off both rewards per answer word beyond the truth's count (off)
    unscorable: str = "drop"  # prompts whose truth is on no wheel: drop | format_only (ours)
    permute_rewards: bool = False  # control: shuffle rewards within each group, so that nothing can be learnt
    max_fast_context: int = 64  # tokens of a fast scoring context: the empty think block and the answer
    max_answer_words: int = 16  # emotion words of an answer that are given a confidence; further ones are counted
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Slow and fast answers on held-out clips."""

    eval_steps: int = 0  # evaluate every so many RL steps; 0 = only at the start and the end
    prompts_per_batch: int = 16  # prompts decoded at once
    limit: int = 0  # evaluate the first so many clips; 0 = all
    max_completion_length: int = 0  # 0 = rl.max_completion_length
    num_examples: int = 24  # clips shown in the report


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1 and is inferred."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: where it writes, what it keeps, when it stops."""

    output_dir: str = "runs"  # runs are written to <output_dir>/<run_name>; may be gs://
    local_dir: str = ""  # copies of what lies at gs:// paths are kept here, on each host; "" = ~/.cache/mer-r1-jax
    run_name: str = ""  # "" = the config's name
    seed: int = 0  # every random choice of the run follows from it
    save_steps: int = 100  # steps between checkpoints
    save_total_limit: int = 2  # checkpoints kept
    logging_steps: int = 1  # steps between lines of metrics.jsonl
    log_completions: bool = True  # write sampled completions as a table
    num_completions_to_print: int = 1  # completions shown on the console at a logging step
    report_to: tuple[str, ...] = ("tensorboard",)  # tensorboard
    resume_from_checkpoint: str = "auto"  # auto (newest valid) | never
    max_nonfinite_steps: int = 10  # updates skipped for a non-finite loss or gradient before the run stops
    export: bool = True  # write the final policy in Hugging Face format to export/hf


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about one run."""

    name: str = "mer_r1"  # the config's name, also the default run name
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    media: MediaConfig = dataclasses.field(default_factory=MediaConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    emotion: EmotionConfig = dataclasses.field(default_factory=EmotionConfig)
    sft: SftConfig = dataclasses.field(default_factory=SftConfig)
    rl: RlConfig = dataclasses.field(default_factory=RlConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
