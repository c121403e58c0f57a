"""A tree of arrays as Orbax stores it: one flat {name: array} mapping, and what is said of each array beside it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mer_r1_jax.parallel import processes
from mer_r1_jax.parallel.whole import mesh_of


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, is damaged, or does not fit the run; the message says which and what to do."""


class Restored(NamedTuple):
    """What `Checkpoints.restore` gives back.

    Attributes:
        step: its number.
        arrays: in the caller's tree.
        host: the host state.
        manifest_sha256: hash of the manifest's bytes, which names every other file's: identifies the content.
        saved_on: devices along each axis of the mesh it was saved from, and `processes`; empty where that is unknown.
    """

    step: int
    arrays: Any
    host: dict[str, Any]
    manifest_sha256: str = ""
    saved_on: Mapping[str, int] = {}


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves under readable, unique names such as `optimizer.0.mu.text.embed`, in the order of the tree."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise CheckpointError(
            "two arrays of the tree get the same name: keys must not contain dots that make them alike"
        )
    return named


def host_content(layout_version: int, named: dict[str, Any], host: dict[str, Any]) -> dict[str, Any]:
    """What lies beside the arrays: the layout's version, what each array is, where they were, the caller's host state.

    Raises:
        CheckpointError: a leaf is no array, or the host state would not come back as it is.
    """
    described = {name: _describe(name, leaf) for name, leaf in named.items()}
    _check_host(host)
    return {"layout_version": layout_version, "arrays": described, "saved_on": _layout_of(named), "host": host}


def save_arrays(path: os.PathLike, named: dict[str, Any]) -> None:
    """Writes arrays by name; every process of a run calls it."""
    stored = {name: leaf for name, leaf in named.items() if leaf.size}  # Orbax stores no empty arrays
    if stored:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(stored))


def restore_arrays(
    found: Any, layout_version: int, abstract_arrays: Any | Callable[[int, dict[str, Any]], Any], part: bool = False
) -> Restored:
    """Reads a sound step into the caller's tree.

    Args:
        found: the step, a `step_store.Found`.
        layout_version: that this program reads.
        abstract_arrays, part: as for `Checkpoints.restore`.

    Raises:
        CheckpointError: it does not fit.
    """
    state = found.state
    if state["layout_version"] != layout_version:
        raise CheckpointError(
            f"checkpoint {found.where} has layout version {state['layout_version']}, this program writes and reads "
            f"version {layout_version}: resume with the program version that made it, or start a new run"
        )
    if callable(abstract_arrays):
        abstract_arrays = abstract_arrays(found.step, state["host"])
    wanted = named_leaves(abstract_arrays)
    _check_matches(found.where, state["arrays"], wanted, part)
    stored = {name: leaf for name, leaf in wanted.items() if np.prod(leaf.shape, dtype=np.int64)}
    loaded = _load_arrays(found.arrays, stored) if stored else {}
    leaves = [loaded[name] if name in loaded else _empty(leaf) for name, leaf in wanted.items()]
    arrays = jax.tree.unflatten(jax.tree.structure(abstract_arrays), leaves)
    return Restored(found.step, arrays, state["host"], found.manifest_sha256, state.get("saved_on", {}))


def hash_of_json(content: dict[str, Any]) -> str:
    """Hexadecimal SHA-256 of JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _describe(name: str, leaf: Any) -> dict[str, Any]:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise CheckpointError(
            f"{name or 'the root'} is a {type(leaf).__name__}, but a checkpoint holds arrays: "
            "make it one, or put it into the host state"
        )
    return {"shape": [int(size) for size in leaf.shape], "dtype": str(leaf.dtype)}


def _layout_of(named: dict[str, Any]) -> dict[str, int]:
    """Devices along the axes of the mesh that the arrays lie on, and the number of processes; empty without a mesh."""
    mesh = mesh_of(named.values())
    return {} if mesh is None else dict(mesh.shape) | {"processes": processes.count()}


def _check_matches(where: object, saved: dict[str, Any], wanted: dict[str, Any], part: bool) -> None:
    problems = [f"{name}: in the checkpoint, not in the run" for name in saved if name not in wanted and not part]
    shown = lambda spec: f"{spec['dtype']}{spec['shape']}"  # noqa: E731
    for name, leaf in wanted.items():
        now = _describe(name, leaf)
        if name not in saved:
            problems.append(f"{name}: in the run, not in the checkpoint")
        elif any(saved[name][key] != now[key] for key in now):
            problems.append(f"{name}: {shown(saved[name])} in the checkpoint, {shown(now)} in the run")
    if problems:
        raise CheckpointError(
            f"checkpoint {where} does not fit the run, {len(problems)} mismatches:\n  "
            + "\n  ".join(problems)
            + "\nResume with the configuration it was made with, or start a run of another name."
        )


def _load_arrays(path: os.PathLike, wanted: dict[str, Any]) -> dict[str, Any]:
    """Reads arrays by name, each onto the sharding of its abstract leaf (numpy when it has none)."""
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets, arguments = {}, {}
    for name, leaf in wanted.items():
        sharding = getattr(leaf, "sharding", None)
        if sharding is None and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            sharding = default
        targets[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        arguments[name] = (
            ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
            if sharding is None
            else ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=sharding, global_shape=leaf.shape, strict=True)
        )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        wished = ocp.args.PyTreeRestore(item=targets, restore_args=arguments, partial_restore=True)
        return checkpointer.restore(path, args=wished)


def _empty(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    empty = np.zeros(leaf.shape, leaf.dtype)
    return empty if sharding is None else jax.device_put(empty, sharding)


def _check_host(host: dict[str, Any]) -> None:
    try:
        back = json.loads(json.dumps(host, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the host state cannot be written as JSON: {error}") from error
    if back != host:
        changed = sorted(key for key in host if back.get(str(key)) != host[key])
        raise CheckpointError(
            f"the host state would not come back from JSON as it is, at {changed}: "
            "use string keys, and lists in place of tuples"
        )
