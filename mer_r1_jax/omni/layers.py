"""What the three towers share: parameters with logical axis names, projections, norms, rotary embedding, stacking.

Every parameter carries `axes`, one logical name per dimension; activations are named where they cross a block. A table
of rules maps names to mesh axes, so the model code is the same on one device and on a pod.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mer_r1_jax.kernels.attention.reference import INPUTS, RESIDUALS
from mer_r1_jax.kernels.placement import Placement
from mer_r1_jax.omni.lora import AdapterConfig

# Name under which the results of products with weights can be kept by a remat policy.
DOTS = "dots"

Rules = Mapping[str, str | tuple[str, ...] | None]


class _Active(threading.local):
    rules: Rules | None = None
    mesh: Mesh | None = None
    dropout_key: jax.Array | None = None
    dropouts: int = 0  # drawn since the key became active


_active = _Active()


@contextlib.contextmanager
def axis_rules(rules: Rules, mesh: Mesh):
    """While it lasts, `constrain` places activations by these rules.

    What counts are the rules at the time a function is traced: a jitted function must not be shared by two tables.

    Args:
        rules: logical axis name -> mesh axis, several mesh axes, or None; names that are missing are not sharded.
        mesh: the mesh the axes belong to, of Auto axis types.

    Raises:
        ValueError: a rule names a mesh axis that does not exist.
    """
    for name, target in rules.items():
        for axis in _mesh_axes(target):
            if axis not in mesh.shape:
                raise ValueError(
                    f"sharding rule {name!r} -> {target!r}: the mesh has no axis {axis!r}, only {', '.join(mesh.shape)}"
                )
    before = _active.rules, _active.mesh
    _active.rules, _active.mesh = rules, mesh
    try:
        yield
    finally:
        _active.rules, _active.mesh = before


@contextlib.contextmanager
def adapter_dropout(key: jax.Array | None):
    """While it lasts, adapters of a dropout above 0 drop some of their inputs; without a key, nothing changes.

    As with `axis_rules`, what counts is whether it lasts when a function is traced.

    Args:
        key: random bits of this pass; those of a layer follow from it and the layer's number.
    """
    before = _active.dropout_key, _active.dropouts
    _active.dropout_key, _active.dropouts = key, 0
    try:
        yield
    finally:
        _active.dropout_key, _active.dropouts = before


def _mesh_axes(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if target is None:
        return ()
    return (target,) if isinstance(target, str) else tuple(target)


def active_mesh() -> Mesh | None:
    """The mesh of the active `axis_rules`; None when there are none."""
    return _active.mesh


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes of a logical name under the active `axis_rules`."""
    return _mesh_axes((_active.rules or {}).get(name))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """x, placed by the active `axis_rules`; x itself when there are none.

    A mesh axis cuts an array once: an activation's "embed" is not cut over an axis that its "batch" already uses.

    Args:
        x: an activation.
        axes: logical name of each of its dimensions, None for one that is never cut.

    Raises:
        ValueError: a dimension that its mesh axes do not divide; the message names it.
    """
    rules, mesh = _active.rules, _active.mesh
    if rules is None or mesh is None:
        return x
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for name, size in zip(axes, x.shape, strict=True):
        mesh_axes = _mesh_axes(rules.get(name)) if name is not None else ()
        mesh_axes = tuple(axis for axis in mesh_axes if axis not in used)
        used |= set(mesh_axes)
        parts = math.prod(mesh.shape[axis] for axis in mesh_axes)
        if size % parts:
            raise ValueError(
                f"activation {tuple(axes)} of shape {x.shape}: {name!r} has size {size}, which the {parts} devices of "
                f"mesh axes {mesh_axes} do not divide; change the size or the rule of {name!r}"
            )
        entries.append(mesh_axes or None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*entries)))


def placement(rows: str, heads: str) -> Placement | None:
    """Where the active `axis_rules` put rows and heads, for kernels, which the compiler cannot cut; None without rules.

    Args:
        rows, heads: logical names of the two axes.
    """
    if _active.mesh is None:
        return None
    return Placement(_active.mesh, rows=mesh_axes(rows), heads=mesh_axes(heads))


@dataclasses.dataclass(frozen=True)
class Settings:
    """How parameters are made and products computed: dtypes, the spread of random weights, adapters.

    Attributes:
        adapters: those asked of the model; only modules that were given `adapted` settings have some.
        in_adapted_part: whether these settings are `adapted`.
    """

    param_dtype: str
    compute_dtype: str
    initializer_range: float
    adapters: AdapterConfig | None = None
    in_adapted_part: bool = False

    def adapted(self, group: str) -> Settings:
        """These settings for a part of a layer, which has adapters where they are asked of it."""
        return dataclasses.replace(self, in_adapted_part=bool(self.adapters and group in self.adapters.groups))


