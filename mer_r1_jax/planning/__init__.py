"""What a run will take of TPUs or GPUs nobody has yet: its programs compiled by the real compiler, and their sheet.

Importing this changes nothing: a run that trains reads its advice too. A process that compiles for devices it has not
calls `without_devices` first.
"""

import os
from collections.abc import MutableMapping

from mer_r1_jax.parallel import set_tpu_flags

_SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    # libtpu asks the cloud's metadata server which slice it is on; here there is none to answer.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    # Two compilers at once would otherwise meet at a lock file that guards the chips.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def without_devices(environment: MutableMapping[str, str] = os.environ) -> None:
    """Has the real compilers work in this process without a chip, and jax look for none.

    It has to come before jax is imported, which looks for a TPU host the moment it is. What the user has set stays.
    """
    for name, value in _SETTINGS.items():
        environment.setdefault(name, value)
    set_tpu_flags(environment)
