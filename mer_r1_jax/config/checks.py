"""Values a configuration may take: each rule names its field, what it got, what is allowed and how to mend it."""

from __future__ import annotations

import math
from typing import Any

from mer_r1_jax.bucket.storage import is_bucket, problem_of
from mer_r1_jax.config.schema import MAX_ASPECT_RATIO, OptimizerConfig, RunConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "model.preset": ("tiny", "3b", "7b"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.remat": ("nothing", "attention", "dots", "everything"),
    "media.missing_audio": ("error", "skip", "silence"),
    "emotion.variant": ("unibench", "mer2026"),
    "sft.optimizer.lr_scheduler_type": ("linear", "cosine", "constant"),
    "sft.optimizer.dtype": ("float32", "bfloat16"),
    "rl.optimizer.lr_scheduler_type": ("linear", "cosine", "constant"),
    "rl.optimizer.dtype": ("float32", "bfloat16"),
    "rl.loss_type": ("grpo", "bnpo", "dr_grpo", "dapo"),
    "rl.importance_sampling_level": ("token", "sequence"),
    "rl.scale_rewards": ("group", "batch", "none"),
    "rl.unscorable": ("drop", "format_only"),
    "train.resume_from_checkpoint": ("auto", "never"),
}

AT_LEAST_ONE = (
    "media.min_frames",
    "media.max_frames",
    "data.max_prompt_length",
    "sft.prompts_per_step",
    "sft.gradient_accumulation_steps",
    "sft.max_completion_length",
    "rl.prompts_per_step",
    "rl.gradient_accumulation_steps",
    "rl.num_iterations",
    "rl.max_completion_length",
    "rl.max_fast_context",
    "rl.max_answer_words",
    "rl.max_faulty_rollouts",
    "eval.prompts_per_batch",
    "train.save_steps",
    "train.save_total_limit",
    "train.logging_steps",
    "train.max_nonfinite_steps",
)

# Fields that name places on the machine a run is made on.
PATHS = (
    "model.path",
    "model.tokenizer_path",
    "data.sft_path",
    "data.rl_path",
    "data.eval_path",
    "data.media_root",
    "data.cache_dir",
    "data.synthetic_dir",
    "emotion.wheel_dir",
    "train.output_dir",
    "train.local_dir",
)

# Those of them that must be on a disk of the host: they are written to file by file.
ON_DISK = ("data.cache_dir", "data.synthetic_dir", "train.local_dir")


def lookup(config: Any, dotted: str) -> Any:
    """The value of a dotted field name."""
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def check_values(config: RunConfig) -> list[str]:
    """Every impossible value of a configuration, as one line each; an empty list means it can be used."""
    problems = [
        f"{dotted}: got {lookup(config, dotted)!r}, expected one of {', '.join(allowed)}"
        for dotted, allowed in CHOICES.items()
        if lookup(config, dotted) not in allowed
    ]
    problems += [
        f"{dotted}: got {lookup(config, dotted)}, expected at least 1"
        for dotted in AT_LEAST_ONE
        if lookup(config, dotted) < 1
    ]
    problems += _check_paths(config)
    problems += _check_batches(config)
    problems += _check_sampling(config)
    problems += _check_rewards(config)
    problems += _check_media(config)
    for phase in ("sft", "rl"):
        problems += _check_optimizer(f"{phase}.optimizer", getattr(config, phase).optimizer)
    unknown = [name for name in config.train.report_to if name != "tensorboard"]
    if unknown:
        problems.append(f"train.report_to: got {unknown}, expected a subset of: tensorboard")
    return problems


def _check_paths(config: RunConfig) -> list[str]:
    problems = []
    for dotted in PATHS:
        path = lookup(config, dotted)
        if "://" not in path:
            continue
        if dotted in ON_DISK:
            problems.append(f"{dotted}: got {path!r}, expected a folder on a disk of every host, not one in a bucket")
        elif not is_bucket(path):
            problems.append(
                f"{dotted}: got {path!r}, expected a path of a file system or gs://<bucket>/<path>; mount other "
                "storage at the same place on every host (experiments/launch/README.md) and name that place"
            )
        elif problem := problem_of(path):
            problems.append(f"{dotted}: got {path!r}, {problem}")
    return problems


def _check_batches(config: RunConfig) -> list[str]:
    problems = []
    for phase in ("sft", "rl"):
        section = getattr(config, phase)
        prompts, parts = section.prompts_per_step, section.gradient_accumulation_steps
        if parts >= 1 and prompts % parts:
            problems.append(
                f"{phase}.prompts_per_step: got {prompts}, which {phase}.gradient_accumulation_steps={parts} does not "
                f"divide; try {prompts // parts * parts or parts} or {(prompts // parts + 1) * parts}"
            )
        if section.max_steps < -1:
            problems.append(f"{phase}.max_steps: got {section.max_steps}, expected -1 (epochs), 0 (skip) or more")
    if config.rl.num_generations < 2:
        problems.append(
            f"rl.num_generations: got {config.rl.num_generations}, expected at least 2: "
            "a group of one answer has no advantage"
        )
    axes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if sum(size == -1 for size in axes) > 1 or any(size < 1 and size != -1 for size in axes):
        problems.append(f"mesh: got data, fsdp, tensor = {axes}, expected positive sizes with at most one -1")
    return problems


