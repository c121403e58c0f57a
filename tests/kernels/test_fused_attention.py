"""cuDNN's attention as we call it: the same call of jax.nn by plain XLA against the reference, gradients included.

That cuDNN takes the call at the sizes of 3B is compiled for in tests/planning/test_gpu_compiler.py.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention_cases import CASES, LIMITS, pulled, relative_error

from mer_r1_jax.kernels.attention import cudnn, reference
from mer_r1_jax.kernels.placement import Placement


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("packed RL row, 28/4 heads of 128", jnp.float32),
        ("packed RL row, 28/4 heads of 128", jnp.bfloat16),
        ("vision windows, 16/16 heads of 80", jnp.float32),
        ("audio chunks, 20/20 heads of 64", jnp.bfloat16),
    ],
)
def test_rows_are_those_of_the_reference(name, dtype):
    case = CASES[name]
    *arrays, gradient = case.arrays(dtype)
    mask = reference.segment_mask(*case.segments(), causal=case.causal, shared_segment=case.shared_segment)
    # What sees nothing has no meaning, so nothing may ask for it.
    gradient = jnp.where(mask.any(axis=-1)[..., None, None], gradient, 0)

    def of(call):
        return pulled(lambda q, k, v: call(q, k, v, mask, scale=case.width**-0.5), arrays, gradient)

    got, want = map(of, (functools.partial(cudnn.attention, implementation="xla"), reference.attention))
    seen = np.asarray(mask.any(axis=-1))[..., None, None]
    for part, one, other in zip(("result", "query", "key", "value"), got, want, strict=True):
        assert one.dtype == dtype and one.shape == other.shape and np.isfinite(np.asarray(one, np.float32)).all()
        if part in ("result", "query"):
            one, other = (jnp.where(seen, x, 0) for x in (one, other))
        assert relative_error(one, other) < LIMITS[dtype], part


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_completions_and_their_shared_prompt_are_those_of_the_reference(dtype):
    rng = np.random.default_rng(0)
    B, G, C, T, H, K, h = 2, 3, 16, 24, 4, 2, 64
    shapes = (B, G, C, H, h), (B, T, K, h), (B, T, K, h), (B, G, C, K, h), (B, G, C, K, h), (B, G, C, H, h)
    *arrays, gradient = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    prompt_mask = jnp.asarray(np.arange(T) >= np.array([[5], [0]])) & jnp.asarray(np.arange(T) < np.array([[T], [17]]))
    # Two texts of a completion, then padding that no query of theirs sees.
    segment = np.repeat([1, 2, 0], [7, 6, 3])
    own_mask = jnp.asarray(np.tril(segment[:, None] == segment) & (segment != 0))
    own_mask = jnp.broadcast_to(own_mask, (B, G, C, C))

    def of(call):
        def run(q, prompt_k, prompt_v, own_k, own_v):
            return call(q, prompt_k, prompt_v, prompt_mask, own_k, own_v, own_mask, scale=h**-0.5)

        return pulled(run, arrays, gradient)

    got, want = map(
        of, (functools.partial(cudnn.shared_prompt_attention, implementation="xla"), reference.shared_prompt_attention)
    )
    for one, other in zip(got, want, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        # Gradients of the prompt are sums over completions, each rounded to bfloat16 once more than the reference's.
        assert relative_error(one, other) < 2 * LIMITS[dtype]


def card(**changes):
    """A placement on a card that is not there."""
    device = types.SimpleNamespace(**({"platform": "gpu", "compute_capability": "9.0"} | changes))
    mesh = types.SimpleNamespace(devices=np.array([device], dtype=object))
    return Placement(mesh=mesh)


def test_it_is_taken_on_a_gpu_where_its_kernels_apply(monkeypatch):
    monkeypatch.setattr(cudnn, "is_there", lambda: True)

    def applies(width=128, tokens=(512, 2560), dtype=jnp.bfloat16, **changes):
        return cudnn.applies(jax.ShapeDtypeStruct((4, 512, 16, width), dtype), tokens, card(**changes))

    assert applies() and applies(width=80) and applies(dtype=jnp.float16) and applies(compute_capability="8.0")
    assert not applies(platform="cpu") and not applies(platform="tpu")
    assert (
        not applies(compute_capability="gfx942")
        and not applies(compute_capability="7.5")
        and not applies(dtype=jnp.float32)
    )
    assert not applies(width=256) and not applies(width=100) and not applies(tokens=(513, 2560))
    monkeypatch.setattr(cudnn, "is_there", lambda: False)
    assert not applies()
