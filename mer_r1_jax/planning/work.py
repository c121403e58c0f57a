"""What an optimised program does, read off its text: operations, memory traffic and collectives, loops counted in full.

The compiler's own `cost_analysis` counts the body of a loop once. Here every computation is weighted by how often it
runs: a loop by its trip count, a loop whose end depends on data by a number the caller gives.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator

from mer_r1_jax.planning.flops import library_flops, product_flops
from mer_r1_jax.planning.hlo import COLLECTIVES, Array, Computation, Instruction, group_size, parse
from mer_r1_jax.planning.windows import window_bytes

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN_CYCLES = 2**60  # the compiler writes numbers beyond this where it has no estimate
_ESTIMATE = re.compile(r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_STATED_BYTES = re.compile(r'"cost_estimate":\s*\{[^}]*"bytes_accessed":\s*"?(\d+)')
_ROW_ATTENTION = re.compile(r'op_name="[^"]*text_decoder[^"]*/attention_(forward|backward)/')

_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all"}
_FREE |= {"partition-id", "replica-id", "iota", "opt-barrier", "add-dependency", "domain"}
_SLICES = {"dynamic-slice", "slice", "gather"}
# A GPU's libraries, and kernels that XLA neither made nor can look into: Triton's, cuDNN's attention.
_LIBRARIES = ("__cublas$", "__cudnn$")
_OPAQUE = ("tpu_custom_call", "__gpu$xla.gpu.triton", "__cudnn$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind and size.

    Attributes:
        kind: one of COLLECTIVES.
        bytes: of the whole array on one chip, before a reduce-scatter or after an all-gather.
        chips: that take part in one.
        calls: how often it runs.
        synchronous: of these calls, those beside which the chip does nothing else.
    """

    kind: str
    bytes: int
    chips: int
    calls: int
    synchronous: int

    @property
    def sent(self) -> float:
        """Bytes one chip has to send in all its calls, by the cheapest known algorithm."""
        return self._sent(self.calls)

    @property
    def exposed(self) -> float:
        """Bytes of these that it sends while it does nothing else."""
        return self._sent(self.synchronous)

    def _sent(self, calls: int) -> float:
        passes = {"all-reduce": 2.0, "collective-permute": 1.0}.get(self.kind, 1.0)
        share = 1.0 if self.kind == "collective-permute" else (self.chips - 1) / max(self.chips, 1)
        return calls * passes * self.bytes * share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """An operation of the compiler's schedule with matrix products in it, kernels left out.

    Attributes:
        flops: of one call.
        bytes: that one call reads from HBM and writes to it; where the compiler states its windows, what these fetch
            at least (`windows.window_bytes`), if that is more.
        cycles: the compiler's estimate for one call.
        calls: how often it runs.
    """

    flops: float
    bytes: float
    cycles: int
    calls: int

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Of all calls, where matrix units (`flops` a second) and HBM (bytes a second) work side by side."""
        return self.calls * max(self.flops / flops, self.bytes / bandwidth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one chip does in one call of a program.

    Attributes:
        flops: of matrix products and convolutions, and of kernels that state theirs.
        kernel_flops: of these kernels alone.
        hbm_bytes: read from and written to HBM; of slices only what is taken.
        cycles: the compiler's own estimate for what is neither a collective nor a kernel.
        products: the operations of the schedule that `cycles` and `flops` have most of, in no order.
        collectives: largest first.
        collective_operations, synchronous_operations: how many collectives the program's text has, each once; and those
            beside which the chip does nothing else.
        silent_kernels: calls of kernels that state no operations, which `flops` therefore lacks.
        open_loops: loops whose end depends on data.
    """

    flops: float
    kernel_flops: float
    hbm_bytes: float
    cycles: int
    products: tuple[Product, ...]
    collectives: tuple[Collective, ...]
    collective_operations: int
    synchronous_operations: int
    silent_kernels: int
    open_loops: int

    @property
    def sent(self) -> float:
        """Bytes one chip has to send to others."""
        return sum(collective.sent for collective in self.collectives)

    @property
    def exposed(self) -> float:
        """Bytes of these that it sends while it does nothing else."""
        return sum(collective.exposed for collective in self.collectives)


