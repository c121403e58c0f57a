"""Decode attention for TPUs: a row's prompt passes through the chip once for all its completions.

Decoding is bound by the bytes it reads, and with a group of G completions a prompt need not be read G times. A row is
walked in steps: the chunks of its prompt against the queries of all completions, then the chunks of each completion's
own tokens against its own queries; the softmax is carried from step to step, so the result is exact. Chunks without
tokens are neither read nor computed. The stacked caches are read in place: handing a kernel one layer of them would
copy that layer first.

Letters besides the reference's: q = Q rounded up to whole registers, s tokens of a chunk, l lanes of equal value.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mer_r1_jax.kernels.attention.tile import FLOOR, LANES, MASKED, ROWS_BY_COLUMNS, ROWS_BY_ROWS

SUBLANES = 8

# Bytes of keys (and as many of values) a step reads: enough to be worth a step's fixed cost of about 0.35 us, little
# enough that two of each kind of step fit into 16 MiB of vector memory.
_PROMPT_BYTES, _OWN_BYTES = 2**20, 2**18


def chunks(T: int, C: int, K: int, h: int, itemsize: int) -> tuple[int, int]:
    """Tokens of a prompt chunk and of a chunk of own tokens: multiples of 128, no more than needed to hold all."""

    def one(length: int, most: int) -> int:
        tokens = max(LANES, most // (K * h * itemsize) // LANES * LANES)
        return min(tokens, -(-length // LANES) * LANES)

    return one(T, _PROMPT_BYTES), one(C, _OWN_BYTES)


def _kernel(
    layer_ref,
    prompt_chunks_ref,
    own_length_ref,
    q_ref,
    prompt_k_ref,
    prompt_v_ref,
    prompt_mask_ref,
    own_k_ref,
    own_v_ref,
    out_ref,
    max_ref,
    sum_ref,
    acc_ref,
    *,
    scale: float,
    prompt_tokens: int,
    own_tokens: int,
):
    # The grid is (row, step): the prompt's chunks, then completion by completion the chunks of its own tokens.
    K, G, q, h = acc_ref.shape
    row, step = pl.program_id(0), pl.program_id(1)
    prompt_chunk, own_chunk = prompt_k_ref.shape[3], own_k_ref.shape[4]
    prompt_steps, own_steps = pl.cdiv(prompt_tokens, prompt_chunk), pl.cdiv(own_tokens, own_chunk)
    factor = scale * math.log2(math.e)

    @pl.when(step == 0)
    def start():
        max_ref[...] = jnp.full_like(max_ref, FLOOR)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def visit(head: int, group, k_sh, v_sh, seen_1s):
        """Takes a chunk into the softmax of one key head and the completions `group` (a number, or all of them)."""
        # Queries of all completions are rows of one product, so that a chunk of the prompt is loaded once for them.
        rows = (G if isinstance(group, slice) else 1) * q
        load = lambda ref: ref[head, group].reshape(rows, ref.shape[-1])  # noqa: E731
        query_rh = q_ref[0, head, group].reshape(rows, h).astype(k_sh.dtype)
        score_rs = jax.lax.dot_general(query_rh, k_sh, ROWS_BY_ROWS, preferred_element_type=jnp.float32) * factor
        # This covers keys beyond the cache as well, whose scores may be NaN; only values need `existing`.
        score_rs = jnp.where(seen_1s, score_rs, MASKED)
        before_rl = load(max_ref)
        after_rl = jnp.maximum(before_rl, score_rs.max(axis=1, keepdims=True))
        weight_rs = jnp.exp2(score_rs - after_rl[:, :1])
        shrink_rl = jnp.exp2(before_rl - after_rl)
        sum_rl = load(sum_ref) * shrink_rl + weight_rs.sum(axis=1, keepdims=True)
        part_rh = jax.lax.dot_general(
            weight_rs.astype(v_sh.dtype), v_sh, ROWS_BY_COLUMNS, preferred_element_type=jnp.float32
        )
        acc_rh = load(acc_ref) * shrink_rl[:, :1] + part_rh
        for ref, value in ((max_ref, after_rl), (sum_ref, sum_rl), (acc_ref, acc_rh)):
            ref[head, group] = value.reshape(ref[head, group].shape)

    def existing(v_sh, first, tokens: int):
        """Values with 0 where the chunk reaches beyond the cache: what lies there may be NaN, and 0 x NaN is NaN."""
        if tokens % v_sh.shape[0] == 0:
            return v_sh
        place = first + jax.lax.broadcasted_iota(jnp.int32, v_sh.shape, 0)
        return jnp.where(place < tokens, v_sh, jnp.zeros_like(v_sh))

    first_chunk, last_chunk = prompt_chunks_ref[row, 0], prompt_chunks_ref[row, 1]

    @pl.when((step >= first_chunk) & (step <= last_chunk))
    def prompt():
        seen_1s = prompt_mask_ref[0] != 0
        for head in range(K):
            v_sh = existing(prompt_v_ref[0, 0, head], step * prompt_chunk, prompt_tokens)
            visit(head, slice(None), prompt_k_ref[0, 0, head], v_sh, seen_1s)

    group, chunk = _own(step, prompt_steps, own_steps, G)
    length = own_length_ref[row, group]

    @pl.when((step >= prompt_steps) & (chunk * own_chunk < length))
    def own():
        first = chunk * own_chunk
        seen_1s = first + jax.lax.broadcasted_iota(jnp.int32, (1, own_chunk), 1) < length
        for head in range(K):
            v_sh = existing(own_v_ref[0, 0, 0, head], first, own_tokens)
            visit(head, group, own_k_ref[0, 0, 0, head], v_sh, seen_1s)

    @pl.when(step == pl.num_programs(1) - 1)
    def finish():
        total = sum_ref[...][..., :1]
        out_ref[0] = acc_ref[...] / jnp.where(total == 0.0, 1.0, total)


def _own(step, prompt_steps: int, own_steps: int, G: int):
    """(completion, chunk) of a step, the first ones while the prompt's steps last."""
    number = jnp.clip(step - prompt_steps, 0, G * own_steps - 1)
    return jax.lax.div(number, own_steps), jax.lax.rem(number, own_steps)


