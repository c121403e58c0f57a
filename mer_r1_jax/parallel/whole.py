"""Arrays that several processes hold between them, brought whole to the first of them."""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mer_r1_jax.parallel import processes

PIECE_BYTES = 1 << 28  # of an array that every device holds whole at a time


def on_first(leaf: jax.Array) -> jax.Array | np.ndarray | None:
    """A sharded array as one numpy array on the first process, None on the others; all of them must call it.

    It comes in pieces along its first axis, so that no device has to hold all of it. An array that this process holds
    whole anyhow is given back as it is.
    """
    if leaf.is_fully_addressable:
        return leaf
    rows = leaf.shape[0]
    step = max(1, PIECE_BYTES * rows // max(1, leaf.nbytes))
    pieces = []
    for start in range(0, rows, step):
        piece = jax.block_until_ready(_piece(leaf, np.int32(start), min(step, rows - start), leaf.sharding))
        if processes.is_first():
            pieces.append(np.asarray(piece))
    return np.concatenate(pieces) if processes.is_first() else None


@functools.partial(jax.jit, static_argnums=(2, 3))
def _piece(leaf: jax.Array, start: jax.Array, rows: int, sharding: NamedSharding) -> jax.Array:
    piece = jax.lax.dynamic_slice_in_dim(leaf, start, rows, axis=0)
    return jax.lax.with_sharding_constraint(piece, NamedSharding(sharding.mesh, PartitionSpec()))
