"""The forward kernel of attention for TPUs: one tile of scores at a time, softmax carried from tile to tile.

Letters besides the reference's, here for the tokens of one tile: t queries, s keys, l lanes that hold the same value.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mer_r1_jax.kernels.attention import schedule as tiles
from mer_r1_jax.kernels.attention.tile import (
    FLOOR,
    LANES,
    MASKED,
    PADDING_QUERY,
    ROWS_BY_COLUMNS,
    ROWS_BY_ROWS,
    Options,
    pieces,
    turned,
    visible,
)


def _kernel(
    tile_ref,
    q_ref,
    k_ref,
    v_ref,
    query_segment_ref,
    key_segment_ref,
    out_ref,
    lse_ref,
    max_ref,
    sum_ref,
    acc_ref,
    *,
    options: Options,
):
    # The grid is (row, query head, place in the row's list of tiles); all heads of a row share the list.
    tile = tile_ref[pl.program_id(0), pl.program_id(2)]
    width = acc_ref.shape[1]
    factor = options.scale * math.log2(math.e)  # powers of 2 are what the hardware has

    @pl.when(tiles.is_first(tile))
    def start():
        max_ref[...] = jnp.full_like(max_ref, FLOOR)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def visit(masked: bool):
        segment_tl = turned(query_segment_ref[0]) if masked else None
        for begin, size in pieces(options.key_block, options.forward_piece):
            keys, repeats = pl.ds(begin, size), size // LANES
            score_ts = jax.lax.dot_general(
                q_ref[0, 0], k_ref[0, 0, keys], ROWS_BY_ROWS, preferred_element_type=jnp.float32
            )
            # The scores are scaled and not the queries, which would be rounded to bfloat16 once more.
            score_ts *= factor
            if segment_tl is not None:
                seen_ts = visible(
                    jnp.tile(segment_tl, (1, repeats)),
                    key_segment_ref[0, :, keys],
                    tiles.query_block_of(tile) * options.query_block,
                    tiles.key_block_of(tile) * options.key_block + begin,
                    options,
                    query_axis=0,
                )
                score_ts = jnp.where(seen_ts, score_ts, MASKED)
            # Online softmax: what was summed under an older maximum shrinks by 2 ** (older - newer).
            before_tl = max_ref[...]
            after_tl = jnp.maximum(before_tl, score_ts.max(axis=1, keepdims=True))
            max_ref[...] = after_tl
            weight_ts = jnp.exp2(score_ts - jnp.tile(after_tl, (1, repeats)))
            shrink_tl = jnp.exp2(before_tl - after_tl)
            # Sums stay apart by lane until the query block is finished.
            sum_tl = sum(weight_ts[:, n * LANES : (n + 1) * LANES] for n in range(repeats))
            sum_ref[...] = sum_ref[...] * shrink_tl + sum_tl
            # Weights are rounded to the values' dtype for the matrix unit; the sum over all keys stays in float32.
            part_th = jax.lax.dot_general(
                weight_ts.astype(v_ref.dtype), v_ref[0, 0, keys], ROWS_BY_COLUMNS, preferred_element_type=jnp.float32
            )
            acc_ref[...] = acc_ref[...] * _widened(shrink_tl, width) + part_th

    @pl.when(tiles.state_of(tile) == tiles.FULL)
    def full():
        visit(masked=False)

    @pl.when(tiles.state_of(tile) == tiles.PARTIAL)
    def partial():
        visit(masked=True)

    @pl.when(tiles.is_last(tile))
    def finish():
        total_tl = jnp.broadcast_to(sum_ref[...].sum(axis=1, keepdims=True), sum_ref.shape)
        # Padding sees the shared segment in the tiles it happens to be in; its result is 0 all the same.
        alone_tl = (total_tl == 0.0) | (turned(query_segment_ref[0]) == PADDING_QUERY)
        total_tl = jnp.where(alone_tl, 1.0, total_tl)
        inverse_tl = jnp.where(alone_tl, 0.0, 1.0 / total_tl)
        out_ref[0, 0] = (acc_ref[...] * _widened(inverse_tl, width)).astype(out_ref.dtype)
        if lse_ref is not None:
            # The log-sum-exp leaves as a row [1, t]: as a column it would take 128 lanes a query in HBM.
            lse_tl = jnp.where(alone_tl, -FLOOR, max_ref[...] + jnp.log2(total_tl))
            lse_ref[0, 0] = lse_tl.T[:1]


def _widened(x_tl, width: int):
    """x, equal in all lanes, as wide as a head."""
    return jnp.tile(x_tl, (1, -(-width // LANES)))[:, :width]


def forward(q, k, v, query_segment, key_segment, tile, options: Options, *, keep: bool):
    """Attention of whole blocks.

    Args:
        q_BHTh, k_BKSh, v_BKSh: bfloat16 or float32.
        query_segment_BT, key_segment_BS: int32, padding marked by PADDING_QUERY and PADDING_KEY.
        tile_BP: of `schedule`.
        options: of the call.
        keep: whether to return what the backward pass needs.

    Returns:
        (out_BHTh, lse_BH1T): the latter float32, the logarithm to base 2 of the sum of a query's weights, or None.
        Padding and queries that see nothing have an out of 0 and an lse of -FLOOR, with which every weight of theirs
        that the backward pass computes is 0.
    """
    B, H, T, h = q.shape
    Q = H // k.shape[1]

    def at_query(b, n, p, tile):
        return b, n, tiles.query_block_of(tile[b, p]), 0

    def at_key(b, n, p, tile):
        return b, jax.lax.div(n, Q), tiles.key_block_of(tile[b, p]), 0

    # A block whose index is that of the step before is not fetched again, so the end of a list costs no traffic.
    q_spec = pl.BlockSpec((1, 1, options.query_block, h), at_query)
    kv_spec = pl.BlockSpec((1, 1, options.key_block, h), at_key)
    lse_spec = pl.BlockSpec(
        (1, 1, 1, options.query_block), lambda b, n, p, tile: (b, n, 0, tiles.query_block_of(tile[b, p]))
    )
    # Segments come as [B, 1, T]: the last two sizes of a block have to be whole tiles or the array's own.
    query_segment_spec = pl.BlockSpec(
        (1, 1, options.query_block), lambda b, n, p, tile: (b, 0, tiles.query_block_of(tile[b, p]))
    )
    key_segment_spec = pl.BlockSpec(
        (1, 1, options.key_block), lambda b, n, p, tile: (b, 0, tiles.key_block_of(tile[b, p]))
    )
    # One number a query takes 128 lanes of VMEM in any case: the maximum fills them all, the sum is kept by lane.
    per_query = pltpu.VMEM((options.query_block, LANES), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, options=options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, H, tile.shape[1]),
            in_specs=[q_spec, kv_spec, kv_spec, query_segment_spec, key_segment_spec],
            out_specs=[q_spec, lse_spec if keep else None],
            scratch_shapes=[per_query, per_query, pltpu.VMEM((options.query_block, h), jnp.float32)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32) if keep else None,
        ],
        # Tiles carry one softmax and keep their order; rows and heads may be spread over the cores of a chip.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=options.vmem_bytes
        ),
        cost_estimate=options.cost(q, k, tile, products=2),
        name="attention_forward",
        interpret=options.interpret,
    )(tile, q, k, v, query_segment[:, None], key_segment[:, None])
