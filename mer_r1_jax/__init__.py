"""MER-R1 (multimodal emotion reasoning by slow-fast thinking synergy) in JAX for Cloud TPU.

`load` opens a model that answers about clips, `score` scores predictions; see mer_r1_jax/api.py.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mer_r1_jax.api import Answer as Answer
    from mer_r1_jax.api import Auto as Auto
    from mer_r1_jax.api import Model as Model
    from mer_r1_jax.api import load as load
    from mer_r1_jax.api import score as score

__version__ = "0.1.0"
__all__ = ["Answer", "Auto", "Model", "load", "score"]


def __getattr__(name: str):
    # At first use: importing the package, as every command and child process does, must not import JAX.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mer_r1_jax import api

    return getattr(api, name)
