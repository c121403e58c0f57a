"""Field names, and did-you-mean suggestions for unknown ones."""

from __future__ import annotations

import difflib
import functools

from mer_r1_jax.config.bounds import all_fields
from mer_r1_jax.config.schema import RunConfig

# Names that users of other trainers know, and where the setting lives here.
KNOWN_ELSEWHERE = {
    "max_prompt_length": "data.max_prompt_length",
    "rollout.n": "rl.num_generations",
    "n": "rl.num_generations",
    "kl_loss_coef": "rl.beta",
    "kl_coef": "rl.beta",
    "clip_ratio_low": "rl.epsilon",
    "clip_ratio_high": "rl.epsilon_high",
    "clip_ratio": "rl.epsilon",
    "loss_agg_mode": "rl.loss_type",
    "max_response_length": "rl.max_completion_length",
    "max_new_tokens": "rl.max_completion_length",
    "per_device_train_batch_size": "rl.prompts_per_step (prompts, not completions)",
    "train_batch_size": "rl.prompts_per_step (prompts, not completions)",
    "learning_rate": "sft.optimizer.learning_rate or rl.optimizer.learning_rate",
    "lambda": "rl.calibration_weight",
    "multi_objective_aggregation": "rl.arm (rd: rewards added, then normalised; ad: normalised, then added; gdpo: ad, "
    "then whitened over the step, as TRL's normalize_then_sum)",
    "generation_batch_size": "rl.prompts_per_step x rl.steps_per_generation (prompts, not completions)",
    "ppo_mini_batch_size": "rl.prompts_per_step, of which a rollout has rl.steps_per_generation times as many",
    "ppo_epochs": "rl.num_iterations",
    "custom_reward_function": "rl.reward_funcs (package.module.function)",
    "external_plugins": "rl.reward_funcs (package.module.function)",
    "vllm_importance_sampling_correction": "rl.sampler_correction (none: off)",
    "vllm_importance_sampling_mode": "rl.sampler_correction",
    "vllm_importance_sampling_clip_max": "rl.sampler_correction_max",
    "vllm_importance_sampling_clip_min": "rl.sampler_correction_min",
    "vllm_importance_sampling_cap": "rl.sampler_correction_max",
    "tis_imp_ratio_cap": "rl.sampler_correction_max, with rl.sampler_correction=token_truncate",
    "entropy_coeff": "rl.entropy_coef",
    "lora_r": "model.lora.rank",
    "lora_rank": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "target_modules": "model.lora.targets (attention, mlp or both)",
    "repetition_penalty": "not offered (the policy would be scored under another distribution than it was drawn from)",
}


@functools.cache
def field_names() -> tuple[str, ...]:
    """Dotted names of every field of the schema."""
    return tuple(name for name, _, _ in all_fields(RunConfig()))


def advice(name: str) -> str:
    """What to write in place of a name, dotted or not, that is no field's."""
    known = field_names()
    if any(field.startswith(f"{name}.") for field in known):
        return f"a section, expected one of its fields, {name}.<field>"
    last = name.rpartition(".")[2]
    if last in KNOWN_ELSEWHERE:
        return f"no such field; here it is {KNOWN_ELSEWHERE[last]}"
    # Right name in the wrong section first, then the nearest spelling of the whole or of the last part.
    meant = [field for field in known if field.rpartition(".")[2] == last]
    meant = meant or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    if not meant:
        near = difflib.get_close_matches(last, [field.rpartition(".")[2] for field in known], n=1, cutoff=0.6)
        meant = [field for field in known if near and field.rpartition(".")[2] == near[0]]
    return f"no such field; did you mean {' or '.join(meant)}?" if meant else "no such field"
