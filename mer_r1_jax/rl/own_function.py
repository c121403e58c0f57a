"""Functions of the user's by dotted path, for `rl.arm` and `rl.loss_type`: found, and tried on shapes before a run.

Reward functions are another matter: they run on the host, in a process of their own (rl/reward_funcs.py).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.rl.reward_worker import NotAFunctionError, load


class OwnFunctionError(ValueError):
    """A dotted path that leads to no usable function; the message says which setting, what was found and expected."""


@functools.cache
def own_function(setting: str, path: str) -> Callable[..., Any]:
    """The function at a dotted path, looked for in the folder the command was started from as well.

    Raises:
        OwnFunctionError: it cannot be imported, or is no function.
    """
    # At the end: a file of the user's must not hide an installed module of its name.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return load(path)
    except NotAFunctionError as error:
        raise OwnFunctionError(f"{setting}: got {path!r}: {error}") from error


def check_result(
    setting: str, path: str, arrays: tuple[Any, ...], config: RlConfig, shape: tuple[int, ...], meaning: str
) -> None:
    """Traces `function(*arrays, config)` once, without values, so that mistakes come before anything is compiled.

    Args:
        setting, path: as in `own_function`.
        arrays: examples of its arguments, pytrees.
        config: its last argument.
        shape: of the floating-point array that it has to return.
        meaning: of that array, in words.

    Raises:
        OwnFunctionError: it raised, or returned something else.
    """
    function = own_function(setting, path)
    try:
        made = jax.eval_shape(lambda *arguments: function(*arguments, config), *arrays)
    except Exception as error:  # the user's code: anything may come out of it
        first = str(error).strip().partition("\n")[0]
        raise OwnFunctionError(f"{setting}: {path} raised {type(error).__name__}: {first}") from error
    found = f"{made.dtype}{list(made.shape)}" if hasattr(made, "shape") else f"a {type(made).__name__}"
    if not hasattr(made, "shape") or made.shape != shape or not jnp.issubdtype(made.dtype, jnp.floating):
        raise OwnFunctionError(f"{setting}: {path} returned {found}, expected floats {list(shape)}: {meaning}")
