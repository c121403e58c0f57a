"""Whether parameters on the devices are numbers at all."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding


def not_finite(arrays: Mapping[str, jax.Array]) -> list[str]:
    """Names of the arrays that hold NaN or infinite values, in their order.

    One program reads every array where it lies; in a run of several processes all of them have to call it.
    """
    sharding = next((array.sharding for array in arrays.values() if isinstance(array, jax.Array)), None)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    good = np.asarray(_all_finite(tuple(arrays.values()), everywhere))
    return [name for name, finite in zip(arrays, good, strict=True) if not finite]


@functools.partial(jax.jit, static_argnums=1)
def _all_finite(arrays: tuple[jax.Array, ...], everywhere: Sharding | None) -> jax.Array:
    """bool [number of arrays]."""
    good = jnp.stack([jnp.isfinite(array).all() for array in arrays])
    return good if everywhere is None else jax.lax.with_sharding_constraint(good, everywhere)
