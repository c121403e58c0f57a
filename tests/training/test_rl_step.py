"""The RL step on real clips and a small policy that has learnt to answer: rollout, scores, advantages, update."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.small_run import visits_of, with_config

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.parallel.rows import put
from mer_r1_jax.rl.losses import PolicyLossConfig
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.rl.rollout import STOP_ABSENT
from mer_r1_jax.run.experience import ExperienceMaker
from mer_r1_jax.training.prompts import plan_buckets
from mer_r1_jax.training.rl import policy_loss_config
from mer_r1_jax.training.state import init_state, partition, trainable_names

TEXT_ONLY = trainable_names(train_audio=False, train_vision=False)
BETA = np.float32(0.04)


def buckets_of(setup):
    return plan_buckets(setup.config, setup.backbone.config, setup.data.rl, setup.config.rl.prompts_per_step)


@pytest.fixture(scope="module")
def maker(small):
    return ExperienceMaker(small, buckets_of(small), encode_inside=False)


@pytest.fixture(scope="module")
def policy(trained):
    """(trainable, frozen) leaves."""
    return partition(trained, TEXT_ONLY)


def rollout_of(setup, maker, policy, numbers, step=0):
    return maker.make(policy, policy, visits_of(setup, setup.data.rl, numbers), step)


@pytest.fixture(scope="module")
def rollout(small, maker, policy):
    """Of four clips; the reference is the policy."""
    return rollout_of(small, maker, policy, [0, 1, 2, 3])


@pytest.fixture(scope="module")
def updates(small):
    """parts -> the jitted update by plain gradient descent: the change of a leaf is its gradient."""
    made = {}

    def update_of(parts):
        if parts not in made:
            config = dataclasses.replace(small.programs.config, gradient_accumulation_steps=parts)
            programs = dataclasses.replace(small.programs, config=config)
            made[parts] = programs.make_update(optax.sgd(1.0), small.candidates.ids_ZY)
        return made[parts]

    return update_of


@pytest.fixture(scope="module")
def gradients_of(trained, updates):
    """(experience, parts) -> (gradients by name, metrics, new state)."""

    def gradients_of(experience, parts=1):
        state = init_state(jax.tree.map(jnp.array, trained), TEXT_ONLY, optax.sgd(1.0), "float32")
        state, metrics = updates(parts)(state, experience, BETA)
        gradients = {name: np.asarray(trained[name] - new) for name, new in state.trainable.items()}
        return gradients, jax.device_get(metrics), state

    return gradients_of


def assert_same_gradients(one, other):
    assert one.keys() == other.keys()
    for name in one:
        scale = np.abs(one[name]).max()
        assert scale > 0, name
        np.testing.assert_allclose(other[name], one[name], rtol=0, atol=2e-5 * scale + 2e-7, err_msg=name)


def test_rollout_has_something_to_learn_from(rollout):
    """The premise of the tests below: rewards and lengths differ within groups."""
    advantage_BG = np.asarray(rollout.experience.advantage_BG)
    assert np.ptp(advantage_BG, axis=1).max() > 1
    assert len(set(rollout.table["length"])) > 1
    assert any(value is not None for value in rollout.table["r_plus"])


def test_kl_is_zero_and_reference_equals_policy_before_the_first_update(rollout, gradients_of):
    _, metrics, _ = gradients_of(rollout.experience)
    assert 0 <= metrics["kl"] < 1e-10  # exp(d) - d - 1 of differences around 1e-6
    assert metrics["clip_ratio/region_mean"] == 0


def test_kl_is_seen_once_the_policy_moved(small, maker, policy, rollout, gradients_of):
    elsewhere = jax.tree.map(lambda leaf: 1.01 * leaf, policy[0])
    other = maker.make(policy, (elsewhere, policy[1]), visits_of(small, small.data.rl, [0, 1, 2, 3]), 0)
    _, metrics, _ = gradients_of(other.experience)
    assert metrics["kl"] > 1e-5
    assert other.table["completion"] == rollout.table["completion"]  # the reference does not sample


def test_update_scores_tokens_as_the_rollout_sampled_them(small, policy, rollout, gradients_of):
    """Decoding with a cache and the update's forward pass agree on every token's log-probability."""
    experience = rollout.experience
    untempered = dataclasses.replace(small.programs, config=dataclasses.replace(small.config.rl, temperature=1.0))
    logprob_BGC = untempered.logprobs(policy, experience.prompts, experience.features_BRD, experience.completion)
    mask_BGC = np.asarray(experience.loss_mask_BGC)
    scored_BG = np.where(mask_BGC, logprob_BGC, 0).sum(-1)
    np.testing.assert_allclose(np.ravel(scored_BG), rollout.table["logprob"], atol=2e-4)
    # The distribution drawn from leaves out what must not be generated: tokens get a little likelier, never less.
    tempered = np.asarray(experience.reference_logprob_BGC)
    gap = (np.asarray(experience.sampling_logprob_BGC) - tempered)[mask_BGC]
    assert gap.min() > -1e-4 and gap.mean() < 0.05
    _, metrics, _ = gradients_of(experience)
    np.testing.assert_allclose(metrics["sampling/sampling_logp_difference/mean"], np.abs(gap).mean(), atol=1e-5)


def test_rl_micro_batches_add_up_to_the_step_whatever_their_masks(rollout, gradients_of):
    # One micro-batch has almost no tokens in its loss.
    mask_BGC = np.array(rollout.experience.loss_mask_BGC)
    mask_BGC[:2, 1:] = False
    experience = dataclasses.replace(rollout.experience, loss_mask_BGC=jnp.asarray(mask_BGC))
    whole, whole_metrics, _ = gradients_of(experience)
    parts, parts_metrics, _ = gradients_of(experience, parts=2)
    assert_same_gradients(whole, parts)
    for name in ("loss", "policy_loss", "entropy", "grad_norm", "sampling/sampling_logp_difference/mean"):
        np.testing.assert_allclose(parts_metrics[name], whole_metrics[name], rtol=2e-5, atol=1e-7, err_msg=name)


def test_rl_leaves_the_towers_as_they_are(trained, rollout, gradients_of):
    gradients, _, state = gradients_of(rollout.experience)
    assert all(name.startswith("text/") for name in gradients)
    assert {name.partition("/")[0] for name in state.frozen} == {"audio", "vision"}
    for name, leaf in state.frozen.items():
        np.testing.assert_array_equal(leaf, trained[name], err_msg=name)


def test_features_encoded_outside_give_the_gradient_of_those_encoded_inside(rollout, gradients_of):
    outside, metrics, _ = gradients_of(rollout.experience)
    inside, other, _ = gradients_of(dataclasses.replace(rollout.experience, features_BRD=None))
    assert_same_gradients(outside, inside)
    np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-5, atol=1e-7)


def test_features_matter_to_what_is_sampled(small, policy, rollout):
    """The update and the rollout really look at the clips: without features the log-probabilities are others."""
    experience = rollout.experience
    blind = small.programs.logprobs(
        policy, experience.prompts, jnp.zeros_like(experience.features_BRD), experience.completion
    )
    gap = np.abs(np.asarray(blind) - np.asarray(experience.reference_logprob_BGC))[np.asarray(experience.loss_mask_BGC)]
    assert gap.max() > 1e-2


def test_row_of_a_broken_clip_stays_empty_and_changes_no_other(small, maker, policy, rollout, gradients_of):
    broken = rollout_of(small, maker, policy, [0, None, 2, 3])
    kept = np.array([0, 2, 3])
    for name in ("advantage_BG", "sampling_logprob_BGC", "loss_mask_BGC", "reference_logprob_BGC"):
        np.testing.assert_array_equal(
            np.asarray(getattr(broken.experience, name))[kept],
            np.asarray(getattr(rollout.experience, name))[kept],
            err_msg=name,
        )
    experience = broken.experience
    assert not np.asarray(experience.loss_mask_BGC)[1].any() and not np.asarray(experience.present_BG)[1].any()
    assert not np.asarray(experience.advantage_BG)[1].any()
    assert broken.metrics["completions/count"] == 12 and len(broken.table["id"]) == 12
    assert "clip-1" not in broken.table["id"]
    # Its share of the gradient is nothing: the same as with every token of that row masked.
    mask_BGC = np.array(rollout.experience.loss_mask_BGC)
    mask_BGC[1] = False
    masked, _, _ = gradients_of(dataclasses.replace(rollout.experience, loss_mask_BGC=jnp.asarray(mask_BGC)))
    assert_same_gradients(gradients_of(experience)[0], masked)


def completions_by_visit(rollout):
    table = rollout.table
    return {
        (name, generation): text
        for name, generation, text in zip(table["id"], table["generation"], table["completion"], strict=True)
    }


def test_completions_do_not_depend_on_the_rows_around_them(small, maker, policy, rollout):
    visits = visits_of(small, small.data.rl, [3, 2, 1, 0])
    turned = maker.make(policy, policy, visits, 0)
    assert completions_by_visit(turned) == completions_by_visit(rollout)
    later = maker.make(policy, policy, visits, 1)
    assert later.table["completion"] != turned.table["completion"]


def test_nothing_is_sampled_where_all_clips_broke(small, maker, policy, gradients_of):
    empty = rollout_of(small, maker, policy, [None] * 4)
    assert empty.table == {} and empty.metrics["completions/count"] == 0 and empty.tokens == 0
    gradients, metrics, _ = gradients_of(empty.experience)
    assert not any(np.any(gradient) for gradient in gradients.values())
    assert metrics["loss"] == 0 and metrics["skipped_steps"] == 0


def z(values):
    """(x - mean) / (std + 1e-4) of a group, None left out; 0 where invalid or without spread."""
    held = np.asarray([value for value in values if value is not None], np.float64)
    if held.size < 2 or np.ptp(held) == 0:
        return np.zeros(len(values))
    return np.asarray([0.0 if v is None else (v - held.mean()) / (held.std(ddof=1) + 1e-4) for v in values])


def groups(table, name, size=4):
    return [table[name][start : start + size] for start in range(0, len(table[name]), size)]


def test_advantages_are_those_of_the_method(rollout):
    expected = [
        z(recall) + z(precision) + 0.1 * (z(plus) + z(minus)) + 0.1 * z(form)
        for recall, precision, plus, minus, form in zip(
            *(groups(rollout.table, name) for name in ("recall", "precision", "r_plus", "r_minus", "format")),
            strict=True,
        )
    ]
    np.testing.assert_allclose(groups(rollout.table, "advantage"), expected, atol=2e-3)
    np.testing.assert_allclose(rollout.experience.advantage_BG, groups(rollout.table, "advantage"), rtol=1e-6)


def test_baseline_arm_uses_one_reward(small, policy, rollout):
    setup = with_config(small, rl={"arm": "baseline"})
    other = rollout_of(setup, ExperienceMaker(setup, buckets_of(setup), encode_inside=False), policy, [0, 1, 2, 3])
    assert other.table["completion"] == rollout.table["completion"]
    expected = [
        z([f1 + 0.1 * form for f1, form in zip(f1s, forms, strict=True)])
        for f1s, forms in zip(groups(other.table, "f1"), groups(other.table, "format"), strict=True)
    ]
    np.testing.assert_allclose(groups(other.table, "advantage"), expected, atol=2e-3)


def test_permuted_rewards_keep_their_distribution_and_lose_their_owner(small, policy, rollout):
    setup = with_config(small, rl={"permute_rewards": True})
    maker = ExperienceMaker(setup, buckets_of(setup), encode_inside=False)
    permuted = rollout_of(setup, maker, policy, [0, 1, 2, 3])
    assert permuted.table["completion"] == rollout.table["completion"]
    assert permuted.table["f1"] == rollout.table["f1"]  # what is logged is what was earned
    here, there = np.asarray(rollout.experience.advantage_BG), np.asarray(permuted.experience.advantage_BG)
    np.testing.assert_allclose(np.sort(there, axis=1), np.sort(here, axis=1), atol=1e-6)
    assert np.abs(there - here).max() > 0.5
    again = rollout_of(setup, maker, policy, [0, 1, 2, 3])
    np.testing.assert_array_equal(again.experience.advantage_BG, there)


def test_every_setting_of_the_loss_reaches_it():
    settings = dict(
        loss_type="bnpo",
        importance_sampling_level="sequence",
        epsilon=0.1,
        epsilon_high=0.3,
        delta=4.0,
        max_completion_length=77,
    )
    assert policy_loss_config(RlConfig(**settings)) == PolicyLossConfig(**settings)
    assert policy_loss_config(RlConfig()).delta is None  # off, as in TRL


def test_absent_rows_have_no_stop_reason_of_their_own(small, policy, maker):
    prompts = put(
        dataclasses.replace(rollout_of(small, maker, policy, [None, 1, 2, 3]).experience.prompts), small.backbone.mesh
    )
    features = small.programs.encode(policy, prompts.batch)
    completions = small.programs.sample(policy, prompts, features, jax.random.key(0), np.int32(0), generations=4)
    assert (np.asarray(completions.stop_BG)[0] == STOP_ABSENT).all()
    assert (np.asarray(completions.stop_BG)[1:] != STOP_ABSENT).all()
    assert isinstance(completions.exists_BGC, jax.Array) and not np.asarray(completions.exists_BGC)[0].any()


def test_second_update_from_a_rollout_sees_the_policy_that_sampled(small, policy, trained):
    setup = with_config(small, rl={"num_iterations": 2})
    maker = ExperienceMaker(setup, buckets_of(setup), encode_inside=False)
    experience = rollout_of(setup, maker, policy, [0, 1, 2, 3]).experience
    np.testing.assert_allclose(experience.old_logprob_BGC, experience.reference_logprob_BGC, atol=1e-6)
    assert isinstance(experience.completion, Continuations)
    update = setup.programs.make_update(optax.sgd(3.0), setup.candidates.ids_ZY)
    state = init_state(jax.tree.map(jnp.array, trained), TEXT_ONLY, optax.sgd(3.0), "float32")
    state, first = update(state, experience, BETA)
    state, second = update(state, experience, BETA)
    assert first["clip_ratio/region_mean"] == 0 and second["clip_ratio/region_mean"] > 0
    assert second["kl"] > first["kl"]
