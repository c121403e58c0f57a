"""Where a kernel's arguments live: the mesh, and which of its axes cut their rows and their heads.

The compiler cannot cut a Pallas call, so under a mesh it runs in `shard_map`, each device on its own rows and heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

# On-chip vector memory of a core in MiB, by `Device.device_kind`; kinds that are not listed have at least 64.
_VMEM_MIB = {"TPU v2": 16, "TPU v3": 16, "TPU v4": 16, "TPU v5 lite": 128, "TPU v5e": 128, "TPU v6 lite": 128}


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh of Auto axes and what its axes cut.

    Attributes:
        mesh: devices the call runs on, real ones or those of a topology that is only compiled for.
        rows: mesh axes that cut the arguments' rows.
        heads: mesh axes that cut the arguments' heads.
    """

    mesh: Mesh
    rows: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    @property
    def cut_rows(self) -> int:
        """Parts the rows are cut into."""
        return math.prod(self.mesh.shape[axis] for axis in self.rows)

    @property
    def cut_heads(self) -> int:
        """Parts the heads are cut into."""
        return math.prod(self.mesh.shape[axis] for axis in self.heads)

    def spec(self, letters: str) -> PartitionSpec:
        """The partition of an array with these shape letters: B is cut like rows, H and K like heads."""
        axes = {"B": self.rows, "H": self.heads, "K": self.heads}
        return PartitionSpec(*(axes.get(letter) or None for letter in letters))


def device(placement: Placement | None) -> Any:
    """A jax.Device, which type checkers know nothing about, of the kind the call will run on."""
    # The mesh decides, not this process: it may be of another chip, which a program is only compiled for.
    return jax.devices()[0] if placement is None else placement.mesh.devices.flat[0]


def vmem_mib(placement: Placement | None) -> int:
    """MiB of vector memory of the core the call will run on."""
    return _VMEM_MIB.get(device(placement).device_kind, 64)


def _elsewhere(call: Callable, mesh: Mesh) -> Callable:
    """`call` for one device that this process has not: a kernel is lowered for the chip of the mesh that is in force,
    and where there is none for the process's own, which cannot be asked for another's facts."""

    def there(*arguments: jax.Array) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return call(*arguments)

    return there


def on_each_device(call: Callable, placement: Placement | None, arguments: Sequence[str], result: str) -> Callable:
    """`call`, run by every device of the placement on its part of the arguments; `call` itself without one.

    Args:
        call: takes as many arrays as `arguments` has entries and returns one.
        placement: the placement, or None.
        arguments, result: shape letters of each argument and of the result.
    """
    if placement is None:
        return call
    if placement.mesh.size == 1:
        return call if device(placement) in jax.devices() else _elsewhere(call, placement.mesh)
    # check_vma would have every kernel state over which mesh axes each of its outputs varies; ours state shapes only.
    return jax.shard_map(
        call,
        mesh=placement.mesh,
        in_specs=tuple(placement.spec(letters) for letters in arguments),
        out_specs=placement.spec(result),
        check_vma=False,
    )
