"""What a model takes in memory to answer: known from headers, said before it is loaded, refused where there is less.

Without this a machine that is too small loads for minutes and is then killed by its operating system without a word.
psutil tells what a machine has free and not what a container may use, so both are read here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mer_r1_jax import screen
from mer_r1_jax.config.schema import ModelConfig
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.omni.hf import table
from mer_r1_jax.omni.hf.tensor_files import NUMPY_DTYPES, StoredTensor, WeightError, list_tensors
from mer_r1_jax.training.backbone import Backbone

BFLOAT16 = "BF16"  # as safetensors spells it
WORTH_SAYING = 10**9  # bytes; a smaller model is loaded before anybody has read a line about it
_TEXT = ("model.", "lm_head.")  # bare names of the language model, which decoding wants in the compute dtype


class ModelMemoryError(ValueError):
    """A model that this machine cannot hold; the message says what it takes, what is free and what to do."""


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a model takes at least; what a clip takes comes on top.

    Attributes:
        parameters: their number.
        dtype: they are kept in.
        weights: bytes of them all.
        decoding: bytes of a second copy of the language model, which lasts while it answers; 0 where decoding takes the
            first one.
        tensor: bytes of the largest tensor as it is read and as it is kept, beside all others while weights are loaded.
    """

    parameters: int
    dtype: str
    weights: int
    decoding: int = 0
    tensor: int = 0

    @property
    def total(self) -> int:
        """The most of it at one time: weights with the tensor on its way, or with the copy."""
        return self.weights + max(self.decoding, self.tensor)

    def __str__(self) -> str:
        copy = f" and {_gb(self.decoding)} for a copy that decoding wants" if self.decoding else ""
        return f"{self.parameters / 1e9:.3g} billion parameters as {self.dtype}: {_gb(self.weights)}{copy}"


def kept_dtype(tensors: Iterable[StoredTensor], model: ModelConfig) -> Literal["float32", "bfloat16"]:
    """The dtype in which a model that nobody trains is kept: bfloat16 where its files and its products are.

    Every weight is cast to the compute dtype where it is used, so the numbers are those of `model.param_dtype`, bit for
    bit, in half the memory. Products in float32 would want a second copy for decoding, and save nothing.

    Args:
        tensors: of the Thinker, as stored.
        model: `param_dtype` and `compute_dtype`.
    """
    if model.compute_dtype == "bfloat16" and {tensor.dtype for tensor in tensors} == {BFLOAT16}:
        return "bfloat16"
    return model.param_dtype


def thinker_tensors(directory: str | Path) -> dict[str, StoredTensor]:
    """The stored tensors of a Hugging Face directory by bare name, without talker and vocoder; only headers are read.

    Returns:
        Nothing where the weights cannot be read: whoever loads them says what is wrong.
    """
    try:
        stored = list_tensors(Path(directory))
    except (WeightError, OSError):
        return {}
    return {table.plain_name(name): tensor for name, tensor in stored.items() if not table.known_extra(name)}


def need_of_files(tensors: dict[str, StoredTensor], model: ModelConfig) -> MemoryNeed:
    """What the model of these files takes, kept and computed in as `model` says.

    Args:
        tensors: as `thinker_tensors` gives them.
        model: `param_dtype` and `compute_dtype`.
    """
    kept, computed = (NUMPY_DTYPES[_SPELLED[name]].itemsize for name in (model.param_dtype, model.compute_dtype))
    sizes = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
    text = sum(size for name, size in sizes.items() if name.startswith(_TEXT))
    return MemoryNeed(
        parameters=sum(sizes.values()),
        dtype=model.param_dtype,
        weights=kept * sum(sizes.values()),
        decoding=computed * text if model.compute_dtype != model.param_dtype else 0,
        tensor=max((tensor.nbytes + kept * sizes[name] for name, tensor in tensors.items()), default=0),
    )


