"""One pass over the vocabulary in plain XLA: a scan over chunks of it, forward and backward.

The same contract as `pallas_tpu`. What lives at once are the logits of one chunk for all rows. The unembedding's
gradient is written once, a chunk at a time; the hidden states' is summed in float32.

Shape letters: N rows, D width, V vocabulary, v columns of a chunk, Z candidate sets.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

LOWEST = -1e30  # below every logit; finite, so that differences of two of them are no NaN


def _chunks(V: int, chunk: int) -> tuple[int, int]:
    width = min(chunk, V)
    return width, -(-V // width)


def _columns(number, width: int, V: int):
    """First column of a chunk, its columns [v], and which of them no earlier chunk had: the last one may reach back."""
    # The last chunk reaches back because padding V to whole chunks would copy the unembedding.
    wanted = number * width
    start = jnp.minimum(wanted, V - width)
    column_v = start + jnp.arange(width)
    return start, column_v, column_v >= wanted


def _cut(array, start, width: int, axis: int):
    return lax.dynamic_slice_in_dim(array, start, width, axis)


def _logits(x_ND, w, scale: float, vocab_first: bool):
    logits_Nv = jnp.einsum("ND,vD->Nv" if vocab_first else "ND,Dv->Nv", x_ND, w, preferred_element_type=jnp.float32)
    return logits_Nv if scale == 1.0 else logits_Nv * scale


def _members(member_ZV, start, width: int, fresh_v):
    return jnp.where(fresh_v, _cut(member_ZV, start, width, 1), 0).astype(jnp.float32)


def forward(x_ND, w, token_N, member_ZV, *, scale: float, vocab_first: bool, chunk: int):
    """As `pallas_tpu.forward`, for any N; `token_N` has one axis and `chunk` columns are scored at once."""
    axis = 0 if vocab_first else 1
    V = w.shape[axis]
    width, count = _chunks(V, chunk)

    def step(carry, number):
        top_N, total_N, mean_N, picked_N, set_NZ = carry
        start, column_v, fresh_v = _columns(number, width, V)
        logits_Nv = _logits(x_ND, _cut(w, start, width, axis), scale, vocab_first)
        # Columns that were scored before get p = 0; LOWEST is finite, so p * logits is 0 too and not NaN.
        logits_Nv = jnp.where(fresh_v, logits_Nv, LOWEST)
        is_token_Nv = (column_v == token_N[:, None]) & fresh_v
        picked_N += jnp.sum(jnp.where(is_token_Nv, logits_Nv, 0.0), axis=1)
        now_N = jnp.maximum(top_N, jnp.max(logits_Nv, axis=1))
        decay_N = jnp.exp(top_N - now_N)
        p_Nv = jnp.exp(logits_Nv - now_N[:, None])
        total_N = decay_N * total_N + jnp.sum(p_Nv, axis=1)
        mean_N = decay_N * mean_N + jnp.sum(p_Nv * logits_Nv, axis=1)
        if set_NZ is not None:
            # At the default precision a TPU would round the probabilities to bfloat16.
            part_NZ = jnp.einsum("Nv,Zv->NZ", p_Nv, _members(member_ZV, start, width, fresh_v), precision="highest")
            set_NZ = decay_N[:, None] * set_NZ + part_NZ
        return (now_N, total_N, mean_N, picked_N, set_NZ), None

    zero_N = jnp.zeros(x_ND.shape[0], jnp.float32)
    set_NZ = None if member_ZV is None else jnp.zeros((x_ND.shape[0], member_ZV.shape[0]), jnp.float32)
    carry = (jnp.full_like(zero_N, LOWEST), zero_N, zero_N, zero_N, set_NZ)
    (top_N, total_N, mean_N, picked_N, set_NZ), _ = lax.scan(step, carry, jnp.arange(count))
    lse_N = top_N + jnp.log(total_N)
    return lse_N, picked_N, mean_N / total_N, None if set_NZ is None else set_NZ / total_N[:, None]


def backward(x_ND, w, rows, member_ZV, weight_NZ, *, scale: float, vocab_first: bool, chunk: int):
    """As `pallas_tpu.backward`, for any N; `rows` is the tuple of arrays [N] lse, on_token, constant, slope, token."""
    axis = 0 if vocab_first else 1
    V = w.shape[axis]
    width, count = _chunks(V, chunk)
    lse_N1, on_token_N1, constant_N1, slope_N1, token_N1 = (row[:, None] for row in rows)

    def step(carry, number):
        dx_ND, dw = carry
        start, column_v, fresh_v = _columns(number, width, V)
        w_cut = _cut(w, start, width, axis)
        logits_Nv = _logits(x_ND, w_cut, scale, vocab_first)
        factor_Nv = constant_N1 - slope_N1 * logits_Nv
        if member_ZV is not None:
            members = _members(member_ZV, start, width, fresh_v)
            factor_Nv += jnp.einsum("NZ,Zv->Nv", weight_NZ, members, precision="highest")
        d_Nv = jnp.where(column_v == token_N1, on_token_N1, 0.0) + jnp.exp(logits_Nv - lse_N1) * factor_Nv
        d_Nv = jnp.where(fresh_v, d_Nv * scale, 0.0).astype(x_ND.dtype)
        to_dx, to_dw = ("Nv,vD->ND", "Nv,ND->vD") if vocab_first else ("Nv,Dv->ND", "Nv,ND->Dv")
        dx_ND += jnp.einsum(to_dx, d_Nv, w_cut, preferred_element_type=jnp.float32)
        part = jnp.einsum(to_dw, d_Nv, x_ND, preferred_element_type=jnp.float32)
        # Columns that an earlier chunk had are zero here: their gradient is kept.
        part = part.astype(dw.dtype) + _cut(dw, start, width, axis)
        return (dx_ND, lax.dynamic_update_slice_in_dim(dw, part, start, axis)), None

    # dw needs no float32 sum: every column gets its whole gradient from one chunk.
    carry = (jnp.zeros(x_ND.shape, jnp.float32), jnp.zeros_like(w))
    (dx_ND, dw), _ = lax.scan(step, carry, jnp.arange(count))
    return dx_ND.astype(x_ND.dtype), dw
