"""What of a run's layout over devices differs from the one that its checkpoint was saved from."""

from __future__ import annotations

from collections.abc import Mapping

from jax.sharding import Mesh

from mer_r1_jax.parallel import processes


def mesh_changes(saved_on: Mapping[str, int], mesh: Mesh) -> str:
    """Changes such as `fsdp 2 -> 4, processes 1 -> 2`; empty when there are none, or none are known.

    Args:
        saved_on: of `stored_arrays.Restored`.
        mesh: of this attempt.
    """
    now = dict(mesh.shape) | {"processes": processes.count()}
    changed = [name for name in now if saved_on.get(name, now[name]) != now[name]]
    return ", ".join(f"{name} {saved_on[name]} -> {now[name]}" for name in changed)