def parameter(
    init: Callable, shape: Sequence[int], axes: Sequence[str], settings: Settings, rngs: nnx.Rngs
) -> nnx.Param:
    """A parameter with its logical axis names; `init` is a jax.nn.initializers function."""
    if len(shape) != len(axes):
        raise ValueError(f"parameter of shape {tuple(shape)} has axis names {tuple(axes)}: expected one name per axis")
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.dtype(settings.param_dtype)), axes=tuple(axes))


class Linear(nnx.Module):
    """A projection y = einsum(equation, x, kernel) + bias.

    Args:
        equation: einsum string with the kernel second, e.g. "BTD,DHh->BTHh".
        sizes: size of every letter of the kernel, e.g. dict(D=64, H=4, h=16).
        axes: logical name of every kernel axis.
        bias: whether the kernel letters of the result get a bias.
        settings, rngs: as everywhere.
    """

    def __init__(
        self,
        equation: str,
        sizes: Mapping[str, int],
        axes: Sequence[str],
        *,
        bias: bool,
        settings: Settings,
        rngs: nnx.Rngs,
    ) -> None:
        self.equation, self.dtype = equation, settings.compute_dtype
        _, letters, result = equation.replace("->", ",").split(",")
        normal = jax.nn.initializers.normal(settings.initializer_range)
        self.kernel = parameter(normal, [sizes[a] for a in letters], axes, settings, rngs)
        if bias:
            kept = [(sizes[a], name) for a, name in zip(letters, axes, strict=True) if a in result]
            zeros = jax.nn.initializers.zeros
            self.bias = parameter(zeros, [size for size, _ in kept], [name for _, name in kept], settings, rngs)
        else:
            self.bias = None
        self.adapters = settings.adapters if settings.in_adapted_part else None
        if self.adapters is not None:
            named = dict(zip(letters, axes, strict=True)) | {"r": "rank"}
            sizes = {**sizes, "r": self.adapters.rank}
            inputs, outputs = [a for a in letters if a not in result], [a for a in letters if a in result]

            # No random bits are drawn here: the base is the same with and without adapters (`lora.fresh_adapters`).
            def zeros_of(kept: Sequence[str]) -> nnx.Param:
                value = jnp.zeros([sizes[a] for a in kept], jnp.dtype(settings.param_dtype))
                return nnx.Param(value, axes=tuple(named[a] for a in kept))

            self.lora_a, self.lora_b = zeros_of([*inputs, "r"]), zeros_of(["r", *outputs])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = checkpoint_name(_project(self.equation, x, self.kernel[...].astype(self.dtype)), DOTS)
        y = y if self.bias is None else y + self.bias[...].astype(self.dtype)
        return y if self.adapters is None else y + self._adapter(x, self.adapters)

    def _adapter(self, x: jax.Array, adapters: AdapterConfig) -> jax.Array:
        """What the adapter adds to the projection of x: scale x B (A x)."""
        before, letters, after = self.equation.replace("->", ",").split(",")
        inputs = "".join(a for a in letters if a not in after)
        outputs = "".join(a for a in letters if a in after)
        seen = _dropped(x, adapters.dropout)
        low = _project(f"{before},{inputs}r->...r", seen, self.lora_a[...].astype(self.dtype))
        added: Any = _project(f"...r,r{outputs}->{after}", low, self.lora_b[...].astype(self.dtype))
        # In float32: bfloat16 has no 32 / 12, and a merge or peft takes it exactly.
        return (added.astype(jnp.float32) * adapters.scale).astype(self.dtype)


