"""Whole logits of a device's own rows, for vocabularies that are small: the plain way, with its gradient by hand.

A chunk of rows at a time, small enough that its logits stay in a CPU's cache, and computed again for the gradient: that
takes less time than to bring all of them from memory. By hand, because the derived gradient costs several more passes
over the logits, and brings the larger factor of the unembedding's gradient into another order instead of the smaller.
Of the mesh, the axes that cut rows are dealt with here: left to the compiler, a loop over chunks makes every device
score all rows. Those that cut the vocabulary are the compiler's.

Letters besides the reference's: N all rows of a device, M rows of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mer_r1_jax.kernels.logprobs import reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """Static: factor on the logits, the order of the unembedding's axes, and rows whose logits exist at once."""

    scale: float
    vocab_first: bool
    chunk: int

    def logits(self, x_MD, w) -> jax.Array:
        logits_MV = reference.logits(x_MD, w, vocab_first=self.vocab_first)
        return logits_MV if self.scale == 1.0 else logits_MV * self.scale


def scores(h, unembedding, token, sets, candidate_ids_ZY, *, temperature, vocab_first, partition, chunk):
    """Arguments and results as `api.gather_logprobs`; results that were not asked for are None."""
    settings = _Settings(scale=1 / temperature, vocab_first=vocab_first, chunk=chunk)
    leading = h.shape[:-1]
    count, parts = math.prod(leading), 1 if partition is None else partition.size(partition.rows)
    own = functools.partial(_own, settings)
    if partition is not None and parts > 1:
        # The unembedding is whole along the row axes: shard_map's transposition sums its gradient over them. Axes that
        # are not named stay with the compiler, those of the vocabulary among them.
        row = PartitionSpec(partition.rows)
        specs = dict(in_specs=(row, PartitionSpec(), row, row, PartitionSpec()), out_specs=row)
        axes = set(partition.rows)
        own = jax.shard_map(own, mesh=partition.mesh, **specs, axis_names=axes, check_vma=False)

    def rows(array):
        if array is None:
            return None
        array = array.reshape(count, *array.shape[len(leading) :])
        return jnp.pad(array, [(0, -count % parts)] + [(0, 0)] * (array.ndim - 1))

    results = own(rows(h), unembedding, rows(token), rows(sets), candidate_ids_ZY)
    return jax.tree.map(lambda a: a[:count].reshape(*leading, *a.shape[1:]), results)


def _own(settings: _Settings, x_ND, w, token_N, set_NK, ids_ZY):
    """What is asked for of one device's rows."""
    logprob_N = entropy_N = set_logprob_NK = None
    if token_N is not None:
        scores = _token_scores(settings, x_ND, w, token_N)
        assert isinstance(scores, tuple)  # type checkers do not see through custom_vjp
        logprob_N, entropy_N = scores
    if set_NK is not None:

        def of_sets(x_MD, set_MK):
            return reference.set_scores(settings.logits(x_MD, w), set_MK, ids_ZY)

        # The gradient is derived here; checkpoint makes it compute a chunk's logits again instead of keeping all.
        set_logprob_NK = _map(settings.chunk, jax.checkpoint(of_sets), x_ND, set_NK)
    return logprob_N, entropy_N, set_logprob_NK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_scores(settings: _Settings, x_ND, w, token_N):
    return _token_forward(settings, x_ND, w, token_N)[0]


def _token_forward(settings: _Settings, x_ND, w, token_N):
    def of_rows(x_MD, token_M):
        logits_MV = settings.logits(x_MD, w)
        lse_M = jax.nn.logsumexp(logits_MV, axis=-1)
        picked_M = jnp.sum(jnp.where(_is_token(logits_MV, token_M), logits_MV, 0.0), axis=-1)
        mean_M = jnp.sum(jnp.exp(logits_MV - lse_M[:, None]) * logits_MV, axis=-1)
        return picked_M - lse_M, lse_M - mean_M, lse_M

    logprob_N, entropy_N, lse_N = _map(settings.chunk, of_rows, x_ND, token_N)
    # Besides the inputs, residuals are two float32 numbers a row; no logit is kept.
    return (logprob_N, entropy_N), (x_ND, w, token_N, entropy_N, lse_N)


def _token_backward(settings: _Settings, residuals, gradients):
    x_ND, w, token_N, entropy_N, lse_N = residuals
    # Or the compiler would see that the logits of a single chunk are those it had, and keep them.
    x_ND, w = jax.lax.optimization_barrier((x_ND, w))
    on_logprob_N, on_entropy_N = gradients
    # The logits' gradient in terms of one number of each kind a row: see one_pass.
    constant_N = -on_logprob_N - on_entropy_N * (entropy_N - lse_N)
    rows = (x_ND, token_N, lse_N, on_logprob_N, constant_N, on_entropy_N)
    to_dx, to_dw = ("MV,VD->MD", "MV,MD->VD") if settings.vocab_first else ("MV,DV->MD", "MD,MV->DV")

    def of_rows(dw, rows_of_chunk):
        x_MD, token_M, *numbers = rows_of_chunk
        lse_M1, on_token_M1, constant_M1, slope_M1 = (number_M[:, None] for number_M in numbers)
        logits_MV = settings.logits(x_MD, w)
        d_MV = jnp.exp(logits_MV - lse_M1) * (constant_M1 - slope_M1 * logits_MV)
        d_MV = (d_MV + jnp.where(_is_token(logits_MV, token_M), on_token_M1, 0.0)) * settings.scale
        d_MV = d_MV.astype(x_MD.dtype)
        pair = (d_MV, x_MD) if settings.vocab_first else (x_MD, d_MV)
        dw += jnp.einsum(to_dw, *pair, preferred_element_type=jnp.float32)
        return dw, jnp.einsum(to_dx, d_MV, w, preferred_element_type=jnp.float32)

    # Rows that fill up the last chunk are 0 in every number, cotangents included, and add nothing to dw.
    dw, dx_JMD = jax.lax.scan(of_rows, jnp.zeros(w.shape, jnp.float32), _chunks(settings.chunk, rows))
    dx_ND = dx_JMD.reshape(-1, dx_JMD.shape[-1])[: x_ND.shape[0]]
    return dx_ND.astype(x_ND.dtype), dw.astype(w.dtype), None


_token_scores.defvjp(_token_forward, _token_backward)


def _is_token(logits_MV, token_M):
    return jnp.arange(logits_MV.shape[1]) == token_M[:, None]


def _chunks(chunk: int, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arrays [N, ...] as [J, M, ...] with at most `chunk` rows M, and with rows of 0 behind them."""
    chunk = min(chunk, arrays[0].shape[0])
    padded = (jnp.pad(a, [(0, -a.shape[0] % chunk)] + [(0, 0)] * (a.ndim - 1)) for a in arrays)
    return tuple(a.reshape(-1, chunk, *a.shape[1:]) for a in padded)


def _map(chunk: int, function, *arrays):
    """A function of rows applied to at most `chunk` rows at a time."""
    count = arrays[0].shape[0]
    if count <= chunk:
        return function(*arrays)
    results = jax.lax.map(lambda rows: function(*rows), _chunks(chunk, arrays))
    return jax.tree.map(lambda r: r.reshape(-1, *r.shape[2:])[:count], results)
