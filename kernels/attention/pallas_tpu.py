"""Attention for TPUs: scores live in vector memory only, forward and backward walk a list of the visible tiles.

The kernels themselves are in `pallas_forward` and `pallas_backward`; here they get whole blocks and a gradient.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mer_r1_jax.kernels.attention.pallas_backward import backward
from mer_r1_jax.kernels.attention.pallas_forward import forward
from mer_r1_jax.kernels.attention.reference import INPUTS, RESIDUALS
from mer_r1_jax.kernels.attention.schedule import EMPTY, MAX_KEY_BLOCKS, MAX_QUERY_BLOCKS, schedule, state_of
from mer_r1_jax.kernels.attention.tile import LANES, PADDING_KEY, PADDING_QUERY, Options

MIB = 2**20

# Tokens of a tile's side, keys of the pieces of a forward and a backward tile, most keys of one backward call, and the
# vector memory to be used, by the least vector memory of a core. Measured: see README.md.
_SIZES = {
    128: dict(side=1024, forward_piece=512, backward_piece=512, span=32768, vmem_bytes=96 * MIB),
    64: dict(side=1024, forward_piece=512, backward_piece=512, span=16384, vmem_bytes=48 * MIB),
    16: dict(side=512, forward_piece=512, backward_piece=512, span=4096, vmem_bytes=14 * MIB),
}


def attention(
    query_BTHh,
    key_BSKh,
    value_BSKh,
    query_segment_BT,
    key_segment_BS,
    *,
    causal: bool,
    shared_segment: int | None,
    scale: float,
    vmem_mib: int,
    interpret: bool,
    side: int | None = None,
) -> jax.Array:
    """Attention as the reference defines it, except that what sees nothing is 0.

    Args:
        query_BTHh, key_BSKh, value_BSKh, query_segment_BT, key_segment_BS, causal, shared_segment, scale: as in `api`.
        vmem_mib: vector memory of a core.
        interpret: run operation by operation, on any platform.
        side: tokens of a tile's side, a multiple of 128; None takes what was measured to be best.

    Returns:
        out_BTHh.
    """
    options = _sizes(vmem_mib)
    side = side or options["side"]
    del options["side"]
    T, S = query_BTHh.shape[1], key_BSKh.shape[1]
    query_block, key_block = _block(T, side), _block(S, side)
    span = options["span"] = options["span"] // key_block * key_block
    options = Options(
        scale=scale,
        causal=causal,
        shared_segment=shared_segment,
        query_block=query_block,
        key_block=key_block,
        interpret=interpret,
        **options,
    )
    if T > MAX_QUERY_BLOCKS * query_block or S > MAX_KEY_BLOCKS * key_block:
        raise ValueError(f"attention of {T} queries to {S} keys: too long for a list of tiles of {side} tokens")
    query_segment_BT, key_segment_BS = _padded(query_segment_BT, query_block), _padded(key_segment_BS, key_block)
    find = functools.partial(schedule, causal=causal, shared_segment=shared_segment)
    tile_BP = find(query_segment_BT, key_segment_BS, query_block, key_block)
    # The backward pass takes keys span by span, each with a list of its own that counts from its first key.
    whole = key_segment_BS.shape[1]
    span_tiles = (tile_BP,)
    if whole > span:
        span_tiles = tuple(
            find(query_segment_BT, key_segment_BS[:, begin : begin + span], query_block, key_block, key_offset=begin)
            for begin in range(0, whole, span)
        )
    # Heads go before tokens, so that a block's last two axes are tokens and h and fill whole tiles in HBM.
    blocks = ((query_BTHh, query_block), (key_BSKh, key_block), (value_BSKh, key_block))
    query, key, value = (checkpoint_name(_padded(x, block).swapaxes(1, 2), INPUTS) for x, block in blocks)
    out_BHTh = _attention(
        query,
        key,
        value,
        jnp.where(query_segment_BT == 0, PADDING_QUERY, query_segment_BT),
        jnp.where(key_segment_BS == 0, PADDING_KEY, key_segment_BS),
        tile_BP,
        span_tiles,
        options,
    )
    assert isinstance(out_BHTh, jax.Array)  # type checkers do not see through custom_vjp
    return out_BHTh.swapaxes(1, 2)[:, :T]


def visited_share(segment_T, *, shared_segment: int | None, vmem_mib: int) -> float:
    """Share of a causal row's listed tiles that are visited; what the kernels state as their operations counts all.

    Args:
        segment_T: int32 segments of the row, 0 for padding.
        shared_segment, vmem_mib: as in `attention`.
    """
    block = _block(len(segment_T), _sizes(vmem_mib)["side"])
    segment_1T = _padded(jnp.asarray(segment_T, jnp.int32)[None], block)
    tile_1P = schedule(segment_1T, segment_1T, block, block, causal=True, shared_segment=shared_segment)
    return float(jnp.mean(state_of(tile_1P) != EMPTY))


def _sizes(vmem_mib: int) -> dict[str, int]:
    # Sizes stand in falling order of VMEM: the first entry that the core can hold is the largest.
    return dict(next(sizes for least, sizes in _SIZES.items() if vmem_mib >= least))


def _block(length: int, side: int) -> int:
    """The block that covers `length` tokens with the fewest blocks of at most `side` and then the least padding."""
    blocks = -(-length // side)
    return -(-length // (blocks * LANES)) * LANES


def _padded(x, block: int):
    """x[B, T, ...] with zeros up to a whole number of blocks."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))


@functools.partial(jax.custom_vjp, nondiff_argnames=("options",))
def _attention(q, k, v, query_segment, key_segment, tile, span_tiles, options: Options):
    return forward(q, k, v, query_segment, key_segment, tile, options, keep=False)[0]


def _attention_forward(q, k, v, query_segment, key_segment, tile, span_tiles, options: Options):
    out, lse = forward(q, k, v, query_segment, key_segment, tile, options, keep=True)
    # Named, so that a remat policy can keep them: a layer computed again then need not run the kernel again.
    out, lse = checkpoint_name(out, RESIDUALS), checkpoint_name(lse, RESIDUALS)
    # Residuals are as the kernels take them: q and out [B, H, T, h], k and v [B, K, S, h], lse [B, H, 1, T].
    return out, (q, k, v, query_segment, key_segment, span_tiles, out, lse)


def _attention_backward(options: Options, residuals, do):
    q, k, v, query_segment, key_segment, span_tiles, out, lse = residuals
    # Once a query, float32 [B, H, 1, T]: the kernel would have to fetch `out` for every tile to do the same.
    di = (out.astype(jnp.float32) * do.astype(jnp.float32)).sum(axis=-1)[:, :, None]
    parts = [
        backward(
            q,
            k[:, :, begin : begin + options.span],
            v[:, :, begin : begin + options.span],
            query_segment,
            key_segment[:, begin : begin + options.span],
            tile,
            lse,
            di,
            do,
            options,
            key_offset=begin,
            dq_dtype=q.dtype if len(span_tiles) == 1 else jnp.float32,
        )
        for begin, tile in zip(range(0, k.shape[2], options.span), span_tiles, strict=True)
    ]
    dq = jnp.asarray(sum(part[0] for part in parts)).astype(q.dtype)
    dk, dv = (jnp.concatenate([part[n] for part in parts], axis=2) for n in (1, 2))
    # Segments and lists of tiles are integers: JAX puts zeros of float0 where it is given None.
    return dq, dk, dv, None, None, None, None


_attention.defvjp(_attention_forward, _attention_backward)
