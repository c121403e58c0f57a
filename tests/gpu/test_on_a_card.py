"""On a GPU: cuDNN's attention against the reference in float32, and whole steps against those of the CPU.

The lane `gpu` alone runs these, on a machine with a card: `python -m pytest --lane=gpu`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention_cases import LIMITS, packed_row, pulled, relative_error, windows

from mer_r1_jax.kernels.attention import api, cudnn, reference
from mer_r1_jax.peers.omni import OmniSide
from mer_r1_jax.peers.real_size import SIZES, real_job

ROWS = {
    "prompts of 3B, 16/2 heads of 128": (16, 2, 128, packed_row([2048, 1661], 2048, [[], []], 0), True),
    "text behind text, 28/4 heads of 128": (28, 4, 128, packed_row([700, 512], 768, [[250, 200], [256, 3]], 256), True),
    "vision windows, 16/16 heads of 80": (16, 16, 80, windows(2, 24, 8, 56), False),
    "audio, 20/20 heads of 64": (20, 20, 64, windows(3, 20, 10, 112), False),
}


def in_float32(call, arrays, gradient):
    with jax.default_matmul_precision("highest"):
        return pulled(call, [x.astype(jnp.float32) for x in arrays], gradient.astype(jnp.float32))


@pytest.mark.parametrize("name", ROWS)
def test_rows_by_cudnn_are_those_of_the_reference(name):
    heads, key_heads, width, segment, causal = ROWS[name]
    segment = jnp.asarray(segment, jnp.int32)
    rng = np.random.default_rng(0)
    shapes = [(*segment.shape, count, width) for count in (heads, key_heads, key_heads, heads)]
    *arrays, gradient = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    gradient = jnp.where((segment > 0)[..., None, None], gradient, 0)  # what sees nothing has no meaning
    assert cudnn.applies(arrays[0], segment.shape[1:] * 2, None), "cuDNN has to be what is tested"
    mask = reference.segment_mask(segment, segment, causal=causal, shared_segment=None)
    got = pulled(lambda q, k, v: api.attention(q, k, v, segment, segment, causal=causal), arrays, gradient)
    want = in_float32(lambda q, k, v: reference.attention(q, k, v, mask, scale=width**-0.5), arrays, gradient)
    for part, one, other in zip(("result", "query", "key", "value"), got, want, strict=True):
        if part in ("result", "query"):
            one, other = (jnp.where((segment > 0)[..., None, None], x, 0) for x in (one, other))
        error = relative_error(one, other)
        print(f"{name}: {part} {error:.1e}")
        assert error < LIMITS[jnp.bfloat16], part


def test_completions_by_cudnn_are_those_of_the_reference():
    rng = np.random.default_rng(0)
    B, G, C, T, H, K, h = 2, 4, 256, 1024, 16, 2, 128
    shapes = (B, G, C, H, h), (B, T, K, h), (B, T, K, h), (B, G, C, K, h), (B, G, C, K, h), (B, G, C, H, h)
    *arrays, gradient = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    prompt_mask = jnp.asarray(np.arange(T) < np.array([[T], [701]]))
    segment = np.repeat([1, 2, 0], [180, 60, 16])  # two texts of a completion, then padding that nothing sees
    own_mask = jnp.broadcast_to(jnp.asarray(np.tril(segment[:, None] == segment) & (segment != 0)), (B, G, C, C))
    gradient = jnp.where(jnp.asarray(segment != 0)[:, None, None], gradient, 0)

    def of(call, **settings):
        def run(q, prompt_k, prompt_v, own_k, own_v):
            out = call(q, prompt_k, prompt_v, prompt_mask, own_k, own_v, own_mask, scale=h**-0.5, **settings)
            return jnp.where(jnp.asarray(segment != 0)[:, None, None], out, 0)

        return run

    assert cudnn.applies(arrays[0], (C, T + C), None), "cuDNN has to be what is tested"
    got = pulled(of(api.shared_prompt_attention), arrays, gradient)
    want = in_float32(of(reference.shared_prompt_attention), arrays, gradient)
    for part, one, other in zip(("result", "q", "prompt k", "prompt v", "own k", "own v"), got, want, strict=True):
        error = relative_error(one, other)
        print(f"shared prompt: {part} {error:.1e}")
        # Gradients of the prompt are sums over completions, each rounded to bfloat16.
        assert error < 2 * LIMITS[jnp.bfloat16], part


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Two steps of the same job on the CPU in float32, on the card in float32, and on the card in bfloat16."""
    size = dataclasses.replace(SIZES["tiny"], height=112, width=112)
    cpu, card = jax.local_devices(backend="cpu")[0], jax.devices()[0]
    assert card.platform == "gpu", "the card has to be what is tested"
    done = {}
    for name, device, dtype in (("cpu", cpu, "float32"), ("card", card, "float32"), ("half", card, "bfloat16")):
        folder = tmp_path_factory.mktemp(name)
        # Without this a card multiplies float32 in 19 bits.
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            side = OmniSide(real_job(dataclasses.replace(size, dtype=dtype), folder, devices=[device]))
            ids = side.sampled_ids()
            metrics = []
            for _ in range(2):
                side.step()
                metrics.append(side.metrics)
        print(name, metrics)
        done[name] = (ids, metrics)
    return done


def test_a_step_on_a_card_is_that_of_the_cpu(steps):
    (cpu_ids, cpu), (ids, card) = steps["cpu"], steps["card"]
    for one, other in zip(card, cpu, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
    assert cpu[1]["kl"] > 0
    # A draw that falls between two tokens may fall to the other one, and what follows it is another text.
    assert (ids == cpu_ids).mean() > 0.9


def test_a_step_in_bfloat16_is_near(steps):
    (_, cpu), (ids, half) = steps["cpu"], steps["half"]
    assert half[0]["loss"] == pytest.approx(cpu[0]["loss"], rel=0.05, abs=2e-3)
    assert half[0]["grad_norm"] == pytest.approx(cpu[0]["grad_norm"], rel=0.05)
    assert (ids >= 0).all()