def seen_tokens(prompt_mask_BT, own_length_BG, C: int, K: int, h: int, itemsize: int) -> tuple[jax.Array, ...]:
    """What a call has to know of the rows' tokens, the same in every layer.

    Args:
        prompt_mask_BT, own_length_BG: as in the reference.
        C, K, h: sizes of the caches; K key heads of one device.
        itemsize: bytes of one of their values.

    Returns:
        chunks_B2, the first and the last chunk of a prompt that are read; mask_B1T, its tokens in whole chunks;
        own_length_BG. All int32.
    """
    T = prompt_mask_BT.shape[1]
    prompt_chunk, _ = chunks(T, C, K, h, itemsize)
    # The mask is padded to whole chunks; the caches are not, since that would copy them.
    mask_BT = jnp.pad(prompt_mask_BT, ((0, 0), (0, -T % prompt_chunk))).astype(jnp.int32)
    # A longer length would make visible what the last chunk reads behind the cache.
    return _chunk_range(mask_BT, prompt_chunk), mask_BT[:, None], jnp.clip(own_length_BG, 0, C).astype(jnp.int32)


def decode_attention(
    query_BGHh,
    prompt_key_LBKTh,
    prompt_value_LBKTh,
    chunks_B2,
    mask_B1T,
    own_key_LBGKCh,
    own_value_LBGKCh,
    own_length_BG,
    layer,
    *,
    scale: float,
    interpret: bool,
) -> jax.Array:
    """As the reference.

    Args:
        chunks_B2, mask_B1T, own_length_BG: of `seen_tokens`.
        interpret: run operation by operation, on any platform.
    """
    B, G, H, h = query_BGHh.shape
    K, T = prompt_key_LBKTh.shape[2:4]
    C, Q = own_key_LBGKCh.shape[4], H // K
    # Padding Q to the 8 sublanes of a float32 register lets [G, q, h] become [G * q, h] without moving a row.
    q = -(-Q // SUBLANES) * SUBLANES
    prompt_chunk, own_chunk = chunks(T, C, K, h, own_key_LBGKCh.dtype.itemsize)
    prompt_steps, own_steps = pl.cdiv(T, prompt_chunk), pl.cdiv(C, own_chunk)

    query_BKGqh = query_BGHh.reshape(B, G, K, Q, h).swapaxes(1, 2).astype(jnp.float32)
    query_BKGqh = jnp.pad(query_BKGqh, ((0, 0), (0, 0), (0, 0), (0, q - Q), (0, 0)))

    def at_prompt(b, step, layer, prompt_chunks, own_length):
        return layer[0], b, 0, jnp.clip(step, *_read(prompt_chunks, b)), 0

    def at_mask(b, step, layer, prompt_chunks, own_length):
        return b, 0, jnp.clip(step, *_read(prompt_chunks, b))

    def at_own(b, step, layer, prompt_chunks, own_length):
        group, chunk = _own(step, prompt_steps, own_steps, G)
        last = jax.lax.div(own_length[b, group] + own_chunk - 1, own_chunk) - 1
        return layer[0], b, group, 0, jnp.clip(chunk, 0, jnp.maximum(last, 0)), 0

    whole_spec = pl.BlockSpec((1, K, G, q, h), lambda b, step, *_: (b, 0, 0, 0, 0))
    prompt_spec = pl.BlockSpec((1, 1, K, prompt_chunk, h), at_prompt)
    own_spec = pl.BlockSpec((1, 1, 1, K, own_chunk, h), at_own)
    out_BKGqh = pl.pallas_call(
        functools.partial(_kernel, scale=scale, prompt_tokens=T, own_tokens=C),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, prompt_steps + G * own_steps),
            in_specs=[
                whole_spec,
                prompt_spec,
                prompt_spec,
                pl.BlockSpec((1, 1, prompt_chunk), at_mask),
                own_spec,
                own_spec,
            ],
            out_specs=whole_spec,
            scratch_shapes=[
                pltpu.VMEM((K, G, q, LANES), jnp.float32),
                pltpu.VMEM((K, G, q, LANES), jnp.float32),
                pltpu.VMEM((K, G, q, h), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B, K, G, q, h), jnp.float32),
        # Steps of a row carry its softmaxes and keep their order; rows may be spread over cores.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * G * H * h * (T + C),
            transcendentals=B * G * H * (T + C),
            bytes_accessed=2 * B * K * h * (T + G * C) * own_key_LBGKCh.dtype.itemsize,
        ),
        name="decode_attention",
        interpret=interpret,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        chunks_B2,
        own_length_BG,
        query_BKGqh,
        prompt_key_LBKTh,
        prompt_value_LBKTh,
        mask_B1T,
        own_key_LBGKCh,
        own_value_LBGKCh,
    )
    return out_BKGqh[:, :, :, :Q].swapaxes(1, 2).reshape(B, G, H, h).astype(query_BGHh.dtype)


