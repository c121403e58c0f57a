"""Low-rank adapters of the text decoder (LoRA, arXiv 2106.09685), and where they live.

An adapted projection computes y = W x + b + alpha / rank x B (A x). A and B are two more leaves beside its kernel in
the flat dictionary of parameters, stacked over layers as the kernel is:

    text/layers/attn/q/kernel   [L, D, H, h]
    text/layers/attn/q/lora_a   [L, D, r]      the kernel's input axes, then the rank
    text/layers/attn/q/lora_b   [L, r, H, h]   the rank, then the kernel's output axes

What follows from this place:

* **Sharding**: both carry the kernel's logical axes and "rank", which no table of rules cuts. So A is cut along the
  model width where the kernel is, B along heads or the feed-forward width, in training and in decoding alike.
* **Trained and frozen**: a predicate on names (`is_adapter`). Gradients, optimizer moments and the trained half of a
  checkpoint are those of the adapters, and of a tower where one is trained.
* **Reference**: parameters without adapters are the model without adapters (`OmniBackbone.bind`). The reference of RL
  is then the policy's own frozen leaves, of which no second copy exists. Where RL begins with adapters that have learnt
  already, those of SFT, the reference keeps a copy of these small arrays, as it keeps one of whatever is trained.
* **Weight table** (`omni/hf/table.py`): knows no adapters. An export merges them on the way out, a layer at a time
  (`omni/hf/merging.py`); the names of a PEFT folder follow from the table's rows (`omni/hf/peft_folder.py`).
* **Checkpoints**: hold what is trained and the optimizer. The base is read from `model.path` again, or, where a run
  began with random weights, from `base/` beside its checkpoints, once (`run/stored_base.py`).
* **Plans**: read shapes and shardings from the same dictionary, so adapters are counted like everything else.

The media towers, embedding table, norms and output head have no adapters. With rank 0 there are no such leaves, and
every program is the one it is without this module.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Leaf = TypeVar("Leaf")

ADAPTER_LEAVES = ("lora_a", "lora_b")
# What `targets` may name -> the projections of a layer of the text decoder.
PROJECTIONS = {"attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Size and place of the adapters.

    Attributes:
        rank: r, at least 1.
        alpha: the product B (A x) is multiplied by alpha / rank.
        attention, mlp: whether the projections of attention, and of the feed-forward layers, have adapters.
        dropout: share of a projection's inputs that A does not see, in an update alone.
    """

    rank: int
    alpha: float
    attention: bool = True
    mlp: bool = True
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / self.rank

    @property
    def groups(self) -> tuple[str, ...]:
        """The adapted parts of a layer, by their names in the tree."""
        return ("attn",) * self.attention + ("mlp",) * self.mlp


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its flat name, belongs to an adapter."""
    return name.rpartition("/")[2] in ADAPTER_LEAVES


def without_adapters(params: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The parameters, by their flat names, of the model with its adapters switched off."""
    return {name: leaf for name, leaf in params.items() if not is_adapter(name)}


def adapted_kernels(names: Iterable[str]) -> list[str]:
    """Flat names of the kernels that have adapters among these parameters."""
    return [f"{name.removesuffix('/lora_a')}/kernel" for name in names if name.endswith("/lora_a")]


def fresh_adapters(shapes: Mapping[str, Any], key: jax.Array) -> dict[str, jax.Array]:
    """Adapters that change nothing yet: A uniform within 1 / sqrt(inputs), as peft's, and B zero.

    Args:
        shapes: of the adapters, by their flat names, stacked over layers.
        key: random bits; each leaf's follow from its place in the order of names.
    """
    made = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        if name.endswith("lora_b"):
            made[name] = jnp.zeros(shape.shape, shape.dtype)
            continue
        bound = 1 / math.sqrt(math.prod(shape.shape[1:-1]))  # inputs of one layer: neither layers nor rank
        drawn = jax.random.uniform(jax.random.fold_in(key, number), shape.shape, jnp.float32, -bound, bound)
        made[name] = drawn.astype(shape.dtype)
    return made
