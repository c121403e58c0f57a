"""What every command says to XLA before anything touches a device, in one place: a plan then is for what a run runs.

libtpu reads its flags when it is loaded, at the first touch of a device or of a topology, and jax the share of a GPU's
memory when it opens the card: `set_tpu_flags` and `set_gpu_memory` come before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

VARIABLE = "LIBTPU_INIT_ARGS"

FLAGS = {
    # Left alone, the compiler cuts a product whose weights have to be gathered first into a loop of small products, one
    # a chip ("windowed einsum"). By its own estimate that makes a 7B step on 16 chips take 2.2 times as long.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}

# KiB of a core's vector memory that one operation may fill, by `Device.device_kind`. Left alone, the compiler gives 16
# MiB and cuts products into windows so small that their operands are read again and again. By the data sheets most of
# that hides behind the matrix units, so on hardware, where it has not been tried, this may gain anything from nothing
# to what the compiler estimates (7B on v5p: 22 % of an update). The more it is, the longer compiles take, up to three
# times as long at these values. 48 MiB of v5p's 64 leave room to fetch ahead; beyond 32 nothing more was gained on v5e.
# v6e's 96 are the value that Marin's and axlearn's published flags have; only a tiny model was compiled with it here.
SCOPED_VMEM = "xla_tpu_scoped_vmem_limit_kib"
SCOPED_VMEM_KIB = {
    "TPU v5": 49152,
    "TPU v5p": 49152,
    "TPU v5 lite": 32768,
    "TPU v5e": 32768,
    "TPU v6 lite": 98304,
    "TPU v6e": 98304,
}

# Collectives on the sparse cores of a chip, beside the products of its tensor cores. The compiler does so with the sums
# of gradients; weights that are gathered stay where they were.
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload"
SPARSE_CORE = {f"{_OFFLOAD}_{kind}": "true" for kind in ("all_gather", "all_reduce", "reduce_scatter")}
SPARSE_CORE_KINDS = ("TPU v5", "TPU v5p")  # by `Device.device_kind`; on others nothing was compiled with them

# Of a GPU's memory, what jax reserves when it opens the card; its own 75% would leave 20 GB of an 80 GB card unused.
# The rest is for what XLA does not count: CUDA's context and modules, NCCL's buffers, a desktop.
GPU_MEMORY_SHARE = 0.92
GPU_MEMORY_VARIABLE = "XLA_CLIENT_MEM_FRACTION"
_USERS_OWN = (GPU_MEMORY_VARIABLE, "XLA_PYTHON_CLIENT_MEM_FRACTION")  # jax refuses both at once


def set_tpu_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds our flags to LIBTPU_INIT_ARGS; one that is already there keeps the user's value."""
    names = _named(environment)
    added = [f"--{name}={value}" for name, value in FLAGS.items() if name not in names]
    environment[VARIABLE] = " ".join([*environment.get(VARIABLE, "").split(), *added])


def product_options(device_kind: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Options of TPU programs whose time goes into large products.

    A limit that stands in LIBTPU_INIT_ARGS is the user's, and stays.

    Args:
        device_kind: of the chip, as `Device.device_kind` has it.
        environment: what LIBTPU_INIT_ARGS is read from.
    """
    if device_kind not in SCOPED_VMEM_KIB or SCOPED_VMEM in _named(environment):
        return {}
    return {SCOPED_VMEM: str(SCOPED_VMEM_KIB[device_kind])}


def _named(environment: Mapping[str, str]) -> set[str]:
    """Names of the flags in LIBTPU_INIT_ARGS."""
    return {word.lstrip("-").partition("=")[0] for word in environment.get(VARIABLE, "").split()}


def set_gpu_memory(environment: MutableMapping[str, str] = os.environ) -> None:
    """Has jax reserve GPU_MEMORY_SHARE of a GPU; a share the user has set, by the new name or the old, stays."""
    if not any(environment.get(name) for name in _USERS_OWN):
        environment[GPU_MEMORY_VARIABLE] = str(GPU_MEMORY_SHARE)
