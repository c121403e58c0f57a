"""Token log-probabilities and the clipped policy loss.

Names and meanings are TRL's (GRPOConfig): `loss_type`, `importance_sampling_level`, `epsilon`, `epsilon_high`, `delta`.
Every sum is divided by a denominator of the whole optimizer step, so the losses (and gradients) of its micro-batches
add up to those of the step, whatever their masks.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mer_r1_jax.omni.batch import Array

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """Static settings of the policy loss.

    Attributes:
        loss_type: how token losses are averaged. grpo: mean over each completion, then over completions; bnpo: mean
            over the tokens of the micro-batch, then over micro-batches; dr_grpo: sum over tokens divided by
            completions x max_completion_length; dapo: mean over the tokens of the whole optimizer step.
        importance_sampling_level: token: a ratio per token; sequence: one per completion, exp of the mean log ratio
            (GSPO).
        epsilon: the ratio is clipped below at 1 - epsilon.
        epsilon_high: and above at 1 + epsilon_high.
        delta: the unclipped ratio is cut at this value (two-sided clipping), None = not.
        max_completion_length: the constant of dr_grpo.

    Raises:
        ValueError: an unknown name or a value out of range.
    """

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    max_completion_length: int = 1024

    def __post_init__(self):
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type is {self.loss_type!r}, expected one of {', '.join(LOSS_TYPES)}")
        if self.importance_sampling_level not in IMPORTANCE_SAMPLING_LEVELS:
            raise ValueError(
                f"importance_sampling_level is {self.importance_sampling_level!r}, expected one of "
                f"{', '.join(IMPORTANCE_SAMPLING_LEVELS)}"
            )
        if not 0 <= self.epsilon <= 1 or self.epsilon_high < 0:
            raise ValueError(
                f"epsilon is {self.epsilon} and epsilon_high {self.epsilon_high}, expected 0 <= epsilon <= 1 and "
                "epsilon_high >= 0"
            )
        if self.delta is not None and self.delta <= 1 + self.epsilon_high:
            raise ValueError(f"delta is {self.delta}, expected None or more than 1 + epsilon_high")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length is {self.max_completion_length}, expected at least 1 token")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTotals:
    """Denominators of a whole optimizer step, float32 scalars, the same for each of its micro-batches.

    Attributes:
        tokens: tokens in the loss.
        completions: completions of rows that exist, including those masked out of the loss (as TRL counts them).
        micro_batches: micro-batches of the step (bnpo averages over them).
    """

    tokens: Array
    completions: Array
    micro_batches: Array


def step_totals(mask: Array, present: Array, micro_batches: int = 1) -> StepTotals:
    """Totals from the masks of a whole step.

    Args:
        mask: bool [..., C], tokens in the loss.
        present: bool [...], completions of rows that exist.
        micro_batches: micro-batches the step is cut into.
    """
    return StepTotals(
        tokens=jnp.sum(mask, dtype=jnp.float32),
        completions=jnp.sum(present, dtype=jnp.float32),
        micro_batches=jnp.float32(micro_batches),
    )


def loss_mask(mask_BGC: Array, truncated_BG: Array, mask_truncated_completions: bool) -> Array:
    """bool [B, G, C]: the sampled tokens, without truncated completions if these are to be left out of the loss."""
    if not mask_truncated_completions:
        return mask_BGC
    return mask_BGC & ~truncated_BG[..., None]


def token_logprobs(model, h: Array, ids: Array, *, temperature: float, chunk: int | None = None) -> tuple[Array, Array]:
    """Log-probability of each token and entropy of the distribution it is scored under, softmax(logits / temperature).

    The logits of all tokens are never held at once; `mer_r1_jax.kernels.logprobs` says how.

    Args:
        model: a bound Thinker.
        h: hidden states [..., D] that predict the tokens.
        ids: int32 [...].
        temperature: above 0; the sampling temperature.
        chunk: tokens whose logits are held at once where whole logits are computed; None chooses.

    Returns:
        log-probabilities float32 [...] and entropies float32 [...] in nats; no gradient flows through the entropies,
        which are a metric.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: log-probabilities need one above 0 (rl.temperature)")
    scores = model.gather_logprobs(h, ids, temperature=temperature, entropy_gradient=False, chunk=chunk)
    return scores.logprob, scores.entropy


def kl_penalty(logprob: Array, reference_logprob: Array) -> Array:
    """Per-token estimate exp(d) - d - 1 of KL(policy || reference), d = reference - policy; never negative, in nats."""
    d = reference_logprob - logprob
    return jnp.exp(d) - d - 1


