"""What the real TPU compiler makes of attention: memory, kernel calls and the schedule of a tile. Needs no TPU.

    python tools/measure_attention.py --chip v5p [--splash] [--schedule] [--tokens 4096 --heads 28 ...]

A bundle is one instruction word and takes a cycle or more, so bundles and matrix-unit cycles are both lower bounds of a
tile's time. `--schedule` reads them from dumps that libtpu writes under flags it does not document: they were seen to
work with the libtpu that setup.cfg pins, cost some hundred MiB of disk while it runs and ten times the compile time.
"""

from __future__ import annotations

import argparse
import functools
import glob
import os
import pathlib
import re
import tempfile
import time

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|\d+)\s*([A-Z]{2})?\s*:")


def parser() -> argparse.ArgumentParser:
    """The command's flags; the defaults are the 7B decoder at 4 rows of 4096 tokens."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--chip", choices=TOPOLOGIES, default="v5p")
    flags.add_argument("--splash", action="store_true", help="jax's splash attention instead (no shared segment)")
    flags.add_argument("--xla", action="store_true", help="the plain computation instead")
    flags.add_argument("--forward", action="store_true", help="without the backward pass")
    flags.add_argument("--bidirectional", action="store_true", help="no causal order and no shared segment")
    flags.add_argument("--schedule", action="store_true", help="print the schedule of every kernel's tiles")
    for name, value in dict(rows=4, tokens=4096, heads=28, key_heads=4, width=128).items():
        flags.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return flags


def attend(flags: argparse.Namespace, device):
    """The attention that was asked for, as a function of q, k, v and segments."""
    import jax
    import numpy as np

    from mer_r1_jax.kernels.attention.api import attention
    from mer_r1_jax.kernels.placement import Placement

    causal = not flags.bidirectional
    if not flags.splash:
        return functools.partial(
            lambda q, k, v, segment, **options: attention(q, k, v, segment, segment, **options),
            causal=causal,
            shared_segment=1 if causal else None,
            implementation="xla" if flags.xla else "pallas",
            placement=Placement(jax.sharding.Mesh(np.array([device]), ("data",))),
        )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    side = min(flags.tokens, 1024)
    piece = side if side < 1024 else 512
    blocks = dict(block_q=side, block_kv=side, block_kv_compute=piece)
    blocks |= dict(block_q_dkv=side, block_kv_dkv=side, block_kv_dkv_compute=piece, use_fused_bwd_kernel=True)
    mask = (masks.CausalMask if causal else masks.FullMask)((flags.tokens, flags.tokens))
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * flags.heads), block_sizes=splash.BlockSizes(**blocks)
    )

    def run(q, k, v, segment):
        q, k, v = ((x.swapaxes(1, 2)) for x in (q * flags.width**-0.5, k, v))
        one = lambda q, k, v, segment: kernel(q, k, v, splash.SegmentIds(segment, segment))  # noqa: E731
        out = jax.vmap(one)(q, k, v, segment)
        assert isinstance(out, jax.Array)  # a tuple only where residuals are kept
        return out.swapaxes(1, 2)

    return run


def measure(flags: argparse.Namespace) -> None:
    """Compiles and prints."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    device = topologies.get_topology_desc(TOPOLOGIES[flags.chip], platform="tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    rows, tokens = flags.rows, flags.tokens
    q, k = (
        jax.ShapeDtypeStruct((rows, tokens, heads, flags.width), jnp.bfloat16, sharding=sharding)
        for heads in (flags.heads, flags.key_heads)
    )
    segment = jax.ShapeDtypeStruct((rows, tokens), jnp.int32, sharding=sharding)
    run = attend(flags, device)

    def program(q, k, v, segment, gradient):
        if flags.forward:
            return run(q, k, v, segment)
        return jax.vjp(lambda q, k, v: run(q, k, v, segment), q, k, v)[1](gradient)

    began, worked = time.monotonic(), time.process_time()
    compiled = jax.jit(program).trace(q, k, k, segment, q).lower(lowering_platforms=("tpu",)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # the TPU compiler gives both
    print(
        f"{flags.chip}: temp {memory.temp_size_in_bytes / 2**20:.0f} MiB, "
        f"arguments {memory.argument_size_in_bytes / 2**20:.0f} MiB, "
        f"kernel calls {text.count('custom_call_target=' + chr(34) + 'tpu_custom_call')}, "
        f"compiled in {time.monotonic() - began:.1f} s ({time.process_time() - worked:.1f} s of processor time)"
    )


def schedules(folder: pathlib.Path) -> None:
    """Prints, for every kernel in a dump, its straight stretches of code that use the matrix units."""
    for path in sorted(folder.glob("*-final_bundles.txt")):
        number, _, name = path.name.partition("-")
        if "schedule-analysis" in name or not re.search("attention|splash", name):
            continue
        stem = re.sub(r"-\d+-final_bundles\.txt$", "", name)
        pattern = f"{number}-{glob.escape(stem)}-*-final_hlo-static-per-bundle-utilization.txt"
        uses = next(folder.glob(pattern))
        head, _, body = uses.read_text().partition("== UTILIZATION:")
        slots = [slot.strip() for slot in head.splitlines()[1].split(",")]
        used = [[int(n) for n in line.split()] for line in body.splitlines() if line.strip()]
        marks = [match.group(1) for line in path.open() if (match := _BUNDLE.match(line))]
        edges = [n for n, mark in enumerate(marks) if mark] + [len(marks)]
        print(f"{stem}: {len(marks)} bundles")
        for begin, end in zip([0, *edges], edges, strict=False):
            total = dict(zip(slots, (sum(column) for column in zip(*used[begin:end], strict=True)), strict=False))
            if total.get("MATMUL"):
                spills, fills = total.get("VSTORE:SPILL", 0), total.get("VLOAD:FILL", 0)
                print(f"    tile of {end - begin} bundles, {spills} spills, {fills} fills, {total['MATMUL']} MATMUL")


def main() -> None:
    """Sets the environment before jax is imported: no TPU is looked for, and dumps go to a temporary folder."""
    flags = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if flags.schedule:
            os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        for name, value in dict(
            JAX_PLATFORMS="cpu",
            TPU_SKIP_MDS_QUERY="1",
            TPU_WORKER_HOSTNAMES="localhost",
            TPU_ACCELERATOR_TYPE="v5p-8",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        ).items():
            os.environ.setdefault(name, value)
        measure(flags)
        schedules(pathlib.Path(folder))


if __name__ == "__main__":
    main()
