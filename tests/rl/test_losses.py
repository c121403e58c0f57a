"""The policy loss against TRL's own on the same tensors, masked and absent rows, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.policy_losses import LEVELS, TRL_LOSS_TYPES, batch, own_loss, trl_loss

from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.config.schema import LOSS_TYPES, ConfigError, RlConfig
from mer_r1_jax.rl.losses import kl_penalty, loss_mask, step_totals


@pytest.mark.torch
@given(
    seed=st.integers(0, 1000),
    loss_type=st.sampled_from(TRL_LOSS_TYPES),
    level=st.sampled_from(LEVELS),
    epsilons=st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.05, 0.1)]),
    delta=st.sampled_from([0.0, 1.4]),
    beta=st.sampled_from([0.0, 0.04, 0.5]),
    on_policy=st.booleans(),
)
@settings(max_examples=60)
def test_policy_loss_and_gradient_equal_trl(seed, loss_type, level, epsilons, delta, beta, on_policy):
    tensors = batch(seed)
    if on_policy:
        tensors["old_logprob"] = None
    config = RlConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon=epsilons[0],
        epsilon_high=epsilons[1],
        delta=delta,
        max_completion_length=9,
    )
    totals = step_totals(tensors["mask"], np.ones(len(tensors["mask"]), bool))
    value, gradient, metrics = own_loss(tensors, config, beta, totals)
    expected, expected_gradient, expected_metrics = trl_loss(tensors, config, beta, int(tensors["mask"].sum()))
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=1e-6)
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", *(["kl"] if beta else [])):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_masked_tokens_and_absent_rows_leave_no_trace(loss_type, level):
    """What stands behind the mask, infinities included, changes neither loss nor gradient; nor do absent rows."""
    tensors = batch(5)
    config = RlConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=9)
    present = np.ones(6, bool)
    clean = own_loss(tensors, config, 0.04, step_totals(tensors["mask"], present))
    dirty = dict(tensors)
    for name, rubbish in (("logprob", -np.inf), ("old_logprob", np.inf), ("reference_logprob", np.nan)):
        dirty[name] = np.where(tensors["mask"], tensors[name], rubbish).astype(np.float32)
    padded = {name: np.concatenate([value, value[:2]]) for name, value in dirty.items()}
    padded["mask"][6:] = False
    value, gradient, _ = own_loss(padded, config, 0.04, step_totals(padded["mask"], np.append(present, [False, False])))
    np.testing.assert_allclose(value, clean[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[:6], clean[1], rtol=1e-6)
    assert not gradient[6:].any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_step_without_a_token_has_a_zero_loss(loss_type):
    tensors = batch(6)
    tensors["mask"] = np.zeros_like(tensors["mask"])
    config = RlConfig(loss_type=loss_type)
    value, gradient, metrics = own_loss(tensors, config, 0.04, step_totals(tensors["mask"], np.ones(6, bool)))
    assert value == 0 and not gradient.any()
    assert all(np.isfinite(metric) for metric in metrics.values())


def test_truncated_completions_leave_the_loss_only_when_asked():
    mask = np.ones((1, 2, 3), bool)
    truncated = np.array([[True, False]])
    assert loss_mask(mask, truncated, False).all()
    np.testing.assert_array_equal(loss_mask(mask, truncated, True).sum(-1), [[0, 3]])


def test_kl_is_zero_for_equal_policies_and_positive_otherwise():
    logprob = jnp.linspace(-4, -0.1, 9)
    assert not np.asarray(kl_penalty(logprob, logprob)).any()
    assert (np.asarray(kl_penalty(logprob, logprob[::-1]))[[0, -1]] > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss_type="gspo"), "grpo, bnpo, dr_grpo, dapo"),
        (dict(importance_sampling_level="word"), "token, sequence"),
        (dict(epsilon=1.1), "epsilon"),
        (dict(epsilon=-0.1), "epsilon"),
        (dict(delta=1.1), "delta"),
        (dict(entropy_coef=-0.1), "entropy_coef"),
        (dict(top_entropy_quantile=1.5), "top_entropy_quantile"),
        (dict(sampler_correction="truncate"), "token_truncate, token_mask"),
        (dict(sampler_correction_min=3.0), "less than rl.sampler_correction_max=3"),
        (dict(sampler_correction="token_mask", sampler_correction_max=0.0), "without a bound"),
        (dict(max_completion_length=0), "max_completion_length"),
    ],
)
def test_impossible_loss_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping({"rl": changes})
