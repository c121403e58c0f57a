"""Token log-probabilities and the clipped policy loss.

Names and meanings are TRL's (GRPOConfig): `loss_type`, `importance_sampling_level`, `epsilon`, `epsilon_high`, `delta`.
Every sum is divided by a denominator of the whole optimizer step, so the losses (and gradients) of its micro-batches
add up to those of the step, whatever their masks.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mer_r1_jax.config.schema import LOSS_TYPES, RlConfig
from mer_r1_jax.omni.batch import Array
from mer_r1_jax.rl.bound_model import BoundModel
from mer_r1_jax.rl.own_function import check_result, own_function


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyTargets:
    """What a rollout fixes about its completions, for the policy to learn from. Logits are divided by the temperature.

    Attributes:
        advantage_BG: float32, one value per completion, given to each of its tokens.
        mask_BGC: bool, tokens in the loss.
        present_BG: bool, completions of rows that exist.
        old_logprob_BGC: float32, under the policy that sampled; None when that is the policy being updated (one update
            per rollout).
        reference_logprob_BGC: float32, under the reference; None when there is no KL term.
    """

    advantage_BG: Array
    mask_BGC: Array
    present_BG: Array
    old_logprob_BGC: Array | None = None
    reference_logprob_BGC: Array | None = None


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


def token_logprobs(
    model: BoundModel, h: Array, ids: Array, *, temperature: float, chunk: int | None = None
) -> tuple[Array, Array]:
    """Log-probability of each token and entropy of the distribution it is scored under, softmax(logits / temperature).

    The logits of all tokens are never held at once; `mer_r1_jax.kernels.logprobs` says how.

    Args:
        model: the policy, or the reference.
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
    logprob_BGC: Array, targets: PolicyTargets, beta: Array, totals: StepTotals, config: RlConfig
) -> tuple[Array, dict[str, Array]]:
    """This micro-batch's share of the step's loss, -min(ratio A, clip(ratio) A) + beta KL.

    Args:
        logprob_BGC: float32, under the policy being trained, of logits / temperature.
        targets: advantages, masks and the other log-probabilities.
        beta: float32 scalar, weight of the KL term.
        totals: denominators of the whole optimizer step.
        config: static. `loss_type` says how token losses are averaged: grpo, the mean over each completion, then over
            completions; bnpo, the mean over the micro-batch's tokens, then over micro-batches; dr_grpo, the sum over
            tokens divided by completions x max_completion_length; dapo, the mean over the tokens of the whole step.
            `importance_sampling_level` token has a ratio per token, sequence one per completion: exp of the mean log
            ratio (GSPO). The ratio is clipped to [1 - epsilon, 1 + epsilon_high], and where it is not, cut at `delta`.

    Returns:
        loss float32 scalar; metrics as shares of the step's means, to be added over its micro-batches: policy_loss, kl,
        clip_ratio/low_mean, clip_ratio/high_mean, clip_ratio/region_mean.
    """
    mask_BGC = targets.mask_BGC
    advantage_BG1 = jax.lax.stop_gradient(targets.advantage_BG)[..., None]
    # With one update a rollout the old policy is the policy itself: the ratio is 1, its gradient that of logprob.
    old_BGC = jax.lax.stop_gradient(logprob_BGC if targets.old_logprob_BGC is None else targets.old_logprob_BGC)
    # Masked tokens may hold anything, infinities included: they must reach neither a sum nor a gradient.
    log_ratio = jnp.where(mask_BGC, logprob_BGC - old_BGC, 0.0)
    if config.importance_sampling_level == "sequence":
        length = jnp.maximum(jnp.sum(mask_BGC, axis=-1, keepdims=True), 1)
        log_ratio = jnp.sum(log_ratio, axis=-1, keepdims=True) / length  # [..., 1]: one ratio for all its tokens
    ratio = jnp.exp(log_ratio)
    # The lower of two values (PPO): nothing is gained by going beyond the clip, but what is lost there counts in full.
    clipped = jnp.clip(ratio, 1 - config.epsilon, 1 + config.epsilon_high)
    bounded = jnp.minimum(ratio, config.delta) if config.delta else ratio
    token_loss = -jnp.minimum(bounded * advantage_BG1, clipped * advantage_BG1)
    metrics = _clip_metrics(bounded, targets, totals, config)
    metrics["policy_loss"] = _reduce(token_loss, mask_BGC, totals, config)
    if targets.reference_logprob_BGC is not None:
        reference_BGC = jax.lax.stop_gradient(targets.reference_logprob_BGC)
        token_kl = kl_penalty(jnp.where(mask_BGC, logprob_BGC, 0.0), jnp.where(mask_BGC, reference_BGC, 0.0))
        token_loss = token_loss + beta * token_kl
        metrics["kl"] = jnp.sum(token_kl * mask_BGC) / jnp.maximum(totals.tokens, 1)
    return _reduce(token_loss, mask_BGC, totals, config), metrics


