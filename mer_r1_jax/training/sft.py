"""Supervised fine-tuning: every prompt carries its slow and its fast target, in one row.

The prompt (and its media) is computed once for both: they are two continuations that do not see each other. The loss
weight of every token is set on the host for the whole optimizer step, so micro-batches simply add up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mer_r1_jax.config.schema import OptimizerConfig
from mer_r1_jax.omni.batch import Array, Batch
from mer_r1_jax.omni.thinker import FeatureLayout
from mer_r1_jax.parallel.rows import split_rows
from mer_r1_jax.rl.losses import token_logprobs
from mer_r1_jax.rl.packing import Continuations, pack, predictor_hidden
from mer_r1_jax.training.backbone import Backbone
from mer_r1_jax.training.state import Leaves, TrainState, apply_gradients


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """Targets of one kind, one for each prompt (G = 1).

    Attributes:
        continuation: the target's tokens, the fast target's forced prefix included.
        weight_BGC: float32 weight of each token's log-loss; the weights of a whole optimizer step sum to the kind's
            share of the loss, and are 0 on padding and on forced prefixes.
    """

    continuation: Continuations
    weight_BGC: Array


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
    backbone: Backbone, trainable: Leaves, frozen: Leaves, batch: SftBatch, encode_inside: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """This micro-batch's share of the step's weighted mean of token log-losses, in nats.

    Args:
        encode_inside: whether a tower is trained, so that gradients flow through the media encoding; frozen towers are
            encoded with their gradient stopped.
    """
    model = backbone.bind(trainable, frozen)
    features = model.encode_media(batch.prompts.vision, batch.prompts.audio)
    if not encode_inside and features is not None:
        features = jax.lax.stop_gradient(features)
    kinds = [kind for kind in (batch.slow, batch.fast) if kind is not None]
    sets = [kind.continuation for kind in kinds]
    tokens = pack(batch.prompts.tokens, batch.next_position_B, *sets)
    h_BTD = model.hidden(tokens, features, FeatureLayout.of_batch(batch.prompts))
    losses = []
    for kind, h_BGCD in zip(kinds, predictor_hidden(h_BTD, batch.prompts.tokens, *sets), strict=True):
        logprob_BGC, _ = token_logprobs(model, h_BGCD, kind.continuation.id_BGC, temperature=1.0)
        losses.append(-jnp.sum(logprob_BGC * kind.weight_BGC))
    metrics = {"loss/slow": losses[0]} | ({"loss/fast": losses[1]} if batch.fast is not None else {})
    return sum(losses), metrics


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
    backbone: Backbone, optimizer: Any, optimizer_config: OptimizerConfig, encode_inside: bool, parts: int
) -> Callable[[TrainState, SftBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted `step(state, batch) -> (state, metrics)`; the state is donated."""

    def sft_step(state: TrainState, batch: SftBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss(trainable, micro_batch):
            return sft_loss(backbone, trainable, state.frozen, micro_batch, encode_inside)

        with backbone.rules():
            value, metrics, gradients = accumulate(loss, state.trainable, batch, parts)
        state, update_metrics = apply_gradients(state, gradients, value, optimizer, optimizer_config.dtype)
        return state, {"loss": value} | metrics | update_metrics

    return jax.jit(sft_step, donate_argnums=0)
