"""Batches as trees of arrays whose field names say which axis counts rows: `id_BT` axis 0, `position_3BT` axis 1."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mer_r1_jax.parallel.rules import TRAIN_RULES, Rules, replicated, rows


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
