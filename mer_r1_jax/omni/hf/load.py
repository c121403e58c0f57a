"""Weights of a Hugging Face directory into our parameter tree, tensor by tensor.

The host never holds more than one stored tensor (and the piece of it that is on its way): leaves that stack layers are
allocated on the devices first, then each layer is written into its slot with the stack donated.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf import table
from mer_r1_jax.omni.hf.matching import Matched, match_tensors
from mer_r1_jax.omni.hf.sums import check_weights
from mer_r1_jax.omni.hf.tensor_files import NUMPY_DTYPES, StoredTensor, list_tensors
from mer_r1_jax.omni.thinker import abstract_thinker

_log = logging.getLogger(__name__)


def find_weights(directory: str | Path, config: ThinkerConfig) -> Matched:
    """Checks that the weights in `directory` are exactly those of `config`, reading headers only.

    Raises:
        WeightError: as list_tensors and match_tensors; one error lists everything that does not fit.
    """
    directory = Path(directory)
    entries = table.entries(abstract_thinker(config)[1], config)
    return match_tensors(list_tensors(directory), entries, directory, tied=config.tie_word_embeddings)


@dataclasses.dataclass(frozen=True)
class FileLeaf:
    """A parameter that stays in its files: a tensor of it is read when it is asked for, and kept nowhere.

    Attributes:
        shape, dtype: of the whole leaf, layers stacked; the dtype holds that of each of its tensors.
        tensors: one for each layer, or a single one, with its entry of the weight table.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    tensors: tuple[tuple[table.Entry, StoredTensor], ...]

    def read(self, layer: int | None) -> np.ndarray:
        """One layer in our shape, or the leaf where it has none. Raises WeightError as StoredTensor.read."""
        entry, stored = self.tensors[layer or 0]
        return entry.to_ours(stored.read())


def left_in_files(directory: str | os.PathLike, config: ThinkerConfig) -> dict[str, Any]:
    """The parameters of a Thinker for an export: nested dict of FileLeaf, in the shapes of `abstract_thinker(config)`.

    Nothing but headers is read, and sums compared, before a leaf is asked for. Names are understood as by load_params.

    Raises:
        WeightError: as load_params, but for values, which are looked at when they are read.
    """
    directory = Path(directory)
    check_weights(directory)
    matched = find_weights(directory, config)
    _, abstract, _ = abstract_thinker(config)
    shapes = table.leaves(abstract)
    params: dict[str, Any] = {}
    for path, group in table.by_leaf(table.entries(abstract, config)).items():
        tensors = tuple((entry, matched.tensors[entry.name]) for entry in group)
        dtypes = [NUMPY_DTYPES[stored.dtype] for _, stored in tensors]
        _set(params, path, FileLeaf(tuple(shapes[path].shape), functools.reduce(jnp.promote_types, dtypes), tensors))
    return params