_Key = tuple[str, int, int]  # of a collective: its kind, bytes and chips


@dataclasses.dataclass
class _Fused:
    """A collective that was counted: of which kind, how often it runs, and whether other work runs beside it."""

    key: _Key
    times: int
    hidden: bool = False


def work_of(text: str, longest_loop: int = 1, visited: float = 1.0) -> Work:
    """Reads a program.

    Args:
        text: of the optimised module (`compiled.as_text()`).
        longest_loop: trips of a loop whose end depends on data.
        visited: share of the tiles of the decoder's attention that its kernels visit, of those they state.
    """
    return _Reader(text, longest_loop, visited).work()


class _Reader:
    """One program while it is read."""

    def __init__(self, text: str, longest_loop: int, visited: float = 1.0):
        self.computations, self.entry = parse(text)
        self.longest_loop, self.visited = longest_loop, visited
        self.product_flops = self.kernel_flops = self.bytes = 0.0
        self.collectives: collections.Counter[_Key] = collections.Counter()
        self.asynchronous: collections.Counter[_Key] = collections.Counter()
        self.products: list[Product] = []
        self.silent_kernels = self.open_loops = self.cycles = self.operations = self.hidden_operations = 0

    def work(self) -> Work:
        self._visit(self.entry, 1, in_hbm=True)
        found = [
            Collective(kind=kind, bytes=size, chips=chips, calls=calls, synchronous=calls - self.asynchronous[key])
            for key, calls in self.collectives.items()
            for kind, size, chips in [key]
        ]
        return Work(
            flops=self.product_flops + self.kernel_flops,
            kernel_flops=self.kernel_flops,
            hbm_bytes=self.bytes,
            cycles=self.cycles,
            products=tuple(self.products),
            collective_operations=self.operations,
            synchronous_operations=self.operations - self.hidden_operations,
            collectives=tuple(sorted(found, key=lambda one: -one.sent)),
            silent_kernels=self.silent_kernels,
            open_loops=self.open_loops,
        )

    def _visit(self, name: str, times: int, in_hbm: bool, fused: dict[str, _Fused] | None = None) -> None:
        """Adds up one computation; inside a fusion nothing touches HBM but its arguments and results.

        `fused` has the collectives already counted inside the fusions of a schedule, by their channels: one that is
        fused with the products it hides behind stands in the fusion that starts it, in those that carry it on and in
        the one that ends it.
        """
        computation = self.computations[name]
        fused = {} if in_hbm or fused is None else fused
        for instruction in computation.values():
            if instruction.opcode == "while":
                trips, known = self._trips(instruction)
                self.open_loops += not known
                self._visit(_named(instruction, "body"), times * trips, in_hbm)
                continue
            # Products have a sum of their own: of one that kernels are in too, a rounding would be left of a kernel.
            before = self.product_flops, self.cycles, self.bytes
            self._add(instruction, computation, times, in_hbm, fused)
            flops = self.product_flops - before[0]
            if in_hbm and flops and instruction.opcode not in ("call", "conditional"):
                cycles, moved = (self.cycles - before[1]) // times, (self.bytes - before[2]) / times
                moved = max(moved, window_bytes(instruction, computation, self.computations))
                self.products.append(Product(flops=flops / times, bytes=moved, cycles=cycles, calls=times))

    def _add(
        self, instruction: Instruction, computation: Computation, times: int, in_hbm: bool, fused: dict[str, _Fused]
    ) -> None:
        """Adds up one instruction that is no loop, and what it calls."""
        opcode = instruction.opcode
        if opcode in ("convolution", "dot"):
            self.product_flops += times * product_flops(instruction, computation)
        elif opcode == "custom-call":
            self._kernel(instruction, computation, times)
        if in_hbm and (estimate := _CYCLES.search(instruction.attributes)):
            self.cycles += times * (int(estimate.group(1)) if int(estimate.group(1)) < _UNKNOWN_CYCLES else 0)
        if in_hbm and opcode not in _FREE and not opcode.endswith(("-done", "-update")):
            self.bytes += times * self._traffic(instruction, computation)
        if key := self._collective(instruction, computation):
            channel = _CHANNEL.search(instruction.attributes)
            # In a schedule each is one of its own, although a few small ones share a channel.
            if not in_hbm and channel and (seen := fused.get(channel.group(1))):
                self._hide(seen)
                return
            one = _Fused(key, times)
            self.collectives[key] += times
            self.operations += 1
            if opcode.endswith("-start"):
                self._hide(one)
            elif not in_hbm and channel:
                fused[channel.group(1)] = one
            return
        inside = in_hbm and opcode in ("call", "conditional")
        # What runs on the sparse cores stands in a custom call, within what starts it.
        offloaded = opcode == "custom-call" and not in_hbm
        if offloaded or opcode in ("fusion", "call", "conditional", "async-start", "fusion-start"):
            begun = self.operations, collections.Counter(self.collectives)
            for called in instruction.called:
                if called in self.computations:
                    self._visit(called, times, inside, fused)
            if in_hbm and opcode.endswith("-start"):  # what it calls runs beside what comes before its end
                self.hidden_operations += self.operations - begun[0]
                self.asynchronous += self.collectives - begun[1]

    def _hide(self, one: _Fused) -> None:
        """Notes that the chip does other work beside a collective."""
        if not one.hidden:
            one.hidden = True
            self.hidden_operations += 1
            self.asynchronous[one.key] += one.times

    def _trips(self, loop: Instruction) -> tuple[int, bool]:
        """How often a loop runs, and whether the text says so."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known.group(1)), True
        condition = self.computations[_named(loop, "condition")]
        root = next(one for one in condition.values() if one.is_root)
        if root.opcode == "fusion":
            inner = next(one for one in self.computations[root.called[0]].values() if one.is_root)
            compares = inner.opcode == "compare"
        else:
            compares = root.opcode == "compare"
        limits = [int(one.inside) for one in condition.values() if one.opcode == "constant" and one.inside.isdigit()]
        if compares and len(limits) == 1:
            return limits[0], True
        return self.longest_loop, False

    def _kernel(self, call: Instruction, computation: Computation, times: int) -> None:
        if (flops := library_flops(call, computation)) is not None:
            self.product_flops += times * flops
            return
        if not any(target in call.attributes for target in _OPAQUE):
            return
        estimate = _ESTIMATE.search(call.attributes)
        if estimate and int(estimate.group(1)):
            share = self.visited if _ROW_ATTENTION.search(call.attributes) else 1.0
            self.kernel_flops += times * share * int(estimate.group(1))
        else:
            self.silent_kernels += times

    def _collective(self, instruction: Instruction, computation: Computation) -> _Key | None:
        """Kind, bytes and chips of a collective; a fusion named after one is the compiler's reduce-scatter."""
        kind = instruction.opcode.removesuffix("-start")
        if instruction.opcode == "fusion" and instruction.called[0].startswith("all-reduce-scatter"):
            inner = self.computations[instruction.called[0]].values()
            reduce = next((one for one in inner if one.opcode.startswith("all-reduce")), None)
            if reduce is None:
                return None
            return "reduce-scatter", sum(array.bytes for array in reduce.arrays), group_size(reduce)
        if kind not in COLLECTIVES or instruction.opcode.endswith("-done"):
            return None
        chips = group_size(instruction)
        operands = sum(self._operand_bytes(instruction, computation))
        size = operands * chips if kind == "all-gather" else operands
        return kind, size, chips

    def _operand_bytes(self, instruction: Instruction, computation: Computation) -> Iterator[int]:
        for name in instruction.operands:
            if name in computation:
                yield sum(array.bytes for array in computation[name].arrays)

    def _traffic(self, instruction: Instruction, computation: Computation) -> float:
        """HBM bytes one instruction reads and writes."""
        result = [array.bytes for array in self._results(instruction, computation) if array.in_hbm]
        if instruction.opcode in _SLICES:
            return 2 * sum(result)
        if instruction.opcode == "custom-call" and (stated := _STATED_BYTES.search(instruction.attributes)):
            return float(stated.group(1))  # a kernel may read a part of an operand, or read it again and again
        if instruction.opcode == "dynamic-update-slice":
            return 2 * sum(array.bytes for array in computation[instruction.operands[1]].arrays)
        if instruction.opcode in ("fusion", "async-start", "fusion-start") and instruction.called:
            inner = self.computations[instruction.called[0]]
            parameters = [one for one in inner.values() if one.opcode == "parameter"]
            parameters.sort(key=_parameter_number)
            read = sum(
                self._read(inner, parameter)
                for parameter, name in zip(parameters, instruction.operands, strict=False)
                if _in_hbm(computation, name)
            )
            return read + self._written(inner, self._results(instruction, computation))
        read = sum(
            sum(array.bytes for array in computation[name].arrays if array.in_hbm)
            for name in instruction.operands
            if name in computation
        )
        return read + sum(result)

    def _results(self, instruction: Instruction, computation: Computation) -> list[Array]:
        """The arrays an instruction makes, without those that its tuple names besides."""
        arrays = instruction.arrays
        if instruction.opcode == "custom-call" and any(name in instruction.attributes for name in _LIBRARIES):
            return arrays[:-1] if len(arrays) > 1 else arrays  # the last one is scratch memory
        if not instruction.opcode.endswith("-start") or instruction.opcode == "async-start":
            return arrays
        if instruction.opcode == "copy-start":  # result, operand, context
            return arrays[:1]
        # Operands, results, context; an all-reduce of a GPU names its results alone.
        given = sum(len(computation[name].arrays) for name in instruction.operands if name in computation)
        return arrays[given : 2 * given] or arrays[:given]

    def _read(self, computation: Computation, value: Instruction) -> float:
        """Bytes a fused computation takes of one of its arguments: all of it, or what its slices take."""
        whole = sum(array.bytes for array in value.arrays)
        taken = 0.0
        for user in computation.values():
            if value.name not in user.operands:
                continue
            if user.opcode in _SLICES and user.operands[0] == value.name:
                taken += sum(array.bytes for array in user.arrays)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                continue
            elif user.opcode == "bitcast" or self._is_bitcast(user):
                taken += whole if user.is_root else self._read(computation, user)
            elif user.opcode == "fusion":
                inner = self.computations[user.called[0]]
                numbers = [place for place, name in enumerate(user.operands) if name == value.name]
                inner_values = [one for one in inner.values() if one.opcode == "parameter"]
                taken += sum(self._read(inner, one) for one in inner_values if _parameter_number(one) in numbers)
            else:
                return whole
        return min(whole, taken)

    def _is_bitcast(self, instruction: Instruction) -> bool:
        """Whether it is a fusion that only gives its one argument another shape."""
        if instruction.opcode != "fusion":
            return False
        inner = self.computations[instruction.called[0]].values()
        return all(one.opcode in ("parameter", "bitcast") for one in inner)

    def _written(self, inner: Computation, results: list[Array]) -> float:
        """Bytes a fusion writes: its results, of an updated slice only the update."""
        root = next(one for one in inner.values() if one.is_root)
        roots = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        written = 0.0
        for value, array in zip(roots, results, strict=False):
            while value.opcode == "bitcast" and value.operands[0] in inner:
                value = inner[value.operands[0]]
            if not array.in_hbm:
                continue
            if value.opcode == "dynamic-update-slice":
                written += sum(one.bytes for one in inner[value.operands[1]].arrays)
            else:
                written += array.bytes
        return written


def _in_hbm(computation: Computation, name: str) -> bool:
    return name in computation and any(array.in_hbm for array in computation[name].arrays)


def _named(instruction: Instruction, name: str) -> str:
    """The computation that an attribute names."""
    return instruction.attribute(rf"\b{name}=%?([\w.<>-]+)")[0]


def _parameter_number(instruction: Instruction) -> int:
    return int(instruction.inside)
