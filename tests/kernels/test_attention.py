"""The attention kernel, interpreted, against the reference: results, gradients, and what sees nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from support.attention_cases import CASES, LIMITS, AttentionCase, packed_row, relative_error

from mer_r1_jax.kernels.attention import pallas_tpu, reference
from mer_r1_jax.kernels.attention import schedule as tiles
from mer_r1_jax.kernels.attention.api import attention
from mer_r1_jax.kernels.attention.tile import pieces
from mer_r1_jax.kernels.placement import Placement


def expected(case: AttentionCase, q, k, v):
    """The reference in float32, with 0 for what sees nothing."""
    segments = case.segments()
    mask = reference.segment_mask(*segments, causal=case.causal, shared_segment=case.shared_segment)
    out = reference.attention(*(x.astype(jnp.float32) for x in (q, k, v)), mask, scale=case.width**-0.5)
    return jnp.where(mask.any(axis=-1)[..., None, None], out, 0)


def computed(case: AttentionCase, q, k, v, vmem_mib: int = 64):
    return pallas_tpu.attention(
        q,
        k,
        v,
        *case.segments(),
        causal=case.causal,
        shared_segment=case.shared_segment,
        scale=case.width**-0.5,
        vmem_mib=vmem_mib,
        interpret=True,
        side=case.side,
    )


def with_gradients(fn, q, k, v, gradient):
    @jax.jit
    def run(q, k, v, gradient):
        out, pull = jax.vjp(fn, q, k, v)
        return out, *pull(gradient.astype(out.dtype))

    return run(q, k, v, gradient)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("packed RL row, 28/4 heads of 128", jnp.float32),
        ("packed RL row, 28/4 heads of 128", jnp.bfloat16),
        ("vision windows, 16/16 heads of 80", jnp.float32),
        ("audio chunks, 20/20 heads of 64", jnp.bfloat16),
        ("queries that see nothing, 16/2 heads, more queries than keys", jnp.float32),
    ],
)
def test_results_and_gradients_are_those_of_the_reference(name, dtype):
    case = CASES[name]
    arrays = case.arrays(dtype)
    got = with_gradients(functools.partial(computed, case), *arrays)
    want = with_gradients(functools.partial(expected, case), *arrays)
    for part, one, other in zip(("result", "query", "key", "value"), got, want, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert relative_error(one, other) < LIMITS[dtype], part
    # Exactly 0, and so without influence, where there is nothing to see.
    nothing = np.asarray(want[0] == 0).all(axis=(2, 3))
    assert not np.asarray(got[0], np.float32)[nothing].any() and not np.asarray(got[1], np.float32)[nothing].any()


def test_keys_that_do_not_fit_into_vector_memory_come_in_spans(monkeypatch):
    """The same gradients when every backward call gets 128 keys instead of all 300."""
    segment = packed_row([100], 150, [[70, 40]], 75)
    case = AttentionCase(heads=2, key_heads=1, width=16, query_segment=segment, causal=True, shared_segment=1)
    arrays = case.arrays(jnp.float32)
    monkeypatch.setitem(pallas_tpu._SIZES, 16, pallas_tpu._SIZES[16] | dict(span=128))
    got = with_gradients(functools.partial(computed, case, vmem_mib=16), *arrays)
    for one, other in zip(got, with_gradients(functools.partial(expected, case), *arrays), strict=True):
        assert relative_error(one, other) < LIMITS[jnp.float32]


@pytest.mark.parametrize(("query_block", "key_block", "key_offset"), [(32, 32, 0), (64, 32, 0), (32, 64, 128)])
@pytest.mark.parametrize("shared", [1, None])
def test_the_list_of_tiles_covers_the_mask(query_block, key_block, key_offset, shared):
    rng = np.random.default_rng(0)
    B, T = 4, 256
    segment = np.sort(rng.integers(0, 5, (B, T)), axis=1)
    segment[1] = np.roll(segment[1], 57)
    segment[2] = rng.integers(0, 3, T)
    segment[3, 64:] = 0
    options = dict(causal=True, shared_segment=shared)
    mask = jax.jit(functools.partial(reference.segment_mask, **options))(segment, segment)
    mask = np.asarray(mask)[:, :, key_offset:]
    options |= dict(key_offset=key_offset)
    find = jax.jit(lambda query, key: tiles.schedule(query, key, query_block, key_block, **options))
    tile_BP = np.asarray(find(segment, segment[:, key_offset:]))
    for row in range(B):
        seen, opened, closed = np.zeros_like(mask[row]), [], []
        for tile in tile_BP[row]:
            i, j = tiles.query_block_of(tile), tiles.key_block_of(tile)
            block = np.s_[i * query_block : (i + 1) * query_block, j * key_block : (j + 1) * key_block]
            opened += [i] if tiles.is_first(tile) else []
            if tiles.state_of(tile) == tiles.FULL:
                assert mask[row][block].all()
            if tiles.state_of(tile) != tiles.EMPTY:
                assert opened[-1] == i and i not in closed and not seen[block].any()
                seen[block] = True
            closed += [i] if tiles.is_last(tile) else []
        assert opened == closed == list(range(T // query_block))
        assert not (mask[row] & ~seen).any()
    visits = (tiles.state_of(tile_BP) != tiles.EMPTY).sum(axis=1)
    assert visits[3] < visits[2] and tile_BP.shape[1] <= (T // query_block) * (mask.shape[2] // key_block)


def test_pieces_are_whole_registers_and_cover_a_block():
    for total in range(128, 1025, 128):
        parts = pieces(total, 512)
        assert parts[0][0] == 0 and all(a + size == b for (a, size), (b, _) in zip(parts, parts[1:], strict=False))
        assert sum(size for _, size in parts) == total and all(size % 128 == 0 and size <= 512 for _, size in parts)


def test_rows_and_heads_are_cut_over_a_mesh():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    placement = Placement(mesh, rows=("data", "fsdp"), heads=("tensor",))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(4, 128, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    segment = jnp.asarray(rng.integers(0, 3, (4, 128)), jnp.int32)
    options = dict(causal=True, shared_segment=1)
    run = functools.partial(attention, implementation="pallas", placement=placement, **options)
    got = jax.jit(run)(q, k, v, segment, segment)
    assert got.sharding.shard_shape(got.shape) == (1, 128, 2, 16)
    real = np.asarray(segment != 0)
    np.testing.assert_allclose(got[real], attention(q, k, v, segment, segment, **options)[real], atol=1e-5)
    with pytest.raises(ValueError, match=r"3 rows, expected a multiple of the 4 devices of mesh axes \('data', 'fsdp'"):
        run(q[:3], k[:3], v[:3], segment[:3], segment[:3])
    with pytest.raises(ValueError, match="1 key heads, expected a multiple of the 2 devices"):
        run(q, k[:, :, :1], v[:, :, :1], segment, segment)


def test_the_platform_chooses():
    """On the CPU the plain computation runs, the kernel only on request; unequal dtypes are refused by name."""
    q, k, v = (jnp.zeros((1, 256, 2, 16)) for _ in range(3))
    segment = jnp.ones((1, 256), jnp.int32)

    def kernels(**options):
        return str(jax.make_jaxpr(functools.partial(attention, **options))(q, k, v, segment, segment)).count("pallas_")

    assert kernels() == 0 and kernels(implementation="xla") == 0 and kernels(implementation="pallas") > 0
    with pytest.raises(ValueError, match="value dtype bfloat16, expected float32"):
        attention(q, k, v.astype(jnp.bfloat16), segment, segment)


def test_visited_share_of_a_packed_row():
    """A prompt of two blocks and four completions of one: 3 tiles for the prompt and 3 for each, of 6 * 7 / 2."""
    segment = np.repeat([1, 2, 3, 4, 5], [2048, 1024, 1024, 1024, 1024])
    assert pallas_tpu.visited_share(segment, shared_segment=1, vmem_mib=64) == pytest.approx(15 / 21)
    assert pallas_tpu.visited_share(segment[:2048], shared_segment=1, vmem_mib=64) == 1
    # Nothing shared: the prompt's 3 tiles and one for each completion.
    assert pallas_tpu.visited_share(segment, shared_segment=None, vmem_mib=64) == pytest.approx(7 / 21)
