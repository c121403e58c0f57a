"""Which tiles of the score matrix a kernel has to visit, found from the segments on the device.

A tile is a block of queries against a block of keys. Most tiles of a packed row are either invisible (later keys,
another completion, padding) or wholly visible, and only the rest need a mask; sorting them out once a call lets the
kernels walk a list of tiles instead of a grid. Letters besides the reference's: P tiles of a row's list, I query
blocks, J key blocks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# What a kernel does with a tile.
EMPTY, PARTIAL, FULL = 0, 1, 2

# A tile is one int32 of scalar memory. From the lowest bit: first, last, 2 bits of state, 12 of key block and 15
# of query block; the sign stays 0.
_FIRST, _LAST, _STATE, _KEY, _QUERY = 0, 1, 2, 4, 16
MAX_KEY_BLOCKS, MAX_QUERY_BLOCKS = 1 << (_QUERY - _KEY), 1 << (31 - _QUERY)


def candidates(
    I: int,  # noqa: E741
    J: int,
    query_block: int,
    key_block: int,
    *,
    causal: bool,
    key_offset: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The (query block, key block) of every tile that causal order does not rule out, query block by query block.

    A query block it leaves nothing for keeps its first tile.
    """
    # In numpy, because these tiles follow from shapes alone and their number is the list's static length P.
    i, j = np.indices((I, J)).reshape(2, -1)
    kept = (key_offset + j * key_block < (i + 1) * query_block) | (j == 0) if causal else np.ones_like(i, bool)
    return i[kept].astype(np.int32), j[kept].astype(np.int32)


def schedule(
    query_segment_BT: jax.Array,
    key_segment_BS: jax.Array,
    query_block: int,
    key_block: int,
    *,
    causal: bool,
    shared_segment: int | None,
    key_offset: int = 0,
) -> jax.Array:
    """Lists the tiles of every row in the order a kernel visits them.

    Tiles of one query block are neighbours, the first and the last of them are marked, and every query block has at
    least one (an EMPTY one if it sees nothing), so that its result is written. What is left of the list repeats the
    last tile as EMPTY: nothing is fetched for it.

    Args:
        query_segment_BT, key_segment_BS: int32, 0 for padding; whole numbers of blocks.
        query_block, key_block: tokens of a block.
        causal, shared_segment: as in the reference's mask.
        key_offset: number of the first key in the row.

    Returns:
        int32 tile_BP, to be read by `query_block_of`, `key_block_of`, `state_of`, `is_first` and `is_last`.
    """
    B, T = query_segment_BT.shape
    S = key_segment_BS.shape[1]
    i_P, j_P = candidates(
        T // query_block, S // key_block, query_block, key_block, causal=causal, key_offset=key_offset
    )
    state_BP = _states(query_segment_BT, key_segment_BS, query_block, key_block, i_P, j_P, shared_segment)
    if causal:
        # Where causal order cuts through a tile it needs a mask even if the segments agree throughout.
        first_query_P, last_query_P = i_P * query_block, (i_P + 1) * query_block - 1
        first_key_P, last_key_P = key_offset + j_P * key_block, key_offset + (j_P + 1) * key_block - 1
        state_BP = jnp.where(last_key_P > first_query_P, jnp.minimum(state_BP, PARTIAL), state_BP)
        state_BP = jnp.where(first_key_P > last_query_P, EMPTY, state_BP)
    visit_BP = state_BP != EMPTY
    # A query block without visible tiles keeps its first candidate.
    count_BI = jnp.zeros((B, T // query_block), jnp.int32).at[:, i_P].add(visit_BP.astype(jnp.int32))
    opens_P = np.diff(i_P, prepend=-1) != 0
    visit_BP |= opens_P & (count_BI[:, i_P] == 0)

    # The sort is stable: visited tiles come first and stay in the order of their query blocks.
    order_BP = jnp.argsort(~visit_BP, axis=1, stable=True)
    visit_BP, state_BP = (jnp.take_along_axis(x, order_BP, axis=1) for x in (visit_BP, state_BP))
    visits_B1 = visit_BP.sum(axis=1, keepdims=True)
    order_BP = jnp.take_along_axis(order_BP, jnp.minimum(jnp.arange(len(i_P)), visits_B1 - 1), axis=1)
    i_BP, j_BP = jnp.asarray(i_P)[order_BP], jnp.asarray(j_P)[order_BP]
    first_BP = visit_BP & (jnp.diff(i_BP, axis=1, prepend=-1) != 0)
    last_BP = jnp.roll(first_BP, -1, axis=1).at[:, -1].set(False) | (jnp.arange(len(i_P)) == visits_B1 - 1)
    last_BP &= visit_BP
    state_BP = jnp.where(visit_BP, state_BP, EMPTY)
    tile_BP = (i_BP << _QUERY) | (j_BP << _KEY) | (state_BP << _STATE)
    return (tile_BP | (last_BP << _LAST) | (first_BP << _FIRST)).astype(jnp.int32)


def _states(query_segment_BT, key_segment_BS, query_block, key_block, i_P, j_P, shared_segment):
    """EMPTY, PARTIAL or FULL by the segments; PARTIAL where a look at the blocks' extremes cannot tell."""
    # Ranges that overlap need not share a segment: such a tile costs a masked visit and changes nothing.
    query_low_BI, query_high_BI, query_whole_BI = _extremes(query_segment_BT, query_block)
    key_low_BJ, key_high_BJ, key_whole_BJ = _extremes(key_segment_BS, key_block)
    query_low, query_high, query_whole = query_low_BI[:, i_P], query_high_BI[:, i_P], query_whole_BI[:, i_P]
    key_low, key_high, key_whole = key_low_BJ[:, j_P], key_high_BJ[:, j_P], key_whole_BJ[:, j_P]
    seen = (query_low <= key_high) & (key_low <= query_high)
    full = (query_low == query_high) & (key_low == key_high) & (query_low == key_low)
    if shared_segment is not None:
        seen |= (key_low <= shared_segment) & (shared_segment <= key_high) & (query_low <= query_high)
        full |= (key_low == shared_segment) & (key_high == shared_segment)
    full &= query_whole & key_whole
    return jnp.where(full, FULL, jnp.where(seen, PARTIAL, EMPTY))


def _extremes(segment_BT: jax.Array, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lowest and highest segment of every block and whether it has no padding; an empty range if all is padding."""
    segment = segment_BT.reshape(segment_BT.shape[0], -1, block)
    exists = segment != 0
    info = jnp.iinfo(jnp.int32)
    low = jnp.where(exists, segment, info.max).min(axis=-1)
    high = jnp.where(exists, segment, info.min).max(axis=-1)
    return low, high, exists.all(axis=-1)


def query_block_of(tile):
    """Number of the tile's query block."""
    return tile >> _QUERY


def key_block_of(tile):
    """Number of the tile's key block."""
    return (tile >> _KEY) & (MAX_KEY_BLOCKS - 1)


def state_of(tile):
    """EMPTY, PARTIAL or FULL."""
    return (tile >> _STATE) & 3


def is_first(tile):
    """Whether no earlier tile of the list has this query block."""
    return (tile & (1 << _FIRST)) != 0


def is_last(tile):
    """Whether no later tile of the list has this query block."""
    return (tile & (1 << _LAST)) != 0
