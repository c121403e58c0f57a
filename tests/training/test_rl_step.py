"""The RL step on real clips and a small policy that has learnt to answer: rollout, scores, advantages, update."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.rl_rollouts import BETA, TEXT_ONLY, buckets_of, rollout_of
from support.small_run import visits_of, with_config

from mer_r1_jax.parallel.rows import put
from mer_r1_jax.rl.rollout import STOP_ABSENT
from mer_r1_jax.training.prompts import prompt_rows
from mer_r1_jax.training.rl_step import RlPrograms
from mer_r1_jax.training.state import init_state


@pytest.fixture(scope="module")
def updates(small):
    """parts -> the jitted update by plain gradient descent: the change of a leaf is its gradient."""
    made = {}

    def update_of(parts):
        if parts not in made:
            config = dataclasses.replace(small.programs.config, gradient_accumulation_steps=parts)
            programs = RlPrograms(small.backbone, config, small.programs.sampling)
            made[parts] = programs.make_update(optax.sgd(1.0))
        return made[parts]

    return update_of


@pytest.fixture(scope="module")
def gradients_of(trained, updates):
    """(experience, parts) -> (gradients by name, metrics, new state)."""

    def gradients_of(experience, parts=1):
        state = init_state(jax.tree.map(jnp.array, trained), TEXT_ONLY, optax.sgd(1.0), "float32")
        state, metrics = updates(parts)(state, experience, BETA)
        gradients = {name: np.asarray(trained[name] - new) for name, new in state.split()[0].items()}
        return gradients, jax.device_get(metrics), state

    return gradients_of


def assert_same_gradients(one, other):
    assert one.keys() == other.keys()
    for name in one:
        scale = np.abs(one[name]).max()
        assert scale > 0, name
        np.testing.assert_allclose(other[name], one[name], rtol=0, atol=2e-5 * scale + 2e-7, err_msg=name)


def masked_as(experience, mask_BGC):
    """The experience with other tokens in its loss."""
    targets = dataclasses.replace(experience.targets, mask_BGC=jnp.asarray(mask_BGC))
    return dataclasses.replace(experience, targets=targets)


def test_the_device_has_the_reference_to_compute_while_the_host_reads_the_answers(small, maker, trained, rollout):
    order, programs = [], RlPrograms(small.backbone, small.programs.config, small.programs.sampling)

    def told(name, function):
        def call(*arguments, **settings):
            order.append(name)
            return function(*arguments, **settings)

        return call

    programs.logprobs, programs.score = told("reference", programs.logprobs), told("score", programs.score)
    scorer = copy.copy(maker.scorer)
    scorer.groups = told("read", maker.scorer.groups)
    again = rollout_of(small, dataclasses.replace(maker, programs=programs, scorer=scorer), trained, [0, 1, 2, 3])
    assert order == ["reference", "read", "score"]
    targets = again.experience.targets
    np.testing.assert_array_equal(targets.reference_logprob_BGC, rollout.experience.targets.reference_logprob_BGC)


def test_rollout_has_something_to_learn_from(rollout):
    """The premise of the tests below: rewards and lengths differ within groups."""
    advantage_BG = np.asarray(rollout.experience.targets.advantage_BG)
    assert np.ptp(advantage_BG, axis=1).max() > 1
    assert len(set(rollout.table["length"])) > 1
    assert any(value is not None for value in rollout.table["r_plus"])


def test_kl_is_zero_and_reference_equals_policy_before_the_first_update(rollout, gradients_of):
    _, metrics, _ = gradients_of(rollout.experience)
    assert 0 <= metrics["kl"] < 1e-10  # exp(d) - d - 1 of differences around 1e-6
    assert metrics["clip_ratio/region_mean"] == 0


def test_kl_is_seen_once_the_policy_moved(small, maker, trained, rollout, gradients_of):
    elsewhere = {name: (1.01 if TEXT_ONLY(name) else 1.0) * value for name, value in trained.items()}
    other = maker.rollout(trained, elsewhere, visits_of(small, small.data.rl, [0, 1, 2, 3]), 0)
    _, metrics, _ = gradients_of(other.experience)
    assert metrics["kl"] > 1e-5
    assert other.table["completion"] == rollout.table["completion"]  # the reference does not sample


def test_update_scores_tokens_as_the_rollout_sampled_them(small, trained, rollout, gradients_of):
    """Decoding with a cache and the update's forward pass agree on every token's log-probability."""
    experience = rollout.experience
    config = dataclasses.replace(small.config.rl, temper_logprobs=False)
    untempered = RlPrograms(small.backbone, config, small.programs.sampling)
    logprob_BGC = untempered.logprobs(trained, experience.prompts, experience.completion)
    mask_BGC = np.asarray(experience.targets.mask_BGC)
    scored_BG = np.where(mask_BGC, logprob_BGC, 0).sum(-1)
    np.testing.assert_allclose(np.ravel(scored_BG), rollout.table["logprob"], atol=2e-4)
    # The distribution drawn from leaves out what must not be generated: tokens get a little likelier, never less.
    tempered = np.asarray(experience.targets.reference_logprob_BGC)
    gap = (np.asarray(experience.sampling_logprob_BGC) - tempered)[mask_BGC]
    assert gap.min() > -1e-4 and gap.mean() < 0.05
    _, metrics, _ = gradients_of(experience)
    np.testing.assert_allclose(metrics["sampling/sampling_logp_difference/mean"], np.abs(gap).mean(), atol=1e-5)


def test_rl_micro_batches_add_up_to_the_step_whatever_their_masks(rollout, gradients_of):
    # One micro-batch has almost no tokens in its loss.
    mask_BGC = np.array(rollout.experience.targets.mask_BGC)
    mask_BGC[:2, 1:] = False
    experience = masked_as(rollout.experience, mask_BGC)
    whole, whole_metrics, _ = gradients_of(experience)
    parts, parts_metrics, _ = gradients_of(experience, parts=2)
    assert_same_gradients(whole, parts)
    for name in ("loss", "policy_loss", "entropy", "grad_norm", "sampling/sampling_logp_difference/mean"):
        np.testing.assert_allclose(parts_metrics[name], whole_metrics[name], rtol=2e-5, atol=1e-7, err_msg=name)


def test_switches_reach_the_update(small, trained, rollout):
    """Of an answer that has no advantage only the entropy bonus is left: all of the gradient is its."""
    config = dataclasses.replace(
        small.programs.config,
        temper_logprobs=False,
        sampler_correction="token_truncate",
        sampler_correction_max=1.02,
        entropy_coef=0.5,
        top_entropy_quantile=0.3,
    )
    programs = RlPrograms(small.backbone, config, small.programs.sampling)
    experience = rollout.experience
    logprob_BGC = np.asarray(programs.logprobs(trained, experience.prompts, experience.completion))
    targets = dataclasses.replace(
        experience.targets,
        advantage_BG=jnp.zeros_like(experience.targets.advantage_BG),
        reference_logprob_BGC=jnp.asarray(logprob_BGC),
    )
    state = init_state(jax.tree.map(jnp.array, trained), TEXT_ONLY, optax.sgd(1.0), "float32")
    update = programs.make_update(optax.sgd(1.0))
    _, metrics = update(state, dataclasses.replace(experience, targets=targets), np.float32(0))
    ratio = np.exp(logprob_BGC - np.asarray(experience.sampling_logprob_BGC))[np.asarray(targets.mask_BGC)]
    name = "sampling/importance_sampling_ratio"
    np.testing.assert_allclose(metrics[f"{name}/mean"], np.minimum(ratio, 1.02).mean(), rtol=1e-4)
    assert metrics[f"{name}/beyond"] == pytest.approx((ratio > 1.02).mean(), abs=0.02) and (ratio > 1.02).any()
    assert metrics["kl"] < 1e-10  # both log-probabilities are of logits that no temperature divided
    assert metrics["entropy_bonus"] > 0.5 * metrics["entropy"] > 0  # the widest tokens' mean is above all tokens'
    assert metrics["loss"] == pytest.approx(-float(metrics["entropy_bonus"]), rel=1e-5) and metrics["grad_norm"] > 1e-4


def test_rl_leaves_the_towers_as_they_are(trained, rollout, gradients_of):
    gradients, _, state = gradients_of(rollout.experience)
    assert all(name.startswith("text/") for name in gradients)
    assert {name.partition("/")[0] for name in state.split()[1]} == {"audio", "vision"}
    for name, leaf in state.split()[1].items():
        np.testing.assert_array_equal(leaf, trained[name], err_msg=name)


def test_features_encoded_outside_give_the_gradient_of_those_encoded_inside(small, rollout, gradients_of):
    outside, metrics, _ = gradients_of(rollout.experience)
    clips = [visit.clips.prompt for visit in visits_of(small, small.data.rl, [0, 1, 2, 3])]
    prompts = put(prompt_rows(clips, buckets_of(small), small.backbone.config, range(4)), small.backbone.mesh)
    assert prompts.features_BRD is None and rollout.experience.prompts.vision is None
    inside, other, _ = gradients_of(dataclasses.replace(rollout.experience, prompts=prompts))
    assert_same_gradients(outside, inside)
    np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-5, atol=1e-7)


def test_features_matter_to_what_is_sampled(small, trained, rollout):
    """The update and the rollout really look at the clips: without features the log-probabilities are others."""
    experience = rollout.experience
    blind = small.programs.logprobs(
        trained,
        experience.prompts.encoded(jnp.zeros_like(experience.prompts.features_BRD)),
        experience.completion,
    )
    gap = np.abs(np.asarray(blind) - np.asarray(experience.targets.reference_logprob_BGC))[
        np.asarray(experience.targets.mask_BGC)
    ]
    assert gap.max() > 1e-2


def test_row_of_a_broken_clip_stays_empty_and_changes_no_other(small, maker, trained, rollout, gradients_of):
    broken = rollout_of(small, maker, trained, [0, None, 2, 3])
    kept = np.array([0, 2, 3])
    here, there = (
        {**vars(one.experience.targets), "sampling_logprob_BGC": one.experience.sampling_logprob_BGC}
        for one in (broken, rollout)
    )
    for name in ("advantage_BG", "sampling_logprob_BGC", "mask_BGC", "reference_logprob_BGC"):
        np.testing.assert_array_equal(np.asarray(here[name])[kept], np.asarray(there[name])[kept], err_msg=name)
    experience = broken.experience
    assert (
        not np.asarray(experience.targets.mask_BGC)[1].any() and not np.asarray(experience.targets.present_BG)[1].any()
    )
    assert not np.asarray(experience.targets.advantage_BG)[1].any()
    assert broken.metrics["completions/count"] == 12 and len(broken.table["id"]) == 12
    assert "clip-1" not in broken.table["id"]
    # Its share of the gradient is nothing: the same as with every token of that row masked.
    mask_BGC = np.array(rollout.experience.targets.mask_BGC)
    mask_BGC[1] = False
    masked, _, _ = gradients_of(masked_as(rollout.experience, mask_BGC))
    assert_same_gradients(gradients_of(experience)[0], masked)


def completions_by_visit(rollout):
    table = rollout.table
    return {
        (name, generation): text
        for name, generation, text in zip(table["id"], table["generation"], table["completion"], strict=True)
    }


def test_completions_do_not_depend_on_the_rows_around_them(small, maker, trained, rollout):
    visits = visits_of(small, small.data.rl, [3, 2, 1, 0])
    turned = maker.rollout(trained, trained, visits, 0)
    assert completions_by_visit(turned) == completions_by_visit(rollout)
    later = maker.rollout(trained, trained, visits, 1)
    assert later.table["completion"] != turned.table["completion"]


def test_nothing_is_sampled_where_all_clips_broke(small, maker, trained, gradients_of):
    empty = rollout_of(small, maker, trained, [None] * 4)
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
    np.testing.assert_allclose(rollout.experience.targets.advantage_BG, groups(rollout.table, "advantage"), rtol=1e-6)


def test_baseline_arm_uses_one_reward(small, trained, rollout):
    setup = with_config(small, rl={"arm": "baseline"})
    other = rollout_of(setup, setup.rl_step(buckets_of(setup)), trained, [0, 1, 2, 3])
    assert other.table["completion"] == rollout.table["completion"]
    expected = [
        z([f1 + 0.1 * form for f1, form in zip(f1s, forms, strict=True)])
        for f1s, forms in zip(groups(other.table, "f1"), groups(other.table, "format"), strict=True)
    ]
    np.testing.assert_allclose(groups(other.table, "advantage"), expected, atol=2e-3)


def test_permuted_rewards_keep_their_distribution_and_lose_their_owner(small, trained, rollout):
    setup = with_config(small, rl={"permute_rewards": True})
    maker = setup.rl_step(buckets_of(setup))
    permuted = rollout_of(setup, maker, trained, [0, 1, 2, 3])
    assert permuted.table["completion"] == rollout.table["completion"]
    assert permuted.table["f1"] == rollout.table["f1"]  # what is logged is what was earned
    here, there = (
        np.asarray(rollout.experience.targets.advantage_BG),
        np.asarray(permuted.experience.targets.advantage_BG),
    )
    np.testing.assert_allclose(np.sort(there, axis=1), np.sort(here, axis=1), atol=1e-6)
    assert np.abs(there - here).max() > 0.5
    again = rollout_of(setup, maker, trained, [0, 1, 2, 3])
    np.testing.assert_array_equal(again.experience.targets.advantage_BG, there)


def test_absent_rows_have_no_stop_reason_of_their_own(small, trained, maker):
    prompts = rollout_of(small, maker, trained, [None, 1, 2, 3]).experience.prompts
    completions = small.programs.sample(trained, prompts, jax.random.key(0))
    assert (np.asarray(completions.stop_BG)[0] == STOP_ABSENT).all()
    assert (np.asarray(completions.stop_BG)[1:] != STOP_ABSENT).all()
    assert isinstance(completions.exists_BGC, jax.Array) and not np.asarray(completions.exists_BGC)[0].any()
