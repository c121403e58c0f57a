"""What every command says to XLA before anything touches a device, in one place: a plan then is for what a run runs.

libtpu reads its flags when it is loaded, at the first touch of a device or of a topology, and jax the share of a GPU's
memory when it opens the card: `set_tpu_flags` and `set_gpu_memory` come before.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

VARIABLE = "LIBTPU_INIT_ARGS"

FLAGS = {
    # Left alone, the compiler cuts a product whose weights have to be gathered first into a loop of small products, one
    # a chip ("windowed einsum"). By its own estimate that makes a 7B step on 16 chips take 2.2 times as long.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}

# Of a GPU's memory, what jax reserves when it opens the card; its own 75% would leave 20 GB of an 80 GB card unused.
# The rest is for what XLA does not count: CUDA's context and modules, NCCL's buffers, a desktop.
GPU_MEMORY_SHARE = 0.92
GPU_MEMORY_VARIABLE = "XLA_CLIENT_MEM_FRACTION"
_USERS_OWN = (GPU_MEMORY_VARIABLE, "XLA_PYTHON_CLIENT_MEM_FRACTION")  # jax refuses both at once


def set_tpu_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds our flags to LIBTPU_INIT_ARGS; one that is already there keeps the user's value."""
    given = environment.get(VARIABLE, "").split()
    names = {word.lstrip("-").partition("=")[0] for word in given}
    added = [f"--{name}={value}" for name, value in FLAGS.items() if name not in names]
    environment[VARIABLE] = " ".join([*given, *added])


def set_gpu_memory(environment: MutableMapping[str, str] = os.environ) -> None:
    """Has jax reserve GPU_MEMORY_SHARE of a GPU; a share the user has set, by the new name or the old, stays."""
    if not any(environment.get(name) for name in _USERS_OWN):
        environment[GPU_MEMORY_VARIABLE] = str(GPU_MEMORY_SHARE)
