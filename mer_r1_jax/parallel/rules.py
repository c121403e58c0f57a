"""Two tables from logical axis names to mesh axes, one for training and one for decoding, and the shardings they give.

Every parameter and activation of the backbone carries logical names; where they live is decided here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, tuple[str, ...]]

# Training: parameters are cut along their model width over `fsdp` and along heads, mlp and vocabulary over `tensor`;
# activations are cut along the batch over the data axes. `decode_tensor` is one of those here, as if it were `fsdp`.
TRAIN_RULES: Rules = {
    "batch": ("data", "fsdp", "decode_tensor"),
    "mlp_batch": ("data", "fsdp", "decode_tensor"),
    "embed": ("fsdp", "decode_tensor"),
    "audio_embed": ("fsdp", "decode_tensor"),
    "vision_embed": ("fsdp", "decode_tensor"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "audio_heads": ("tensor",),
    "vision_heads": ("tensor",),
    "mlp": ("tensor",),
    "audio_mlp": ("tensor",),
    "vision_mlp": ("tensor",),
    "merged": ("tensor",),
    "vocab": ("tensor",),
    # Completions while their next token is drawn: the axes of `batch`, then those of `vocab`, so that one exchange of
    # logits is all it takes.
    "drawn": ("data", "fsdp", "decode_tensor", "tensor"),
}

# Decoding reads every weight once a token, so none may have to be gathered: nothing is cut along the model width. Rows
# and caches stay where training has them on `data` and `fsdp`. `decode_tensor` cuts heads here, as if it were `tensor`:
# products of training are widest where every chip has all heads, and decoding reads least where each has but some. The
# feed-forward layers, three quarters of a 7B model, are cut over `fsdp` too: a token's activations are few, so their
# rows are brought together before such a layer ("mlp_batch") and parted after it, where prefill, with its many tokens,
# gathers a layer's weights once. Attention and vocabulary are not cut over it, because heads are few and rows keep
# their caches; every chip of an fsdp group holds their quarter. Bytes a chip of a 7B model in bfloat16: 4.6 GB on 16
# chips of `fsdp` (15.2 if all were held whole), 1.1 GB on fsdp 64 x tensor 4 (3.8). The towers are not decoded with and
# keep the layout of training.
DECODE_RULES: Rules = {
    "batch": ("data", "fsdp"),
    "mlp_batch": ("data",),
    "heads": ("tensor", "decode_tensor"),
    "kv_heads": ("tensor", "decode_tensor"),
    "mlp": ("tensor", "fsdp", "decode_tensor"),
    "vocab": ("tensor", "decode_tensor"),
    "drawn": ("data", "fsdp", "tensor", "decode_tensor"),
}


class ShardingError(ValueError):
    """An array that the mesh cannot cut as the rules say; names the array, the axis and the sizes."""


def on(mesh: Mesh, rules: Rules) -> Rules:
    """The rules without the axes that the mesh has not: `decode_tensor` is there only where it is more than one."""
    return {name: tuple(axis for axis in axes if axis in mesh.shape) for name, axes in rules.items()}


def spec(axes: tuple[str | None, ...], rules: Rules = TRAIN_RULES, activation: bool = False) -> PartitionSpec:
    """The partition of an array with these logical axes.

    A mesh axis cuts an array once: an activation's `embed` is not cut over `fsdp` where its `batch` already is.
    """
    used: set[str] = set()
    parts: list[Any] = []
    for name in axes:
        mesh_axes = () if name is None else rules.get(name, ())
        clash = used & set(mesh_axes)
        if clash and not activation:
            raise ShardingError(
                f"logical axes {axes} put mesh axis {', '.join(sorted(clash))} on two dimensions of one array; "
                f"change the rule of {name!r}"
            )
        mesh_axes = tuple(axis for axis in mesh_axes if axis not in used)
        used |= set(mesh_axes)
        parts.append(_part(mesh_axes))
    return PartitionSpec(*parts)


def param_shardings(shapes: Any, axes: Any, mesh: Mesh, rules: Rules = TRAIN_RULES) -> Any:
    """Shardings of a parameter tree, from its abstract arrays and its tree of logical axes.

    Raises:
        ShardingError: listing every parameter a mesh axis does not divide, or whose axes collide.
    """
    problems: list[str] = []
    rules = on(mesh, rules)

    def one(path: Any, shape: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> NamedSharding:
        partition = spec(names, rules)
        for size, name, mesh_axes in zip(shape.shape, names, partition, strict=True):
            cut = _cut(mesh, mesh_axes)
            if size % cut:
                problems.append(
                    f"{jax.tree_util.keystr(path, simple=True, separator='/')}: dimension {name!r} of size {size} is "
                    f"not a multiple of {cut} (mesh axes {mesh_axes})"
                )
        return NamedSharding(mesh, partition)

    tree = jax.tree_util.tree_map_with_path(one, shapes, axes, is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct))
    if problems:
        raise ShardingError(
            "the mesh cannot cut these parameters; choose smaller mesh.tensor, mesh.decode_tensor or mesh.fsdp:\n  "
            + "\n  ".join(problems)
        )
    return tree


def _cut(mesh: Mesh, mesh_axes: Any) -> int:
    return math.prod(mesh.shape[name] for name in _axes_of(mesh_axes))


def _part(axes: tuple[str, ...]) -> Any:
    """One dimension of a partition, as `PartitionSpec` has it: a tuple only of several axes."""
    return axes if len(axes) > 1 else (axes[0] if axes else None)


def _axes_of(part: Any) -> tuple[str, ...]:
    """The mesh axes of one dimension of a partition."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def halfway(trained: NamedSharding, decoded: NamedSharding) -> NamedSharding:
    """Where a weight is on its way from training to decoding: cut as there, and still along its width by what is left.

    Asked for both at once, to part heads over `decode_tensor` and to bring the width together over `fsdp`, the compiler
    brings the whole weight together first, on every device.
    """
    used = {axis for part in decoded.spec for axis in _axes_of(part)}
    left = [tuple(axis for axis in _axes_of(part) if axis not in used) for part in trained.spec]
    parts = [_part(_axes_of(goal) or axes) for goal, axes in zip(decoded.spec, left, strict=True)]
    return NamedSharding(decoded.mesh, PartitionSpec(*parts))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of something every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh, rules: Rules = TRAIN_RULES, axis: int = 0) -> NamedSharding:
    """The sharding of a host batch whose `axis` counts rows."""
    return NamedSharding(mesh, PartitionSpec(*([None] * axis), on(mesh, rules)["batch"]))
