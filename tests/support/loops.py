"""What an optimised program does inside its loop over tokens, or over chunks of a loss."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mer_r1_jax.planning.hlo import Computation, Instruction, parse

_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.<>-]+)")


def loops(text: str, fused: bool = True) -> list[list[Instruction]]:
    """The instructions of every outermost loop, whatever it calls included.

    Args:
        fused: with those inside fusions, whose results are never in memory.
    """
    computations, entry = parse(text)
    found: list[list[Instruction]] = []

    def look(name: str) -> None:
        for instruction in computations[name].values():
            if instruction.opcode == "while":
                body = re.search(r"\bbody=%?([\w.<>-]+)", instruction.attributes).group(1)
                found.append(list(_inside(computations, body, fused)))
            elif instruction.opcode in ("call", "conditional"):
                for called in instruction.called:
                    look(called)

    look(entry)
    return found


def token_loop(text: str) -> list[Instruction]:
    """The instructions of the one outermost loop that runs the layers' loop: that over tokens."""
    (found,) = [loop for loop in loops(text) if any(instruction.opcode == "while" for instruction in loop)]
    return found


def layers_loop(text: str) -> list[Instruction]:
    """The instructions of the loop over layers within that over tokens, without those inside fusions."""
    computations, _ = parse(text)
    loops_inside = [one for one in token_loop(text) if one.opcode == "while"]
    bodies = [computations[one.attribute(r"\bbody=%?([\w.<>-]+)")[0]] for one in loops_inside]
    # What sorts or adds up numbers is a loop too, and a shorter one.
    return list(max(bodies, key=len).values())


def _inside(computations: dict[str, Computation], name: str, fused: bool) -> Iterator[Instruction]:
    for instruction in computations[name].values():
        yield instruction
        if instruction.opcode == "fusion" and not fused:
            continue
        for called in _CALLED.findall(instruction.attributes):
            if called in computations:
                yield from _inside(computations, called, fused)
