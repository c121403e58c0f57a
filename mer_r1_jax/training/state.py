"""What training changes: one flat dictionary of parameters, and the optimizer over those that are trained.

Parameters are `params` everywhere: "text/layers/attn/q/kernel" -> array. Only an update splits them into trained and
frozen ones (`partition`), and a checkpoint keeps the two apart on disk (`as_stored`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from mer_r1_jax.config.schema import OptimizerConfig, RunConfig
from mer_r1_jax.omni.lora import is_adapter
from mer_r1_jax.parallel.rows import split_rows
from mer_r1_jax.parallel.whole import not_finite
from mer_r1_jax.storage.step_store import DamagedStepError, is_count
from mer_r1_jax.storage.stored_arrays import CheckpointError

Params = dict[str, Any]  # flat: path joined by "/" -> array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything an update reads and writes.

    Attributes:
        step: int32 updates attempted.
        params: all parameters.
        opt_state: optax state over the trained ones.
        skipped: int32 updates left out for a non-finite loss or gradient, in all.
        skipped_in_a_row: int32 the same since the last good update.
        trained: static, names of the parameters that the optimizer changes; nothing changes the others.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    trained: frozenset[str] = dataclasses.field(metadata={"static": True})

    def split(self) -> tuple[Params, Params]:
        """(trained, frozen) parameters."""
        return partition(self.params, self.trained.__contains__)


def flatten(nested: Mapping[str, Any]) -> Params:
    """Flat parameters from those nested as the backbone's modules."""
    return traverse_util.flatten_dict(nested, sep="/")


def nest(params: Params) -> dict[str, Any]:
    """Parameters nested as the backbone's modules."""
    return traverse_util.unflatten_dict(params, sep="/")


def tower_flags(config: RunConfig, phase: str) -> dict[str, bool]:
    """Which towers a phase trains."""
    model, sft = config.model, config.sft
    in_sft = phase == "sft"
    return {
        "train_audio": model.train_audio_tower or (in_sft and sft.train_audio_tower),
        "train_vision": model.train_vision_tower or (in_sft and sft.train_vision_tower),
    }


def trainable_names(train_audio: bool, train_vision: bool, adapters: bool = False) -> Callable[[str], bool]:
    """The predicate that says whether a parameter is trained: the language model always, a tower on demand.

    The audio tower's `bos_eos` embedding never enters the forward pass and is kept for export alone. With `adapters`
    those are trained in place of the language model.
    """
    trained = {"text": True, "audio": train_audio, "vision": train_vision}

    def is_trained(name: str) -> bool:
        part = name.split("/", 1)[0]
        if adapters and part == "text":
            return is_adapter(name)
        return trained[part] and not name.startswith("audio/bos_eos")

    return is_trained


def trained_in(config: RunConfig, phase: str) -> Callable[[str], bool]:
    """The predicate that says whether a phase of this run trains a parameter."""
    return trainable_names(**tower_flags(config, phase), adapters=bool(config.model.lora.rank))


def never_trained(config: RunConfig) -> Callable[[str], bool]:
    """The predicate of the parameters that no phase of this run trains."""
    in_sft, in_rl = trained_in(config, "sft"), trained_in(config, "rl")
    return lambda name: not (in_sft(name) or in_rl(name))


def left_out_of_checkpoints(config: RunConfig) -> Callable[[str], bool]:
    """The predicate of the parameters that checkpoints of this run leave out: the base that adapters belong to."""
    return never_trained(config) if config.model.lora.rank else lambda name: False


def param_dtypes(config: RunConfig) -> Callable[[str], str]:
    """The dtype that each parameter of this run is kept in."""
    model, is_frozen = config.model, never_trained(config)
    frozen = model.param_dtype if model.frozen_dtype == "param_dtype" else model.frozen_dtype
    return lambda name: frozen if is_frozen(name) else model.param_dtype


