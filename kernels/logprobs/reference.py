"""Log-probabilities from whole logits in plain jax.numpy: what every faster implementation has to compute.

Shape letters: M rows, D width, V vocabulary, K candidate sets of a row, Z candidate sets of the table, Y tokens of a
set.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

FLOOR = 1e-10  # of the summed probability of a candidate set (MER-R1); an empty or absent set has exactly this


def logits(h: jax.Array, unembedding: jax.Array, *, vocab_first: bool) -> jax.Array:
    """float32 logits [..., V] of hidden states h [..., D]; the unembedding is [D, V], or [V, D] with vocab_first."""
    kernel_DV = unembedding.T if vocab_first else unembedding
    return jnp.einsum("...D,DV->...V", h, kernel_DV, preferred_element_type=jnp.float32)


def token_scores(logits_MV: jax.Array, token_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of one token and entropy of each row's softmax, float32 [M] in nats."""
    lse_M = jax.nn.logsumexp(logits_MV, axis=-1)
    logprob_M = jnp.take_along_axis(logits_MV, token_M[:, None], axis=-1)[:, 0] - lse_M
    return logprob_M, lse_M - jnp.sum(jnp.exp(logits_MV - lse_M[:, None]) * logits_MV, axis=-1)


def set_scores(logits_MV: jax.Array, set_MK: jax.Array, candidate_ids_ZY: jax.Array) -> jax.Array:
    """log of the probability that the next token is one of a set's, float32 [M, K], never below log(FLOOR).

    Args:
        logits_MV: untempered or not, as the caller wants the probability.
        set_MK: int32 rows of the table, negative for no set.
        candidate_ids_ZY: int32 token ids of each set, -1 where a set has fewer.
    """
    id_MKY = candidate_ids_ZY[jnp.maximum(set_MK, 0)]
    held_MKY = (id_MKY >= 0) & (set_MK >= 0)[..., None]
    flat_MF = jnp.maximum(id_MKY, 0).reshape(id_MKY.shape[0], -1)
    logit_MKY = jnp.take_along_axis(logits_MV, flat_MF, axis=-1).reshape(id_MKY.shape)
    logprob_MKY = logit_MKY - jax.nn.logsumexp(logits_MV, axis=-1)[:, None, None]
    total_MK = jnp.sum(jnp.where(held_MKY, jnp.exp(logprob_MKY), 0.0), axis=-1)
    return jnp.log(jnp.maximum(total_MK, FLOOR))