def load_params(
    directory: str | os.PathLike,
    config: ThinkerConfig,
    *,
    shardings: Mapping | None = None,
    dtypes: Mapping | None = None,
) -> dict[str, Any]:
    """Loads the parameters of a Thinker.

    Bare transformers 4 names, the `thinker.` prefix of full Omni directories and transformers 5's in-memory names are
    all understood, in one file or in shards with an index. Talker and vocoder tensors are skipped and counted in the
    log. In a run of several processes every process reads the files and keeps its own shards.

    Args:
        directory: with `model.safetensors`, or shards and their index.
        config: the architecture, as `load_config(directory)` gives it; its `param_dtype` is what leaves are cast to.
        shardings: tree of `NamedSharding` or `SingleDeviceSharding` like the parameters; None puts everything on the
            first device.
        dtypes: tree of dtypes like the parameters, in place of the config's for all.

    Returns:
        Nested dict of jax.Arrays in the shapes of `abstract_thinker(config)`.

    Raises:
        WeightError: one error that lists everything that does not fit, raised before any data is read; files that are
            not as exported; a tensor with values that are not finite.
        ValueError: `shardings` is not shaped like the parameters or has a kind of sharding not listed above.
    """
    directory = Path(directory)
    check_weights(directory)
    matched = find_weights(directory, config)
    _, abstract, _ = abstract_thinker(config)
    entries = table.entries(abstract, config)
    shapes = table.leaves(abstract)
    if dtypes is not None:
        given = table.leaves(dtypes)
        shapes = {path: jax.ShapeDtypeStruct(leaf.shape, given[path]) for path, leaf in shapes.items()}
    placed = _placements(shapes, shardings)
    groups = table.by_leaf(entries)
    stacks = _allocate({path: shapes[path] for path, group in groups.items() if group[0].layer is not None}, placed)
    params: dict[str, Any] = {}
    for path, group in groups.items():
        dtype = np.dtype(shapes[path].dtype)
        if path in stacks:
            leaf = _fill(stacks.pop(path), group, matched.tensors, placed[path], dtype)
        else:
            leaf = _put(group[0], matched.tensors[group[0].name], placed[path], dtype)
        _set(params, path, leaf)
    skipped = ", ".join(f"{count} of {part}" for part, count in matched.skipped.items()) or "none"
    _log.info("%s: %d tensors loaded, tensors left aside: %s", directory, len(entries), skipped)
    return params


def _set(params: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = leaf


def _placements(shapes: Mapping[tuple[str, ...], Any], shardings: Mapping | None) -> dict[tuple[str, ...], Sharding]:
    if shardings is None:
        return dict.fromkeys(shapes, SingleDeviceSharding(jax.devices()[0]))
    placed = table.leaves(shardings)
    if placed.keys() != shapes.keys():
        odd = sorted("/".join(path) for path in placed.keys() ^ shapes.keys())
        raise ValueError(
            f"shardings and parameters differ in {', '.join(odd)}; make them from abstract_thinker(config)"
        )
    for path, sharding in placed.items():
        if not isinstance(sharding, (NamedSharding, SingleDeviceSharding)):
            raise ValueError(
                f"sharding of {'/'.join(path)} is a {type(sharding).__name__}: expected NamedSharding or "
                "SingleDeviceSharding"
            )
    return placed


def _put(entry: table.Entry, stored: StoredTensor, sharding: Sharding, dtype: np.dtype) -> jax.Array:
    """One stored tensor on the devices, in our shape; each shard is cast on its own."""
    ours = entry.to_ours(stored.read(dtype))
    array = jax.make_array_from_callback(
        entry.shape, sharding, lambda index: np.ascontiguousarray(ours[index]).astype(dtype, copy=False)
    )
    return jax.block_until_ready(array)  # else several host copies wait for their transfers at once


def _fill(
    stack: jax.Array, group: list[table.Entry], tensors: Mapping[str, StoredTensor], sharding: Sharding, dtype: np.dtype
) -> jax.Array:
    """A leaf of stacked layers, written layer by layer into the array allocated for it."""
    of_one_layer = _without_layer_axis(sharding)
    for entry in group:
        layer = _put(entry, tensors[entry.name], of_one_layer, dtype)
        stack = jax.block_until_ready(_write_layer(stack, layer, entry.layer, sharding))
    return stack


def _without_layer_axis(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=sharding.memory_kind)
    return sharding


def _allocate(shapes: Mapping[tuple[str, ...], Any], placed: Mapping[tuple[str, ...], Sharding]) -> dict:
    """Zeros for the stacked leaves, on the devices; one program, as compiling one for each outlasts the loading."""
    make = jax.jit(
        lambda: [jnp.zeros(leaf.shape, leaf.dtype) for leaf in shapes.values()],
        out_shardings=[placed[path] for path in shapes],
    )
    return dict(zip(shapes, make(), strict=True))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write_layer(stack: jax.Array, layer: jax.Array, index: jax.Array, sharding: Sharding) -> jax.Array:
    written = jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)
    return jax.lax.with_sharding_constraint(written, sharding)