def partition(params: Params, is_trainable: Callable[[str], bool]) -> tuple[Params, Params]:
    """Splits parameters into (trained, frozen)."""
    trained = {name: value for name, value in params.items() if is_trainable(name)}
    return trained, {name: value for name, value in params.items() if name not in trained}


def as_stored(state: TrainState, leave_out: Callable[[str], bool] = lambda name: False) -> dict[str, Any]:
    """A state as checkpoints hold it: trained and frozen parameters apart, as "trainable" and "frozen".

    Args:
        state: the state.
        leave_out: says of a frozen parameter's name whether it is kept elsewhere.
    """
    trained, frozen = state.split()
    frozen = {name: value for name, value in frozen.items() if not leave_out(name)}
    return {
        "step": state.step,
        "trainable": trained,
        "frozen": frozen,
        "opt_state": state.opt_state,
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
    }


def from_stored(stored: Mapping[str, Any]) -> TrainState:
    """The state that `as_stored` was given; what it left out has to be among the frozen parameters again."""
    rest = {name: stored[name] for name in ("step", "opt_state", "skipped", "skipped_in_a_row")}
    return TrainState(params=stored_params(stored), trained=frozenset(stored["trainable"]), **rest)


def stored_params(stored: Mapping[str, Any]) -> Params:
    """All parameters of what `as_stored` gave."""
    return stored["trainable"] | stored["frozen"]


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Warm-up, then the configured decay to zero at `total_steps`."""
    # Steps; a ratio above 0 gives at least one.
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
    # Clipping comes first, because the moments would remember a single huge gradient for many steps.
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


def init_state(params: Params, is_trainable: Callable[[str], bool], optimizer: Any, dtype: str) -> TrainState:
    """A fresh state around given parameters; both moments are kept in `dtype`."""
    trained, _ = partition(params, is_trainable)

    def zero() -> jax.Array:
        # One buffer each: the state is donated, and a buffer can be donated once.
        return jnp.zeros((), jnp.int32)

    return TrainState(
        step=zero(),
        params=params,
        # Optax gives the moments the dtype of the parameters it is shown, so it is shown a cast copy.
        opt_state=optimizer.init(_cast(trained, dtype)),
        skipped=zero(),
        skipped_in_a_row=zero(),
        trained=frozenset(trained),
    )


def accumulate(
    loss: Callable[[Params, Any], tuple[jax.Array, dict[str, jax.Array]]], trained: Params, batch: Any, parts: int
) -> tuple[jax.Array, dict[str, jax.Array], Params]:
    """Sums loss, metrics and gradients over micro-batches whose shares already have whole-step denominators.

    Args:
        loss: (trained parameters, micro-batch) -> (share of the step's loss, shares of its metrics).
        trained: the parameters that the gradient is taken by.
        batch: of the whole step; its rows are cut into `parts`.
        parts: micro-batches, walked one after the other, so that the activations of one alone are held.

    Returns:
        Loss, metrics and gradients. Of several micro-batches gradients are float32 where the parameters are narrower:
        bfloat16 has eight bits, and a share 256 times as small as the sum so far would leave it as it is. The sums so
        take 4 bytes a trained parameter in place of 2; what is float32 already costs nothing.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    # A single micro-batch needs no scan, which would hold running sums beside the gradients.
    if parts == 1:
        (value, metrics), gradients = gradient(trained, batch)
        return value, metrics, gradients

    def add(total, micro_batch):
        (value, metrics), gradients = gradient(trained, micro_batch)
        new = (value, metrics, gradients)
        return jax.tree.map(lambda so_far, one: so_far + one.astype(so_far.dtype), total, new), None

    # [parts, rows / parts, ...], walked by a scan: one program for one part, compiled once.
    micro_batches = split_rows(batch, parts)
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), micro_batches)
    # The loss decides which metrics there are, so it is traced once to shape the zeros that the sums start from.
    (value, metrics), gradients = jax.eval_shape(gradient, trained, first)
    sums = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.promote_types(leaf.dtype, jnp.float32)), gradients)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (value, metrics, sums))
    total, _ = jax.lax.scan(add, zero, micro_batches)
    return total


