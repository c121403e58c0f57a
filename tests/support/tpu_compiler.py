"""The real TPU compiler without a TPU: programs are compiled ahead of time for the chips of a named topology.

What the compiler refuses here (a kernel it cannot lower, memory that does not suffice) it would refuse on the pod.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# The smallest slice of each generation that its compiler accepts.
CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

# Two test processes may compile at the same time; without this the second one dies on libtpu's lock file.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@functools.cache
def topology(name: str) -> topologies.TopologyDescription:
    """The devices of a slice such as "v5p:2x2x1", for meshes and shardings of programs that are only compiled.

    Args:
        name: a chip of CHIPS, or a topology as Cloud TPU spells it.
    """
    return topologies.get_topology_desc(CHIPS.get(name, name), platform="tpu")


def on_first_device(tree: Any, topology: topologies.TopologyDescription) -> Any:
    """Arrays as abstract arrays of the topology's first device; those that have a sharding already keep it."""
    device = SingleDeviceSharding(topology.devices[0])

    def one(leaf):
        placed = isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None
        return leaf if placed else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)

    return jax.tree.map(one, tree)


def compile_for(
    fn: Callable, args: tuple, topology: topologies.TopologyDescription, **jit_options: Any
) -> jax.stages.Compiled:
    """fn, compiled for the topology.

    Args:
        fn: the function; it need not be jitted.
        args: arrays or jax.ShapeDtypeStruct; what has no sharding lives on the first device.
        topology: of `topology`.
        **jit_options: of jax.jit, e.g. donate_argnums, out_shardings.

    Returns:
        The compiled program: `.memory_analysis()`, `.as_text()`.
    """
    traced = jax.jit(fn, **jit_options).trace(*on_first_device(args, topology))
    return traced.lower(lowering_platforms=("tpu",)).compile()