def _check_sampling(config: RunConfig) -> list[str]:
    rl, problems = config.rl, []
    if rl.temperature <= 0:
        problems.append(f"rl.temperature: got {rl.temperature}, expected more than 0: a group must differ")
    if not 0 < rl.top_p <= 1:
        problems.append(f"rl.top_p: got {rl.top_p}, expected more than 0 and at most 1 (1 = off)")
    if not 0 <= rl.min_p < 1:
        problems.append(f"rl.min_p: got {rl.min_p}, expected at least 0 (off) and less than 1")
    if rl.decode_chunk < 0:
        problems.append(f"rl.decode_chunk: got {rl.decode_chunk}, expected a number of tokens, or 0 (off)")
    if rl.top_k < 0:
        problems.append(f"rl.top_k: got {rl.top_k}, expected 0 (off) or more")
    for name in ("epsilon", "epsilon_high", "beta", "calibration_weight", "format_weight", "word_penalty"):
        if getattr(rl, name) < 0:
            problems.append(f"rl.{name}: got {getattr(rl, name)}, expected 0 or more")
    if not 0 <= config.sft.fast_fraction < 1:
        problems.append(f"sft.fast_fraction: got {config.sft.fast_fraction}, expected at least 0 and less than 1")
    return problems


def _check_rewards(config: RunConfig) -> list[str]:
    rl, problems = config.rl, []
    if rl.delta and rl.delta <= 1 + rl.epsilon_high:
        problems.append(
            f"rl.delta: got {rl.delta}, expected 0 (off) or more than 1 + rl.epsilon_high = {1 + rl.epsilon_high:g}"
        )
    for path in rl.reward_funcs:
        if path.count(".") < 1 or not all(part.isidentifier() for part in path.split(".")):
            problems.append(
                f"rl.reward_funcs: got {path!r}, expected package.module.function; several are written "
                "\"('a.b.one', 'a.b.two')\""
            )
    if len(set(rl.reward_funcs)) < len(rl.reward_funcs):
        problems.append(f"rl.reward_funcs: got {rl.reward_funcs}, expected each function once")
    if rl.reward_weights and len(rl.reward_weights) != len(rl.reward_funcs):
        problems.append(
            f"rl.reward_weights: got {len(rl.reward_weights)} for {len(rl.reward_funcs)} rl.reward_funcs, expected one "
            "for each, or none for 1 each; the method's own rewards are weighed by calibration_weight and format_weight"
        )
    if not all(math.isfinite(weight) for weight in rl.reward_weights):
        problems.append(f"rl.reward_weights: got {rl.reward_weights}, expected finite numbers")
    if rl.reward_timeout <= 0:
        problems.append(f"rl.reward_timeout: got {rl.reward_timeout}, expected more than 0")
    return problems


def _check_media(config: RunConfig) -> list[str]:
    media, problems = config.media, []
    for name in ("fps", "sampling_rate", "max_audio_seconds", "max_clip_seconds", "decode_timeout"):
        if getattr(media, name) <= 0:
            problems.append(f"media.{name}: got {getattr(media, name)}, expected more than 0")
    if media.min_frames > media.max_frames:
        problems.append(f"media.min_frames: got {media.min_frames}, expected at most max_frames={media.max_frames}")
    for kind in ("video", "image"):
        low, high = getattr(media, f"{kind}_min_pixels"), getattr(media, f"{kind}_max_pixels")
        if not 0 < low <= high:
            problems.append(f"media.{kind}_min_pixels: got {low}, expected 1..{kind}_max_pixels={high}")
    if not 1 <= media.max_aspect_ratio <= MAX_ASPECT_RATIO:
        problems.append(f"media.max_aspect_ratio: got {media.max_aspect_ratio}, expected 1..{MAX_ASPECT_RATIO:g}")
    buckets, cap = config.data.prompt_buckets, config.data.max_prompt_length
    if buckets and (list(buckets) != sorted(set(buckets)) or buckets[0] < 1 or buckets[-1] != cap):
        problems.append(
            f"data.prompt_buckets: got {buckets}, expected ascending lengths that end with data.max_prompt_length={cap}"
        )
    if not 0 <= config.data.max_quarantined_fraction <= 1:
        problems.append(f"data.max_quarantined_fraction: got {config.data.max_quarantined_fraction}, expected 0..1")
    return problems


def _check_optimizer(prefix: str, optimizer: OptimizerConfig) -> list[str]:
    problems = []
    for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
        if getattr(optimizer, name) <= 0:
            problems.append(f"{prefix}.{name}: got {getattr(optimizer, name)}, expected more than 0")
    for name in ("adam_beta1", "adam_beta2", "warmup_ratio"):
        if not 0 <= getattr(optimizer, name) < 1:
            problems.append(f"{prefix}.{name}: got {getattr(optimizer, name)}, expected at least 0 and less than 1")
    return problems
