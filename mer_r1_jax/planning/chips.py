"""The chips a plan can be made for: what Google's Cloud TPU pages state of each, and the devices of a slice."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.experimental import topologies

GB = 10**9
GIB = 2**30


class TopologyError(ValueError):
    """A slice that cannot be planned for; the message says what is known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip.

    Attributes:
        flops: dense bf16 operations a second.
        hbm_bytes: memory. The TPU pages give 95 GB and 16 GB where the compiler accepts 95 GiB and 16 GiB less a
            little; where it refuses a program, its word counts.
        hbm_bandwidth: bytes a second.
        ici_bandwidth: bytes a second that one chip can send over all its links (half the figure for both directions).
        clock: cycles a second, for the compiler's estimates; not stated officially (v6e's is inferred).
    """

    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    clock: float


CHIPS: dict[str, Chip] = {
    "v4": Chip(flops=275e12, hbm_bytes=32 * GIB, hbm_bandwidth=1200 * GB, ici_bandwidth=300 * GB, clock=1.05e9),
    "v5e": Chip(flops=197e12, hbm_bytes=16 * GIB, hbm_bandwidth=819 * GB, ici_bandwidth=200 * GB, clock=1.5e9),
    "v5p": Chip(flops=459e12, hbm_bytes=95 * GIB, hbm_bandwidth=2765 * GB, ici_bandwidth=600 * GB, clock=1.75e9),
    "v6e": Chip(flops=918e12, hbm_bytes=32 * GIB, hbm_bandwidth=1638 * GB, ici_bandwidth=400 * GB, clock=1.75e9),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5p:2x2x4".

    Raises:
        TopologyError: a generation that is not in CHIPS.
    """
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise TopologyError(f"topology {topology!r}: expected a chip of {', '.join(CHIPS)}, as in v5p:2x2x4")
    return CHIPS[generation]


def topology_devices(topology: str) -> list[Any]:
    """The devices of a slice, for a mesh of programs that are compiled and never run.

    Raises:
        TopologyError: a slice the compiler does not know, or a machine without libtpu.
    """
    chip_of(topology)
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # jax raises several classes here, none of them its own
        raise TopologyError(
            f"topology {topology!r}: the TPU compiler does not take it ({str(error).splitlines()[0]}); expected a "
            "slice Cloud TPU offers, such as v5p:2x2x4, v5e:16x16 or v6e:4x4, and libtpu installed "
            "(pip install -e '.[test]')"
        ) from error
