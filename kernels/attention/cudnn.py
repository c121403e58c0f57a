"""Fused attention on NVIDIA GPUs: cuDNN's, through jax.nn.dot_product_attention, whose gradient it has as well.

Scores of plain XLA are float32 arrays of all queries and keys, written and read several times; cuDNN keeps them on the
chip. Masks become a bias in the queries' dtype, [B, 1, T, S]: the one large array that is left. A query that sees
nothing gets a finite value without meaning, as in `reference`. The tests compile it for an H100 and hold it against
`reference` through the same calls of jax.nn without cuDNN; those of tests/gpu hold cuDNN's own against it, on a card.

Shape letters are those of `reference`.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mer_r1_jax.kernels.placement import Placement, device

How = Literal["xla", "cudnn"]  # of jax.nn

_WIDEST_HEAD = 128
_MULTIPLE = 8  # of head widths and of numbers of tokens
_AMPERE = 8.0  # compute capability from which cuDNN has fused attention


def applies(query: jax.Array, tokens: tuple[int, ...], placement: Placement | None) -> bool:
    """Whether a call can be cuDNN's: on a GPU of 2020 or later, in 16 bits, at sizes that its kernels have.

    Args:
        query: [..., h].
        tokens: numbers of queries and of keys.
        placement: where the call runs.
    """
    card, width = device(placement), query.shape[-1]
    return (
        card.platform == "gpu"
        and _capability(card) >= _AMPERE
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and width <= _WIDEST_HEAD
        and not any(size % _MULTIPLE for size in (width, *tokens))
        and is_there()
    )


def _capability(card: Any) -> float:
    """CUDA's compute capability; 0 for a card of another maker."""
    try:
        return float(getattr(card, "compute_capability", 0))
    except ValueError:
        return 0.0


@functools.cache
def is_there() -> bool:
    """Whether jax finds cuDNN. Programs may be compiled for a GPU on a machine that has none, and not the library."""
    one = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(lambda x: jax.nn.dot_product_attention(x, x, x, implementation="cudnn"), one)
    except RuntimeError:
        return False
    return True


def attention(query_BTHh, key_BSKh, value_BSKh, mask_BTS, *, scale: float, implementation: How = "cudnn") -> jax.Array:
    """As `reference.attention`; `implementation` is jax.nn's, "xla" for the same call on other platforms."""
    return jax.nn.dot_product_attention(
        query_BTHh, key_BSKh, value_BSKh, mask=mask_BTS[:, None], scale=scale, implementation=implementation
    )


def shared_prompt_attention(
    query_BGCHh,
    prompt_key_BTKh,
    prompt_value_BTKh,
    prompt_mask_BT,
    own_key_BGSKh,
    own_value_BGSKh,
    own_mask_BGCS,
    *,
    scale: float,
    implementation: How = "cudnn",
) -> jax.Array:
    """As `reference.shared_prompt_attention`: each completion is a row, behind a copy of the prompt's keys and values.

    The copies are small where few key heads serve many queries (3B: 1 MiB a completion and layer for 2048 tokens), and
    one softmax over both needs no second pass that puts two results together.
    """
    B, G, C, H, h = query_BGCHh.shape

    def joined(prompt_BTKh, own_BGSKh):
        copies_BGTKh = jnp.broadcast_to(prompt_BTKh[:, None], (B, G, *prompt_BTKh.shape[1:]))
        both = jnp.concatenate([copies_BGTKh, own_BGSKh], axis=2)
        return both.reshape(B * G, *both.shape[2:])

    prompt_mask_BGCT = jnp.broadcast_to(prompt_mask_BT[:, None, None], (B, G, C, prompt_mask_BT.shape[1]))
    mask_BGCS = jnp.concatenate([prompt_mask_BGCT, own_mask_BGCS], axis=-1)
    out = attention(
        query_BGCHh.reshape(B * G, C, H, h),
        joined(prompt_key_BTKh, own_key_BGSKh),
        joined(prompt_value_BTKh, own_value_BGSKh),
        mask_BGCS.reshape(B * G, C, -1),
        scale=scale,
        implementation=implementation,
    )
    return out.reshape(B, G, C, H, h)
