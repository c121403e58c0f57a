"""An optimised program's text, read: its computations, their instructions, and the arrays these make."""

from __future__ import annotations

import dataclasses
import math
import re

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2}
_BYTES |= {"u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([0-9,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.<>-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.<>-]+) .*\{\s*$")
# A kernel's metadata may have lines of its own, so not every line that begins like this is the end.
_END = re.compile(r'^\}(, execution_thread="\w+")?\s*$')
_NAME = re.compile(r"%([\w.<>-]+(?:#\d+)*)")
_PART = re.compile(r"%([\w.<>-]+)((?:#\d+)+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.<>-]+)")
_BRANCHES = re.compile(r"\b(?:branch|called)_computations=\{([^}]*)\}")
# replica_groups in their three spellings: listed; places in order; axes of a mesh, whole or a factor of one.
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([0-9, ]+)\}")
_ORDERED_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'([^']+)'(?:=(\d+)|:\(\d+\)(\d+))?")
_OTHER_MEMORY = "S("  # a layout with a memory space lies in vector or scalar memory: traffic there is not HBM's

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Array:
    """A type as the text gives it.

    Attributes:
        sizes: its dimensions.
        bytes: what it takes.
        in_hbm: whether it lives in HBM.
    """

    sizes: tuple[int, ...]
    bytes: int
    in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    inside: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of its operands."""
        return tuple(_NAME.findall(self.inside))

    @property
    def arrays(self) -> list[Array]:
        """The arrays of its result, those of a tuple in order."""
        return arrays_of(self.type)

    def attribute(self, pattern: str) -> tuple[str, ...]:
        """What the groups of a pattern find among its attributes.

        Raises:
            ValueError: nothing there is like it.
        """
        match = re.search(pattern, self.attributes)
        if match is None:
            raise ValueError(f"{self.name}: nothing like {pattern} among its attributes: {self.attributes[:200]}")
        return match.groups()

    @property
    def called(self) -> list[str]:
        """Computations it calls, a loop's condition left out."""
        names = _CALLED.findall(self.attributes)
        for group in _BRANCHES.findall(self.attributes):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return names


Computation = dict[str, Instruction]


def arrays_of(text: str) -> list[Array]:
    """The arrays a type names."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        found.append(Array(shape, math.ceil(math.prod(shape) * _BYTES[dtype]), _OTHER_MEMORY not in layout))
    return found


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = ""
    for line in text.splitlines():
        if current is None:
            header = _COMPUTATION.match(line)
            if header and not line.startswith((" ", "HloModule")):
                current = computations.setdefault(header.group(2), {})
                entry = header.group(2) if header.group(1) else entry
        elif _END.match(line):
            current = None
        elif match := _INSTRUCTION.match(line):
            instruction = _instruction(match)
            _name_parts(instruction, current)
            current[instruction.name] = instruction
    return computations, entry


def _name_parts(instruction: Instruction, computation: Computation) -> None:
    """Adds the parts of tuples that an instruction takes, as the instructions that older compilers write for them.

    Since jax 0.11 `%a#2` stands for the third part of `%a`, where there was a `get-tuple-element` of that index.
    """
    for whole, places in _PART.findall(instruction.inside):
        for place in places[1:].split("#"):
            part = f"{whole}#{place}"
            if part not in computation and whole in computation:
                kind = _parts(computation[whole].type)[int(place)]
                computation[part] = Instruction(
                    part, kind, "get-tuple-element", f"%{whole}", f", index={place}", is_root=False
                )
            whole = part


def _parts(kind: str) -> list[str]:
    """The types of a tuple's parts."""
    inside, found, depth = _COMMENT.sub("", kind)[1:-1], [""], 0
    for letter in inside:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found]


def _instruction(match: re.Match[str]) -> Instruction:
    root, name, rest = match.groups()
    if rest.startswith("("):  # a tuple's type has spaces
        end = _closing(rest, 0) + 1
    else:
        end = rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return Instruction(name, kind, rest[:opening], rest[opening + 1 : closing], rest[closing + 1 :], bool(root))


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    return len(text)


def group_size(instruction: Instruction) -> int:
    """Chips that take part in one collective.

    Raises:
        ValueError: its groups are spelled in a way that is not known.
    """
    attributes = instruction.attributes
    if instruction.opcode.startswith("collective-permute"):
        return 2
    if match := _LISTED_GROUPS.search(attributes):
        return match.group(1).count(",") + 1
    if match := _ORDERED_GROUPS.search(attributes):
        return int(match.group(1))
    if match := _MESH_GROUPS.search(attributes):
        sizes = {name: int(size) for name, size, _ in _MESH_AXIS.findall(match.group(1))}
        return math.prod(int(part) if part else sizes[name] for name, _, part in _MESH_AXIS.findall(match.group(2)))
    raise ValueError(f"{instruction.name}: cannot tell which chips take part in it: {attributes[:200]}")