def _chunk_range(mask_BT, chunk: int):
    """int32 [B, 2]: the first and the last chunk of a prompt that has tokens; (0, -1) if none has."""
    exists_BJ = (mask_BT.reshape(mask_BT.shape[0], -1, chunk) != 0).any(axis=-1)
    number_J = jnp.arange(exists_BJ.shape[1], dtype=jnp.int32)
    first_B = jnp.argmax(exists_BJ, axis=1).astype(jnp.int32)
    last_B = jnp.where(exists_BJ, number_J, -1).max(axis=1)
    return jnp.stack([first_B, last_B], axis=1)


def _read(prompt_chunks, b):
    """The chunks between which a step is clipped, so that one without tokens repeats its neighbour, unread."""
    return prompt_chunks[b, 0], jnp.maximum(prompt_chunks[b, 1], 0)


def bytes_read(prompt_mask_BT, own_length_BG, C: int, K: int, h: int, itemsize: int) -> int:
    """Bytes of keys and values one call reads: whole chunks, of the tokens that exist.

    Args:
        prompt_mask_BT, own_length_BG: as in the reference, but numbers and not tracers.
        C, K, h: sizes of the caches.
        itemsize: bytes of one of their values.
    """
    B, T = prompt_mask_BT.shape
    prompt_chunk, own_chunk = chunks(T, C, K, h, itemsize)
    mask_BT = jnp.pad(jnp.asarray(prompt_mask_BT), ((0, 0), (0, -T % prompt_chunk))).astype(jnp.int32)
    first_last_B2 = _chunk_range(mask_BT, prompt_chunk)
    prompt_chunks = jnp.maximum(first_last_B2[:, 1] - first_last_B2[:, 0] + 1, 1).sum()
    # A completion without tokens still repeats its first chunk.
    own_chunks = jnp.maximum(-(-jnp.clip(jnp.asarray(own_length_BG), 0, C) // own_chunk), 1).sum()
    return int(2 * K * h * itemsize * (prompt_chunks * prompt_chunk + own_chunks * own_chunk))