def apply_gradients(
    state: TrainState, gradients: Params, loss: jax.Array, optimizer: optax.GradientTransformation, dtype: str
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step, left out (and counted) when the loss or a gradient is not finite.

    Returns:
        The new state, and `grad_norm` (before clipping) with the counts of skipped updates.
    """
    trained, frozen = state.split()
    # Before clipping, in float32: squares of bfloat16 gradients lose the small ones.
    grad_norm = optax.global_norm(jax.tree.map(lambda g: g.astype(jnp.float32), gradients))
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    # In the optimizer's dtype, whatever the weights are kept in: small steps of AdamW vanish in bfloat16.
    updates, opt_state = optimizer.update(_cast(gradients, dtype), state.opt_state, _cast(trained, dtype))
    updated = optax.apply_updates(trained, updates)

    # By selection, as a program without branches does it: what was computed with NaN is thrown away, moments too.
    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    new_state = dataclasses.replace(
        state,
        # A skipped update counts as well: its prompts are used up, and the next one draws new dropout bits.
        step=state.step + 1,
        params=keep(updated, trained) | frozen,
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + ~finite,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )
    metrics = {"skipped_steps": new_state.skipped, "skipped_in_a_row": new_state.skipped_in_a_row}
    return new_state, {"grad_norm": grad_norm} | metrics


def applied_before(step: int, skipped: int, skipped_in_a_row: int) -> int:
    """What the optimizer counts at an update, which is where its learning rate stands in the schedule.

    An update that is left out takes no step of the schedule: the next one has its learning rate.

    Args:
        step: updates attempted with this one, from 1.
        skipped, skipped_in_a_row: metrics of this update.
    """
    return step - skipped - (skipped_in_a_row == 0)


def _cast(params: Params, dtype: str) -> Params:
    return {name: value.astype(dtype) for name, value in params.items()}


def state_shardings(state: TrainState, shardings: Params, scalar: Any) -> TrainState:
    """The sharding of every array of a state: optimizer moments live where their parameter does.

    Args:
        state: a (possibly abstract) state.
        shardings: of the parameters.
        scalar: of everything that is no parameter's.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        # Optax keeps moments in dictionaries under the parameters' names, so the last key says whose place they take.
        name = getattr(path[-1], "key", None)
        return shardings[name] if name in shardings else scalar

    return jax.tree_util.tree_map_with_path(one, state)


def check_numbers(arrays: Mapping[str, jax.Array], where: str) -> None:
    """Refuses a checkpoint with numbers that are none; every process of a run has to call it.

    Args:
        arrays: what was restored of it, by name.
        where: the checkpoint.

    Raises:
        CheckpointError: naming some of them.
    """
    if broken := not_finite(arrays):
        names = ", ".join(broken[:5]) + (" and others" if len(broken) > 5 else "")
        raise CheckpointError(
            f"{where}: NaN or infinite values in {len(broken)} of {len(arrays)} parameters ({names}), expected finite "
            "numbers: the training had broken. Move that step's folder away, so that the one before it is taken, or "
            "train again"
        )


def check_host(host: Mapping[str, Any]) -> None:
    """Refuses a checkpoint's host state that no training run has saved.

    Raises:
        DamagedStepError: naming what is not as it ought to be.
    """
    # This runs while a checkpoint is opened, and its error makes the reader fall back to the step before.
    counters, data = host.get("counters"), host.get("data")
    right = {
        "phase": host.get("phase") in ("sft", "rl"),
        "step": is_count(host.get("step")),
        "counters": isinstance(counters, Mapping) and is_count(counters.get("num_tokens")),
        "data": isinstance(data, Mapping)
        and isinstance(data.get("stream"), Mapping)
        and isinstance(data.get("quarantine"), list),
    }
    if wrong := [name for name, as_saved in right.items() if not as_saved]:
        raise DamagedStepError(f"its host state is no training run's: {', '.join(wrong)} missing or of another type")
