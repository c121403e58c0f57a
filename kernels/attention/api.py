"""Attention as the model calls it: arguments are checked here and an implementation is chosen.

Masks are described by segments and not by matrices, so that an implementation may skip blocks nobody looks at.
"""

from __future__ import annotations

import jax
from mer_r1_jax.kernels.attention import reference

IMPLEMENTATIONS = ("xla",)


def attention(
    query_BTHh: jax.Array,
    key_BSKh: jax.Array,
    value_BSKh: jax.Array,
    query_segment_BT: jax.Array,
    key_segment_BS: jax.Array,
    *,
    causal: bool = False,
    shared_segment: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Grouped-query attention within segments.

    A query attends to the keys of its own segment and to those of `shared_segment`, with `causal` only to keys that are
    not later; segment 0 is padding: nothing attends to it and its own result has no meaning (it is finite).

    Args:
        query_BTHh, key_BSKh, value_BSKh: queries, keys and values; H has to be a multiple of K.
        query_segment_BT, key_segment_BS: int32 segments.
        causal: queries and keys are the same tokens (T = S) and see no later ones.
        shared_segment: segment seen from every other, or None.
        scale: factor on the scores; None means h ** -0.5.
        implementation: one of IMPLEMENTATIONS; None chooses.

    Returns:
        out_BTHh in the dtype of the queries.

    Raises:
        ValueError: shapes that do not belong together, or an unknown implementation.
    """
    _check(query_BTHh, key_BSKh, value_BSKh, query_segment_BT, key_segment_BS, causal)
    _choose(implementation)
    mask_BTS = reference.segment_mask(query_segment_BT, key_segment_BS, causal=causal, shared_segment=shared_segment)
    scale = query_BTHh.shape[-1] ** -0.5 if scale is None else scale
    return reference.attention(query_BTHh, key_BSKh, value_BSKh, mask_BTS, scale=scale)


def shared_prompt_attention(
    query_BGCHh: jax.Array,
    prompt_key_BTKh: jax.Array,
    prompt_value_BTKh: jax.Array,
    prompt_mask_BT: jax.Array,
    own_key_BGSKh: jax.Array,
    own_value_BGSKh: jax.Array,
    own_mask_BGCS: jax.Array,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of G completions to the one prompt they share and each to its own tokens; see the reference."""
    _choose(implementation)
    scale = query_BGCHh.shape[-1] ** -0.5 if scale is None else scale
    return reference.shared_prompt_attention(
        query_BGCHh,
        prompt_key_BTKh,
        prompt_value_BTKh,
        prompt_mask_BT,
        own_key_BGSKh,
        own_value_BGSKh,
        own_mask_BGCS,
        scale=scale,
    )


def _choose(implementation: str | None) -> str:
    if implementation is None:
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    return implementation


def _check(query, key, value, query_segment, key_segment, causal: bool) -> None:
    B, T, H, h = query.shape
    S, K = key.shape[1:3]
    expected = {
        "key": (key.shape, (B, S, K, h)),
        "value": (value.shape, (B, S, K, h)),
        "query_segment": (query_segment.shape, (B, T)),
        "key_segment": (key_segment.shape, (B, S)),
    }
    wrong = [f"{name} {got}, expected {want}" for name, (got, want) in expected.items() if got != want]
    if H % K:
        wrong.append(f"{H} query heads, expected a multiple of the {K} key heads")
    if causal and T != S:
        wrong.append(f"causal attention of {T} queries to {S} keys, expected equal numbers")
    if wrong:
        raise ValueError(f"attention with queries {query.shape}: " + "; ".join(wrong))
