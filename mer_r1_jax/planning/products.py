"""Operations of matrix products and convolutions, padding and the holes of dilations left out."""

from __future__ import annotations

import dataclasses
import math
import re

from mer_r1_jax.planning.hlo import Computation, Instruction


def product_flops(instruction: Instruction, computation: Computation) -> float:
    """Multiplications and additions of a matrix product, padding left out."""
    result = instruction.arrays[0].sizes
    left, right = (computation[name].arrays[0].sizes for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", instruction.attributes).group(1)
        return 2.0 * math.prod(result) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    lhs, rest = re.search(r"dim_labels=(\w+)_(\w+->\w+)", instruction.attributes).groups()
    rhs, out = rest.split("->")
    groups = {
        name: int(match.group(1)) if (match := re.search(rf"\b{name}_group_count=(\d+)", instruction.attributes)) else 1
        for name in ("feature", "batch")
    }
    outputs = result[out.index("f")] * left[lhs.index("b")] // groups["batch"]
    inputs = left[lhs.index("f")] // groups["feature"]
    pairs = 1.0
    windows = _windows(instruction, len(rhs) - 2)
    for number, window in enumerate(windows):
        size_in, size_out = left[lhs.index(str(number))], result[out.index(str(number))]
        pairs *= _valid_pairs(size_in, right[rhs.index(str(number))], size_out, window)
    return 2.0 * outputs * inputs * pairs


@dataclasses.dataclass(frozen=True)
class _Window:
    stride: int = 1
    low: int = 0
    lhs_dilate: int = 1
    rhs_dilate: int = 1
    reverse: int = 0


def _windows(instruction: Instruction, count: int) -> list[_Window]:
    match = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in match.group(1).split()) if match else {}
    listed = {name: value.split("x") for name, value in fields.items()}

    def number(name: str, place: int, default: int) -> int:
        return int(listed[name][place].split("_")[0]) if name in listed else default

    return [
        _Window(
            stride=number("stride", place, 1),
            low=number("pad", place, 0),
            lhs_dilate=number("lhs_dilate", place, 1),
            rhs_dilate=number("rhs_dilate", place, 1),
            reverse=number("rhs_reversal", place, 0),
        )
        for place in range(count)
    ]


def _valid_pairs(size_in: int, kernel: int, size_out: int, window: _Window) -> int:
    """Pairs of an output place and a kernel place that meet a real input, not padding or a hole of a dilation."""
    total = 0
    reach = (size_in - 1) * window.lhs_dilate
    for place in range(kernel):
        offset = (kernel - 1 - place if window.reverse else place) * window.rhs_dilate - window.low
        if window.lhs_dilate == 1:
            first = max(0, -(offset // window.stride))
            last = min(size_out - 1, (reach - offset) // window.stride)
            total += max(0, last - first + 1)
        else:
            at = [out * window.stride + offset for out in range(size_out)]
            total += sum(0 <= one <= reach and one % window.lhs_dilate == 0 for one in at)
    return total
