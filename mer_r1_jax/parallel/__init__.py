"""Flags of the TPU compiler that every run and every plan sets, in one place, so that a plan compiles what a run runs.

libtpu reads them when it is loaded, at the first touch of a device or of a topology: `set_tpu_flags` comes before.
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


def set_tpu_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds our flags to LIBTPU_INIT_ARGS; one that is already there keeps the user's value."""
    given = environment.get(VARIABLE, "").split()
    names = {word.lstrip("-").partition("=")[0] for word in given}
    added = [f"--{name}={value}" for name, value in FLAGS.items() if name not in names]
    environment[VARIABLE] = " ".join([*given, *added])
