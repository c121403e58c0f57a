"""Several updates that share a rollout: how it is cut, what their losses and clips are, and how many a run makes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.rl_rollouts import BETA, TEXT_ONLY, buckets_of, rollout_of
from support.small_run import with_config

from mer_r1_jax.config.schema import ConfigError
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.training.rl_step import RlPrograms
from mer_r1_jax.training.state import init_state


def test_second_update_from_a_rollout_sees_the_policy_that_sampled(small, trained):
    setup = with_config(small, rl={"num_iterations": 2})
    maker = setup.rl_step(buckets_of(setup))
    experience = rollout_of(setup, maker, trained, [0, 1, 2, 3]).experience
    np.testing.assert_allclose(experience.targets.old_logprob_BGC, experience.targets.reference_logprob_BGC, atol=1e-6)
    assert isinstance(experience.completion, Continuations)
    update = setup.programs.make_update(optax.sgd(3.0))
    state = init_state(jax.tree.map(jnp.array, trained), TEXT_ONLY, optax.sgd(3.0), "float32")
    state, first = update(state, experience, BETA)
    state, second = update(state, experience, BETA)
    assert first["clip_ratio/region_mean"] == 0 and second["clip_ratio/region_mean"] > 0
    assert second["kl"] > first["kl"]


@pytest.fixture(scope="module")
def halves(small, trained):
    """The setup whose rollouts of four prompts are learnt from in two updates, and one of its rollouts."""
    setup = with_config(small, rl={"prompts_per_step": 2, "steps_per_generation": 2, "num_iterations": 2})
    return setup, rollout_of(setup, setup.rl_step(buckets_of(small)), trained, [0, 1, 2, 3])


def test_a_rollout_is_made_once_and_cut_into_whole_groups(halves, rollout):
    setup, other = halves
    assert other.table["completion"] == rollout.table["completion"]
    targets = other.experience.targets
    np.testing.assert_array_equal(targets.advantage_BG, rollout.experience.targets.advantage_BG)
    # Under the policy that sampled, as the trainer scores it; the reference is that policy here.
    np.testing.assert_allclose(targets.old_logprob_BGC, targets.reference_logprob_BGC, atol=1e-6)
    tokens = np.asarray(targets.mask_BGC).sum()
    whole = jax.tree.map(np.asarray, other.experience)
    for number in range(4):  # each half, and each of them once more
        rows = slice(0, 2) if number % 2 == 0 else slice(2, 4)
        part = setup.programs.minibatch(other.experience, number)
        assert part.rollout_mean_tokens == tokens / 2
        assert part.prompts.tokens.position_3BT.shape[1] == 2  # rows are its second axis
        for name in ("advantage_BG", "mask_BGC", "present_BG", "old_logprob_BGC", "reference_logprob_BGC"):
            expected = getattr(whole.targets, name)[rows]
            np.testing.assert_array_equal(getattr(part.targets, name), expected, err_msg=name)
        np.testing.assert_array_equal(part.prompts.features_BRD, whole.prompts.features_BRD[rows])
        np.testing.assert_array_equal(part.prompts.tokens.position_3BT, whole.prompts.tokens.position_3BT[:, rows])
        np.testing.assert_array_equal(part.completion.id_BGC, whole.completion.id_BGC[rows])
        np.testing.assert_array_equal(part.prompts.uid_B, whole.prompts.uid_B[rows])
    with pytest.raises(TypeError, match="cannot reshape"):  # four rows in three parts
        setup.programs.cut_minibatch.eval_shape(other.experience, np.int32(0), 3)


def test_updates_of_one_rollout_add_up_to_its_loss_while_the_policy_stands_still(halves, trained, rollout):
    """Every token weighs the same in whichever of them it is, as in TRL: dapo divides by the rollout's mean."""
    setup, other = halves
    update, values = setup.programs.make_update(optax.sgd(0.0)), []
    state = init_state(jax.tree.map(jnp.array, trained), TEXT_ONLY, optax.sgd(0.0), "float32")
    for number in range(2):
        state, metrics = update(state, setup.programs.minibatch(other.experience, number), BETA)
        values.append(float(metrics["loss"]))
    _, metrics = update(state, rollout.experience, BETA)
    assert abs(values[0] - values[1]) > 1e-3
    np.testing.assert_allclose(np.mean(values), metrics["loss"], rtol=1e-4, atol=1e-6)


