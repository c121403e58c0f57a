"""Batches as trees of arrays whose field names say which axis counts rows: `id_BT` axis 0, `position_3BT` axis 1.

In a run of several processes each of them holds, on the host, the rows that its own devices hold.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mer_r1_jax.parallel.mesh import row_cut
from mer_r1_jax.parallel.rules import TRAIN_RULES, Rules, ShardingError, on, replicated, rows


def row_axis(path: tuple[Any, ...]) -> int | None:
    """Axis of the letter B in a field's shape letters; None when its array has no rows.

    Args:
        path: a key path of `jax.tree_util`, ending in the field.
    """
    name = path[-1]
    name = str(getattr(name, "name", getattr(name, "key", name)))
    letters = name.rpartition("_")[2]
    return letters.index("B") if "B" in letters else None


def split_rows(batch: Any, parts: int) -> Any:
    """Cuts a batch into micro-batches: arrays of B rows become arrays of `parts` x (B / parts) rows, stacked in front.

    Arrays without rows are repeated for every part, so that a scan can walk the whole tree.
    """

    def one(path, leaf):
        axis = row_axis(path)
        if axis is None:
            return jax.numpy.broadcast_to(leaf, (parts, *leaf.shape))
        cut = leaf.reshape(*leaf.shape[:axis], parts, leaf.shape[axis] // parts, *leaf.shape[axis + 1 :])
        return jax.numpy.moveaxis(cut, axis, 0)

    return jax.tree_util.tree_map_with_path(one, batch)


def row_shardings(batch: Any, mesh: Mesh, rules: Rules = TRAIN_RULES) -> Any:
    """The sharding of every array of a batch: rows over the data axes, arrays without rows everywhere."""

    def one(path, leaf):
        axis = row_axis(path)
        return replicated(mesh) if axis is None else rows(mesh, rules, axis)

    return jax.tree_util.tree_map_with_path(one, batch)


def put(batch: Any, mesh: Mesh, rules: Rules = TRAIN_RULES) -> Any:
    """Moves this process's rows of a host batch onto the mesh as part of one global array each."""

    def one(sharding, leaf):
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(one, row_shardings(batch, mesh, rules), batch)


def moved(batch: Any, mesh: Mesh, rules: Rules) -> Any:
    """A batch on the mesh, its rows where these rules cut them; what lies there is passed on, nothing is waited for.

    Within one process `jax.device_put` would wait for the batch and bring it there by way of the host.
    """
    leaves, structure = jax.tree.flatten(batch)
    wanted = jax.tree.leaves(row_shardings(batch, mesh, rules))
    elsewhere = [
        number
        for number, (leaf, sharding) in enumerate(zip(leaves, wanted, strict=True))
        if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    ]
    if elsewhere:
        there = _to(tuple(wanted[number] for number in elsewhere))([leaves[number] for number in elsewhere])
        for number, leaf in zip(elsewhere, there, strict=True):
            leaves[number] = leaf
    return jax.tree.unflatten(structure, leaves)


@functools.cache
def _to(shardings: tuple[Any, ...]) -> Callable[[list[jax.Array]], list[jax.Array]]:
    return jax.jit(lambda leaves: leaves, out_shardings=list(shardings))


def local_rows(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of global arrays, as numpy arrays: what `put` would put back."""
    if jax.process_count() == 1:
        return jax.device_get(batch)
    # A program's results lie as its compiler likes; here every process must hold the rows that are its own.
    batch = moved(batch, mesh, TRAIN_RULES)

    def one(path, leaf):
        axis = row_axis(path)
        if axis is None:
            return np.asarray(leaf)
        parts = {shard.index[axis].start or 0: shard.data for shard in leaf.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)], axis)

    return jax.tree_util.tree_map_with_path(one, batch)


@dataclasses.dataclass(frozen=True)
class RowShare:
    """Which part of every batch's rows this process loads.

    Attributes:
        index, count: the part, and how many equal parts there are.
        leader: whether no process with a lower number loads the same part (processes may share a part where a row
            spans several of them).
    """

    index: int = 0
    count: int = 1
    leader: bool = True

    def of(self, rows: int) -> int:
        """Rows of the part, of so many in all."""
        return rows // self.count


@functools.cache
def row_share(mesh: Mesh) -> RowShare:
    """The part of the rows that this process's devices hold.

    Raises:
        ShardingError: processes hold parts of different sizes, or parts that overlap.
    """
    held: dict[int, set[int]] = {}
    axes = on(mesh, TRAIN_RULES)["batch"]
    numbers = [mesh.axis_names.index(axis) for axis in axes]
    for place, device in np.ndenumerate(mesh.devices):
        part = np.ravel_multi_index([place[number] for number in numbers], [mesh.shape[axis] for axis in axes])
        held.setdefault(device.process_index, set()).add(int(part))
    mine = held.get(jax.process_index())
    parts = sorted({tuple(sorted(cuts)) for cuts in held.values()})
    flat = [cut for part in parts for cut in part]
    if mine is None or flat != list(range(row_cut(mesh))) or len({len(part) for part in parts}) > 1:
        raise ShardingError(
            f"on mesh {dict(mesh.shape)} the {len(held)} processes cannot share the rows of a batch evenly; choose "
            "mesh.tensor so that it divides the devices of a process, or is a multiple of them"
        )
    own = tuple(sorted(mine))
    first = min(process for process, cuts in held.items() if tuple(sorted(cuts)) == own)
    return RowShare(parts.index(own), len(parts), first == jax.process_index())
