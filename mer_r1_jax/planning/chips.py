"""The chips a plan can be made for, TPUs and GPUs: what their makers state of each, and the devices of a slice."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.experimental import topologies

from mer_r1_jax.parallel import GPU_MEMORY_SHARE
from mer_r1_jax.planning.cuda_target import GIB, CudaTarget

GB = 10**9
MOST_GPUS = 8  # of one host; between hosts the links are others


class TopologyError(ValueError):
    """A slice that cannot be planned for; the message says what is known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip: a TPU's, or a GPU.

    Attributes:
        flops: dense bf16 operations a second, sums in float32.
        hbm_bytes: memory a run can have: of a TPU what its compiler gives out, which is not what the pages state (16
            GB of a v5e, 95 of a v5p, 32 of a v6e; v4's is the page's). Of a GPU, what commands reserve.
        hbm_bandwidth: bytes a second.
        link_bandwidth: bytes a second that one chip can send over all its links (half the figure for both directions).
        clock: cycles a second, for the compiler's estimates; not stated officially (v6e's is inferred). 0 where the
            compiler makes none.
        source: where the figures stand.
        cuda: what XLA's compiler has to know of a GPU; None for TPUs.
    """

    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    clock: float = 0.0
    source: str
    cuda: CudaTarget | None = None

    @property
    def platform(self) -> str:
        """The platform programs are lowered for, as jax calls it."""
        return "cuda" if self.cuda else "tpu"


def _tpu(page: str, **figures: Any) -> Chip:
    return Chip(**figures, source=f"cloud.google.com/tpu/docs/{page}")


def _gpu(cuda: CudaTarget, source: str, **figures: Any) -> Chip:
    return Chip(**figures, hbm_bytes=int(GPU_MEMORY_SHARE * cuda.memory_bytes), source=source, cuda=cuda)


# Links of a GPU are NVLink's, or a card's PCI Express 4.0 x16.
CHIPS: dict[str, Chip] = {
    "v4": _tpu("v4", flops=275e12, hbm_bytes=32 * GIB, hbm_bandwidth=1200 * GB, link_bandwidth=300 * GB, clock=1.05e9),
    "v5e": _tpu(
        "v5e", flops=197e12, hbm_bytes=int(15.75 * GIB), hbm_bandwidth=819 * GB, link_bandwidth=200 * GB, clock=1.5e9
    ),
    "v5p": _tpu(
        "v5p", flops=459e12, hbm_bytes=int(95.73 * GIB), hbm_bandwidth=2765 * GB, link_bandwidth=600 * GB, clock=1.75e9
    ),
    "v6e": _tpu(
        "v6e", flops=918e12, hbm_bytes=int(31.24 * GIB), hbm_bandwidth=1638 * GB, link_bandwidth=400 * GB, clock=1.75e9
    ),
    "h100": _gpu(
        CudaTarget(
            name="NVIDIA H100 80GB HBM3",
            capability=(9, 0),
            cores=132,
            clock=1.98e9,
            l2_bytes=50 << 20,
            memory_bytes=84_942_979_072,
        ),
        "NVIDIA H100 data sheet, SXM",
        flops=989e12,
        hbm_bandwidth=3350 * GB,
        link_bandwidth=450 * GB,
    ),
    "a100": _gpu(
        CudaTarget(
            name="NVIDIA A100-SXM4-80GB",
            capability=(8, 0),
            cores=108,
            clock=1.41e9,
            l2_bytes=40 << 20,
            memory_bytes=85_100_068_864,
        ),
        "NVIDIA A100 data sheet, 80 GB SXM",
        flops=312e12,
        hbm_bandwidth=2039 * GB,
        link_bandwidth=300 * GB,
    ),
    "l4": _gpu(
        CudaTarget(
            name="NVIDIA L4",
            capability=(8, 9),
            cores=58,
            clock=2.04e9,
            l2_bytes=48 << 20,
            memory_bytes=22 * GIB,  # of its 24 GB, with error correction, about
        ),
        "NVIDIA L4 data sheet",
        flops=121e12,
        hbm_bandwidth=300 * GB,
        link_bandwidth=32 * GB,
    ),
    "rtx4090": _gpu(
        CudaTarget(
            name="NVIDIA GeForce RTX 4090",
            capability=(8, 9),
            cores=128,
            clock=2.52e9,
            l2_bytes=72 << 20,
            memory_bytes=int(23.6 * GIB),
        ),
        "NVIDIA Ada GPU Architecture white paper",
        flops=165e12,
        hbm_bandwidth=1008 * GB,
        link_bandwidth=32 * GB,
    ),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5p:2x2x4" or "h100:8".

    Raises:
        TopologyError: a generation that is not in CHIPS.
    """
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise TopologyError(
            f"topology {topology!r}: expected a chip of {', '.join(CHIPS)}; name one with its slice, as in v5p:2x2x4, "
            "or with the number of cards, as in h100:8"
        )
    return CHIPS[generation]


def gpu_count(topology: str) -> int:
    """The cards of a topology such as "h100:8".

    Raises:
        TopologyError: not a number of cards that one host has.
    """
    name, _, count = topology.partition(":")
    # Not `isdigit`, which takes superscripts.
    if not (count.isascii() and count.isdecimal() and 1 <= int(count) <= MOST_GPUS):
        raise TopologyError(
            f"topology {topology!r}: got {count or 'no number'!r} of cards, expected 1 to {MOST_GPUS}, those of one "
            f"host; write {name}:1 or {name}:{MOST_GPUS}"
        )
    return int(count)


def topology_devices(topology: str) -> list[Any]:
    """The devices of a slice, for a mesh of programs that are compiled and never run.

    Raises:
        TopologyError: a slice the compiler does not know, or a machine without the chip's compiler.
    """
    chip = chip_of(topology)
    if chip.cuda:
        return _gpu_devices(topology, chip)
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # jax raises several classes here, none of them its own
        raise TopologyError(
            f"topology {topology!r}: the TPU compiler does not take it ({_first_line(error)}); expected a "
            "slice Cloud TPU offers, such as v5p:2x2x4, v5e:16x16 or v6e:4x4, and libtpu installed "
            "(pip install -e '.[test]')"
        ) from error


def _gpu_devices(topology: str, chip: Chip) -> list[Any]:
    count = gpu_count(topology)
    assert chip.cuda is not None
    target = chip.cuda.text(chip.hbm_bandwidth)
    try:
        # Slices x hosts x cards of a host.
        described = topologies.get_topology_desc("", "cuda", target_config=target, topology=f"1x1x{count}")
    except Exception as error:  # jax raises several classes here, none of them its own
        raise TopologyError(
            f"topology {topology!r}: the GPU compiler is not there ({_first_line(error)}); expected jax's CUDA plugin, "
            "which compiles on machines without a GPU too; install it with pip install 'mer-r1-jax[plan-gpu]'"
        ) from error
    return list(described.devices)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