def _reduce(token_loss: Array, mask: Array, totals: StepTotals, config: RlConfig) -> Array:
    """The micro-batch's share of the step's average of token losses [..., C] (or [..., 1], one per completion)."""
    # [B, G]. A ratio of a whole completion, [..., 1], counts once for each of its tokens.
    sum_ = jnp.sum(token_loss * mask, axis=-1)
    completions = jnp.maximum(totals.completions, 1)
    if config.loss_type == "grpo":
        return jnp.sum(sum_ / jnp.maximum(jnp.sum(mask, axis=-1), 1)) / completions
    if config.loss_type == "bnpo":
        return jnp.sum(sum_) / jnp.maximum(jnp.sum(mask), 1) / totals.micro_batches
    if config.loss_type == "dr_grpo":
        return jnp.sum(sum_) / (completions * config.max_completion_length)
    if config.loss_type == "dapo":
        return jnp.sum(sum_) / jnp.maximum(totals.tokens, 1)
    return own_function("rl.loss_type", config.loss_type)(token_loss, mask, totals, config)


def check_loss_type(loss_type: str) -> None:
    """Tries a loss type of the user's, given by dotted path, on shapes: before anything is compiled.

    Its function takes what `_reduce` takes and returns the micro-batch's share of the step's loss.

    Raises:
        OwnFunctionError: there is no such function, or it does not return one float.
    """
    if loss_type not in LOSS_TYPES:
        mask_BGC = jnp.ones((2, 3, 4), bool)
        arrays = (jnp.zeros((2, 3, 4)), mask_BGC, step_totals(mask_BGC, mask_BGC.any(-1)))
        meaning = "the micro-batch's share of the step's loss"
        check_result("rl.loss_type", loss_type, arrays, RlConfig(loss_type=loss_type), (), meaning)


def _clip_metrics(ratio: Array, targets: PolicyTargets, totals: StepTotals, config: RlConfig) -> dict[str, Array]:
    """Shares of tokens (of completions, at sequence level) whose ratio the clip holds back, as TRL counts them."""
    advantage_BG1 = jax.lax.stop_gradient(targets.advantage_BG)[..., None]
    # Only a ratio that the advantage pushes further out is held back.
    low = (ratio < 1 - config.epsilon) & (advantage_BG1 < 0)
    high = (ratio > 1 + config.epsilon_high) & (advantage_BG1 > 0)
    if config.importance_sampling_level == "sequence":
        counted, total = targets.present_BG[..., None], totals.completions
    else:
        counted, total = targets.mask_BGC, totals.tokens

    def share(flags: Array) -> Array:
        return jnp.sum(flags & counted, dtype=jnp.float32) / jnp.maximum(total, 1)

    return {
        "clip_ratio/low_mean": share(low),
        "clip_ratio/high_mean": share(high),
        "clip_ratio/region_mean": share(low | high),
    }
