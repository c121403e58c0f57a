"""What training changes: trainable and frozen leaves apart, the optimizer over the trainable ones only.

Parameters are kept here as flat dictionaries, "text/layers/attn/q/kernel" -> array, so that a set of leaves is chosen
by a predicate on the name. A set of adapters (LoRA) would be a third such dictionary; `merge` is where it would join.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from mer_r1_jax.config.schema import OptimizerConfig

Leaves = dict[str, Any]  # flat parameters: path joined by "/" -> array
Params = dict[str, Any]  # the same, nested as the backbone's modules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything an update reads and writes.

    Attributes:
        step: int32 updates attempted.
        trainable: leaves the optimizer changes.
        frozen: leaves nothing changes.
        opt_state: optax state over `trainable`.
        skipped: int32 updates left out for a non-finite loss or gradient, in all.
        skipped_in_a_row: int32 the same since the last good update.
    """

    step: jax.Array
    trainable: Leaves
    frozen: Leaves
    opt_state: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def flatten(params: Params) -> Leaves:
    """Nested parameters as one flat dictionary."""
    return traverse_util.flatten_dict(params, sep="/")


def merge(*leaves: Leaves) -> Params:
    """Nested parameters from sets of leaves."""
    return traverse_util.unflatten_dict({k: v for part in leaves for k, v in part.items()}, sep="/")


def trainable_names(train_audio: bool, train_vision: bool) -> Callable[[str], bool]:
    """The predicate that says whether a leaf is trained: the language model always, a tower on demand.

    The audio tower's `bos_eos` embedding never enters the forward pass and is kept for export alone.
    """
    trained = {"text": True, "audio": train_audio, "vision": train_vision}
    return lambda name: trained[name.split("/", 1)[0]] and not name.startswith("audio/bos_eos")


def partition(leaves: Leaves, is_trainable: Callable[[str], bool]) -> tuple[Leaves, Leaves]:
    """Splits leaves into (trainable, frozen)."""
    trainable = {name: leaf for name, leaf in leaves.items() if is_trainable(name)}
    return trainable, {name: leaf for name, leaf in leaves.items() if name not in trainable}


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Warm-up, then the configured decay to zero at `total_steps`."""
    warmup = max(1, round(config.warmup_ratio * total_steps)) if config.warmup_ratio else 0
    decay_steps = max(1, total_steps - warmup)
    after = {
        "linear": lambda: optax.linear_schedule(config.learning_rate, 0.0, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, decay_steps),
        "constant": lambda: optax.constant_schedule(config.learning_rate),
    }[config.lr_scheduler_type]()
    if not warmup:
        return after
    # The first update already moves: step 0 has 1/warmup of the peak rather than none of it.
    rising = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, max(1, warmup - 1))
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW with clipping of the global gradient norm."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate_schedule(config, total_steps),
            b1=config.adam_beta1,
            b2=config.adam_beta2,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        ),
    )


def init_state(leaves: Leaves, is_trainable: Callable[[str], bool], optimizer: Any, dtype: str) -> TrainState:
    """A fresh state around given parameters; both moments are kept in `dtype`."""
    trainable, frozen = partition(leaves, is_trainable)

    def zero() -> jax.Array:
        # One buffer each: the state is donated, and a buffer can be donated once.
        return jnp.zeros((), jnp.int32)

    return TrainState(
        step=zero(),
        trainable=trainable,
        frozen=frozen,
        opt_state=optimizer.init(_cast(trainable, dtype)),
        skipped=zero(),
        skipped_in_a_row=zero(),
    )


def apply_gradients(
    state: TrainState, gradients: Leaves, loss: jax.Array, optimizer: optax.GradientTransformation, dtype: str
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step, left out (and counted) when the loss or a gradient is not finite.

    Returns:
        The new state, and `grad_norm` (before clipping) with the counts of skipped updates.
    """
    grad_norm = optax.global_norm(jax.tree.map(lambda g: g.astype(jnp.float32), gradients))
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(_cast(gradients, dtype), state.opt_state, _cast(state.trainable, dtype))
    updated = optax.apply_updates(state.trainable, updates)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    new_state = dataclasses.replace(
        state,
        step=state.step + 1,
        trainable=keep(updated, state.trainable),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + ~finite,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )
    metrics = {"skipped_steps": new_state.skipped, "skipped_in_a_row": new_state.skipped_in_a_row}
    return new_state, {"grad_norm": grad_norm} | metrics


def _cast(leaves: Leaves, dtype: str) -> Leaves:
    return {name: leaf.astype(dtype) for name, leaf in leaves.items()}


def state_shardings(state: TrainState, shardings: Leaves, scalar: Any) -> TrainState:
    """The sharding of every array of a state: optimizer moments live where their parameter does.

    Args:
        state: a (possibly abstract) state.
        shardings: of the flat parameters.
        scalar: of everything that is no parameter's.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        name = getattr(path[-1], "key", None)
        return shardings[name] if name in shardings else scalar

    return jax.tree_util.tree_map_with_path(one, state)