def _dropped(x: jax.Array, share: float) -> jax.Array:
    """x with a share of it set to 0 and the rest scaled up, inside an `adapter_dropout`; x itself elsewhere."""
    if not share or _active.dropout_key is None:
        return x
    # Each projection of a layer has its own bits: they are numbered in the order in which they are traced.
    _active.dropouts += 1
    key = jax.random.fold_in(_active.dropout_key, _active.dropouts)
    kept = jax.random.bernoulli(key, 1 - share, x.shape)
    return jnp.where(kept, x / jnp.asarray(1 - share, x.dtype), jnp.zeros((), x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """einsum(equation, x, kernel), whose derived gradient would be right and, on a CPU, slow.

    The kernel's gradient sums over tokens, so one factor has to be brought into another order first. Derived, that is
    always the result's gradient: in a feed-forward layer the wider one, computed anew while it is read across.
    """
    return jnp.einsum(equation, x, kernel)


def _project_forward(equation, x, kernel):
    return _project(equation, x, kernel), (x, kernel)


def _project_backward(equation, residuals, dy):
    x, kernel = residuals
    before, letters, after = equation.replace("->", ",").split(",")
    dx = jnp.einsum(f"{after},{letters}->{before}", dy, kernel)
    tokens = tuple(range(x.ndim - sum(letter in letters for letter in before)))
    narrow, wide = (x, dy) if x.size <= dy.size else (dy, x)
    product = jax.lax.dot_general(narrow, wide, ((tokens, tokens), ((), ())))
    if narrow is dy:
        outer = dy.ndim - len(tokens)
        product = jnp.transpose(product, (*range(outer, kernel.ndim), *range(outer)))
    return dx, product


_project.defvjp(_project_forward, _project_backward)


class Embedding(nnx.Module):
    """A table embedding[N, D].

    Looked up with its width made whole: rows cut along the width cannot be re-cut along the batch without the compiler
    holding all of them on every device.
    """

    def __init__(self, shape: Sequence[int], axes: Sequence[str], *, settings: Settings, rngs: nnx.Rngs) -> None:
        self.dtype, self.axes = settings.compute_dtype, (axes[0], None)
        normal = jax.nn.initializers.normal(settings.initializer_range)
        self.embedding = parameter(normal, shape, axes, settings, rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        table_ND = constrain(self.embedding[...].astype(self.dtype), self.axes)
        return jnp.take(table_ND, ids, axis=0, mode="clip")


class RMSNorm(nnx.Module):
    """Root-mean-square norm: float32 statistics, the weight multiplied after casting back."""

    def __init__(self, size: int, axis: str, *, eps: float, settings: Settings, rngs: nnx.Rngs) -> None:
        self.eps = eps
        self.scale = parameter(jax.nn.initializers.ones, [size], [axis], settings, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * x32.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with torch's epsilon of 1e-5, computed in float32."""

    def __init__(self, size: int, axis: str, *, settings: Settings, rngs: nnx.Rngs, eps: float = 1e-5) -> None:
        self.eps = eps
        self.scale = parameter(jax.nn.initializers.ones, [size], [axis], settings, rngs)
        self.bias = parameter(jax.nn.initializers.zeros, [size], [axis], settings, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 -= jnp.mean(x32, axis=-1, keepdims=True)
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU; jax's default is the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


def inverse_frequencies(count: int, theta: float) -> jax.Array:
    """float32 theta ** (-k / count) for k = 0 .. count - 1."""
    return 1.0 / theta ** (jnp.arange(count, dtype=jnp.float32) / count)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding: the halves of the last axis of x[..., h] are rotated by angles given as [..., h / 2].

    cos and sin lack x's head axis, which comes before the last; the result has the dtype of cos times x.
    """
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` layers as one module whose parameters have a leading axis "layers"."""
    return nnx.vmap(make)(rngs.fork(split=count))


def scan_layers(
    layers: nnx.Module,
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    per_layer: Any = None,
    *,
    remat: str = "everything",
) -> tuple[Any, Any]:
    """lax.scan over stacked layers.

    Args:
        layers: a module made by `stack_layers`.
        step: (layer, carry, this layer's slice of per_layer) -> (carry, output).
        carry: what goes from layer to layer.
        per_layer: pytree of arrays with a leading layer axis, or None.
        remat: what the backward pass keeps of a layer: nothing | attention (its result, so that the kernel is not run
            again) | dots (that, what the kernel takes, and the results of matrix products with weights) | everything.

    Returns:
        (last carry, outputs stacked over layers).
    """
    graphdef, params = nnx.split(layers)

    def body(carry, xs):
        layer_params, extra = xs
        return step(nnx.merge(graphdef, layer_params), carry, extra)

    def body_with_dropout(carry, xs):
        xs, key = xs
        with adapter_dropout(key):
            return body(carry, xs)

    run, xs = body, (params, per_layer)
    if _active.dropout_key is not None:
        count = jax.tree.leaves(params)[0].shape[0]
        # Passes are numbered as they are traced: one over prompts and one over what continues them draw other bits.
        _active.dropouts += 1
        key = jax.random.fold_in(_active.dropout_key, _active.dropouts)
        # A key a layer, handed in with its parameters: what is traced once must not draw the same bits for all.
        run, xs = body_with_dropout, (xs, jax.random.split(key, count))
    if remat != "everything":
        run = jax.checkpoint(run, prevent_cse=False, policy=_kept(remat))
    return jax.lax.scan(run, carry, xs)


def _kept(remat: str) -> Callable:
    """The policy of a remat setting other than "everything"."""
    policies = jax.checkpoint_policies
    attention = policies.save_only_these_names(RESIDUALS)
    # Rotated and laid out for the kernel, queries need not be rotated again: only their products' results are dropped.
    dots = policies.save_only_these_names(RESIDUALS, INPUTS, DOTS)
    return {"nothing": policies.nothing_saveable, "attention": attention, "dots": dots}[remat]
