"""The loss of micro-batches, and of several updates that share a rollout, against TRL's own."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.policy_losses import TRL_LOSS_TYPES, batch, own_loss, trl_loss

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.rl.losses import step_totals


@pytest.mark.torch
@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_micro_batches_add_up_as_in_trl(loss_type):
    """Losses and gradients of unevenly masked micro-batches, each with the whole step's denominators."""
    tensors, parts, beta = batch(3, rows=8), 2, 0.04
    config = RlConfig(loss_type=loss_type, max_completion_length=9)
    totals = step_totals(tensors["mask"], np.ones(8, bool), parts)
    num_items = int(tensors["mask"].sum())
    values, gradients = [], []
    for part in range(parts):
        at = slice(4 * part, 4 * part + 4)
        cut = {name: value[at] for name, value in tensors.items()}
        value, gradient, _ = own_loss(cut, config, beta, totals)
        # TRL divides dapo's whole-batch count by steps_per_generation / accumulation steps: 1 here.
        expected, expected_gradient, _ = trl_loss(cut, config, beta, num_items, accumulation=parts)
        np.testing.assert_allclose(value, expected, rtol=2e-5)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=1e-7)
        values.append(value)
        gradients.append(gradient)
    if loss_type != "bnpo":  # bnpo is a mean over micro-batches by definition
        whole, gradient, _ = own_loss(tensors, config, beta, step_totals(tensors["mask"], np.ones(8, bool)))
        np.testing.assert_allclose(sum(values), whole, rtol=2e-5)
        np.testing.assert_allclose(np.concatenate(gradients), gradient, rtol=2e-5, atol=1e-7)


@pytest.mark.torch
@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_updates_of_one_rollout_have_the_losses_and_clips_of_trl(loss_type):
    """A rollout of twelve completions, learnt from in two updates of three micro-batches each."""
    tensors, updates, parts, beta = batch(4, rows=12), 2, 3, 0.04
    config = RlConfig(loss_type=loss_type, max_completion_length=9, steps_per_generation=updates)
    tokens, clips = int(tensors["mask"].sum()), 0.0
    for number in range(updates):
        update = slice(6 * number, 6 * number + 6)
        mask = tensors["mask"][update]
        totals = step_totals(mask, np.ones(6, bool), parts, jnp.float32(tokens / updates))
        region, expected_clips = 0.0, []
        for part in range(parts):
            at = slice(6 * number + 2 * part, 6 * number + 2 * part + 2)
            cut = {name: value[at] for name, value in tensors.items()}
            value, gradient, metrics = own_loss(cut, config, beta, totals)
            # In TRL `steps_per_generation` counts micro-batches.
            trl = trl_loss(cut, config, beta, tokens, accumulation=parts, generation=parts * updates)
            np.testing.assert_allclose(value, trl[0], rtol=2e-5, atol=1e-7)
            np.testing.assert_allclose(gradient, trl[1], rtol=2e-5, atol=1e-7)
            region += float(metrics["clip_ratio/region_mean"])
            # A mean over the micro-batch's own tokens.
            expected_clips.append(trl[2]["clip_ratio/region_mean"] * max(1, cut["mask"].sum()))
        np.testing.assert_allclose(region, sum(expected_clips) / mask.sum(), rtol=1e-5)
        clips += region
    assert clips > 0
