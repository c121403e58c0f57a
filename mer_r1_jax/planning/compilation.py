"""Compiles planned programs for their chips, once: facts and program text are kept under the program's fingerprint."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from mer_r1_jax.kernels.attention import cudnn
from mer_r1_jax.parallel import VARIABLE
from mer_r1_jax.planning.chips import Chip, chip_of
from mer_r1_jax.planning.flops import traced_flops
from mer_r1_jax.planning.programs import PlannedProgram
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.atomic_files import writing

# What a message says in which the compiler refuses tiles of Triton's.
TRITON = r"output tile sizes|shared memory size limit|triton"
_CUDA_PLUGIN = "jax-cuda13-plugin"
_WITHOUT_CUDNN = "attention by plain XLA, as cuDNN is not installed (pip install --no-deps nvidia-cudnn-cu13)"
_WITHOUT_TRITON = "every product by cuBLAS (xla_gpu_enable_triton_gemm=false), as Triton's tiles were refused"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "": 1}
_OVER = re.compile(
    r"Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm\. Exceeded hbm capacity by ([\d.]+)([KMG]?)", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of one program, bytes a chip.

    Attributes:
        seconds: the compile took, when it was made.
        argument_bytes, output_bytes, alias_bytes, temp_bytes, code_bytes: its memory; aliased outputs reuse arguments.
        error: why there is no program; empty when there is one.
        note: how it was compiled other than a run would; empty when it was not.
        over_bytes: by how much its memory exceeds the chip's, where that is the error.
        traced_flops: matrix products the program asks for, of all chips.
        text: the optimised program; empty where there is none, or the compiler wrote none down.
    """

    seconds: float = 0.0
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0
    temp_bytes: int = 0
    code_bytes: int = 0
    error: str = ""
    note: str = ""
    over_bytes: int = 0
    traced_flops: float = 0.0
    text: str = ""


def compile_program(program: PlannedProgram, topology: str, cache_dir: pathlib.Path) -> Compiled:
    """The program compiled for its slice, or what was learnt when that was done before.

    Args:
        program: the program.
        topology: the slice its mesh belongs to.
        cache_dir: where answers are kept; one file of facts and one of text each.
    """
    chip = chip_of(topology)
    traced = program.trace()
    lowered = traced.lower(lowering_platforms=(chip.platform,))
    key = _fingerprint(lowered, topology, chip)
    facts, text = cache_dir / f"{key}.json", cache_dir / f"{key}.hlo.gz"
    if facts.is_file():
        kept = json.loads(facts.read_text())
        return Compiled(**kept, text=gzip.decompress(text.read_bytes()).decode() if text.is_file() else "")
    asked = traced_flops(traced.jaxpr, program.longest_loop)
    compiled = _compile_for_gpu(lowered) if chip.cuda else _compile(lowered)
    compiled = dataclasses.replace(compiled, traced_flops=asked)
    # A card has the library, and a run takes it for all but a token's attention.
    if chip.cuda and asked and program.name != "decode" and not cudnn.is_there():
        compiled = dataclasses.replace(compiled, note="; ".join(filter(None, (_WITHOUT_CUDNN, compiled.note))))
    with writing("a compiled answer", cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
    if compiled.text:
        atomic_files.write_atomically(text, lambda file: file.write(gzip.compress(compiled.text.encode())))
    values = dataclasses.asdict(compiled)
    del values["text"]
    atomic_files.write_text(facts, json.dumps(values, indent=1) + "\n")  # last: it says that the text is there
    return compiled


def versions(chip: Chip) -> dict[str, str]:
    """Versions the numbers of a plan depend on."""
    compiler = _CUDA_PLUGIN if chip.cuda else "libtpu"
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", compiler)}


def options_of(lowered: jax.stages.Lowered) -> dict[str, str]:
    """The compiler's options that a program's `jit` was given."""
    # They are not in the program's text, and jax has no public name for them.
    lowering: Any = lowered._lowering
    return dict(lowering._compiler_options_kvs)


def _fingerprint(lowered: jax.stages.Lowered, topology: str, chip: Chip) -> str:
    flags = os.environ.get("XLA_FLAGS" if chip.cuda else VARIABLE, "")
    parts = [topology, json.dumps(versions(chip)), flags, lowered.as_text()]
    if options := options_of(lowered):
        parts.append(json.dumps(options))
    if chip.cuda:
        parts += [chip.cuda.text(chip.hbm_bandwidth), f"cuDNN: {cudnn.is_there()}"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _compile_for_gpu(lowered: jax.stages.Lowered) -> Compiled:
    """The program compiled for a card that is not there, where no kernel can be tried for speed.

    On the card the compiler times several ways of each product and takes the fastest. Without it, it takes the tiles of
    Triton's kernels unseen, and refuses a product that they do not fit; all products then go to cuBLAS, which a run
    would do with that one alone.
    """
    first = _compiled(lowered, {})
    if not re.search(TRITON, first.error or "", re.IGNORECASE):
        return first
    again = _compiled(lowered, {"xla_gpu_enable_triton_gemm": False})
    return first if again.error else dataclasses.replace(again, note=_WITHOUT_TRITON)


def _compile(lowered: jax.stages.Lowered) -> Compiled:
    """The program compiled for TPUs."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = _compiled(lowered, {"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        return compiled if compiled.error else dataclasses.replace(compiled, text=_dumped(pathlib.Path(folder)))


def _compiled(lowered: jax.stages.Lowered, options: dict[str, Any]) -> Compiled:
    start = time.perf_counter()
    try:
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        seconds = time.perf_counter() - start
        return Compiled(seconds=seconds, error=first_lines(str(error)), over_bytes=_over_bytes(str(error)))
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None  # the compilers of TPUs and GPUs give one
    return Compiled(
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        text="" if "xla_dump_to" in options else compiled.as_text() or "",
    )


def _dumped(folder: pathlib.Path) -> str:
    """The final program as the compiler dumps it.

    `Compiled.as_text` would read it back first, which fails where operations run on the sparse cores.
    """
    files = sorted(folder.glob("*after_codegen.txt"), key=lambda file: file.stat().st_size)
    return files[-1].read_text() if files else ""


def _over_bytes(message: str) -> int:
    """By how much a program's memory exceeds the chip's, from the compiler's message; 0 for other errors."""
    match = _OVER.search(message)
    return int(float(match.group(5)) * _UNITS[match.group(6).upper()]) if match else 0


def first_lines(message: str) -> str:
    """The head of a message that goes on for pages."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:3])[:600]
