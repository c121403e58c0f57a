"""Leaves on their way out to files: brought to the host a layer at a time, adapters merged into their kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.omni.hf.load import FileLeaf
from mer_r1_jax.omni.lora import AdapterConfig


@dataclasses.dataclass(frozen=True, eq=False)
class MergedLeaf:
    """A kernel with its adapter, W + scale x A B, of which one layer at a time is computed.

    Attributes:
        kernel: [L, in..., out...].
        a: [L, in..., r].
        b: [L, r, out...].
        scale: alpha / rank.
    """

    kernel: Any
    a: Any
    b: Any
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return tuple(self.kernel.shape)

    @property
    def dtype(self) -> np.dtype:
        """The wider of the kernel's and the adapter's: a bfloat16 base must not round the sum away."""
        return np.dtype(jnp.promote_types(self.kernel.dtype, self.a.dtype))

    def read(self, layer: int) -> np.ndarray:
        """One layer of the merged kernel on the host, summed in float32."""
        kernel, a, b = (fetch(leaf, layer).astype(np.float32) for leaf in (self.kernel, self.a, self.b))
        return (kernel + self.scale * np.tensordot(a, b, axes=1)).astype(self.dtype)


def fetch(leaf: Any, layer: int | None) -> np.ndarray:
    """A leaf, or one layer of it, on the host.

    A jax.Array keeps the host copy made of it for as long as it lives, so what is fetched is a temporary one.
    """
    if isinstance(leaf, FileLeaf):
        return leaf.read(layer)
    if isinstance(leaf, MergedLeaf):
        assert layer is not None  # adapters are those of stacked layers
        return leaf.read(layer)
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf if layer is None else leaf[layer])
    return np.asarray(jnp.copy(leaf) if layer is None else _layer_of(leaf, layer))


@jax.jit
def _layer_of(leaf: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)


def merged(params: Mapping[str, Any], adapters: AdapterConfig | None) -> dict[str, Any]:
    """Nested parameters without adapters, a `MergedLeaf` in the place of every kernel that had one."""
    if adapters is None:
        return dict(params)
    return _merged(params, adapters.scale)


def _merged(node: Mapping[str, Any], scale: float) -> dict[str, Any]:
    leaves = {name: _merged(value, scale) if isinstance(value, Mapping) else value for name, value in node.items()}
    if "lora_a" in leaves:
        a, b = leaves.pop("lora_a"), leaves.pop("lora_b")
        leaves["kernel"] = MergedLeaf(leaves["kernel"], a, b, scale)
    return leaves