def test_ratios_of_later_updates_are_to_the_policy_that_sampled_and_are_clipped(halves, trained):
    """The shares of clipped tokens against a count by hand, in every update of a rollout."""
    setup, other = halves
    programs, config = setup.programs, setup.config.rl
    update = programs.make_update(optax.sgd(3.0))
    state = init_state(jax.tree.map(jnp.array, trained), TEXT_ONLY, optax.sgd(3.0), "float32")
    found = []
    for number in range(config.updates_per_rollout):
        part = programs.minibatch(other.experience, number)
        logprob_BGC = np.asarray(programs.logprobs(state.params, part.prompts, part.completion))
        state, metrics = update(state, part, BETA)
        mask_BGC, advantage_BG1 = np.asarray(part.targets.mask_BGC), np.asarray(part.targets.advantage_BG)[..., None]
        ratio_BGC = np.exp(np.where(mask_BGC, logprob_BGC - np.asarray(part.targets.old_logprob_BGC), 0))
        low = (ratio_BGC < 1 - config.epsilon) & (advantage_BG1 < 0) & mask_BGC
        high = (ratio_BGC > 1 + config.epsilon_high) & (advantage_BG1 > 0) & mask_BGC
        for name, flags in (("low", low), ("high", high), ("region", low | high)):
            share = float(metrics[f"clip_ratio/{name}_mean"])
            assert share == pytest.approx(flags.sum() / mask_BGC.sum(), abs=1.5 / mask_BGC.sum()), (number, name)
        # The sampler is held against the policy that sampled, not against the one that has moved.
        gap = np.abs(np.asarray(part.sampling_logprob_BGC) - np.asarray(part.targets.old_logprob_BGC))[mask_BGC]
        np.testing.assert_allclose(metrics["sampling/sampling_logp_difference/mean"], gap.mean(), rtol=1e-4)
        found.append(float(metrics["clip_ratio/region_mean"]))
    assert found[0] == 0 and min(found[1:]) > 0.01


def test_one_update_a_rollout_is_the_program_it_was(small, trained, rollout):
    """The setting reaches a program only through what the rollout then brings along."""
    assert rollout.experience.targets.old_logprob_BGC is None and rollout.experience.rollout_mean_tokens is None
    assert small.programs.minibatch(rollout.experience, 0) is rollout.experience
    state = init_state(trained, TEXT_ONLY, optax.sgd(1.0), "float32")

    def program(**settings):
        programs = RlPrograms(small.backbone, dataclasses.replace(small.config.rl, **settings), small.programs.sampling)
        return str(programs.make_update(optax.sgd(1.0)).trace(state, rollout.experience, BETA).jaxpr)

    assert program() == program(steps_per_generation=3)


def test_steps_are_whole_rollouts(small):
    """Six records in rollouts of two, each learnt from in two updates, twice: three rollouts an epoch."""
    several = {"prompts_per_step": 1, "steps_per_generation": 2, "num_iterations": 2}
    phase = with_config(small, rl=several | {"max_steps": -1}, eval={"eval_steps": 0}).rl_phase()
    assert phase.total_steps == 3 * 4 and {bucket.rows for bucket in phase.buckets} == {2}
    with pytest.raises(ConfigError, match="rl.max_steps: got 6.*rl.steps_per_generation=2 x rl.num_iterations=2: a"):
        with_config(small, rl=several | {"max_steps": 6}).rl_phase()
    with pytest.raises(ConfigError, match="eval.eval_steps: got 3.*rl.steps_per_generation=2 x rl.num_iterations=2: e"):
        with_config(small, rl=several | {"max_steps": 8}).rl_phase()
