"""Attention in plain jax.numpy: what every faster implementation has to compute.

Shape letters: B rows, T query tokens, S key tokens, H query heads, K key heads, Q = H / K query heads of one key head,
h head width, G completions of a row, C tokens of a completion.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Finite, so that a row that may attend to nothing gives the mean of its values instead of NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

# Name under which the result (and, of kernels, the softmax's normaliser) can be kept by a remat policy.
RESIDUALS = "attention"
# And that of a kernel's queries, keys and values as it takes them: rotated, a head's tokens together.
INPUTS = "attention_inputs"


def segment_mask(query_segment_BT, key_segment_BS, *, causal: bool, shared_segment: int | None) -> jax.Array:
    """Which query may attend to which key.

    Args:
        query_segment_BT: int32; 0 marks padding, which attends to nothing.
        key_segment_BS: int32; 0 marks padding, which nothing attends to.
        causal: a query does not see later keys (queries and keys are then the same tokens).
        shared_segment: keys of this segment are seen from every segment; None if there is none.

    Returns:
        bool mask_BTS.
    """
    query_BT1, key_B1S = query_segment_BT[:, :, None], key_segment_BS[:, None, :]
    seen_BTS = query_BT1 == key_B1S
    if shared_segment is not None:
        seen_BTS |= key_B1S == shared_segment
    seen_BTS &= (key_B1S != 0) & (query_BT1 != 0)
    if causal:
        T, S = query_segment_BT.shape[1], key_segment_BS.shape[1]
        seen_BTS &= (jnp.arange(T)[:, None] >= jnp.arange(S))[None]
    return seen_BTS


def attention(query_BTHh, key_BSKh, value_BSKh, mask_BTS, *, scale: float) -> jax.Array:
    """Grouped-query attention with a float32 softmax.

    Args:
        query_BTHh, key_BSKh, value_BSKh: queries, keys, values; H is a multiple of K.
        mask_BTS: bool, who may attend to whom; None for everybody.
        scale: factor on the scores.

    Returns:
        out_BTHh in the dtype of the queries. Rows that may attend to nothing hold a finite value without meaning.
    """
    B, T, H, h = query_BTHh.shape
    K = key_BSKh.shape[2]
    query_BTKQh = query_BTHh.reshape(B, T, K, H // K, h)
    score_BKQTS = jnp.einsum("BTKQh,BSKh->BKQTS", query_BTKQh, key_BSKh, preferred_element_type=jnp.float32) * scale
    if mask_BTS is not None:
        score_BKQTS = jnp.where(mask_BTS[:, None, None], score_BKQTS, MASKED)
    weight_BKQTS = jax.nn.softmax(score_BKQTS, axis=-1).astype(value_BSKh.dtype)
    out_BTKQh = jnp.einsum("BKQTS,BSKh->BTKQh", weight_BKQTS, value_BSKh)
    return out_BTKQh.reshape(B, T, H, h)


def shared_prompt_attention(
    query_BGCHh,
    prompt_key_BTKh,
    prompt_value_BTKh,
    prompt_mask_BT,
    own_key_BGSKh,
    own_value_BGSKh,
    own_mask_BGCS,
    *,
    scale,
) -> jax.Array:
    """Attention of a row's completions to their one shared prompt and to their own tokens, in one exact softmax.

    The prompt's keys and values are read once for all completions of the row instead of once for each.

    Args:
        query_BGCHh: queries of C tokens of each completion.
        prompt_key_BTKh, prompt_value_BTKh: the row's prompt. prompt_mask_BT: bool, False for padding.
        own_key_BGSKh, own_value_BGSKh: each completion's own tokens.
        own_mask_BGCS: bool, which own token a query sees.
        scale: factor on the scores.

    Returns:
        out_BGCHh in the dtype of the queries.
    """
    B, G, C, H, h = query_BGCHh.shape
    K = prompt_key_BTKh.shape[2]
    query_BGCKQh = query_BGCHh.reshape(B, G, C, K, H // K, h)
    prompt_BKGQCT = jnp.einsum("BGCKQh,BTKh->BKGQCT", query_BGCKQh, prompt_key_BTKh, preferred_element_type=jnp.float32)
    own_BKGQCS = jnp.einsum("BGCKQh,BGSKh->BKGQCS", query_BGCKQh, own_key_BGSKh, preferred_element_type=jnp.float32)
    prompt_BKGQCT = jnp.where(prompt_mask_BT[:, None, None, None, None], prompt_BKGQCT * scale, MASKED)
    own_BKGQCS = jnp.where(own_mask_BGCS[:, None, :, None], own_BKGQCS * scale, MASKED)
    # One softmax in two parts: put side by side, the scores would be copied there and back.
    top = jnp.maximum(prompt_BKGQCT.max(axis=-1, keepdims=True), own_BKGQCS.max(axis=-1, keepdims=True))
    # The maximum cancels between weights and total, so no gradient has to flow through it.
    top = jax.lax.stop_gradient(top)
    prompt_BKGQCT, own_BKGQCS = jnp.exp(prompt_BKGQCT - top), jnp.exp(own_BKGQCS - top)
    total_BKGQC = prompt_BKGQCT.sum(axis=-1) + own_BKGQCS.sum(axis=-1)
    out_BGCKQh = jnp.einsum("BKGQCT,BTKh->BGCKQh", prompt_BKGQCT.astype(query_BGCHh.dtype), prompt_value_BTKh)
    out_BGCKQh += jnp.einsum("BKGQCS,BGSKh->BGCKQh", own_BKGQCS.astype(query_BGCHh.dtype), own_value_BGSKh)
    out_BGCKQh /= jnp.transpose(total_BKGQC, (0, 2, 4, 1, 3))[..., None]
    out_BGCKQh = out_BGCKQh.astype(query_BGCHh.dtype)
    return out_BGCKQh.reshape(B, G, C, H, h)
