"""What training asks of a model: its structure, once. `rl/bound_model.py` says what it asks of it around parameters.

Programs of training, evaluation and planning see these names and no others, so a second model has to give these and
nothing else. `omni_backbone.OmniBackbone` is the one there is; docs/extending.md, "A second backbone", has the rest.

Parameters are one flat dictionary, "text/layers/attn/q/kernel" -> array, whatever the model; names that begin with
"audio/" and "vision/" belong to towers, which a phase may leave frozen, all others to the language model.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from mer_r1_jax.config.schema import ConfigError
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.parallel import SPARSE_CORE, product_options
from mer_r1_jax.parallel.rules import replicated
from mer_r1_jax.rl.bound_model import BoundModel
from mer_r1_jax.training.state import Params, TrainState, init_state, state_shardings


@runtime_checkable
class Backbone(Protocol):
    """Structure, shapes and shardings of a model on a mesh. Holds no parameters, so it can be static in a program.

    An implementation that names this class as its base is given everything below `rules`, which follows from the rest.

    Attributes:
        config: the architecture. Programs read its compute dtype; what builds prompts reads its token ids, the patch
            sizes of its vision tower, and the mel bins of its audio tower.
        mesh: where the model lives.
        shapes: abstract parameters, by name.
        shardings: where each parameter lives in training, a `NamedSharding` under every name of `shapes`.
        decode_shardings: the same while completions are sampled, for the parameters that decoding reads.
        packed_rows: whether completions are scored in one row with their prompt (`rl/packing.py`).
        sparse_core_collectives: whether programs of training leave collectives to the sparse cores of TPUs.
    """

    config: ThinkerConfig
    mesh: Mesh
    shapes: Params
    shardings: Params
    decode_shardings: Params
    packed_rows: bool
    sparse_core_collectives: bool = False

    def bind(self, params: Params) -> BoundModel:
        """The model around parameters, all of them, or all but its adapters; for use inside `jit`."""
        ...

    def init(self, seed: int) -> Params:
        """Random parameters, each made where it will live; adapters are made apart."""
        ...

    def load(self, path: str | os.PathLike) -> Params:
        """Parameters of a Hugging Face directory, through the model's table of weights, streamed onto the mesh."""
        ...

    def save(
        self, path: str | os.PathLike, params: Params, source: str | os.PathLike, asked: Callable[[], bool]
    ) -> None:
        """Writes a Hugging Face directory through the same table; what `load` reads there is what was saved.

        Args:
            path: the directory; what is there is replaced when the new one is whole.
            params: on one process, whole.
            source: folder of the tokenizer and processor files to copy.
            asked: whether a signal asks to leave it.

        Raises:
            StopRequested: one does; nothing was changed.
        """
        ...

    def adapters(self, seed: int, path: str | os.PathLike = "") -> Params:
        """Adapters of a PEFT folder or, without a path, new ones at zero; asked only where `model.lora` has a rank.

        Raises:
            ConfigError: a backbone that has none.
        """
        raise ConfigError(
            f"model.lora.rank: got a rank above 0 for {type(self).__name__}, which has no adapters; expected 0, or a "
            "backbone with a method `adapters`"
        )

    def rules(self, *, decode: bool = False) -> contextlib.AbstractContextManager[None]:
        """Context in which activations are constrained to the mesh, as training or as decoding has them."""
        ...

    @functools.cached_property
    def recast(self) -> frozenset[str]:
        """Names of the parameters that decoding wants in another dtype or another place than training."""

        def differs(name: str, sharding: Any) -> bool:
            shape = self.shapes[name]
            # This compares where arrays end up: specs that differ only over axes of one device place them alike.
            placed = sharding.is_equivalent_to(self.shardings[name], len(shape.shape))
            return shape.dtype != self.config.compute_dtype or not placed

        return frozenset(name for name, sharding in self.decode_shardings.items() if differs(name, sharding))

    def abstract_state(self, is_trainable: Callable[[str], bool], optimizer: Any, dtype: str) -> TrainState:
        """A train state without numbers, with its shardings; both moments in `dtype`."""
        # Traced on shapes: nothing is allocated.
        shapes = jax.eval_shape(lambda params: init_state(params, is_trainable, optimizer, dtype), self.shapes)
        shardings = state_shardings(shapes, self.shardings, replicated(self.mesh))
        return jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
        )

    def new_state(
        self, params: Mapping[str, Any], is_trainable: Callable[[str], bool], optimizer: Any, dtype: str
    ) -> TrainState:
        """A fresh train state around parameters, every array made where it will live.

        Args:
            params: donated: whoever still needs them keeps a copy.
            is_trainable: the predicate of those that are trained.
            optimizer: of the phase.
            dtype: of both moments.
        """
        abstract = self.abstract_state(is_trainable, optimizer, dtype)
        make = functools.partial(init_state, is_trainable=is_trainable, optimizer=optimizer, dtype=dtype)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        # Made in place by a program: a moment that was made first and cut then would be whole on one device. Without
        # the donation all parameters would lie in memory twice while it runs: at 3B in float32 another 19 GB.
        return jax.jit(make, out_shardings=shardings, donate_argnums=0)(dict(params))


# Bytes of weights in the compute dtype from which on a copy of them is what decides whether a machine is large enough.
_LARGE = 10**9


# XLA for GPUs makes one product of those that share an operand, and puts their weights side by side for it at every
# token: with adapters at 3B 19 GB are moved a token, where 8.5 are without.
GPU_DECODING = {"xla_gpu_dot_merger_threshold_mb": "0"}


def compiler_options(backbone: Backbone, decode: bool = False) -> dict[str, str] | None:
    """What XLA is told of the programs that take this model's parameters; None where its own ways are fine.

    On a CPU XLA multiplies in float32 what is bfloat16, and moves that conversion out of the loop over layers: all of
    them lie in memory a second time, at twice the size (3B: 13 GB beside 9.4). A large model is converted a layer at a
    time.
    """
    device = backbone.mesh.devices.flat[0]  # of the mesh, which may be that of a slice that is only compiled for
    platform = device.platform
    if platform == "tpu":
        # A token's products are small and wait for memory; more room only makes their compile longer.
        offload = SPARSE_CORE if backbone.sparse_core_collectives else {}
        return None if decode else product_options(device.device_kind) | offload or None
    if platform == "gpu":
        return GPU_DECODING if decode else None
    if platform != "cpu" or backbone.config.compute_dtype == "float32":
        return None
    computed = np.dtype(backbone.config.compute_dtype).itemsize
    if computed * sum(math.prod(leaf.shape) for leaf in backbone.shapes.values()) < _LARGE:
        return None
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
