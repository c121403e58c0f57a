"""What a run will take of TPUs or GPUs nobody has yet: its programs compiled by the real compiler, and their sheet.

The settings under which that compiler works on a machine without one come first: jax looks for a TPU host the moment
it is imported.
"""

import os

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

for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)

set_tpu_flags()
