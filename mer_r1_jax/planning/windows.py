"""What the windows of a TPU's matrix product fetch from HBM, as the compiler states them in the program's text.

A product whose operands do not fit a core's vector memory walks a grid, and every step of it multiplies a window of the
one with a window of the other: the smaller the windows, the more often the same bytes are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from mer_r1_jax.planning.hlo import Computation, Instruction

_TILE = (8, 128)  # values of a tile along the two dimensions that lie closest together; windows are stated in tiles
_LAYOUT = re.compile(r"\]\{([0-9,]+)")

# Computations from the schedule to a fused one, each with the instruction that calls it.
_Frames = tuple[tuple[Computation, Instruction | None], ...]


def window_bytes(instruction: Instruction, computation: Computation, computations: Mapping[str, Computation]) -> float:
    """Bytes that the windows of one call fetch at least; 0 where none are stated, or not for every dimension.

    A window is fetched anew where the step before had another one. Within a window of the result all steps along the
    summed dimension come one after another, so both operands change at every step if that takes several. If it takes
    one, the grid can be walked so that one of the two operands is read once: the one that saves more is taken to be.

    Args:
        instruction: a product, or a fusion with one in it.
        computation: where it stands.
        computations: of the program.
    """
    grid = math.prod(_bounds(instruction, "iteration_bounds"))
    found = _product(instruction, ((computation, None),), computations)
    if found is None or not _bounds(instruction, "iteration_bounds"):
        return 0.0
    product, frames = found
    values = [frames[-1][0][operand] for operand in product.operands] + [product]
    stated = [_bounds(instruction, f"{name}_window_bounds") for name in ("input", "kernel", "output")]
    # A vector has no tiles as they are read here, and what a compiler states of it is no reason to end a plan.
    if not all(_is_tiled(value, bounds) for value, bounds in zip(values, stated, strict=True)):
        return 0.0
    windows = [_windows(value, bounds) for value, bounds in zip(values, stated, strict=True)]
    counts, results = [count for _, count in windows[:2]], windows[2][1]
    sizes = [
        window * _value_bytes(_sources(operand, frames))
        for (window, _), operand in zip(windows[:2], product.operands, strict=True)
    ]
    if grid > results:
        return grid * sum(sizes)
    return min(grid * sizes[0] + counts[1] * sizes[1], counts[0] * sizes[0] + grid * sizes[1])


def _is_tiled(value: Instruction, bounds: Sequence[int]) -> bool:
    """Whether an array has rows and columns to tile, and a bound is stated for each of its dimensions."""
    (array, *_) = value.arrays
    return len(array.sizes) >= len(_TILE) and len(bounds) == len(array.sizes) and all(bounds)


def _windows(value: Instruction, bounds: Sequence[int]) -> tuple[int, int]:
    """Values of one window of an array, and how many windows it has; bounds are in tiles, the longest stride first."""
    (array, *_) = value.arrays
    layout = _LAYOUT.search(value.type)
    order = [int(place) for place in layout.group(1).split(",")][::-1] if layout else list(range(len(array.sizes)))
    tiles = [array.sizes[place] for place in order]
    for place, values in zip((-2, -1), _TILE, strict=True):
        tiles[place] = math.ceil(tiles[place] / values)
    count = math.prod(math.ceil(have / window) for have, window in zip(tiles, bounds, strict=True))
    return math.prod(bounds) * math.prod(_TILE), count


def _bounds(instruction: Instruction, name: str) -> list[int]:
    """A list of the window configuration; empty where there is none."""
    match = re.search(rf'"{name}":\[([^\]]*)\]', instruction.attributes)
    return [int(value) for value in re.findall(r'"(\d+)"', match.group(1))] if match else []


def _value_bytes(sources: Sequence[Instruction]) -> float:
    """Bytes that a value of an operand takes where it is read from HBM; 0 where it is on the chip already.

    An operand may be made within the fusion, from an array and smaller ones: a normalised activation, a weight that is
    converted. The largest is what its windows are cut from.
    """
    arrays = [array for source in sources for array in source.arrays if array.sizes]
    largest = max(arrays, key=lambda array: array.bytes, default=None)
    return largest.bytes / math.prod(largest.sizes) if largest and largest.in_hbm else 0.0


def _sources(name: str, frames: _Frames) -> list[Instruction]:
    """Values of the schedule that an operand is made from."""
    computation, caller = frames[-1]
    if name not in computation:
        return []
    value = computation[name]
    if caller is None:
        return [value]
    if value.opcode == "parameter":
        return _sources(caller.operands[int(value.inside)], frames[:-1])
    return [source for operand in value.operands for source in _sources(operand, frames)]


def _product(
    instruction: Instruction, frames: _Frames, computations: Mapping[str, Computation]
) -> tuple[Instruction, _Frames] | None:
    """The first product in an instruction or in what it fuses, and the frames it stands in."""
    if instruction.opcode in ("convolution", "dot"):
        return instruction, frames
    if instruction.opcode in ("fusion", "async-start", "fusion-start"):
        for called in instruction.called:
            inside = computations.get(called, {})
            for one in inside.values():
                if found := _product(one, (*frames, (inside, instruction)), computations):
                    return found
    return None