def need_of_backbone(backbone: Backbone, dtype: str) -> MemoryNeed:
    """What a run's own model takes, from the shapes of its parameters; `dtype` is what most are kept in."""
    sizes = {name: math.prod(leaf.shape) for name, leaf in backbone.shapes.items()}
    computed = np.dtype(backbone.config.compute_dtype).itemsize
    return MemoryNeed(
        parameters=sum(sizes.values()),
        dtype=dtype,
        weights=sum(size * np.dtype(backbone.shapes[name].dtype).itemsize for name, size in sizes.items()),
        decoding=sum(computed * sizes[name] for name in backbone.recast),
    )


def check_memory(path: str | Path, need: MemoryNeed, mesh_sizes: Sequence[int], check: str, free: int | None) -> None:
    """Says what a model takes, and refuses one that does not fit.

    Args:
        path: of the model, for the message.
        need: of one copy of it.
        mesh_sizes: devices along `data`, each of which holds a copy, and along the other axes, which share one.
        check: `eval.memory_check`.
        free: bytes of all these devices; None where nobody tells.

    Raises:
        ModelMemoryError: it takes more, and `check` is "refuse".
    """
    total = need.total * mesh_sizes[0]
    # A small model is spoken of only where it does not fit.
    if check == "off" or total < WORTH_SAYING and (free is None or total <= free):
        return
    copies = f", {mesh_sizes[0]} times (mesh.data)" if mesh_sizes[0] > 1 else ""
    takes = f"at least {_gb(total)} of memory to answer ({need}{copies})"
    if free is None or total <= free:
        there = "" if free is None else f"; {_gb(free)} are free"
        screen.say(f"{printable(path)}: takes {takes}{there}", error=True)
        return
    if check == "warn":
        screen.say(f"{printable(path)}: takes {takes}, and {_gb(free)} are free: it is loaded all the same", error=True)
        return
    narrower = "export it in bfloat16 (`mer-r1 export`), " if need.dtype == "float32" else ""
    raise ModelMemoryError(
        f"{printable(path)}: got a model that takes {takes}; expected no more than the {_gb(free)} that are free; "
        f"free some, {narrower}take a larger machine or a smaller model, or load it all the same: "
        "--set=eval.memory_check=warn of infer, --config.eval.memory_check=warn beside evaluate's --config, "
        'load(..., eval__memory_check="warn")'
    )


def free_bytes(devices: Sequence[Any]) -> int | None:
    """Bytes that devices of a mesh have left together: the host's own on CPUs, else what they tell; None if nothing."""
    if devices[0].platform == "cpu":
        return free_on_host()
    stats = [device.memory_stats() or {} for device in devices if device.process_index == devices[0].process_index]
    if not all("bytes_limit" in one for one in stats):
        return None
    # The devices of other processes are like these.
    return sum(one["bytes_limit"] - one.get("bytes_in_use", 0) for one in stats) * len(devices) // len(stats)


def free_on_host(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process can still have: what Linux counts as available and swap, or less in a container.

    Args:
        proc: where Linux tells of memory and of this process.
        groups: where it tells of control groups, those of version 1 or 2.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    # The kernel writes kB and means KiB.
    free = 1024 * (kilobytes.get("MemAvailable", 0) + kilobytes.get("SwapFree", 0))
    return min([free, *_left_in_groups(proc, groups)])


# Of each version: the limit, what is used of it, and the pages among that which the system takes back when it has to.
_GROUP_FILES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def _left_in_groups(proc: Path, groups: Path) -> Iterable[int]:
    """What each limited group that this process is in, or a group above it, has left."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        # A line reads `number:controllers:path`; that of version 2 names no controllers.
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root, version = (groups / "memory", 1) if kinds else (groups, 0)
        limit, used, given_back = _GROUP_FILES[version]
        own = Path(path.strip("/"))
        # A group has no more than each group above it leaves.
        for place in (own, *own.parents):
            try:
                most = (root / place / limit).read_text().strip()
                taken = int((root / place / used).read_text())
                stat = dict(pair.split() for pair in (root / place / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue  # a container does not see the groups above its own
            if most != "max":
                yield max(0, int(most) - taken + sum(int(stat.get(name, 0)) for name in given_back))


_SPELLED = {"float32": "F32", "bfloat16": BFLOAT16}


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
