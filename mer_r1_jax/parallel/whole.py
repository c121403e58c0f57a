"""Arrays that lie on a mesh: brought whole to the first process, or looked at where they lie."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from mer_r1_jax.parallel import processes

PIECE_BYTES = 1 << 28  # that every device holds whole at a time


def on_first(arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray] | None:
    """Sharded arrays as numpy arrays on the first process, None on the others; all of them must call it.

    Large arrays come in pieces along their first axis, small ones together, so that no device holds much at a time.

    Args:
        arrays: of one mesh.
    """
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in arrays}
    for names, spans in _batches(arrays):
        sharding = arrays[names[0]].sharding
        assert isinstance(sharding, NamedSharding)
        starts = np.asarray([start for start, _ in spans], np.int32)
        sizes = tuple(size for _, size in spans)
        fetched = jax.block_until_ready(_whole(sharding.mesh, sizes)([arrays[name] for name in names], starts))
        if processes.is_first():
            for name, piece in zip(names, fetched, strict=True):
                pieces[name].append(np.asarray(piece))
    return {name: np.concatenate(parts) for name, parts in pieces.items()} if processes.is_first() else None


def _batches(arrays: Mapping[str, jax.Array]) -> Iterator[tuple[list[str], list[tuple[int, int]]]]:
    """Names with (first row, rows) of each, about PIECE_BYTES at a time, in one order on every process."""
    names: list[str] = []
    spans: list[tuple[int, int]] = []
    held = 0
    for name in sorted(arrays):
        rows, nbytes = arrays[name].shape[0], arrays[name].nbytes
        step = max(1, PIECE_BYTES * rows // max(1, nbytes))
        for start in range(0, rows, step):
            size = min(step, rows - start)
            piece = nbytes * size // rows
            if names and held + piece > PIECE_BYTES:
                yield names, spans
                names, spans, held = [], [], 0
            names, spans, held = [*names, name], [*spans, (start, size)], held + piece
    if names:
        yield names, spans


@functools.lru_cache(maxsize=8)
def _whole(mesh: Mesh, sizes: tuple[int, ...]):
    def cut(arrays: list[jax.Array], starts: jax.Array) -> list[jax.Array]:
        return [
            jax.lax.dynamic_slice_in_dim(array, starts[place], size, axis=0)
            for place, (array, size) in enumerate(zip(arrays, sizes, strict=True))
        ]

    return jax.jit(cut, out_shardings=NamedSharding(mesh, PartitionSpec()))


def mesh_of(leaves: Iterable[Any]) -> Mesh | None:
    """The mesh that the first array on one lies on."""
    for leaf in leaves:
        sharding = getattr(leaf, "sharding", None)
        if sharding is not None and isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def not_finite(arrays: Mapping[str, jax.Array]) -> list[str]:
    """Names of the arrays that hold NaN or infinite values, in their order.

    One program reads every array where it lies; in a run of several processes all of them have to call it.
    """
    mesh = mesh_of(arrays.values())
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    good = np.asarray(_all_finite(tuple(arrays.values()), everywhere))
    return [name for name, finite in zip(arrays, good, strict=True) if not finite]


@functools.partial(jax.jit, static_argnums=1)
def _all_finite(arrays: tuple[jax.Array, ...], everywhere: Sharding | None) -> jax.Array:
    """bool [number of arrays]."""
    good = jnp.stack([jnp.isfinite(array).all() for array in arrays])
    return good if everywhere is None else jax.lax.with_sharding_constraint(good, everywhere)
