"""Decode attention in plain jax.numpy: what every faster implementation has to compute.

Shape letters: L layers, B rows, G completions of a row, T prompt tokens, C slots of a completion's own tokens, H query
heads, K key heads, Q = H / K query heads of one key head, h head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mer_r1_jax.kernels.attention.reference import shared_prompt_attention


def decode_attention(
    query_BGHh,
    prompt_key_LBKTh,
    prompt_value_LBKTh,
    prompt_mask_BT,
    own_key_LBGKCh,
    own_value_LBGKCh,
    own_length_BG,
    layer,
    *,
    scale: float,
) -> jax.Array:
    """Attention of one token of every completion to its row's prompt and to its own tokens, in one exact softmax.

    Args:
        query_BGHh: queries of the token.
        prompt_key_LBKTh, prompt_value_LBKTh: the prompts of every layer, shared by the G completions of a row.
        prompt_mask_BT: bool, False for padding.
        own_key_LBGKCh, own_value_LBGKCh: the completions' own tokens of every layer, this token's included.
        own_length_BG: int32, how many of its C slots a completion sees; they are the first ones.
        layer: int32 scalar, the layer to read.
        scale: factor on the scores.

    Returns:
        out_BGHh in the dtype of the queries; 0 for a completion that sees nothing.
    """
    prompt_key_BTKh, prompt_value_BTKh, own_key_BGCKh, own_value_BGCKh = (
        jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False).swapaxes(-2, -3).astype(query_BGHh.dtype)
        for cache in (prompt_key_LBKTh, prompt_value_LBKTh, own_key_LBGKCh, own_value_LBGKCh)
    )
    own_mask_BGC = jnp.arange(own_key_BGCKh.shape[2]) < own_length_BG[..., None]
    out_BGCHh = shared_prompt_attention(
        query_BGHh[:, :, None],
        prompt_key_BTKh,
        prompt_value_BTKh,
        prompt_mask_BT,
        own_key_BGCKh,
        own_value_BGCKh,
        own_mask_BGC[:, :, None],
        scale=scale,
    )
    # With everything masked alike, softmax gives the mean of the values; the contract says 0.
    alone_BG = ~prompt_mask_BT.any(axis=1, keepdims=True) & (own_length_BG <= 0)
    return jnp.where(alone_BG[..., None, None], 0, out_BGCHh[:, :, 0])
