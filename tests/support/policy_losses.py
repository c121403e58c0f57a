"""The policy loss of this project and TRL's own, on the same log-probabilities, masks and advantages."""

from __future__ import annotations

import types
import typing

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.rl.losses import PolicyTargets, policy_loss

LENGTH = 7
LEVELS = typing.get_args(typing.get_type_hints(RlConfig)["importance_sampling_level"])
TRL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")  # those that TRL has as well


def batch(seed, rows=6):
    """Log-probabilities far enough apart for every clip to act, masks with an empty row, advantages of both signs."""
    rng = np.random.default_rng(seed)
    logprob = -rng.exponential(1.5, (rows, LENGTH)).astype(np.float32)
    lengths = rng.integers(1, LENGTH + 1, rows)
    lengths[0] = 0
    return dict(
        logprob=logprob,
        old_logprob=(logprob + rng.normal(size=logprob.shape) * 0.4).astype(np.float32),
        reference_logprob=(logprob + rng.normal(size=logprob.shape) * 0.3).astype(np.float32),
        advantage=rng.normal(size=rows).astype(np.float32),
        mask=np.arange(LENGTH) < lengths[:, None],
    )


def entropies_and_sampler(seed, tensors):
    """Entropies, some of them equal, and log-probabilities of a sampler that differs from the trainer now and then."""
    rng = np.random.default_rng(seed)
    shape = tensors["logprob"].shape
    trained = tensors["logprob"] if tensors["old_logprob"] is None else tensors["old_logprob"]
    return {
        "entropy": rng.integers(0, 9, shape).astype(np.float32) / 4,
        "sampling_logprob": (trained + rng.normal(size=shape) * rng.choice([0.01, 1.5], shape)).astype(np.float32),
    }


def trl_ratio(trained, sampling, mask, config):
    """The weights that TRL gives the loss, for `vllm_importance_sampling_mode` and its two bounds (its own lines stand
    inside a method that samples)."""
    log_ratio = (trained - sampling) * mask
    if config.sampler_correction in ("sequence_mask", "sequence_truncate"):
        log_ratio = log_ratio.sum(-1, keepdims=True)
    ratio = np.exp(log_ratio)
    low, high = config.sampler_correction_min, config.sampler_correction_max or np.inf
    if config.sampler_correction in ("token_truncate", "sequence_truncate"):
        return np.clip(ratio, low, high)
    return np.where((ratio < low) | (ratio > high), 0, ratio)


def trl_loss(tensors, config, beta, num_items, accumulation=1, generation=None):
    """TRL's `_compute_loss`, called unbound: the trainer's model is replaced by the log-probabilities themselves.

    Everything between log-probabilities and loss is TRL's code; what it needs of the trainer is its settings, a place
    for metrics, and an accelerator of one process.

    Args:
        accumulation: micro-batches of an optimizer step.
        generation: micro-batches that a rollout is cut into, where these are more; `num_items` are its tokens.

    Returns:
        loss, gradient with respect to the log-probabilities (and to the entropies, where there are any), TRL's metrics.
    """
    import torch
    from trl.trainer.grpo_trainer import GRPOTrainer

    logprob = torch.tensor(tensors["logprob"], requires_grad=True)
    entropy = torch.tensor(tensors.get("entropy", np.zeros_like(tensors["logprob"])), requires_grad=True)
    metrics = {name: [] for name in ("kl", "entropy", "entropy_coef", "policy_loss")}
    metrics |= {f"clip_ratio/{name}": [] for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")}
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, entropy, None),
        get_high_entropy_mask=lambda *arguments: GRPOTrainer.get_high_entropy_mask(trainer, *arguments),
        loss_type=config.loss_type,
        importance_sampling_level=config.importance_sampling_level,
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon_high,
        beta=beta,
        max_completion_length=config.max_completion_length,
        top_entropy_quantile=config.top_entropy_quantile,
        off_policy_mask_threshold=None,
        use_vllm=config.sampler_correction != "none",
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        entropy_coef=config.entropy_coef,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=config.entropy_coef != 0,
        current_gradient_accumulation_steps=accumulation,
        args=types.SimpleNamespace(
            delta=config.delta or None,
            use_bias_correction_kl=False,
            steps_per_generation=generation or accumulation,
        ),
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(
            num_processes=1,
            reduce=lambda x, reduction: x,
            gather=lambda x: x,
            pad_across_processes=lambda x, **_: x,
            sync_gradients=True,
        ),
        _metrics={"train": metrics},
    )
    mask = torch.tensor(tensors["mask"]).int()
    inputs = dict(
        prompt_ids=torch.zeros(len(mask), 1, dtype=torch.long),
        prompt_mask=torch.ones(len(mask), 1, dtype=torch.int),
        completion_ids=torch.zeros(mask.shape, dtype=torch.long),
        completion_mask=mask,
        advantages=torch.tensor(tensors["advantage"]),
        ref_per_token_logps=torch.tensor(tensors["reference_logprob"]),
        num_items_in_batch=torch.tensor(num_items),
    )
    if tensors["old_logprob"] is not None:
        inputs["old_per_token_logps"] = torch.tensor(tensors["old_logprob"])
    if trainer.use_vllm:
        trained = tensors["logprob"] if tensors["old_logprob"] is None else tensors["old_logprob"]
        inputs["importance_sampling_ratio"] = torch.tensor(
            trl_ratio(trained, tensors["sampling_logprob"], tensors["mask"], config)
        )
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    gradients = logprob.grad.numpy()
    if "entropy" in tensors:
        gradients = (gradients, np.zeros_like(gradients) if entropy.grad is None else entropy.grad.numpy())
    return loss.item(), gradients, {name: values[0] for name, values in metrics.items() if values}


def own_loss(tensors, config, beta, totals):
    """Loss, gradient and metrics of this project on the same arrays."""

    def loss(logprob, entropy=None):
        targets = PolicyTargets(
            advantage_BG=tensors["advantage"],
            mask_BGC=tensors["mask"],
            present_BG=np.ones(len(tensors["mask"]), bool),
            old_logprob_BGC=tensors["old_logprob"],
            reference_logprob_BGC=tensors["reference_logprob"] if beta else None,
            sampling_logprob_BGC=tensors["sampling_logprob"] if config.sampler_correction != "none" else None,
        )
        return policy_loss(logprob, targets, beta, totals, config, entropy)

    if "entropy" in tensors:
        at = jnp.asarray(tensors["logprob"]), jnp.asarray(tensors["entropy"])
        (value, metrics), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(*at)
        return float(value), tuple(map(np.asarray, gradients)), metrics
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(tensors["logprob"]))
    return float(value), np.asarray(gradient), metrics
