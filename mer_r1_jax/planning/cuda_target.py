"""A GPU as XLA's compiler is told of it: what decides its choices, in the text format of its `GpuTargetConfigProto`.

With this the compiler works for a card on a machine that has none. On a machine with the card it asks the driver.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Core:
    """A streaming multiprocessor, by compute capability (CUDA C++ Programming Guide, technical specifications).

    Attributes:
        shared_bytes, shared_bytes_of_block: shared memory, and what one block may take of it.
        threads: that live on it at once.
        units: of float32 arithmetic.
    """

    shared_bytes: int
    shared_bytes_of_block: int
    threads: int
    units: int


_CORES = {
    (8, 0): _Core(shared_bytes=164 << 10, shared_bytes_of_block=163 << 10, threads=2048, units=64),
    (8, 9): _Core(shared_bytes=100 << 10, shared_bytes_of_block=99 << 10, threads=1536, units=128),
    (9, 0): _Core(shared_bytes=228 << 10, shared_bytes_of_block=227 << 10, threads=2048, units=128),
}
_CUDNN = (9, 12, 0)  # the oldest that jax's CUDA 13 plugin takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CudaTarget:
    """One card.

    Attributes:
        name: as its driver gives it, jax's `device_kind`.
        capability: compute capability, a key of _CORES.
        cores: streaming multiprocessors.
        clock: cycles a second, the highest.
        l2_bytes: second-level cache.
        memory_bytes: as its driver gives it.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    clock: float
    l2_bytes: int
    memory_bytes: int

    def text(self, bandwidth: float) -> str:
        """The target for `jax.experimental.topologies.get_topology_desc(..., target_config=...)`.

        Args:
            bandwidth: of its memory, bytes a second.
        """
        core, (major, minor) = _CORES[self.capability], self.capability
        info = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 << 10,
            "shared_memory_per_core": core.shared_bytes,
            "shared_memory_per_block_optin": core.shared_bytes_of_block,
            "threads_per_core_limit": core.threads,
            "core_count": self.cores,
            "fpus_per_core": core.units,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "memory_bandwidth": int(bandwidth),
            "l2_cache_size": self.l2_bytes,
            "clock_rate_ghz": self.clock / 1e9,
            "device_memory_size": self.memory_bytes,
            "registers_per_core_limit": 1 << 16,
            "registers_per_block_limit": 1 << 16,
        }
        lines = [f"  {name}: {value}" for name, value in info.items()]
        cudnn = " ".join(f"{name}: {part}" for name, part in zip(("major", "minor", "patch"), _CUDNN, strict=True))
        return "\n".join(
            [
                "gpu_device_info {",
                *lines,
                f"  cuda_compute_capability {{ major: {major} minor: {minor} }}",
                f'  name: "{self.name}"',
                "}",
                'platform_name: "CUDA"',
                f"dnn_version_info {{ {cudnn} }}",
                f'device_description_str: "{self.name}"',
                "",
            ]
        )
