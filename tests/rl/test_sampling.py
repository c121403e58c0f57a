"""Sampling from logits: exact frequencies, transformers' filters as the oracle, random bits that belong to a sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rl_policy import log_softmax

from mer_r1_jax.rl import sampling
from mer_r1_jax.rl.sampling import SamplingConfig, banned_bias, sample

N = 300  # more than two blocks of the two-level draw, and no multiple of one


def config(**settings_):
    return SamplingConfig(**(dict(max_completion_length=8, eos_ids=(1,)) | settings_))


def test_draws_follow_the_distribution_exactly():
    """Evenly spread uniforms must give every token its share, to within one draw at each end of its interval."""
    logits = np.random.default_rng(0).normal(size=N).astype(np.float32) * 2
    draws = 40_000
    uniform = (jnp.arange(draws) + 0.5) / draws
    setting = config(temperature=0.7, banned_ids=(0, 5, 127, 128, 299))
    token, _, _ = jax.jit(lambda u: sample(jnp.broadcast_to(logits, (draws, N)), u, setting))(uniform)
    scaled = logits.astype(np.float64) / 0.7
    scaled[list(setting.banned_ids)] = -np.inf
    expected = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum() * draws
    counts = np.bincount(np.asarray(token), minlength=N)
    assert counts[list(setting.banned_ids)].sum() == 0
    assert np.abs(counts - expected).max() < 2


@pytest.mark.torch
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 400]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)
@settings(max_examples=40)
def test_filters_agree_with_transformers(seed, temperature, top_k, top_p, min_p):
    import torch
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(4, N)).astype(np.float32) * 3
    scores = torch.tensor(logits)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        scores = warper(None, scores)
    kept = torch.isfinite(scores).numpy()
    setting = config(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    uniform = np.linspace(0, 1, 64, endpoint=False, dtype=np.float32)
    rows = jnp.broadcast_to(logits[:, None], (4, 64, N))
    token, logprob, sampling_logprob = sample(rows, jnp.broadcast_to(uniform, (4, 64)), setting)
    for row in range(4):
        own = np.asarray(token[row])
        assert kept[row, own].all()
        np.testing.assert_allclose(sampling_logprob[row], log_softmax(scores[row].numpy())[own], atol=2e-5)
        np.testing.assert_allclose(logprob[row], log_softmax(logits[row])[own], atol=2e-5)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1.0])
def test_extreme_uniforms_never_leave_the_support(uniform):
    """Zero-weight tokens sit at both ends of the vocabulary, of its blocks, and fill whole blocks."""
    logits = np.full((6, N), -np.inf, np.float32)
    for row, kept in enumerate([[3], [130, 131], [0, 299], [127, 128], [255], [20, 140, 290]]):
        logits[row, kept] = [0.3 * i for i in range(len(kept))]
    token, logprob, sampling_logprob = sample(jnp.asarray(logits), jnp.full(6, uniform), config())
    assert np.isfinite(np.asarray(sampling_logprob)).all() and np.isfinite(np.asarray(logprob)).all()
    assert np.isfinite(logits[np.arange(6), np.asarray(token)]).all()


def test_zero_temperature_takes_the_most_likely_allowed_token():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(5, N)).astype(np.float32))
    best = int(jnp.argmax(logits[0]))
    token, logprob, sampling_logprob = sample(logits, jnp.zeros(5), config(temperature=0.0, banned_ids=(best,)))
    allowed = np.asarray(logits).copy()
    allowed[:, best] = -np.inf
    np.testing.assert_array_equal(token, allowed.argmax(-1))
    np.testing.assert_allclose(logprob, log_softmax(logits)[np.arange(5), np.asarray(token)], atol=1e-5)
    assert not np.asarray(sampling_logprob).any()


def test_random_numbers_depend_on_the_sample_alone():
    key = jax.random.fold_in(jax.random.key(3), 5)
    uniforms = jax.jit(sampling.uniforms, static_argnums=(2, 3))
    whole = np.asarray(uniforms(key, jnp.array([10, 11, 12], jnp.uint32), 4, 9))
    alone = np.asarray(uniforms(key, jnp.array([12], jnp.uint32), 2, 4))
    np.testing.assert_array_equal(alone[0], whole[2, :2, :4])
    assert len(np.unique(whole)) == whole.size
    for other_key, other_step in ((jax.random.key(3), 6), (jax.random.key(4), 5)):
        other = uniforms(jax.random.fold_in(other_key, other_step), jnp.array([12], jnp.uint32), 2, 4)
        assert not np.isin(np.asarray(other), alone).any()


def test_random_numbers_are_uniform():
    numbers = np.asarray(sampling.uniforms(jax.random.key(0), jnp.arange(64, dtype=jnp.uint32), 8, 32)).ravel()
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    statistic = ((counts - 256) ** 2 / 256).sum()
    assert statistic < 112  # the 99.99% point of chi-square with 63 degrees of freedom


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        (dict(eos_ids=()), "end token"),
        (dict(banned_ids=(1,)), "banned"),
        (dict(temperature=-1.0), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_k=-1), "top_k"),
        (dict(min_p=1.0), "min_p"),
        (dict(max_completion_length=0), "max_completion_length"),
    ],
)
def test_impossible_sampling_settings_are_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        config(**settings_)


def test_impossible_bans_are_refused():
    with pytest.raises(ValueError, match="outside the vocabulary"):
        banned_bias((300,), N)
    with pytest.raises(ValueError, match="every token"):
        banned_bias(tuple(range(N)), N)
