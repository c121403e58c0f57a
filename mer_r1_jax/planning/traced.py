"""The matrix products a program asks for, counted before any compiler has seen it.

Beside what the compiled program does, summed over chips, this shows work that several chips do in common.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def traced_flops(jaxpr: Any, longest_loop: int = 1) -> float:
    """Multiplications and additions of all matrix products, forward passes done again included.

    Args:
        jaxpr: of `jax.jit(...).trace(...)`, for the whole mesh.
        longest_loop: trips of a `while`, whose end depends on data.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif name == "scan":
            total += params["length"] * traced_flops(params["jaxpr"], longest_loop)
        elif name == "while":
            total += longest_loop * traced_flops(params["body_jaxpr"], longest_loop)
        elif name == "cond":
            total += max(traced_flops(branch, longest_loop) for branch in params["branches"])
        elif name == "pallas_call":
            total += _kernel_flops(params, longest_loop)
        elif name == "shard_map":  # what it holds is one chip's share
            mesh = params["mesh"]
            chips = math.prod(mesh.shape[axis] for axis in params.get("manual_axes", mesh.axis_names))
            total += chips * traced_flops(params["jaxpr"], longest_loop)
        else:
            total += sum(traced_flops(inner, longest_loop) for inner in _inner(params))
    return total


def _kernel_flops(params: dict[str, Any], longest_loop: int) -> float:
    """What a kernel states, or else its body at every place of its grid."""
    if estimate := params.get("cost_estimate"):
        return float(estimate.flops)
    return math.prod(params["grid_mapping"].grid) * traced_flops(params["jaxpr"], longest_loop)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Programs an equation holds: those of jit, checkpoint, shard_map, custom derivatives."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if hasattr(params.get(name), "eqns") or hasattr(params.get(name), "jaxpr"):
            yield params[name]
