"""Token log-probabilities and the clipped policy loss.

Names and meanings are TRL's (GRPOConfig): `loss_type`, `importance_sampling_level`, `epsilon`, `epsilon_high`, `delta`,
`entropy_coef`, `top_entropy_quantile`; `sampler_correction` is its vllm_importance_sampling_correction.
Every sum is divided by a denominator of the whole optimizer step, so the losses (and gradients) of its micro-batches
add up to those of the step, whatever their masks. Two switches take a micro-batch by itself, as in TRL: which tokens
have the highest entropy, and the mean that is the entropy bonus.
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
    """What a rollout fixes about its completions, for the policy to learn from. Logits are divided by the temperature
    (`loss_temperature`), but for the sampler's.

    Attributes:
        advantage_BG: float32, one value per completion, given to each of its tokens.
        mask_BGC: bool, tokens in the loss.
        present_BG: bool, completions of rows that exist.
        old_logprob_BGC: float32, under the policy that sampled; None when that is the policy being updated (one update
            per rollout).
        reference_logprob_BGC: float32, under the reference; None when there is no KL term.
        sampling_logprob_BGC: float32, under the distribution each token was drawn from; None where the sampler is not
            corrected for.
    """

    advantage_BG: Array
    mask_BGC: Array
    present_BG: Array
    old_logprob_BGC: Array | None = None
    reference_logprob_BGC: Array | None = None
    sampling_logprob_BGC: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTotals:
    """Denominators of a whole optimizer step, float32 scalars, the same for each of its micro-batches.

    Attributes:
        tokens: tokens in the loss.
        completions: completions of rows that exist, including those masked out of the loss (as TRL counts them).
        micro_batches: micro-batches of the step (bnpo averages over them).
        dapo_tokens: what dapo divides by: `tokens`, or, where a rollout is cut into several steps, the mean of theirs,
            so that every token of the rollout weighs the same (as in TRL).
    """

    tokens: Array
    completions: Array
    micro_batches: Array
    dapo_tokens: Array


def step_totals(
    mask: Array, present: Array, micro_batches: int = 1, rollout_mean_tokens: Array | None = None
) -> StepTotals:
    """Totals from the masks of a whole step.

    Args:
        mask: bool [..., C], tokens in the loss.
        present: bool [...], completions of rows that exist.
        micro_batches: micro-batches the step is cut into.
        rollout_mean_tokens: float32 scalar, tokens in the loss of the rollout, over the steps it is cut into; None
            where it is one step.
    """
    tokens = jnp.sum(mask, dtype=jnp.float32)
    return StepTotals(
        tokens=tokens,
        completions=jnp.sum(present, dtype=jnp.float32),
        micro_batches=jnp.float32(micro_batches),
        dapo_tokens=tokens if rollout_mean_tokens is None else rollout_mean_tokens,
    )


def loss_mask(mask_BGC: Array, truncated_BG: Array, mask_truncated_completions: bool) -> Array:
    """bool [B, G, C]: the sampled tokens, without truncated completions if these are to be left out of the loss."""
    if not mask_truncated_completions:
        return mask_BGC
    return mask_BGC & ~truncated_BG[..., None]


def token_logprobs(
    model: BoundModel,
    h: Array,
    ids: Array,
    *,
    temperature: float,
    entropy_gradient: bool = False,
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """Log-probability of each token and entropy of the distribution it is scored under, softmax(logits / temperature).

    The logits of all tokens are never held at once; `mer_r1_jax.kernels.logprobs` says how.

    Args:
        model: the policy, or the reference.
        h: hidden states [..., D] that predict the tokens.
        ids: int32 [...].
        temperature: above 0; the sampling temperature.
        entropy_gradient: whether a gradient flows through the entropies. It does for an entropy bonus; a metric needs
            none.
        chunk: tokens whose logits are held at once where whole logits are computed; None chooses.

    Returns:
        log-probabilities float32 [...] and entropies float32 [...] in nats.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: log-probabilities need one above 0 (rl.temperature)")
    scores = model.gather_logprobs(h, ids, temperature=temperature, entropy_gradient=entropy_gradient, chunk=chunk)
    return scores.logprob, scores.entropy


