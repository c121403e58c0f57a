"""The configuration schema: one frozen dataclass per section, a comment on every field. This file is the truth.

`experiments/configs/*.py` build an ml_collections config from it, the command line overrides fields of that, and
`mer_r1_jax.config.build` turns the result back into these dataclasses, refusing unknown names, wrong types and values
outside the bounds that a field's type names (every number has some).
Names of RL settings are TRL's. "Ours" marks a choice the paper leaves open.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from mer_r1_jax.config.bounds import (
    AnyWeight,
    Count,
    CountOrZero,
    DiskPlace,
    Epochs,
    FewOrZero,
    MeshSize,
    NameOrPath,
    NameText,
    Number,
    Pixels,
    Place,
    Rows,
    Seconds,
    Seed,
    Share,
    ShareBelowOne,
    Size,
    Steps,
    Tokens,
    TokensOrZero,
    Weight,
    Words,
)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names each field, what it got and what it expects."""


Dtype = Literal["float32", "bfloat16"]
GroupSize = Annotated[int, Number(2, 65_536, note="a group of one answer has no advantage")]
MixingShare = Annotated[float, Number(0, 1, above=True)]
Temperature = Annotated[float, Number(0, 100, above=True, note="a group must differ")]

Grace = Annotated[float, Number(0, 86_400)]  # seconds; 0 = no limit
AudioSeconds = Annotated[float, Number(0, 300, above=True)]  # the spectrogram takes 300 s at most
Megabytes = Annotated[int, Number(16, 1 << 24)]
# The names that rl/advantage.py and rl/losses.py give a meaning to.
ARM_NAMES = (
    *("baseline", "rd", "ad", "gdpo", "mer_r1"),
    *("sfcc_word", "sfcc_recall_only", "sfcc_reward_space", "sfcc_mixed", "sfcc_loss"),
)
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
SamplerCorrection = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
ReportTo = Annotated[str, NameOrPath(("tensorboard", "wandb"))]
MAX_ASPECT_RATIO = 200.0  # of a picture's sides: transformers' processors take none beyond it
SideRatio = Annotated[float, Number(1.0, MAX_ASPECT_RATIO)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters of the language model, trained in its place by SFT and RL (names are peft's, without lora_)."""

    rank: Annotated[int, Number(0, 4096)] = 0  # peft's r; 0 = off, all weights of the language model are trained
    alpha: Annotated[float, Number(0, 1_000_000, above=True)] = 32.0  # adapters are multiplied by alpha / rank
    targets: Literal["attention", "mlp", "both"] = "both"  # projections with adapters: q k v o, gate up down, or both
    dropout: ShareBelowOne = 0.0  # share of its inputs that an adapter does not see in an update


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which backbone, and in which precision."""

    path: Place = ""  # Hugging Face directory (or gs://) of weights, tokenizer, processor files; "" = random weights
    preset: Literal["tiny", "3b", "7b"] = "7b"  # architecture when `path` is empty: tiny | 3b | 7b
    tokenizer_path: Place = ""  # tokenizer and processor files when `path` is empty; "" = `path`
    text_hidden_size: Size = 0  # width of the language model, for `preset`s without a `path`; 0 = the preset's
    text_layers: Size = 0  # likewise its layers
    text_heads: Size = 0  # likewise its attention heads
    text_kv_heads: Size = 0  # likewise its key and value heads
    text_mlp_size: Size = 0  # likewise the width of its feed-forward layers
    text_rope_theta: Annotated[float, Number(0, 1e12)] = 0.0  # likewise the base of its rotary frequencies
    vision_hidden_size: Size = 0  # width of the vision tower; 0 = the preset's
    vision_layers: Size = 0  # likewise its layers
    vision_heads: Size = 0  # likewise its attention heads
    vision_mlp_size: Size = 0  # likewise the width of its feed-forward layers
    audio_hidden_size: Size = 0  # width of the audio tower; 0 = the preset's
    audio_layers: Size = 0  # likewise its layers
    audio_heads: Size = 0  # likewise its attention heads
    audio_mlp_size: Size = 0  # likewise the width of its feed-forward layers
    initializer_range: Annotated[float, Number(0, 10, above=True)] = 0.02  # standard deviation of random weights
    param_dtype: Dtype = "float32"  # dtype the parameters are kept in
    frozen_dtype: Literal["param_dtype", "float32", "bfloat16"] = "param_dtype"  # of those that no phase trains
    compute_dtype: Dtype = "bfloat16"  # dtype of activations and matrix products
    remat: Literal["nothing", "attention", "dots", "everything"] = "nothing"  # what the backward pass keeps of a layer
    packed_rows: bool = False  # score a prompt's completions in one row with it (for block-sparse attention kernels)
    train_vision_tower: bool = False  # RL and SFT update the vision tower (frozen)
    train_audio_tower: bool = False  # RL and SFT update the audio tower (frozen)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    adapter_path: Place = ""  # PEFT folder of adapters to begin with, of model.lora's size; "" = new ones, at zero


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """How clips become tensors. Defaults follow qwen-omni-utils; the shipped configs narrow them to the prompt cap."""

    fps: Annotated[float, Number(0, 1000, above=True)] = 2.0  # frames sampled per second of video
    min_frames: Annotated[int, Number(1, 100_000)] = 4  # fewest frames sampled
    max_frames: Annotated[int, Number(1, 100_000)] = 768  # most frames sampled
    video_min_pixels: Pixels = 128 * 28 * 28  # fewest pixels of a resized video frame
    video_max_pixels: Pixels = 768 * 28 * 28  # most pixels of a resized video frame
    video_total_pixels: Pixels = 90_316_800  # pixels of all frames together: 0.9 * 128000 * 28 * 28
    image_min_pixels: Pixels = 4 * 28 * 28  # fewest pixels of a resized image
    image_max_pixels: Pixels = 16_384 * 28 * 28  # most pixels of a resized image
    max_aspect_ratio: SideRatio = MAX_ASPECT_RATIO  # largest ratio of a picture's sides; a lower one saves padding
    sampling_rate: Annotated[int, Number(1000, 384_000)] = 16_000  # Hz of the audio the mel spectrogram is made from
    max_audio_seconds: AudioSeconds = 300.0  # audio beyond this is cut (counted in data/audio_cut)
    max_clip_seconds: Seconds = 600.0  # a clip longer than this is refused rather than decoded
    use_audio_in_video: bool = False  # interleave a video's own audio with its frames (a separate item)
    missing_audio: Literal["error", "skip", "silence"] = "error"  # a clip without an audio track; skip: no audio item
    decode_timeout: Seconds = 30.0  # seconds one clip may take to decode before it counts as broken
    decode_memory_mb: Megabytes = 4096  # memory a worker process may take for a clip; one that needs more is refused
    decode_workers: FewOrZero = 2  # worker processes that decode; 0 decodes in the main process, without a time limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the records are and how prompts are built from them."""

    sft_path: Place = ""  # records with assistant turns (or a `reasoning` column) for SFT (JSON lines, CSV, Parquet)
    rl_path: Place = ""  # records with a `solution` for RL
    eval_path: Place = ""  # records held out for evaluation
    media_root: Place = ""  # folder the media paths are relative to and may not leave; "" = the data file's folder
    system_prompt: Words = "You are a helpful assistant."  # system turn when a record brings none
    question: Words = (  # asked when a record brings neither `messages` nor `question` (ours)
        "Look at the face and body, listen to the voice and read the subtitle. What does the person feel? "
        "Reason inside <think></think>, then list the emotion words inside <answer></answer>."
    )
    extra_columns: tuple[Words, ...] = ()  # columns only reward functions read, though they look like a path or label
    max_prompt_length: Tokens = 2048  # tokens of a prompt, media included; a longer one is an error, never cut
    prompt_buckets: tuple[Tokens, ...] = ()  # token lengths prompts are padded to; () = four even steps up to the cap
    cache_dir: DiskPlace = ""  # decoded clips are kept here, keyed by file content and media settings; "" = no cache
    max_quarantined_fraction: Share = 0.02  # share of an epoch's clips that may break before the run stops
    synthetic_dir: DiskPlace = ""  # folder the synthetic world is made in, or found; "" = no synthetic world
    synthetic_world: Literal["U", "O", "even", "concluding"] = "U"  # which; its page: docs/lab.md
    synthetic_sft_clips: CountOrZero = 0  # clips of the synthetic world for SFT
    synthetic_rl_clips: CountOrZero = 0  # likewise for RL
    synthetic_eval_clips: CountOrZero = 0  # likewise held out
    synthetic_seed: Seed = 0  # seed of the synthetic world


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmotionConfig:
    """Emotion wheels: how words become categories."""

    wheel_dir: Place = ""  # folder with wheel1..5.xlsx, synonym.xlsx, format.csv; "" = the wheels shipped here
    variant: Literal["unibench", "mer2026"] = "unibench"  # which of a wheel folder's word-form tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule, of this phase alone."""

    learning_rate: Annotated[float, Number(0, 10, above=True)] = 2e-6  # peak
    adam_beta1: ShareBelowOne = 0.9  # decay of the first moment, the mean of gradients
    adam_beta2: ShareBelowOne = 0.999  # decay of the second moment, the mean of their squares
    adam_epsilon: Annotated[float, Number(0, 1, above=True)] = 1e-8  # added to the root of the second moment
    weight_decay: Annotated[float, Number(0, 10)] = 0.0  # decoupled, times the learning rate
    max_grad_norm: Annotated[float, Number(0, 1e12, above=True)] = 1.0  # global gradient norm is clipped to this
    warmup_ratio: ShareBelowOne = 0.03  # share of the steps spent warming up (ours)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"  # after warm-up (ours: linear)
    dtype: Dtype = "float32"  # dtype of both moments


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning, the cold start."""

    max_steps: Steps = 0  # optimizer steps; 0 skips SFT, -1 means num_train_epochs
    num_train_epochs: Epochs = 2.0  # used when max_steps is -1
    prompts_per_step: Rows = 16  # prompts of one optimizer step
    gradient_accumulation_steps: Rows = 1  # micro-batches a step is cut into
    max_completion_length: Tokens = 1024  # tokens of a target; a longer one is an error
    fast_fraction: ShareBelowOne = 0.25  # share of the loss given to fast targets, which follow an empty think (ours)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=2e-5))
    train_vision_tower: bool = False  # overrides model.train_vision_tower upwards during SFT
    train_audio_tower: bool = False  # overrides model.train_audio_tower upwards during SFT


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlConfig:
    """Group-relative policy optimisation and the method on top of it. Names are TRL's; defaults are the method's."""

    arm: Annotated[str, NameOrPath(ARM_NAMES)] = "mer_r1"  # how rewards become advantages (rl/advantage.py)
    max_steps: Steps = 0  # optimizer steps; 0 skips RL, -1 means num_train_epochs
    num_train_epochs: Epochs = 1.0  # used when max_steps is -1
    prompts_per_step: Rows = 16  # unique prompts of one update (TRL's batch counts completions: prompts x generations)
    num_generations: GroupSize = 4  # completions sampled for each prompt (verl: rollout.n)
    gradient_accumulation_steps: Rows = 1  # micro-batches the update is cut into
    steps_per_generation: Annotated[int, Number(1, 1000)] = 1  # updates that share a rollout (TRL counts micro-batches)
    num_iterations: Annotated[int, Number(1, 1000)] = 1  # times that a rollout is learnt from
    max_completion_length: Tokens = 1024  # tokens sampled at most (verl: max_response_length)
    temperature: Temperature = 0.9  # sampling temperature; policy log-probabilities use logits / temperature too
    temper_logprobs: bool = True  # False: the loss takes log-probabilities of logits, whatever the temperature
    top_p: Annotated[float, Number(0, 1, above=True)] = 1.0  # nucleus; training wants 1
    top_k: CountOrZero = 0  # 0 = off
    min_p: ShareBelowOne = 0.0  # 0 = off
    decode_chunk: TokensOrZero = 0  # tokens decoded before completions that ended make room; 0 = all in one loop (ours)
    beta: Weight = 0.04  # KL weight at the start (verl: kl_loss_coef; TRL's default is 0)
    beta_decay: Share = 0.75  # beta(t) = beta * (1 - beta_decay * min(1, t / (0.5 * max_steps)))
    sync_ref_model: bool = False  # mix the policy into the reference now and then; needs beta above 0 (TR-DPO)
    ref_model_mixup_alpha: MixingShare = 0.6  # reference = alpha * policy + (1 - alpha) * reference
    ref_model_sync_steps: Count = 512  # updates between two mixings
    epsilon: Share = 0.2  # lower clip (verl: clip_ratio_low)
    epsilon_high: Weight = 0.2  # upper clip (verl: clip_ratio_high)
    delta: Weight = 0.0  # the unclipped ratio is cut at this, two-sided clipping; 0 = off (TRL: None)
    loss_type: Annotated[str, NameOrPath(LOSS_TYPES)] = "dapo"  # token averaging (verl: loss_agg_mode)
    importance_sampling_level: Literal["token", "sequence"] = "token"  # token | sequence (GSPO)
    entropy_coef: Weight = 0.0  # weight of the policy's mean entropy, a bonus in the loss; 0 = off
    top_entropy_quantile: Share = 1.0  # share of a micro-batch's tokens, those of highest entropy, in the loss; 1 = all
    sampler_correction: SamplerCorrection = "none"  # weigh by trainer / sampler (TRL: vllm_importance_sampling_mode)
    sampler_correction_max: Weight = 3.0  # the ratio is cut (truncate) or left out (mask) beyond this; 0 = no bound
    sampler_correction_min: Weight = 0.0  # likewise below this
    scale_rewards: Literal["group", "batch", "none"] = "group"  # divisor of z: group | batch | none
    mask_truncated_completions: bool = False  # leave completions that hit the length cap out of the loss
    calibration_weight: Weight = 0.1  # lambda, weight of the slow-fast calibration
    calibration_counts: Literal["word", "category"] = "word"  # in R+ and R-: every word, or a category's first (ours)
    format_weight: Weight = 0.1  # weight of z(format reward)
    reward_funcs: tuple[Words, ...] = ()  # reward functions of your own, package.module.function (docs/method.md)
    reward_weights: tuple[AnyWeight, ...] = ()  # weight of each one's z in the advantage; () = 1 each
    reward_timeout: Seconds = 60.0  # seconds one call of a reward function may take (ours)
    max_faulty_rollouts: Count = 5  # rollouts in a row in which a function gave only faults before the run stops (ours)
    word_penalty: Weight = 0.0  # taken off both rewards per answer word beyond the truth's count (off)
    unscorable: Literal["drop", "format_only"] = "drop"  # prompts whose truth is on no wheel: drop | format_only (ours)
    wheels_without_truth: Literal["left_out", "zero"] = "left_out"  # in a reward's mean over wheels: left_out | zero
    untagged_answer: Literal["empty", "split"] = "empty"  # words of an answer without tags: none, or all text's
    format_reward: Literal["strict", "lenient"] = "strict"  # lenient: trailing text, empty and repeated blocks pass
    permute_rewards: bool = False  # control: shuffle rewards within each group, so that nothing can be learnt
    max_fast_context: Tokens = 64  # tokens of a fast scoring context: the empty think block and the answer
    max_answer_words: Annotated[int, Number(1, 4096)] = 16  # emotion words given a confidence; further ones are counted
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts that are sampled, scored and given advantages at once."""
        return self.prompts_per_step * self.steps_per_generation

    @property
    def updates_per_rollout(self) -> int:
        """Updates made from one rollout; the policy is the one that sampled in the first alone."""
        return self.steps_per_generation * self.num_iterations


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Slow and fast answers on held-out clips."""

    eval_steps: CountOrZero = 0  # evaluate every so many RL steps; 0 = only at the start and the end
    prompts_per_batch: Rows = 16  # prompts decoded at once
    limit: CountOrZero = 0  # evaluate the first so many clips; 0 = all
    max_completion_length: TokensOrZero = 0  # 0 = rl.max_completion_length
    num_examples: FewOrZero = 24  # clips shown in the report
    clip_megabytes: FewOrZero = 8  # of these clips' own files in the report, where they can be played; 0 = none
    num_samples: FewOrZero = 0  # sampled answers a clip and mode, scored beside the greedy one; the paper samples
    temperature: Temperature = 0.9  # of these samples, as the paper scores
    top_p: Annotated[float, Number(0, 1, above=True)] = 0.9  # of these samples, as the paper scores
    memory_check: Literal["refuse", "warn", "off"] = "refuse"  # a model that takes more memory to answer than is free


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1 and is inferred."""

    data: MeshSize = -1  # devices the batch is cut over; each holds all parameters
    fsdp: MeshSize = 1  # devices both batch and parameters are cut over
    tensor: MeshSize = 1  # devices that share heads, feed-forward width and vocabulary
    decode_tensor: Rows = 1  # as fsdp in training, as tensor while decoding (TRL: vllm_tensor_parallel_size)
    sparse_core_collectives: bool = False  # sums of gradients on the sparse cores of TPU v5p; never run on hardware


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: where it writes, what it keeps, when it stops."""

    output_dir: Place = "runs"  # runs are written to <output_dir>/<run_name>; may be gs://
    local_dir: DiskPlace = ""  # copies of what lies at gs:// are kept here, on each host; "" = ~/.cache/mer-r1-jax
    compilation_cache_dir: DiskPlace = ""  # of compiled programs; "" = ~/.cache/mer-r1-jax/compiled, none = not kept
    run_name: Annotated[str, NameText(empty=True)] = ""  # "" = the config's name
    seed: Seed = 0  # every random choice of the run follows from it
    save_steps: Count = 100  # steps between checkpoints
    save_total_limit: Count = 2  # checkpoints kept
    preemption_grace_seconds: Grace = 25.0  # after a signal, to save and end (a spot notice is 30 s); 0 = no limit
    logging_steps: Count = 1  # steps between lines of metrics.jsonl
    log_completions: bool = True  # write sampled completions as a table
    num_completions_to_print: FewOrZero = 1  # completions shown on the console at a logging step
    report_to: tuple[ReportTo, ...] = ("tensorboard",)  # where metrics go besides metrics.jsonl; may be a function
    warm_up_longest: Literal["auto", "always", "never"] = "auto"  # longest shapes run before step 1; auto: not on CPUs
    profile_steps: tuple[Count, ...] = ()  # steps of each phase that jax.profiler traces, into logs/attempt_<n>/profile
    resume_from_checkpoint: Literal["auto", "never"] = "auto"  # auto (newest valid) | never
    max_nonfinite_steps: Count = 10  # updates skipped for a non-finite loss or gradient before the run stops
    export: bool = True  # write the final policy in Hugging Face format to export/hf


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about one run."""

    name: Annotated[str, NameText()] = "mer_r1"  # the config's name, also the default run name
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    media: MediaConfig = dataclasses.field(default_factory=MediaConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    emotion: EmotionConfig = dataclasses.field(default_factory=EmotionConfig)
    sft: SftConfig = dataclasses.field(default_factory=SftConfig)
    rl: RlConfig = dataclasses.field(default_factory=RlConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
