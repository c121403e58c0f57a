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
from mer_r1_jax.omni.batch import Array, Batch
from mer_r1_jax.omni.thinker import FeatureLayout
from mer_r1_jax.parallel.rows import split_rows
from mer_r1_jax.rl.losses import token_logprobs
from mer_r1_jax.rl.packing import Continuations, continuation_hidden
from mer_r1_jax.training.backbone import Backbone
from mer_r1_jax.training.state import Leaves, TrainState, apply_gradients


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
        prompts: prompts and media.
        next_position_B: int32 rotary position that follows each prompt.
        slow, fast: targets; `fast` is None when no fast targets are mixed in.
    """

    prompts: Batch
    next_position_B: Array
    slow: Targets
    fast: Targets | None


def sft_loss(
    backbone: Backbone,
    trainable: Leaves,
    frozen: Leaves,
    batch: SftBatch,
    tokens_in_loss: dict[str, jax.Array],
    fast_fraction: float,
    encode_inside: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """This micro-batch's share of (1 - f) x mean over slow tokens + f x mean over fast tokens of the step, in nats.

    Args:
        tokens_in_loss: tokens of the whole optimizer step, "slow" and "fast".
        fast_fraction: f.
        encode_inside: whether a tower is trained, so that gradients flow through the media encoding; frozen towers are
            encoded with their gradient stopped.
    """
    model = backbone.bind(trainable, frozen)
    features = model.encode_media(batch.prompts.vision, batch.prompts.audio)
    if not encode_inside and features is not None:
        features = jax.lax.stop_gradient(features)
    kinds = {"slow": batch.slow} | ({"fast": batch.fast} if batch.fast is not None else {})
    shares = {"slow": 1 - fast_fraction, "fast": fast_fraction} if batch.fast is not None else {"slow": 1.0}
    hidden = continuation_hidden(
        model,
        batch.prompts.tokens,
        features,
        FeatureLayout.of_batch(batch.prompts),
        batch.next_position_B,
        *(kind.continuation for kind in kinds.values()),
        packed=backbone.packed_rows,
    )
    means = {}
    for (name, kind), h_BGCD in zip(kinds.items(), hidden, strict=True):
        logprob_BGC, _ = token_logprobs(model, h_BGCD, kind.continuation.id_BGC, temperature=1.0)
        total = jnp.sum(jnp.where(kind.loss_mask_BGC, logprob_BGC, 0.0))
        means[name] = -total / jnp.maximum(tokens_in_loss[name], 1)
    return sum(shares[name] * mean for name, mean in means.items()), {f"loss/{name}": m for name, m in means.items()}


def accumulate(
    loss: Callable[[Leaves, Any], tuple[jax.Array, dict[str, jax.Array]]], trainable: Leaves, batch: Any, parts: int
) -> tuple[jax.Array, dict[str, jax.Array], Leaves]:
    """Sums loss, metrics and gradients over micro-batches whose shares already have whole-step denominators."""
    gradient = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, metrics), gradients = gradient(trainable, batch)
        return value, metrics, gradients

    def add(total, micro_batch):
        (value, metrics), gradients = gradient(trainable, micro_batch)
        return jax.tree.map(jnp.add, total, (value, metrics, gradients)), None

    micro_batches = split_rows(batch, parts)
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), micro_batches)
    (value, metrics), gradients = jax.eval_shape(gradient, trainable, first)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (value, metrics, gradients))
    total, _ = jax.lax.scan(add, zero, micro_batches)
    return total


def make_sft_step(
    backbone: Backbone, optimizer: Any, config: SftConfig, encode_inside: bool
) -> Callable[[TrainState, SftBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted `step(state, batch) -> (state, metrics)`; the state is donated."""

    def sft_step(state: TrainState, batch: SftBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        kinds = {"slow": batch.slow} | ({"fast": batch.fast} if batch.fast is not None else {})
        counts = {name: jnp.sum(kind.loss_mask_BGC, dtype=jnp.float32) for name, kind in kinds.items()}

        def loss(trainable, micro_batch):
            return sft_loss(backbone, trainable, state.frozen, micro_batch, counts, config.fast_fraction, encode_inside)

        with backbone.rules():
            value, metrics, gradients = accumulate(loss, state.trainable, batch, config.gradient_accumulation_steps)
        state, update_metrics = apply_gradients(state, gradients, value, optimizer, config.optimizer.dtype)
        return state, {"loss": value} | metrics | update_metrics

    return jax.jit(sft_step, donate_argnums=0)
