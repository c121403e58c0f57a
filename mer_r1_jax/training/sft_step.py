"""Supervised fine-tuning: every prompt carries its slow and its fast target, in one row.

The prompt (and its media) is computed once for both: they are two continuations that do not see each other. Every
micro-batch divides by the tokens of the whole optimizer step, so micro-batches simply add up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mer_r1_jax.config.schema import SftConfig
from mer_r1_jax.omni.batch import Array, Prompts
from mer_r1_jax.rl.losses import token_logprobs
from mer_r1_jax.rl.packing import Continuations, continuation_hidden
from mer_r1_jax.training.backbone import Backbone
from mer_r1_jax.training.state import Params, TrainState, accumulate, apply_gradients


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """Targets of one kind, one for each prompt (G = 1).

    Attributes:
        continuation: the target's tokens, the fast target's forced prefix included.
        loss_mask_BGC: bool, tokens in the loss: neither padding nor a forced prefix.
    """

    continuation: Continuations
    loss_mask_BGC: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SftBatch:
    """One optimizer step of SFT.

    Attributes:
        prompts: with their clips.
        slow, fast: targets; `fast` is None when no fast targets are mixed in.
    """

    prompts: Prompts
    slow: Targets
    fast: Targets | None


def sft_loss(
    backbone: Backbone,
    params: Params,
    batch: SftBatch,
    tokens_in_loss: dict[str, jax.Array],
    fast_fraction: float,
    towers_trained: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """This micro-batch's share of (1 - f) x mean over slow tokens + f x mean over fast tokens of the step, in nats.

    Args:
        tokens_in_loss: tokens of the whole optimizer step, "slow" and "fast".
        fast_fraction: f.
        towers_trained: whether a tower is trained, so that gradients flow through the media encoding; frozen towers are
            encoded with their gradient stopped.
    """
    model = backbone.bind(params)
    features_BRD = model.encode_media(batch.prompts.vision, batch.prompts.audio)
    if not towers_trained and features_BRD is not None:
        features_BRD = jax.lax.stop_gradient(features_BRD)
    kinds = {"slow": batch.slow} | ({"fast": batch.fast} if batch.fast is not None else {})
    shares = {"slow": 1 - fast_fraction, "fast": fast_fraction} if batch.fast is not None else {"slow": 1.0}
    # Both targets follow the same prompt in one forward pass: hidden states [B, 1, C, D] that predict their tokens.
    sets = (kind.continuation for kind in kinds.values())
    hidden = continuation_hidden(model, batch.prompts.encoded(features_BRD), *sets, packed=backbone.packed_rows)
    means = {}
    for (name, kind), h_BGCD in zip(kinds.items(), hidden, strict=True):
        logprob_BGC, _ = token_logprobs(model, h_BGCD, kind.continuation.id_BGC, temperature=1.0)
        total = jnp.sum(jnp.where(kind.loss_mask_BGC, logprob_BGC, 0.0))
        means[name] = -total / jnp.maximum(tokens_in_loss[name], 1)
    return sum(shares[name] * mean for name, mean in means.items()), {f"loss/{name}": m for name, m in means.items()}


def make_sft_step(
    backbone: Backbone, optimizer: Any, config: SftConfig, towers_trained: bool
) -> Callable[[TrainState, SftBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted `step(state, batch) -> (state, metrics)`; the state is donated."""

    def sft_step(state: TrainState, batch: SftBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        kinds = {"slow": batch.slow} | ({"fast": batch.fast} if batch.fast is not None else {})
        counts = {name: jnp.sum(kind.loss_mask_BGC, dtype=jnp.float32) for name, kind in kinds.items()}
        trained, frozen = state.split()

        def loss(trained: Params, micro_batch: SftBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
            return sft_loss(backbone, trained | frozen, micro_batch, counts, config.fast_fraction, towers_trained)

        with backbone.rules():
            value, metrics, gradients = accumulate(loss, trained, batch, config.gradient_accumulation_steps)
        state, update_metrics = apply_gradients(state, gradients, value, optimizer, config.optimizer.dtype)
        return state, {"loss": value} | metrics | update_metrics

    return jax.jit(sft_step, donate_argnums=0)
