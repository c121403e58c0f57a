"""The loss's entropy switches and its correction for the sampler, against TRL's own and by hand."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.policy_losses import (
    LEVELS,
    TRL_LOSS_TYPES,
    batch,
    entropies_and_sampler,
    own_loss,
    trl_loss,
    trl_ratio,
)

from mer_r1_jax.config.schema import RlConfig, SamplerCorrection
from mer_r1_jax.rl import losses
from mer_r1_jax.rl.losses import PolicyTargets, policy_loss, step_totals

CORRECTIONS = typing.get_args(SamplerCorrection)


@pytest.mark.torch
@given(
    seed=st.integers(0, 1000),
    loss_type=st.sampled_from(TRL_LOSS_TYPES),
    level=st.sampled_from(LEVELS),
    coefficient=st.sampled_from([0.0, 0.3]),
    quantile=st.sampled_from([1.0, 0.6, 0.2, 0.0]),
    correction=st.sampled_from(CORRECTIONS),
    bounds=st.sampled_from([(0.0, 3.0), (0.5, 2.0), (0.8, 0.0)]),
    on_policy=st.booleans(),
)
@settings(max_examples=60)
def test_entropy_switches_and_the_sampler_s_correction_equal_trl(
    seed, loss_type, level, coefficient, quantile, correction, bounds, on_policy
):
    """Alone and together: loss, gradients by log-probabilities and entropies, and the mean weight."""
    tensors = batch(seed)
    if on_policy:
        tensors["old_logprob"] = None
    tensors |= entropies_and_sampler(seed + 1, tensors)
    config = RlConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        entropy_coef=coefficient,
        top_entropy_quantile=quantile,
        sampler_correction=correction,
        sampler_correction_min=bounds[0],
        sampler_correction_max=bounds[1],
        max_completion_length=9,
    )
    mask = tensors["mask"]
    value, gradients, metrics = own_loss(tensors, config, 0.04, step_totals(mask, np.ones(len(mask), bool)))
    expected, expected_gradients, expected_metrics = trl_loss(tensors, config, 0.04, int(mask.sum()))
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["kl"], expected_metrics["kl"], rtol=2e-5, atol=1e-6)
    if correction != "none":
        trained = tensors["logprob"] if on_policy else tensors["old_logprob"]
        ratio = trl_ratio(trained, tensors["sampling_logprob"], mask, config)
        of_tokens = ratio[mask] if correction.startswith("token") else ratio
        name = "sampling/importance_sampling_ratio/mean"
        np.testing.assert_allclose(metrics[name], of_tokens.mean(), rtol=2e-5)


def test_the_share_of_highest_entropy_is_counted_among_tokens_of_the_loss():
    entropy = np.array([[[0.1, 0.9, 0.5, 99.0], [0.7, 0.3, 0.5, np.nan]]], np.float32)
    mask = np.array([[[1, 1, 1, 0], [1, 1, 1, 0]]], bool)

    def kept(share):
        return np.asarray(losses.highest_entropy(jnp.asarray(entropy), mask, share)).astype(int).tolist()

    assert kept(0.0) == [[[0, 1, 0, 0], [0, 0, 0, 0]]]
    assert kept(0.3) == [[[0, 1, 0, 0], [1, 0, 0, 0]]]
    assert kept(0.5) == [[[0, 1, 1, 0], [1, 0, 1, 0]]]  # the two of 0.5 together
    assert kept(1.0) == mask.astype(int).tolist()
    assert not losses.highest_entropy(jnp.asarray(entropy), np.zeros_like(mask), 0.5).any()


@pytest.mark.parametrize(
    ("correction", "weights", "beyond"),
    [
        ("token_truncate", [[2.0, 0.5, 1.0], [1.5, 1.0, 1.0]], 2 / 5),
        ("token_mask", [[0.0, 0.0, 1.0], [1.5, 1.0, 1.0]], 2 / 5),
        ("sequence_truncate", [[1.0], [1.5]], 0.0),  # 4 x 0.25, and 1.5
        ("sequence_mask", [[1.0], [1.5]], 0.0),
    ],
)
def test_the_sampler_is_corrected_for_by_hand(correction, weights, beyond):
    """Ratios 4, 0.25, 1 and 1.5, 1 (then padding that must not count), within [0.5, 2]."""
    trained = np.log([[[0.4, 0.1, 0.2], [0.3, 0.2, 0.2]]]).astype(np.float32)
    sampled = np.log([[[0.1, 0.4, 0.2], [0.2, 0.2, 1e-9]]]).astype(np.float32)
    mask = np.array([[[1, 1, 1], [1, 1, 0]]], bool)
    config = RlConfig(sampler_correction=correction, sampler_correction_min=0.5, sampler_correction_max=2.0)
    weight, found = losses.sampler_ratio(jnp.asarray(trained), jnp.asarray(sampled), mask, config)
    np.testing.assert_allclose(weight[0], weights, rtol=1e-5)
    share = float((found & mask).sum() / mask.sum()) if correction.startswith("token") else float(found.mean())
    assert share == pytest.approx(beyond)


def test_entropies_are_asked_for_where_a_switch_reads_them():
    tensors = batch(1)
    totals = step_totals(tensors["mask"], np.ones(6, bool))
    for switch in (dict(entropy_coef=0.1), dict(top_entropy_quantile=0.5)):
        with pytest.raises(ValueError, match="need entropies"):
            own_loss(tensors, RlConfig(**switch), 0.0, totals)


def test_switches_that_are_off_leave_the_program_as_it_was():
    """The same jaxpr whether the entropies and bounds are given or not."""
    tensors = batch(2)
    totals = step_totals(tensors["mask"], np.ones(6, bool))

    def traced(config, **given):
        def loss(logprob, entropy):
            targets = PolicyTargets(
                advantage_BG=tensors["advantage"], mask_BGC=tensors["mask"], present_BG=np.ones(6, bool), **given
            )
            return policy_loss(logprob, targets, 0.0, totals, config, entropy)[0]

        return str(jax.make_jaxpr(loss)(tensors["logprob"], tensors["logprob"]))

    plain = traced(RlConfig())
    assert traced(RlConfig(sampler_correction_max=2.0, sampler_correction_min=0.5)) == plain
    assert traced(RlConfig(entropy_coef=0.1)) != plain
    assert traced(RlConfig(top_entropy_quantile=0.5)) != plain
    on = RlConfig(sampler_correction="token_mask")
    assert traced(on, sampling_logprob_BGC=tensors["old_logprob"]) != plain
