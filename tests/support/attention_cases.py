"""What the attention kernels are tested on: the masks, head counts and head sizes the model has, at odd lengths."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# Largest error of a result or gradient, as a share of its norm, against the float32 reference.
LIMITS = {jnp.float32: 2e-6, jnp.bfloat16: 5e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One call of attention; segments are [B, T] and [B, S] lists of numbers."""

    heads: int
    key_heads: int
    width: int
    query_segment: np.ndarray
    key_segment: np.ndarray | None = None
    causal: bool
    shared_segment: int | None = None
    side: int = 128

    def segments(self) -> tuple[jax.Array, jax.Array]:
        """int32 segments of queries and keys."""
        key_segment = self.query_segment if self.key_segment is None else self.key_segment
        return jnp.asarray(self.query_segment, jnp.int32), jnp.asarray(key_segment, jnp.int32)

    def arrays(self, dtype) -> list[jax.Array]:
        """Queries, keys, values and a gradient of the result."""
        query, key = self.segments()
        shapes = [(*query.shape, self.heads), *[(*key.shape, self.key_heads)] * 2, (*query.shape, self.heads)]
        rng = np.random.default_rng(0)
        return [jnp.asarray(rng.normal(size=(*shape, self.width)), dtype) for shape in shapes]


def pulled(call, arrays, gradient) -> tuple[jax.Array, ...]:
    """Result of a call of arrays, and a gradient of the result pulled back to each of them."""

    @jax.jit
    def run(arrays, gradient):
        out, pull = jax.vjp(lambda *arrays: call(*arrays), *arrays)
        return out, *pull(gradient.astype(out.dtype))

    return run(arrays, gradient)


def packed_row(prompts: list[int], prompt_slots: int, completions: list[list[int]], slots: int) -> np.ndarray:
    """Segments of rows with one right-padded prompt followed by right-padded completions, as the RL update has them."""
    count = len(completions[0])
    segment = np.zeros((len(prompts), prompt_slots + count * slots), np.int32)
    for row, (prompt, lengths) in enumerate(zip(prompts, completions, strict=True)):
        segment[row, :prompt] = 1
        for number, length in enumerate(lengths):
            begin = prompt_slots + number * slots
            segment[row, begin : begin + length] = 2 + number
    return segment


def windows(rows: int, side: int, window: int, padding: int) -> np.ndarray:
    """Segments of a square grid of patches cut into square windows, read line by line, and of padding behind it."""
    row, column = np.indices((side, side)) // window
    segment = (1 + row * -(-side // window) + column).reshape(1, -1)
    return np.pad(np.repeat(segment, rows, axis=0), ((0, 0), (0, padding)))


def chunks(lengths: list[int], size: int) -> np.ndarray:
    """Segments of chunks of `size` frames of which the first ones are real, as the audio tower has them."""
    return (np.arange(size) < np.array(lengths)[:, None]).astype(np.int32)


CASES = {
    "packed RL row, 28/4 heads of 128": AttentionCase(
        heads=7,
        key_heads=1,
        width=128,
        query_segment=packed_row([130, 17], 140, [[100, 30, 0], [5, 101, 77]], 101),
        causal=True,
        shared_segment=1,
    ),
    "vision windows, 16/16 heads of 80": AttentionCase(
        heads=2, key_heads=2, width=80, query_segment=windows(2, 16, 8, 40), causal=False, side=1024
    ),
    "audio chunks, 20/20 heads of 64": AttentionCase(
        heads=2, key_heads=2, width=64, query_segment=chunks([100, 37, 0], 100), causal=False
    ),
    "queries that see nothing, 16/2 heads, more queries than keys": AttentionCase(
        heads=16,
        key_heads=2,
        width=64,
        query_segment=np.arange(290)[None] // 40,
        key_segment=np.arange(200)[None] // 30 % 5,
        causal=False,
        shared_segment=3,
    ),
}


def relative_error(got, expected) -> float:
    """Norm of the difference as a share of the norm of what was expected."""
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
