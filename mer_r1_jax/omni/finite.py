"""Whether parameters on the devices are numbers at all."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding


def not_finite(leaves: Mapping[str, jax.Array]) -> list[str]:
    """Names of the leaves that hold NaN or infinite values, in their order.

    One program reads every leaf where it lies; in a run of several processes all of them have to call it.
    """
    sharding = next((leaf.sharding for leaf in leaves.values() if isinstance(leaf, jax.Array)), None)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    good = np.asarray(_all_finite(tuple(leaves.values()), everywhere))
    return [name for name, finite in zip(leaves, good, strict=True) if not finite]


@functools.partial(jax.jit, static_argnums=1)
def _all_finite(leaves: tuple[jax.Array, ...], everywhere: Sharding | None) -> jax.Array:
    """bool [number of leaves]."""
    good = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])
    return good if everywhere is None else jax.lax.with_sharding_constraint(good, everywhere)
