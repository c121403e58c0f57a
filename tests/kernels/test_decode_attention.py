"""The decode kernel, interpreted, against the reference and against attention over repeated prompts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from support.attention_cases import LIMITS, relative_error

from mer_r1_jax.kernels.attention.api import attention
from mer_r1_jax.kernels.decode_attention import pallas_tpu
from mer_r1_jax.kernels.decode_attention.api import decode_attention
from mer_r1_jax.kernels.placement import Placement


def arguments(B=2, G=3, H=14, K=2, h=32, T=200, C=150, L=2, dtype=jnp.float32, seed=0) -> list[jax.Array]:
    """Prompts padded on the left (row 0) or on the right, completions of any length from nothing to all slots."""
    rng = np.random.default_rng(seed)
    query, prompt_key, prompt_value, own_key, own_value = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in ((B, G, H, h), *[(L, B, K, T, h)] * 2, *[(L, B, G, K, C, h)] * 2)
    )
    length = np.linspace(T, T // 3, B).astype(int)
    mask = np.arange(T) < length[:, None]
    mask[0] = np.arange(T) >= T // 4
    own_length = rng.integers(0, C + 1, (B, G))
    own_length[0, 0], own_length[-1, -1] = C, 0
    return [query, prompt_key, prompt_value, jnp.asarray(mask), own_key, own_value, jnp.asarray(own_length, jnp.int32)]


@functools.partial(jax.jit, static_argnames="implementation")
def run(*arrays, layer, implementation):
    return decode_attention(*arrays, layer, implementation=implementation)


@pytest.mark.parametrize(
    "shape",
    [
        dict(G=1, H=14, K=2, T=300, C=290),
        dict(G=5, H=16, K=2, T=128, C=128, dtype=jnp.bfloat16),
        dict(G=16, H=7, K=1, T=70, C=30, B=3, h=128, dtype=jnp.bfloat16),
    ],
    ids=lambda shape: ", ".join(f"{k} {v if isinstance(v, int) else v.__name__}" for k, v in shape.items()),
)
def test_the_kernel_computes_what_the_reference_does(shape):
    arrays = arguments(**shape)
    got = run(*arrays, layer=1, implementation="pallas")
    exact = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays]
    dtype = shape.get("dtype", jnp.float32)
    assert got.dtype == dtype
    assert relative_error(got, run(*exact, layer=1, implementation="xla")) < LIMITS[dtype]


def test_a_shared_prompt_is_a_prompt_repeated():
    """One softmax over the prompt and the own tokens, as if every completion had a prompt of its own."""
    query, prompt_key, prompt_value, mask, own_key, own_value, length = arrays = arguments(G=2, L=1)
    got = run(*arrays, layer=0, implementation="pallas")
    for g in range(2):
        key, value = (
            jnp.concatenate([prompt[0], own[0, :, g]], axis=2).swapaxes(1, 2)
            for prompt, own in ((prompt_key, own_key), (prompt_value, own_value))
        )
        seen = jnp.concatenate([mask, jnp.arange(own_key.shape[4]) < length[:, g, None]], axis=1).astype(jnp.int32)
        alone = jax.jit(attention)(query[:, g, None], key, value, jnp.ones((2, 1), jnp.int32), seen)
        np.testing.assert_allclose(got[:, g], alone[:, 0], atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_a_completion_that_sees_nothing_is_0(implementation):
    query, *prompt, mask, own_key, own_value, length = arguments(T=128, C=128)
    mask, length = mask.at[0].set(False), length.at[0, 1].set(0)
    got = run(query, *prompt, mask, own_key, own_value, length, layer=0, implementation=implementation)
    assert np.isfinite(got).all() and not got[0, 1].any() and got[0, 0].any() and got[-1, -1].any()


def test_a_group_reads_its_prompt_once():
    """Bytes read, in tokens: the prompts' chunks once a row, the completions' chunks as far as they have grown."""
    K, h, T, C = 4, 128, 2048, 1024
    prompt_chunk, own_chunk = pallas_tpu.chunks(T, C, K, h, 2)
    mask = np.arange(T) < np.array([[2048], [prompt_chunk]])
    length = np.array([[1024, 0, 1, own_chunk + 1]] * 2)
    tokens = 2048 + prompt_chunk + 2 * (1024 + own_chunk + own_chunk + 2 * own_chunk)
    assert pallas_tpu.bytes_read(mask, length, C, K, h, 2) == tokens * 2 * K * h * 2
    # Sixteen completions of 512 tokens behind 2048: a prompt each would be 5 times as many bytes.
    mask, length = np.ones((1, T), bool), np.full((1, 16), 512)
    assert pallas_tpu.bytes_read(mask, length, C, K, h, 2) * 4 == 16 * (2048 + 512) * 2 * K * h * 2


def test_rows_and_heads_are_cut_over_a_mesh():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    placement = Placement(mesh, rows=("fsdp",), heads=("tensor",))
    arrays = arguments(B=4, T=128, C=128, G=2, h=16)
    placed = functools.partial(decode_attention, implementation="pallas", placement=placement)
    got = jax.jit(lambda *arrays: placed(*arrays, 1))(*arrays)
    assert got.sharding.shard_shape(got.shape) == (1, 2, 7, 16)
    np.testing.assert_allclose(got, run(*arrays, layer=1, implementation="xla"), atol=2e-6)
    with pytest.raises(ValueError, match="3 rows, expected a multiple of the 4 devices"):
        placed(*(x[:, :3] if x.ndim > 4 else x[:3] for x in arrays), 0)


def test_shapes_that_do_not_fit_are_named():
    arrays = arguments()
    arrays[5] = arrays[5][..., :100, :]
    with pytest.raises(ValueError, match=r"own_value \(2, 2, 3, 2, 100, 32\), expected \(2, 2, 3, 2, 150, 32\)"):
        decode_attention(*arrays, 0)
