"""Scores from one pass over the vocabulary, with their gradients from one more: what Pallas and XLA have in common.

With z = logits / temperature, p = softmax(z), H its entropy and S_k the probability of candidate set k,

    d logprob / d z_v = [v is the token] - p_v
    d entropy / d z_v = -p_v (z_v - lse + H)
    d log S_k / d z_v = p_v [v in set k] / S_k - p_v

so the gradient of anything is onehot * on_token + p * (constant - slope z + weight . member), one number of each kind a
row: that is all a backward pass has to be told. A vocabulary cut over devices adds a sum of exponentials to the forward
pass and a sum of the hidden states' gradients to the backward one; logits never travel.

Shape letters: N rows, D width, V vocabulary, K candidate sets of a row, Z candidate sets of the table, Y tokens of a
set.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from mer_r1_jax.kernels.logprobs import pallas_tpu, xla
from mer_r1_jax.kernels.logprobs.reference import FLOOR
from mer_r1_jax.kernels.logprobs.tiles import Tiles, padded_sets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """How hidden states and unembedding lie on a mesh.

    Attributes:
        mesh: of Auto axes.
        rows: mesh axes that cut the hidden states' rows.
        vocab: mesh axes that cut the vocabulary.
        width: mesh axes among `rows` that cut the stored unembedding along D: it is gathered once before the pass, and
            its gradient is scattered once after it.
    """

    mesh: Mesh
    rows: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    width: tuple[str, ...] = ()

    def size(self, axes: tuple[str, ...]) -> int:
        """Devices along these axes."""
        size = 1
        for axis in axes:
            size *= self.mesh.shape[axis]
        return size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Static: how one call is computed.

    Attributes:
        temperature: logits are divided by it.
        vocab_first: the unembedding is [V, D] instead of [D, V].
        tiles: of the Pallas kernels; None for XLA.
        chunk: columns that XLA scores at once.
        partition: of the arrays over a mesh; None for one device.
        interpret: run the Pallas kernels interpreted (True, or pltpu.InterpretParams).
    """

    temperature: float
    vocab_first: bool
    tiles: Tiles | None = None
    chunk: int = 2048
    partition: Partition | None = None
    interpret: Any = False


