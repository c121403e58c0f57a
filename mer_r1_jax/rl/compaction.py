"""Making room in a rollout that is decoded in chunks: completions that have ended leave the batch between two chunks.

Completions that still run are regrouped into a smaller batch of a size known beforehand. Rows stay on their device, so
nothing is sent: each device regroups its own. A prompt whose completions do not fit into one row is held in several, so
decoding goes on reading a prompt once a row; there are never more rows than before. What is sampled does not change:
every completion takes its caches, its random bits and its place in the result along.

Shape letters are those of `mer_r1_jax.omni.batch`; N counts the places of a batch, rows x completions of a row.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.omni.batch import Array
from mer_r1_jax.rl.rollout import STOP_ABSENT, RolloutState, Sampled, running

SIZES = 4  # of a batch: whole, a half, a quarter, an eighth; each is a program, and below it little is left to save
_NOWHERE = np.iinfo(np.int32).max  # the place in the result of what no completion is held in


class Size(NamedTuple):
    """Rows on each device, and completions of each row."""

    rows: int
    generations: int


def sizes(rows: int, generations: int) -> tuple[Size, ...]:
    """The sizes a batch can shrink through, largest first: groups are halved first, then rows.

    Args:
        rows: rows on each device.
        generations: completions of a prompt.
    """
    # Groups shrink first: a row reads its prompt once, however few completions it has.
    groups = _halvings(generations)
    return tuple([*(Size(rows, g) for g in groups), *(Size(r, 1) for r in _halvings(rows)[1:])][:SIZES])


def _halvings(count: int) -> list[int]:
    halved = [count]
    while halved[-1] > 1:
        halved.append(-(-halved[-1] // 2))
    return halved


def rows_needed(state: RolloutState, sizes: tuple[Size, ...], devices: int, last: int) -> Array:
    """int32, for every size: rows that the device with the most running completions needs; all 0 when none runs.

    Args:
        state: between two chunks.
        sizes: of `sizes`.
        devices: parts the rows are cut into.
        last: tokens after which every completion ends.
    """
    # The cap ends every completion, though none of them has said so by itself.
    count_B = jnp.sum(running(state) & (state.step < last), axis=1)
    rows_DSB = -(-count_B.reshape(devices, 1, -1) // np.asarray([size.generations for size in sizes])[:, None])
    return jnp.max(jnp.sum(rows_DSB, axis=2), axis=0).astype(jnp.int32)


def smallest(sizes: tuple[Size, ...], needed: np.ndarray) -> Size:
    """The smallest size that holds what still runs."""
    # Sizes come largest first.
    return [size for size, rows in zip(sizes, needed, strict=True) if rows <= size.rows][-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """The result while only a part of it is still decoded.

    Attributes:
        sampled: of all completions, as they were when they left the batch.
        place_BG: int32, which of them each place of the batch holds, counted row by row on its device; an index beyond
            the last for a place that holds none.
    """

    sampled: Sampled
    place_BG: Array


def compact(state: RolloutState, kept: Kept | None, size: Size) -> tuple[RolloutState, Kept]:
    """Regroups one device's running completions; everything they leave behind has been kept.

    Args:
        state: of one device, between two chunks.
        kept: as the last call gave it; None at the first.
        size: no larger than the state's, and large enough (`rows_needed`).
    """
    running_BG = running(state)
    rows, generations = running_BG.shape
    places = jnp.arange(rows * generations, dtype=jnp.int32).reshape(rows, generations)
    place_BG = places if kept is None else kept.place_BG
    source_N = _sources(running_BG, size)
    # Places that nothing moves to hold a copy of the first completion, marked absent below: never decoded on.
    filled_N = source_N < rows * generations
    index_N = jnp.where(filled_N, source_N, 0)
    # A row is filled from its first place on, so that one tells which prompt it holds.
    row_B = index_N[:: size.generations] // generations

    # [..., B, G, ...] to the same with the new size.
    def completions(x: Array, axis: int = 0) -> Array:
        flat = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return jnp.take(flat, index_N, axis=axis, mode="clip").reshape(*x.shape[:axis], *size, *x.shape[axis + 2 :])

    filled_BG = filled_N.reshape(size)
    moved = jax.tree.map(completions, state.sampled)
    smaller = RolloutState(
        step=state.step,
        sampled=dataclasses.replace(moved, stop_BG=jnp.where(filled_BG, moved.stop_BG, STOP_ABSENT)),
        cache=jax.tree.map(lambda x: completions(x, axis=1), state.cache),
        prompt_cache=dataclasses.replace(
            state.prompt_cache,
            k_LBTKh=jnp.take(state.prompt_cache.k_LBTKh, row_B, axis=1, mode="clip"),
            v_LBTKh=jnp.take(state.prompt_cache.v_LBTKh, row_B, axis=1, mode="clip"),
            valid_BT=jnp.take(state.prompt_cache.valid_BT, row_B, axis=0, mode="clip"),
        ),
        uniform_BGC=completions(state.uniform_BGC),
        position_B=jnp.take(state.position_B, row_B, mode="clip"),
    )
    place_BG = jnp.where(filled_BG, completions(place_BG), _NOWHERE)
    return smaller, Kept(sampled=brought_back(state.sampled, kept), place_BG=place_BG)


def brought_back(sampled: Sampled, kept: Kept | None) -> Sampled:
    """The result on one device, with what the batch holds of it written in its places."""
    if kept is None:
        return sampled

    # `drop`: a place that holds no completion points beyond the end.
    def write(whole: Array, part: Array) -> Array:
        flat = whole.reshape(-1, *whole.shape[2:])
        part = part.reshape(-1, *part.shape[2:])
        return flat.at[kept.place_BG.reshape(-1)].set(part, mode="drop").reshape(whole.shape)

    return jax.tree.map(write, kept.sampled, sampled)


def _sources(running_BG: Array, size: Size) -> Array:
    """int32 [N], the place that moves to each place of the new batch; the number of old places where none does."""
    places = running_BG.size
    # Each prompt's completions take whole rows of the new batch, since a row reads the cache of one prompt.
    count_B = jnp.sum(running_BG, axis=1)
    rows_B = -(-count_B // size.generations)
    first_B = (jnp.cumsum(rows_B) - rows_B) * size.generations
    # Which of its prompt's running completions each one is.
    rank_BG = jnp.cumsum(running_BG, axis=1) - 1
    target_BG = jnp.where(running_BG, first_B[:, None] + rank_BG, _NOWHERE)
    source_N = jnp.full(size.rows * size.generations, places, jnp.int32)
    return source_N.at[target_BG.reshape(-1)].set(jnp.arange(places, dtype=jnp.int32), mode="drop")
