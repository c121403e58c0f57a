"""Decode attention as the decoder calls it: arguments are checked here and an implementation is chosen."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mer_r1_jax.kernels.attention.api import choose
from mer_r1_jax.kernels.decode_attention import reference
from mer_r1_jax.kernels.placement import Placement, device, on_each_device


def decode_attention(
    query_BGHh: jax.Array,
    prompt_key_LBKTh: jax.Array,
    prompt_value_LBKTh: jax.Array,
    prompt_mask_BT: jax.Array,
    own_key_LBGKCh: jax.Array,
    own_value_LBGKCh: jax.Array,
    own_length_BG: jax.Array,
    layer: jax.Array | int,
    *,
    seen: tuple[jax.Array, ...] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    placement: Placement | None = None,
) -> jax.Array:
    """Attention of one token of G completions a row to the prompt they share and each to its own tokens.

    No gradient: decoding has none.

    Args:
        query_BGHh: queries of the token, G completions a row.
        prompt_key_LBKTh, prompt_value_LBKTh: keys and values of the rows' prompts, all L layers. Heads come before
            tokens, so that a head's tokens are neighbours in memory.
        prompt_mask_BT: bool, False for padding, which may be on either side.
        own_key_LBGKCh, own_value_LBGKCh: the completions' own tokens, C slots each, this token's already written.
        own_length_BG: int32, slots a completion sees, the first ones; completions of a row may differ.
        layer: the layer to read, traced or not.
        seen: of `seen_tokens`, so that a loop over layers does not find it again in each; None finds it here.
        scale: factor on the scores; None means h ** -0.5.
        implementation: one of `attention.api.IMPLEMENTATIONS`; None chooses "pallas" on TPUs, else "xla".
        placement: the mesh and the axes that cut rows and heads; None means one device.

    Returns:
        out_BGHh in the dtype of the queries; 0 for a completion that sees nothing.

    Raises:
        ValueError: shapes that do not belong together, an unknown implementation, or rows or key heads that the
            placement does not divide.
    """
    arrays = dict(
        prompt_key=prompt_key_LBKTh,
        prompt_value=prompt_value_LBKTh,
        prompt_mask=prompt_mask_BT,
        own_key=own_key_LBGKCh,
        own_value=own_value_LBGKCh,
        own_length=own_length_BG,
    )
    _check(query_BGHh, arrays, placement)
    scale = query_BGHh.shape[-1] ** -0.5 if scale is None else scale
    layer = jnp.asarray(layer, jnp.int32)
    if seen is None:
        seen = seen_tokens(
            prompt_mask_BT, own_length_BG, own_key_LBGKCh, implementation=implementation, placement=placement
        )
    if choose(implementation, placement) == "pallas":
        from mer_r1_jax.kernels.decode_attention import pallas_tpu  # slow to load, see attention.api

        call = functools.partial(
            pallas_tpu.decode_attention, scale=scale, interpret=device(placement).platform != "tpu"
        )
        letters = ("BGHh", "LBKTh", "LBKTh", "B2", "B1T", "LBGKCh", "LBGKCh", "BG", "")
        call = on_each_device(call, placement, letters, "BGHh")
        chunks_B2, mask_B1T, own_length_BG = seen
        return call(
            query_BGHh,
            prompt_key_LBKTh,
            prompt_value_LBKTh,
            chunks_B2,
            mask_B1T,
            own_key_LBGKCh,
            own_value_LBGKCh,
            own_length_BG,
            layer,
        )
    return reference.decode_attention(query_BGHh, *arrays.values(), layer, scale=scale)


def seen_tokens(
    prompt_mask_BT: jax.Array,
    own_length_BG: jax.Array,
    own_key_LBGKCh: jax.Array | jax.ShapeDtypeStruct,
    *,
    implementation: str | None = None,
    placement: Placement | None = None,
) -> tuple[jax.Array, ...]:
    """What `decode_attention` works out of masks and lengths, the same in every layer of a token.

    Args:
        prompt_mask_BT, own_length_BG, implementation, placement: as of `decode_attention`.
        own_key_LBGKCh: its shape and dtype count.

    Returns:
        Arrays for its argument `seen`; none where the implementation reads masks as they are.
    """
    if choose(implementation, placement) != "pallas":
        return ()
    from mer_r1_jax.kernels.decode_attention import pallas_tpu  # slow to load, see attention.api

    K, C, h = own_key_LBGKCh.shape[3:]
    heads = K // (placement.cut_heads if placement else 1)
    return pallas_tpu.seen_tokens(prompt_mask_BT, own_length_BG, C, heads, h, own_key_LBGKCh.dtype.itemsize)


def _check(query, arrays: dict[str, jax.Array], placement: Placement | None) -> None:
    B, G, H, h = query.shape
    L, _, K, T = arrays["prompt_key"].shape[:4]
    C = arrays["own_key"].shape[4]
    expected = dict(
        prompt_key=(L, B, K, T, h),
        prompt_value=(L, B, K, T, h),
        prompt_mask=(B, T),
        own_key=(L, B, G, K, C, h),
        own_value=(L, B, G, K, C, h),
        own_length=(B, G),
    )
    wrong = [f"{name} {arrays[name].shape}, expected {s}" for name, s in expected.items() if arrays[name].shape != s]
    if H % K:
        wrong.append(f"{H} query heads, expected a multiple of the {K} key heads")
    if placement is not None and B % placement.cut_rows:
        wrong.append(f"{B} rows, expected a multiple of the {placement.cut_rows} devices of mesh axes {placement.rows}")
    if placement is not None and K % placement.cut_heads:
        axes = placement.heads
        wrong.append(f"{K} key heads, expected a multiple of the {placement.cut_heads} devices of mesh axes {axes}")
    if wrong:
        raise ValueError(f"decode attention with queries {query.shape}: " + "; ".join(wrong))