def scores(plan: Plan, x_ND, w, token_N, set_NK, ids_ZY):
    """Log-probability of a token, entropy, and log-probability of candidate sets, each float32.

    Args:
        plan: static settings.
        x_ND: hidden states.
        w: unembedding, [D, V] or [V, D], same dtype.
        token_N: int32; a row with a token outside 0..V-1 gets -lse.
        set_NK: int32 rows of ids_ZY, negative for none; None to ask for no sets.
        ids_ZY: int32 token ids of each set, -1 for padding.

    Returns:
        logprob_N, entropy_N, set_NK or None.
    """
    N, rows = x_ND.shape[0], 1
    if plan.partition is not None:
        rows = plan.partition.size(plan.partition.rows)
    x_ND, token_N, set_NK = (_pad(a, rows, value) for a, value in ((x_ND, 0), (token_N, -1), (set_NK, -1)))
    results = _scores(plan, x_ND, w, token_N, set_NK, ids_ZY)
    return jax.tree.map(lambda a: a[:N], results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(plan: Plan, x_ND, w, token_N, set_NK, ids_ZY):
    return _scores_forward(plan, x_ND, w, token_N, set_NK, ids_ZY)[0]


def _scores_forward(plan, x_ND, w, token_N, set_NK, ids_ZY):
    lse_N, picked_N, mean_N, set_NZ = _over_mesh(plan, _forward, backward=False)(x_ND, w, token_N, ids_ZY)
    entropy_N = lse_N - mean_N
    total_NK = set_logprob_NK = None
    if set_NK is not None:
        assert set_NZ is not None  # sets are asked for together with the ids they consist of
        total_NK = jnp.take_along_axis(set_NZ, jnp.maximum(set_NK, 0), axis=1)
        total_NK = jnp.where(set_NK >= 0, total_NK, 0.0)
        set_logprob_NK = jnp.log(jnp.maximum(total_NK, FLOOR))
    # Besides the inputs: float32 lse [N], entropy [N] and probability of each set [N, K].
    residuals = (x_ND, w, token_N, set_NK, ids_ZY, lse_N, entropy_N, total_NK)
    return (picked_N - lse_N, entropy_N, set_logprob_NK), residuals


def _scores_backward(plan, residuals, gradients):
    x_ND, w, token_N, set_NK, ids_ZY, lse_N, entropy_N, total_NK = residuals
    on_logprob_N, on_entropy_N, on_set_NK = gradients
    constant_N = -on_logprob_N - on_entropy_N * (entropy_N - lse_N)
    weight_NZ = None
    if set_NK is not None:
        # At the floor a result is constant and has no gradient, which also keeps 1 / S_k from becoming infinite.
        counts_NK = total_NK > FLOOR
        on_total_NK = jnp.where(counts_NK, on_set_NK / jnp.where(counts_NK, total_NK, 1.0), 0.0)
        constant_N -= jnp.sum(jnp.where(counts_NK, on_set_NK, 0.0), axis=1)
        Z = _sets(plan, ids_ZY)
        weight_NZ = jnp.zeros((x_ND.shape[0], Z), jnp.float32)
        # Added, since a row may name a set twice; absent sets fall on row 0 of the table with a weight of 0.
        weight_NZ = weight_NZ.at[jnp.arange(x_ND.shape[0])[:, None], jnp.maximum(set_NK, 0)].add(on_total_NK)
    arguments = (x_ND, w, token_N, lse_N, on_logprob_N, constant_N, on_entropy_N, ids_ZY, weight_NZ)
    dx_ND, dw = _over_mesh(plan, _backward, backward=True)(*arguments)
    return dx_ND, dw, None, None, None


_scores.defvjp(_scores_forward, _scores_backward)


def _forward(plan: Plan, x_ND, w, token_N, ids_ZY):
    """This device's rows under its share of the vocabulary, put together with the other shares."""
    token_N, member_ZV = _own(plan, w, token_N, ids_ZY)
    scale = 1 / plan.temperature
    if plan.tiles is None:
        out = xla.forward(x_ND, w, token_N, member_ZV, scale=scale, vocab_first=plan.vocab_first, chunk=plan.chunk)
    else:
        N, rows = x_ND.shape[0], plan.tiles.rows
        padded_N = _pad(token_N, rows, -1)
        assert padded_N is not None  # only a table of sets may be None
        out = pallas_tpu.forward(
            _pad(x_ND, rows, 0),
            w,
            padded_N[:, None],
            member_ZV,
            scale=scale,
            vocab_first=plan.vocab_first,
            tiles=plan.tiles,
            interpret=plan.interpret,
        )
        out = jax.tree.map(lambda a: a[:N], out)
    if plan.partition is None or not plan.partition.vocab:
        return out
    axes = plan.partition.vocab
    own_lse_N, picked_N, mean_N, set_NZ = out
    # Shares join like the tiles of an online softmax. Means and sets are relative to a share's own sum, hence
    # weighed by its part of the whole; a token's logit is 0 on every share but one.
    top_N = lax.pmax(own_lse_N, axes)
    lse_N = top_N + jnp.log(lax.psum(jnp.exp(own_lse_N - top_N), axes))
    share_N = jnp.exp(own_lse_N - lse_N)
    set_NZ = None if set_NZ is None else lax.psum(set_NZ * share_N[:, None], axes)
    return lse_N, lax.psum(picked_N, axes), lax.psum(mean_N * share_N, axes), set_NZ


def _backward(plan: Plan, x_ND, w, token_N, lse_N, on_token_N, constant_N, slope_N, ids_ZY, weight_NZ):
    """Gradients of this device's rows (summed over the vocabulary's shares) and of its share of the unembedding."""
    token_N, member_ZV = _own(plan, w, token_N, ids_ZY if weight_NZ is not None else None)
    rows = (lse_N, on_token_N, constant_N, slope_N, token_N)
    settings = dict(scale=1 / plan.temperature, vocab_first=plan.vocab_first)
    if plan.tiles is None:
        dx_ND, dw = xla.backward(x_ND, w, rows, member_ZV, weight_NZ, chunk=plan.chunk, **settings)
    else:
        N, block = x_ND.shape[0], plan.tiles.grad_rows
        # Few rows fill fewer blocks than the kernel needs; what is missing is padding as well.
        padded = block * max(-(-N // block), plan.tiles.fewest_grad_blocks)
        # Tokens travel as float32, exact up to 2 ** 24. Rows of padding are 0 in every column and so is their gradient.
        columns = jnp.stack([row.astype(jnp.float32) for row in rows], axis=1)
        columns = jnp.pad(columns, ((0, 0), (0, pallas_tpu.COLUMNS - len(rows))))
        dx_ND, dw = pallas_tpu.backward(
            _pad(x_ND, padded, 0),
            w,
            _pad(columns, padded, 0),
            member_ZV,
            _pad(weight_NZ, padded, 0),
            tiles=plan.tiles,
            interpret=plan.interpret,
            **settings,
        )
        dx_ND = dx_ND[:N]
    partition = plan.partition
    if partition is None:
        return dx_ND, dw
    if partition.vocab:
        dx_ND = lax.psum(dx_ND, partition.vocab)
    # Devices of all row axes hold parts of dw: over `width` the sum is scattered, as the unembedding is stored, over
    # the others it is whole on each.
    whole = tuple(axis for axis in partition.rows if axis not in partition.width)
    if whole:
        dw = lax.psum(dw, whole)
    if partition.width:
        dw = lax.psum_scatter(dw, partition.width, scatter_dimension=1 if plan.vocab_first else 0, tiled=True)
    return dx_ND, dw


def _over_mesh(plan: Plan, function, *, backward: bool):
    """`function` on every device's share, or as it is where there is one device."""
    function = functools.partial(function, plan)
    if plan.partition is None:
        return function
    p = plan.partition
    row = PartitionSpec(p.rows)

    # Passes take the unembedding whole along D, so that it is gathered before them; its gradient leaves cut again.
    def weight(width):
        return PartitionSpec(p.vocab, width) if plan.vocab_first else PartitionSpec(width, p.vocab)

    if backward:
        in_specs = (row, weight(None), row, row, row, row, row, PartitionSpec(), row)
        out_specs = (row, weight(p.width or None))
    else:
        in_specs = (row, weight(None), row, PartitionSpec())
        out_specs = (row, row, row, row)
    return jax.shard_map(function, mesh=p.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _own(plan: Plan, w, token_N, ids_ZY):
    """Tokens counted within this device's share of the vocabulary, -1 for others, and its membership table."""
    V = w.shape[0 if plan.vocab_first else 1]
    first = 0
    if plan.partition is not None and plan.partition.vocab:
        first = lax.axis_index(plan.partition.vocab) * V

    def own(id_):
        return jnp.where((id_ >= first) & (id_ < first + V), id_ - first, -1)

    if ids_ZY is None:
        return own(token_N), None
    ids_ZY = own(jnp.asarray(ids_ZY))
    outside_V = jnp.where(ids_ZY < 0, V, ids_ZY)  # dropped: behind the last column
    member_ZV = jnp.zeros((_sets(plan, ids_ZY), V), jnp.bfloat16)
    return own(token_N), member_ZV.at[jnp.arange(ids_ZY.shape[0])[:, None], outside_V].set(1, mode="drop")


def _sets(plan: Plan, ids_ZY) -> int:
    """Rows of the membership table: Z, for the kernels a multiple of 128."""
    Z = ids_ZY.shape[0]
    return Z if plan.tiles is None else padded_sets(Z)


def _pad(array, multiple: int, value):
    """The array with rows of `value` behind it, up to a multiple; None stays None."""
    if array is None or array.shape[0] % multiple == 0:
        return array
    return jnp.pad(array, [(0, -array.shape[0] % multiple)] + [(0, 0)] * (array.ndim - 1), constant_values=value)
