"""The reference that RL is held near by the KL term: the policy RL started from, or one that follows it slowly.

With `rl.sync_ref_model` the reference is mixed with the policy every `rl.ref_model_sync_steps` updates (TR-DPO, arXiv
2404.09656; names and meaning are TRL's). It is then part of what a run has to take up again, so each checkpoint has the
reference of its step beside it: a mix cannot be made again from anything else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.config.schema import RlConfig, RunConfig
from mer_r1_jax.omni.lora import is_adapter
from mer_r1_jax.storage.checkpoints import Checkpoints
from mer_r1_jax.training.backbone import Backbone
from mer_r1_jax.training.state import Params, TrainState


@functools.partial(jax.jit, donate_argnums=0)
def mixed(reference: Params, policy: Params, alpha: jax.Array) -> Params:
    """alpha x policy + (1 - alpha) x reference, each parameter in its own dtype and place.

    Args:
        reference: donated.
        policy: trained parameters, of the same names and shapes.
        alpha: float32 scalar in [0, 1].
    """

    def mix(old: jax.Array, new: jax.Array) -> jax.Array:
        # In float32: a small share of a bfloat16 difference would be rounded away.
        return (alpha * new.astype(jnp.float32) + (1 - alpha) * old.astype(jnp.float32)).astype(old.dtype)

    return jax.tree.map(mix, reference, policy)


def switched_off(config: RunConfig) -> Callable[[str], bool]:
    """The predicate of the parameters that the reference does without: adapters that are new when RL begins."""
    return lambda name: is_adapter(name) and not config.model.adapter_path and config.sft.max_steps == 0


def synced_at(config: RlConfig, step: int) -> int:
    """The update after which the reference of `step` updates was last mixed; 0 while it is the start of RL."""
    return step - step % config.ref_model_sync_steps if config.sync_ref_model else 0


def dtypes_in_memory(params: Params, backbone: Backbone, config: RlConfig) -> dict[str, Any]:
    """The dtype each parameter of the reference has while a run uses it; on disk they have the policy's.

    What decoding reads is cast to the compute dtype wherever it is used, so a reference in that dtype gives the same
    bits in half of float32's memory. One that follows the policy keeps its own, as the share of a mix may be small.

    Args:
        params: arrays or their shapes.
    """
    dtype = jnp.dtype(backbone.config.compute_dtype)
    cast = () if config.sync_ref_model else backbone.decode_shardings
    return {name: dtype if name in cast else array.dtype for name, array in params.items()}


def abstract_reference(config: RunConfig, state: TrainState, backbone: Backbone) -> Params:
    """Shapes, dtypes and places of the parameters that a reference holds of its own; none without a KL term.

    Args:
        config: of the run.
        state: of RL, with arrays or their shapes.
        backbone: where its parameters live.
    """
    is_off = switched_off(config)
    held = {name: leaf for name, leaf in state.split()[0].items() if config.rl.beta and not is_off(name)}
    return {
        name: jax.ShapeDtypeStruct(held[name].shape, dtype, sharding=backbone.shardings[name])
        for name, dtype in dtypes_in_memory(held, backbone, config.rl).items()
    }


class Reference:
    """The reference of one run, and what is kept of it on disk.

    Attributes:
        params: the trained parameters only, without adapters where RL began with new ones: these are switched off in
            the reference. Frozen parameters are the policy's own.

    Args:
        params: as they are kept already, in the dtypes of `dtypes_in_memory`.
        config: of RL.
        kept: where references are kept, numbered as `synced_at` says.
    """

    def __init__(self, params: Params, config: RlConfig, kept: Checkpoints):
        self.params = params
        self._config, self._kept = config, kept
        self._unsaved: int | None = None  # its number, where it was mixed since it was last kept

    def over(self, state: TrainState) -> Params:
        """All parameters of the reference, over a policy's frozen ones: only what is trained is held twice."""
        return state.split()[1] | self.params

    def follow(self, state: TrainState, step: int) -> None:
        """Mixes in the policy after `step` updates, where that is due."""
        if self._config.sync_ref_model and step % self._config.ref_model_sync_steps == 0:
            trained, _ = state.split()
            self.params = mixed(self.params, trained, np.float32(self._config.ref_model_mixup_alpha))
            self._unsaved = step

    def keep(self) -> None:
        """Keeps the reference as it is; to be called before a checkpoint, which must never lack its own.

        Raises:
            CheckpointError: nothing was saved.
        """
        if self._unsaved is not None:
            # One that stands there under this number belongs to a future that was given up; it is replaced.
            self._kept.save(self._unsaved, self.params, {})
            self._unsaved = None
