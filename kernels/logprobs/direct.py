"""Whole logits, a chunk of rows at a time, computed again in the backward pass: for vocabularies that are small.

The numbers are those of the reference; only how many rows' logits exist at once differs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from mer_r1_jax.kernels.logprobs import reference


def scores(h, unembedding, token, sets, candidate_ids_ZY, *, temperature, vocab_first, entropy_gradient, chunk):
    """Arguments and results as `api.gather_logprobs`; results that were not asked for are None."""
    leading = h.shape[:-1]

    def row_scores(h_MD, *rest):
        logits_MV = reference.logits(h_MD, unembedding, vocab_first=vocab_first)
        logits_MV = logits_MV if temperature == 1.0 else logits_MV / temperature
        rest, results = list(rest), {}
        if token is not None:
            pair = reference.token_scores(logits_MV, rest.pop(0), entropy_gradient=entropy_gradient)
            results["logprob"], results["entropy"] = pair
        if sets is not None:
            results["sets"] = reference.set_scores(logits_MV, rest.pop(0), candidate_ids_ZY)
        return results

    arrays = (h, *(a for a in (token, sets) if a is not None))
    results = map_chunks(row_scores, arrays, leading, chunk)
    return results.get("logprob"), results.get("entropy"), results.get("sets")


def map_chunks(function, arrays: tuple[jax.Array, ...], leading: tuple[int, ...], chunk: int):
    """Applies `function` to at most `chunk` items at a time and recomputes it in the backward pass.

    Args:
        function: maps arrays [M, ...] to a pytree of arrays [M, ...], item by item.
        arrays: arrays whose leading axes are `leading`.
        leading: the shape that is flattened to items.
        chunk: items of one call.

    Returns:
        The pytree of results with the leading axes put back.
    """
    count = 1
    for size in leading:
        count *= size
    flat = [a.reshape(count, *a.shape[len(leading) :]) for a in arrays]
    if count <= chunk:
        results = jax.checkpoint(function)(*flat)
    else:
        calls = -(-count // chunk)
        padded = [jnp.pad(a, [(0, calls * chunk - count)] + [(0, 0)] * (a.ndim - 1)) for a in flat]
        cut = [a.reshape(calls, chunk, *a.shape[1:]) for a in padded]
        results = jax.lax.map(jax.checkpoint(lambda items: function(*items)), tuple(cut))
        results = jax.tree.map(lambda r: r.reshape(calls * chunk, *r.shape[2:])[:count], results)
    return jax.tree.map(lambda r: r.reshape(*leading, *r.shape[1:]), results)
