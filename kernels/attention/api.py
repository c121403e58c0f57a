"""Attention as the model calls it: arguments are checked here and an implementation is chosen.

Masks are described by segments and not by matrices, so that an implementation may skip blocks nobody looks at.
"""

from __future__ import annotations

import functools
import math

import jax
from jax.ad_checkpoint import checkpoint_name

from mer_r1_jax.kernels.attention import cudnn, reference
from mer_r1_jax.kernels.placement import Placement, device, on_each_device, vmem_mib

IMPLEMENTATIONS = ("xla", "pallas", "cudnn")

# Below this many scores a head the kernel's fixed cost per tile exceeds what it saves; README.md has the figures.
_FEWEST_SCORES = 256 * 256


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
    placement: Placement | None = None,
) -> jax.Array:
    """Grouped-query attention within segments.

    A query attends to the keys of its own segment and to those of `shared_segment`, with `causal` only to keys that are
    not later; segment 0 is padding: nothing attends to it and its own result has no meaning (it is finite; "pallas"
    gives 0, and no gradient, for every query that sees nothing).

    Args:
        query_BTHh, key_BSKh, value_BSKh: queries, keys and values; H has to be a multiple of K.
        query_segment_BT, key_segment_BS: int32 segments, 0 or more.
        causal: queries and keys are the same tokens (T = S) and see no later ones.
        shared_segment: segment seen from every other, or None.
        scale: factor on the scores; None means h ** -0.5.
        implementation: one of IMPLEMENTATIONS; None chooses, from 256 x 256 scores on: "pallas" on TPUs, "cudnn" on
            GPUs where it applies (`cudnn.applies`); else "xla". "pallas" is interpreted, slowly, on other platforms.
        placement: the mesh and the axes that cut rows and heads; None means one device. "xla" leaves the cut to the
            compiler.

    Returns:
        out_BTHh in the dtype of the queries.

    Raises:
        ValueError: shapes or dtypes that do not belong together, an unknown implementation, or rows or heads that the
            placement does not divide.
    """
    _check(query_BTHh, key_BSKh, value_BSKh, query_segment_BT, key_segment_BS, causal, placement)
    scale = query_BTHh.shape[-1] ** -0.5 if scale is None else scale
    # Scores of one head: the number of rows and heads multiplies the cost of both implementations alike.
    tokens = query_BTHh.shape[1], key_BSKh.shape[1]
    worthwhile = math.prod(tokens) >= _FEWEST_SCORES
    if implementation is None and worthwhile and cudnn.applies(query_BTHh, tokens, placement):
        implementation = "cudnn"
    chosen = choose(implementation, placement, worthwhile=worthwhile)
    if chosen == "pallas":
        # Imported where it is used: Pallas takes its time to load, and most processes never run a kernel.
        from mer_r1_jax.kernels.attention import pallas_tpu

        call = functools.partial(
            pallas_tpu.attention,
            causal=causal,
            shared_segment=shared_segment,
            scale=scale,
            vmem_mib=vmem_mib(placement),
            interpret=device(placement).platform != "tpu",
        )
        call = on_each_device(call, placement, ("BTHh", "BSKh", "BSKh", "BT", "BS"), "BTHh")
        return call(query_BTHh, key_BSKh, value_BSKh, query_segment_BT, key_segment_BS)
    mask_BTS = reference.segment_mask(query_segment_BT, key_segment_BS, causal=causal, shared_segment=shared_segment)
    if chosen == "cudnn":
        # Left to cut the call, the compiler asks for the same cut of all arguments, and refuses the gradient's.
        fused = functools.partial(cudnn.attention, scale=scale)
        fused = on_each_device(fused, placement, ("BTHh", "BSKh", "BSKh", "BTS"), "BTHh")
        out_BTHh = fused(query_BTHh, key_BSKh, value_BSKh, mask_BTS)
    else:
        out_BTHh = reference.attention(query_BTHh, key_BSKh, value_BSKh, mask_BTS, scale=scale)
    return checkpoint_name(out_BTHh, reference.RESIDUALS)


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
    placement: Placement | None = None,
) -> jax.Array:
    """Attention of G completions to the one prompt they share and each to its own tokens; see the reference.

    For several tokens of every completion at once, on GPUs by cuDNN where it applies. While a completion grows token by
    token, `kernels.decode_attention` computes the same straight from the stacked caches.
    """
    scale = query_BGCHh.shape[-1] ** -0.5 if scale is None else scale
    arguments = (
        query_BGCHh,
        prompt_key_BTKh,
        prompt_value_BTKh,
        prompt_mask_BT,
        own_key_BGSKh,
        own_value_BGSKh,
        own_mask_BGCS,
    )
    tokens = query_BGCHh.shape[2], prompt_key_BTKh.shape[1] + own_key_BGSKh.shape[2]
    if math.prod(tokens) >= _FEWEST_SCORES and cudnn.applies(query_BGCHh, tokens, placement):
        fused = functools.partial(cudnn.shared_prompt_attention, scale=scale)
        letters = ("BGCHh", "BTKh", "BTKh", "BT", "BGSKh", "BGSKh", "BGCS")
        return on_each_device(fused, placement, letters, "BGCHh")(*arguments)
    return reference.shared_prompt_attention(*arguments, scale=scale)


def choose(implementation: str | None, placement: Placement | None, *, worthwhile: bool = True) -> str:
    """The implementation to use, "cudnn" only where it is asked for by name: sizes and dtypes decide about it too.

    Args:
        implementation: what the caller asks for, or None.
        placement: where the call runs.
        worthwhile: whether the kernel pays for these shapes.
    """
    if implementation is None:
        return "pallas" if worthwhile and device(placement).platform == "tpu" else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    return implementation


def _check(query, key, value, query_segment, key_segment, causal: bool, placement: Placement | None) -> None:
    B, T, H, h = query.shape
    S, K = key.shape[1:3]
    expected = {
        "key": (key.shape, (B, S, K, h)),
        "value": (value.shape, (B, S, K, h)),
        "query_segment": (query_segment.shape, (B, T)),
        "key_segment": (key_segment.shape, (B, S)),
        "key dtype": (key.dtype, query.dtype),
        "value dtype": (value.dtype, query.dtype),
    }
    wrong = [f"{name} {got}, expected {want}" for name, (got, want) in expected.items() if got != want]
    if H % K:
        wrong.append(f"{H} query heads, expected a multiple of the {K} key heads")
    if causal and T != S:
        wrong.append(f"causal attention of {T} queries to {S} keys, expected equal numbers")
    # shard_map cuts into equal parts. Key heads count, not query heads: those that share a key head stay with it.
    if placement is not None and B % placement.cut_rows:
        wrong.append(f"{B} rows, expected a multiple of the {placement.cut_rows} devices of mesh axes {placement.rows}")
    if placement is not None and K % placement.cut_heads:
        axes = placement.heads
        wrong.append(f"{K} key heads, expected a multiple of the {placement.cut_heads} devices of mesh axes {axes}")
    if wrong:
        raise ValueError(f"attention with queries {query.shape}: " + "; ".join(wrong))
