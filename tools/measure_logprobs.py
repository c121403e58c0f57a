"""What the real TPU compiler says about the kernels, without a TPU: memory, and a lower bound of the time.

    python tools/measure_logprobs.py --topology=v5p:2x2x1

Compiles log-probability and entropy with their gradients, and lets libtpu write down the kernels' machine code. A TPU
issues one bundle of instructions a cycle at most, so the bundles on the way through a kernel, times how often they run,
are cycles it cannot do without; nor can it do without the cycles its matrix units need for the products. The larger of
the two is counted for the loops that multiply, and all bundles around them. Waiting for memory is not in it. Branches
are counted as if always taken, though most of them are taken once a block of rows or a tile of the vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from mer_r1_jax.kernels.logprobs.pallas_tpu import columns_of

# Clock in GHz and bf16 TFLOP/s of a chip: Google Cloud's documentation; the clocks follow from the matrix units.
PEAKS = {"v4": (1.05, 275), "v5e": (1.5, 197), "v5p": (1.75, 459), "v6e": (1.75, 918)}
# An address, perhaps the mark of a loop's body (LB), one `>` for each loop around it, and the bundle.
LINE = re.compile(r"^\s*(?:0x[0-9a-f]+|\d+)\s*([A-Z]{2})?\s*:\s*((?:> ?)*)\{")


@dataclasses.dataclass(frozen=True)
class Loops:
    """Bundles of a kernel: of one grid step outside its inner loops, and of one turn of each inner loop."""

    step: int
    inner: tuple[int, ...]


def read_bundles(path: pathlib.Path) -> Loops:
    """Counts the bundles of a kernel's final code by loop depth; depth 1 is the grid."""
    step, inner = 0, []
    for line in path.read_text().splitlines():
        match = LINE.match(line)
        depth = match.group(2).count(">") if match else 0
        if depth == 1:
            step += 1
        elif match and depth > 1:
            if match.group(1) == "LB":
                inner.append(0)
            inner[-1] += 1
    return Loops(step, tuple(inner))


def compile_here(arguments: argparse.Namespace) -> None:
    """The child process: compiles, and prints the memory and the tiles."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from mer_r1_jax.kernels.logprobs.api import gather_logprobs
    from mer_r1_jax.kernels.logprobs.tiles import tiles_for

    device = topologies.get_topology_desc(arguments.topology, platform="tpu").devices[0]
    N, D, V = arguments.rows, arguments.width, arguments.vocab

    def abstract(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def run(x, w, token, *cotangents):
        def score(x, w):
            scores = gather_logprobs(
                x, w, token, vocab_first=arguments.vocab_first, device_kind=device.device_kind, implementation="pallas"
            )
            return scores.logprob, scores.entropy

        results, pull = jax.vjp(score, x, w)
        return results, pull(cotangents)

    w = abstract((V, D) if arguments.vocab_first else (D, V))
    row = abstract((N,), jnp.float32)
    lowered = jax.jit(run).trace(abstract((N, D)), w, abstract((N,), jnp.int32), row, row)
    compiled = lowered.lower(lowering_platforms=("tpu",)).compile()
    tiles = tiles_for(N, D, V, 0, 2, device.device_kind)
    memory = compiled.memory_analysis()
    assert memory is not None  # the TPU compiler gives one
    print(f"temp_bytes={memory.temp_size_in_bytes}")
    print(" ".join(f"{name}={value}" for name, value in dataclasses.asdict(tiles).items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--topology", default="v5p:2x2x1")
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--vocab_first", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        compile_here(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5p-8",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        command = [sys.executable, __file__, *sys.argv[1:], "--child"]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        if child.returncode:
            raise SystemExit(child.stderr[-4000:])
        found = dict(re.findall(r"(\w+)=(\d+)", child.stdout))
        print(report(arguments, {name: int(value) for name, value in found.items()}, pathlib.Path(folder)))


def report(arguments: argparse.Namespace, found: dict[str, int], folder: pathlib.Path) -> str:
    """The lines to print, from the child's numbers and the dumped code."""
    clock, tflops = PEAKS[arguments.topology.split(":")[0]]
    N, D, V, cores = arguments.rows, arguments.width, arguments.vocab, found["cores"]
    ideal_ms = 2 * N * D * V / tflops / 1e9
    lines = [f"one ideal matmul {ideal_ms:.1f} ms; tiles {found}; temp {found['temp_bytes'] / 2**30:.3f} GiB"]
    total_ms = 0.0
    # Each inner loop: how often it turns, and the multiply-adds of one turn.
    columns, chunk = columns_of(found["vocab"]), found["chunk"]
    forward = [(found["vocab"] // columns, found["rows"] * columns * D)]
    columns = columns_of(found["grad_vocab"])
    backward = [
        (found["grad_vocab"] // columns, found["grad_rows"] * columns * D),
        (D // chunk, 2 * found["grad_rows"] * found["grad_vocab"] * chunk),
    ]
    for name, rows, vocab, inner in (
        ("logprobs_forward", found["rows"], found["vocab"], forward),
        ("logprobs_backward", found["grad_rows"], found["grad_vocab"], backward),
    ):
        paths = [p for p in folder.glob(f"*{name}*-final_bundles.txt") if "schedule-analysis" not in p.name]
        loops = read_bundles(max(paths, key=lambda p: p.stat().st_size))
        cycles, parts = loops.step, []
        for (turns, products), bundles in zip(inner, loops.inner, strict=True):
            matrix = 2 * products / (tflops * 1e3 / clock / cores)
            cycles += turns * max(bundles, matrix)
            parts.append(f"{turns} x ({bundles} bundles, matrix units {matrix:.0f} cycles)")
        steps = -(-N // rows) * -(-V // vocab) / cores
        ms = steps * cycles / clock / 1e6
        total_ms += ms
        lines.append(
            f"{name}: {steps:.0f} steps of {rows} rows x {vocab} tokens a core, each {loops.step} bundles and "
            f"{' and '.join(parts)}: {ms:.1f} ms"
        )
    lines.append(f"together {total_ms:.1f} ms = {total_ms / (4 * ideal_ms):.3f} x four ideal matmuls")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