def policy_loss(
    logprob: Array,
    old_logprob: Array | None,
    reference_logprob: Array | None,
    advantage: Array,
    mask: Array,
    *,
    beta: Array,
    totals: StepTotals,
    config: PolicyLossConfig,
    present: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """This micro-batch's share of the step's loss, -min(ratio A, clip(ratio) A) + beta KL.

    All log-probabilities use logits / temperature. Leading axes `...` are rows and generations.

    Args:
        logprob: float32 [..., C] under the policy being trained.
        old_logprob: float32 [..., C] under the policy that sampled, or None when that is the policy itself
            (one update per rollout): then it is logprob with its gradient stopped.
        reference_logprob: float32 [..., C] under the reference, or None: no KL term.
        advantage: float32 [...], one value per completion.
        mask: bool [..., C], tokens in the loss.
        beta: float32 scalar, weight of the KL term.
        totals: denominators of the whole optimizer step.
        config: static settings.
        present: bool [...], completions of rows that exist; needed by nothing but sequence-level clip metrics
            (default: all).

    Returns:
        loss float32 scalar; metrics as shares of the step's means, to be added over its micro-batches: policy_loss, kl,
        clip_ratio/low_mean, clip_ratio/high_mean, clip_ratio/region_mean.
    """
    advantage = jax.lax.stop_gradient(advantage)[..., None]
    old_logprob = jax.lax.stop_gradient(logprob if old_logprob is None else old_logprob)
    # Masked tokens may hold anything, infinities included: they must reach neither a sum nor a gradient.
    log_ratio = jnp.where(mask, logprob - old_logprob, 0.0)
    if config.importance_sampling_level == "sequence":
        length = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
        log_ratio = jnp.sum(log_ratio, axis=-1, keepdims=True) / length
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - config.epsilon, 1 + config.epsilon_high)
    bounded = ratio if config.delta is None else jnp.minimum(ratio, config.delta)
    token_loss = -jnp.minimum(bounded * advantage, clipped * advantage)
    metrics = _clip_metrics(bounded, advantage, mask, present, totals, config)
    metrics["policy_loss"] = _reduce(token_loss, mask, totals, config)
    if reference_logprob is not None:
        reference_logprob = jax.lax.stop_gradient(reference_logprob)
        token_kl = kl_penalty(jnp.where(mask, logprob, 0.0), jnp.where(mask, reference_logprob, 0.0))
        token_loss = token_loss + beta * token_kl
        metrics["kl"] = jnp.sum(token_kl * mask) / jnp.maximum(totals.tokens, 1)
    return _reduce(token_loss, mask, totals, config), metrics


def _reduce(token_loss: Array, mask: Array, totals: StepTotals, config: PolicyLossConfig) -> Array:
    """The micro-batch's share of the step's average of token losses [..., C] (or [..., 1], one per completion)."""
    sum_ = jnp.sum(token_loss * mask, axis=-1)
    completions = jnp.maximum(totals.completions, 1)
    if config.loss_type == "grpo":
        return jnp.sum(sum_ / jnp.maximum(jnp.sum(mask, axis=-1), 1)) / completions
    if config.loss_type == "bnpo":
        return jnp.sum(sum_) / jnp.maximum(jnp.sum(mask), 1) / totals.micro_batches
    if config.loss_type == "dr_grpo":
        return jnp.sum(sum_) / (completions * config.max_completion_length)
    return jnp.sum(sum_) / jnp.maximum(totals.tokens, 1)


def _clip_metrics(ratio, advantage, mask, present, totals: StepTotals, config: PolicyLossConfig) -> dict[str, Array]:
    """Shares of tokens (of completions, at sequence level) whose ratio the clip holds back, as TRL counts them."""
    low = (ratio < 1 - config.epsilon) & (advantage < 0)
    high = (ratio > 1 + config.epsilon_high) & (advantage > 0)
    if config.importance_sampling_level == "sequence":
        counted = jnp.ones_like(low) if present is None else present[..., None]
        total = totals.completions
    else:
        counted, total = mask, totals.tokens

    def share(flags):
        return jnp.sum(flags & counted, dtype=jnp.float32) / jnp.maximum(total, 1)

    return {
        "clip_ratio/low_mean": share(low),
        "clip_ratio/high_mean": share(high),
        "clip_ratio/region_mean": share(low | high),
    }
