"""What the forward and the backward kernel share: the static part of a call, and the mask of a piece of a tile."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128

# Scores that may not be seen, and the lowest running maximum: so far apart that 2 ** (MASKED - FLOOR) is 0, which
# keeps queries that see nothing at 0 without a test in the inner loop.
MASKED, FLOOR = -0.7 * float(jnp.finfo(jnp.float32).max), -1e30

# Segments of padding as the kernels see them: equal to no other and not to each other.
PADDING_QUERY, PADDING_KEY = -1, -2

# Dimension numbers of the two matrix products whose operands need no transposition.
ROWS_BY_ROWS = (((1,), (1,)), ((), ()))
ROWS_BY_COLUMNS = (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Static part of a call.

    Attributes:
        scale: factor on the scores.
        causal, shared_segment: as in the reference's mask.
        query_block, key_block: tokens of a tile's sides, multiples of 128.
        forward_piece, backward_piece: most keys of the pieces a tile is computed in; the scores of a piece are what
            has to be held at once.
        span: most keys a backward call takes; it holds their gradients in vector memory.
        vmem_bytes: vector memory the kernels may use.
        interpret: run operation by operation, on any platform.
    """

    scale: float
    causal: bool
    shared_segment: int | None
    query_block: int
    key_block: int
    forward_piece: int
    backward_piece: int
    span: int
    vmem_bytes: int
    interpret: bool

    def cost(self, q: jax.Array, k: jax.Array, tile: jax.Array, *, products: int) -> pl.CostEstimate:
        """What the compiler may assume a call to take: every listed tile visited, `products` matrix products each."""
        B, H, _, h = q.shape
        scores = B * H * tile.shape[1] * self.query_block * self.key_block
        size = (2 * q.size + 2 * k.size * H // k.shape[1]) * q.dtype.itemsize
        return pl.CostEstimate(flops=2 * products * h * scores, transcendentals=scores, bytes_accessed=size)


def pieces(total: int, most: int) -> list[tuple[int, int]]:
    """(begin, size) of as few pieces of at most `most` as `total` needs, multiples of 128 and about equal."""
    count = -(-total // most)
    edges = [LANES * round(n * total / count / LANES) for n in range(count)] + [total]
    return [(begin, end - begin) for begin, end in zip(edges[:-1], edges[1:], strict=True)]


def turned(x_1t):
    """x_tl: a row of per-token values as a column that fills all lanes."""
    return jnp.broadcast_to(x_1t, (LANES, x_1t.shape[1])).T


def visible(query_segment, key_segment, row, column, options: Options, *, query_axis: int):
    """bool mask of a piece.

    Args:
        query_segment, key_segment: int32, broadcast against each other.
        row, column: numbers of the piece's first query and key.
        options: of the call.
        query_axis: 0 if queries are rows of the piece, 1 if they are its columns.
    """
    seen = query_segment == key_segment
    if options.shared_segment is not None:
        seen |= key_segment == options.shared_segment
    if options.causal:
        query = row + jax.lax.broadcasted_iota(jnp.int32, seen.shape, query_axis)
        key = column + jax.lax.broadcasted_iota(jnp.int32, seen.shape, 1 - query_axis)
        seen &= query >= key
    return seen
