"""The backward kernel of attention for TPUs: gradients of queries, keys and values in one pass, five products a tile.

A row's tiles come query block by query block. The gradient of the queries is finished with its block; those of the
keys and values of a whole row stay in vector memory until the last of the query heads that share them is through.
Pieces of scores are held transposed, keys as rows, so that only one of the five products needs a transposition and
per-query values are rows, not columns. Letters as in the forward kernel.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mer_r1_jax.kernels.attention import schedule as tiles
from mer_r1_jax.kernels.attention.tile import MASKED, ROWS_BY_COLUMNS, ROWS_BY_ROWS, Options, pieces, turned, visible


def _kernel(
    tile_ref,
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    lse_ref,
    di_ref,
    query_segment_ref,
    key_segment_ref,
    dq_ref,
    dk_hbm_ref,
    dv_hbm_ref,
    dq_acc_ref,
    dk_acc_ref,
    dv_acc_ref,
    done_ref,
    *,
    options: Options,
    key_offset: int,
):
    # The grid is (row, key head, query head of its group, place in the list): whatever adds to the gradients of
    # one key head runs in succession, so that their sums can stay in VMEM.
    row, key_head, group, place = (pl.program_id(axis) for axis in range(4))
    tile = tile_ref[row, place]
    factor = options.scale * math.log2(math.e)
    product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)

    def each_key_block(step):
        def body(j, _):
            step(pl.ds(pl.multiple_of(j * options.key_block, options.key_block), options.key_block))

        jax.lax.fori_loop(0, dk_acc_ref.shape[0] // options.key_block, body, None)

    @pl.when((group == 0) & (place == 0))
    def start_keys():
        def clear(block):
            dk_acc_ref[block] = jnp.zeros(done_ref.shape, jnp.float32)
            dv_acc_ref[block] = jnp.zeros(done_ref.shape, jnp.float32)

        each_key_block(clear)

    @pl.when(tiles.is_first(tile))
    def start_queries():
        dq_acc_ref[...] = jnp.zeros_like(dq_acc_ref)

    def visit(masked: bool):
        q, do = q_ref[0, 0], do_ref[0, 0]
        segment_sl = turned(key_segment_ref[0]) if masked else None
        first_key = tiles.key_block_of(tile) * options.key_block
        # Weights come straight from the saved log-sum-exp, without a maximum or a sum carried from piece to piece.
        # Where a query sees nothing it is 1e30, and all its weights are 0.
        for begin, size in pieces(options.key_block, options.backward_piece):
            k, v = k_ref[0, 0, pl.ds(begin, size)], v_ref[0, 0, pl.ds(begin, size)]
            score_st = product(k, q, ROWS_BY_ROWS) * factor
            if segment_sl is not None:
                seen_st = visible(
                    query_segment_ref[0],
                    jnp.tile(segment_sl[begin : begin + size], (1, options.query_block // segment_sl.shape[1])),
                    tiles.query_block_of(tile) * options.query_block,
                    key_offset + first_key + begin,
                    options,
                    query_axis=1,
                )
                score_st = jnp.where(seen_st, score_st, MASKED)
            weight_st = jnp.exp2(score_st - lse_ref[0, 0])
            # Blocks and pieces begin at multiples of 128; the compiler has to be told so to address whole tiles.
            keys = pl.ds(pl.multiple_of(first_key + begin, 128), size)
            dv_acc_ref[keys] += product(weight_st.astype(do.dtype), do, ROWS_BY_COLUMNS)
            # The gradient of a softmax: weight x (cotangent of the weight - di); di is out . do, one number a query.
            slope_st = weight_st * (product(v, do, ROWS_BY_ROWS) - di_ref[0, 0])
            slope_st = slope_st.astype(q.dtype)
            dk_acc_ref[keys] += product(slope_st, q, ROWS_BY_COLUMNS)
            dq_acc_ref[...] += product(slope_st.T, k, ROWS_BY_COLUMNS)

    @pl.when(tiles.state_of(tile) == tiles.FULL)
    def full():
        visit(masked=False)

    @pl.when(tiles.state_of(tile) == tiles.PARTIAL)
    def partial():
        visit(masked=True)

    @pl.when(tiles.is_last(tile))
    def finish_queries():
        # The scale alone remains: log2(e) belongs to the exponent of base 2 and cancels in the gradient.
        dq_ref[0, 0] = (dq_acc_ref[...] * options.scale).astype(dq_ref.dtype)

    @pl.when((group == pl.num_programs(2) - 1) & (place == pl.num_programs(3) - 1))
    def finish_keys():
        def write(block):
            done_ref[...] = (dk_acc_ref[block] * options.scale).astype(done_ref.dtype)
            pltpu.sync_copy(done_ref, dk_hbm_ref.at[row, key_head, block])
            done_ref[...] = dv_acc_ref[block].astype(done_ref.dtype)
            pltpu.sync_copy(done_ref, dv_hbm_ref.at[row, key_head, block])

        each_key_block(write)


def backward(q, k, v, query_segment, key_segment, tile, lse, di, do, options: Options, *, key_offset, dq_dtype):
    """Gradients of a call with S keys that fit into vector memory.

    Args:
        q, k, v, query_segment, key_segment, tile, options: as in `forward`; keys and tiles are those of one span.
        lse_BH1T: of `forward`. di_BH1T: float32, each query's out times its gradient.
        do_BHTh: gradient of out.
        key_offset: number of the first key in the row.
        dq_dtype: dtype of the queries' gradient.

    Returns:
        (dq_BHTh, dk_BKSh, dv_BKSh), the last two in the dtype of the keys.
    """
    B, H, T, h = q.shape
    K, S = k.shape[1:3]
    Q = H // K

    def at_query(b, n, g, p, tile):
        return b, n * Q + g, tiles.query_block_of(tile[b, p]), 0

    def at_query_row(b, n, g, p, tile):
        return b, n * Q + g, 0, tiles.query_block_of(tile[b, p])

    def at_key(b, n, g, p, tile):
        return b, n, tiles.key_block_of(tile[b, p]), 0

    q_spec = pl.BlockSpec((1, 1, options.query_block, h), at_query)
    row_spec = pl.BlockSpec((1, 1, 1, options.query_block), at_query_row)
    kv_spec = pl.BlockSpec((1, 1, options.key_block, h), at_key)
    query_segment_spec = pl.BlockSpec(
        (1, 1, options.query_block), lambda b, n, g, p, tile: (b, 0, tiles.query_block_of(tile[b, p]))
    )
    key_segment_spec = pl.BlockSpec(
        (1, 1, options.key_block), lambda b, n, g, p, tile: (b, 0, tiles.key_block_of(tile[b, p]))
    )
    # A pipelined block would leave VMEM as soon as a tile has other keys, so dk and dv are copied out by hand.
    hbm_spec = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_kernel, options=options, key_offset=key_offset),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, Q, tile.shape[1]),
            in_specs=[q_spec, kv_spec, kv_spec, q_spec, row_spec, row_spec, query_segment_spec, key_segment_spec],
            out_specs=[q_spec, hbm_spec, hbm_spec],
            scratch_shapes=[
                # In float32, because the tiles of all Q heads add to one key. The two sums of S keys are what limits a
                # span: 16 MiB for 16384 keys of 128.
                pltpu.VMEM((options.query_block, h), jnp.float32),
                pltpu.VMEM((S, h), jnp.float32),
                pltpu.VMEM((S, h), jnp.float32),
                pltpu.VMEM((options.key_block, h), k.dtype),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, dq_dtype),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=options.vmem_bytes,
        ),
        cost_estimate=options.cost(q, k, tile, products=5),
        name="attention_backward",
        interpret=options.interpret,
    )(tile, q, k, v, do, lse, di, query_segment[:, None], key_segment[:, None])