def loss_temperature(config: RlConfig) -> float:
    """What logits are divided by in the loss: the sampling temperature, so that the policy is scored as it was sampled.

    Without `temper_logprobs` it is 1: the policy is then trained under another distribution than it was drawn from, as
    the authors' earlier code did.
    """
    return config.temperature if config.temper_logprobs else 1.0


def kl_penalty(logprob: Array, reference_logprob: Array) -> Array:
    """Per-token estimate exp(d) - d - 1 of KL(policy || reference), d = reference - policy; never negative, in nats."""
    d = reference_logprob - logprob
    return jnp.exp(d) - d - 1


def highest_entropy(entropy_BGC: Array, mask_BGC: Array, share: float) -> Array:
    """bool [B, G, C]: the `share` of a micro-batch's tokens whose distribution has the highest entropy.

    "Beyond the 80/20 rule" (arXiv 2506.01939): where reasoning forks, the distribution is wide, and learning at these
    tokens alone does no worse. TRL's quantile lies between two tokens and keeps what is above it, so the upper of the
    two is kept here too; tokens of equal entropy are kept together.

    Args:
        entropy_BGC: float32, in nats.
        mask_BGC: bool, tokens in the loss; the share is of these.
        share: in [0, 1]; 0 keeps the highest alone.
    """
    # Without any token the quantile is NaN, which nothing reaches.
    held_BGC = jnp.where(mask_BGC, entropy_BGC, jnp.nan)
    return mask_BGC & (entropy_BGC >= jnp.nanquantile(held_BGC, 1 - share, method="higher"))


_LARGEST_LOG_RATIO = 80.0  # nats; e^88 is infinite in float32, and infinity times an advantage of 0 is no number


def sampler_ratio(old_BGC: Array, sampling_BGC: Array, mask_BGC: Array, config: RlConfig) -> tuple[Array, Array]:
    """How much likelier the sampled tokens are to the trainer than they were to the sampler, within bounds.

    Both are the same policy, but what draws tokens and what scores them run other kernels, in other precisions and
    layouts, and filters (`top_k`) and banned tokens are the sampler's alone. Weighing by the ratio makes an answer
    count as if the trainer had drawn it. A ratio beyond its bounds is cut (truncate) or its tokens get weight 0 (mask).

    Args:
        old_BGC: float32 log-probabilities under the policy that sampled, as the trainer scores it.
        sampling_BGC: float32 log-probabilities under the distribution each token was drawn from.
        mask_BGC: bool, tokens in the loss.
        config: static; `sampler_correction` and its bounds.

    Returns:
        The weight float32 [B, G, C], or [B, G, 1] for whole completions: their product over tokens; and bool of that
        shape, where a bound acted.
    """
    log_ratio = jnp.where(mask_BGC, old_BGC - sampling_BGC, 0.0)
    if config.sampler_correction.startswith("sequence"):
        log_ratio = jnp.sum(log_ratio, axis=-1, keepdims=True)
    ratio = jnp.exp(jnp.minimum(log_ratio, _LARGEST_LOG_RATIO))
    high = config.sampler_correction_max or jnp.inf  # 0 is no bound
    beyond = (ratio < config.sampler_correction_min) | (ratio > high)
    if config.sampler_correction.endswith("mask"):
        return jnp.where(beyond, 0.0, ratio), beyond
    return jnp.clip(ratio, config.sampler_correction_min, high), beyond


def policy_loss(
    logprob_BGC: Array,
    targets: PolicyTargets,
    beta: Array,
    totals: StepTotals,
    config: RlConfig,
    entropy_BGC: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """This micro-batch's share of the step's loss, -min(ratio A, clip(ratio) A) + beta KL - entropy_coef entropy.

    Args:
        logprob_BGC: float32, under the policy being trained, of logits / temperature.
        targets: advantages, masks and the other log-probabilities.
        beta: float32 scalar, weight of the KL term.
        totals: denominators of the whole optimizer step.
        config: static. `loss_type` says how token losses are averaged: grpo, the mean over each completion, then over
            completions; bnpo, the mean over the micro-batch's tokens, then over micro-batches; dr_grpo, the sum over
            tokens divided by completions x max_completion_length; dapo, the mean over the tokens of the whole step,
            or `totals.dapo_tokens`. `importance_sampling_level` token has a ratio per token, sequence one per
            completion: exp of the mean log ratio (GSPO). The ratio is clipped to [1 - epsilon, 1 + epsilon_high], and
            where it is not, cut at `delta`.
        entropy_BGC: float32, of the distribution each token is scored under; read with `entropy_coef`, through which
            its gradient flows, and `top_entropy_quantile`.

    Returns:
        loss float32 scalar; metrics as shares of the step's means, to be added over its micro-batches: policy_loss, kl,
        clip_ratio/low_mean, clip_ratio/high_mean, clip_ratio/region_mean, and those of switches that are on.

    Raises:
        ValueError: a switch that is on reads entropies, and there are none.
    """
    if entropy_BGC is None and (config.entropy_coef or config.top_entropy_quantile < 1):
        raise ValueError("rl.entropy_coef and rl.top_entropy_quantile need entropies, and none were given here")
    mask_BGC = acting_BGC = targets.mask_BGC
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
    # Two switches weigh the policy's term alone; the KL term, added below, holds back every token.
    if config.top_entropy_quantile < 1:
        acting_BGC = highest_entropy(jax.lax.stop_gradient(entropy_BGC), mask_BGC, config.top_entropy_quantile)
        token_loss = token_loss * acting_BGC
    if targets.sampling_logprob_BGC is not None:
        weight, beyond = sampler_ratio(old_BGC, targets.sampling_logprob_BGC, mask_BGC, config)
        token_loss = token_loss * weight
        metrics |= _sampler_metrics(weight, beyond, targets, totals, config)
    metrics["policy_loss"] = _reduce(token_loss, mask_BGC, totals, config)
    if targets.reference_logprob_BGC is not None:
        reference_BGC = jax.lax.stop_gradient(targets.reference_logprob_BGC)
        token_kl = kl_penalty(jnp.where(mask_BGC, logprob_BGC, 0.0), jnp.where(mask_BGC, reference_BGC, 0.0))
        token_loss = token_loss + beta * token_kl
        metrics["kl"] = jnp.sum(token_kl * mask_BGC) / jnp.maximum(totals.tokens, 1)
    loss = _reduce(token_loss, mask_BGC, totals, config)
    if config.entropy_coef:
        assert entropy_BGC is not None  # refused above
        # Of the same size for every loss type: the mean over the tokens that the policy's term acts on.
        bonus = (
            jnp.sum(jnp.where(acting_BGC, entropy_BGC, 0.0))
            / jnp.maximum(jnp.sum(acting_BGC), 1)
            / totals.micro_batches
        )
        loss = loss - config.entropy_coef * bonus
        metrics["entropy_bonus"] = jax.lax.stop_gradient(config.entropy_coef * bonus)
    return loss, metrics


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
        return jnp.sum(sum_) / jnp.maximum(totals.dapo_tokens, 1)
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


def _sampler_metrics(
    weight: Array, beyond: Array, targets: PolicyTargets, totals: StepTotals, config: RlConfig
) -> dict[str, Array]:
    """The mean weight of tokens (of completions, where they have one each), and the share of them beyond a bound."""
    if config.sampler_correction.startswith("sequence"):
        counted, total = targets.present_BG[..., None], totals.completions
    else:
        counted, total = targets.mask_BGC, totals.tokens

    def mean(value: Array) -> Array:
        return jnp.sum(jnp.where(counted, value, 0.0)) / jnp.maximum(total, 1)

    return {
        "sampling/importance_sampling_ratio/mean": mean(weight),
        "sampling/importance_sampling_ratio/beyond": mean(beyond.astype(jnp.float32)),
    }


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
