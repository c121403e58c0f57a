"""SFT, rollout and RL update cut over data x fsdp x tensor = 2 x 2 x 2 devices, against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.small_run import small_setup, visits_of, with_config

from mer_r1_jax.parallel.rows import put, row_shardings
from mer_r1_jax.parallel.rules import replicated
from mer_r1_jax.training.prompts import plan_buckets
from mer_r1_jax.training.sft_step import make_sft_step
from mer_r1_jax.training.state import init_state, state_shardings, trainable_names

EVERYTHING = trainable_names(train_audio=True, train_vision=True)
TEXT_ONLY = trainable_names(train_audio=False, train_vision=False)
# The first update by momentum is the gradient, and its trace lies beside the parameters like the moments of AdamW.
OPTIMIZER = optax.sgd(1.0, momentum=0.9)
NUMBERS = [0, 1, None, 3]  # one clip broke

# Sums over cut axes are added in another order: float32 rounding of gradients, relative to the largest of a leaf.
RELATIVE = 5e-5


@pytest.fixture(scope="module")
def cut(small_folder, compiled):
    """The small run's setup on eight devices."""
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    return small_setup(small_folder, jax.devices(), media={"decode_workers": 0}, mesh=mesh)


def placed(setup, params):
    return {name: jax.device_put(np.asarray(leaf), setup.backbone.shardings[name]) for name, leaf in params.items()}


def fresh_state(setup, params, is_trainable):
    return init_state(jax.tree.map(jnp.copy, placed(setup, params)), is_trainable, OPTIMIZER, "float32")


def gradients(params, state):
    return {name: np.asarray(params[name]) - np.asarray(new) for name, new in state.split()[0].items()}


def assert_same_gradients(one, other):
    assert one.keys() == other.keys()
    for name in one:
        scale = np.abs(one[name]).max()
        assert scale > 0, name
        np.testing.assert_allclose(other[name], one[name], rtol=0, atol=RELATIVE * scale + 2e-7, err_msg=name)


def assert_stays_in_place(setup, state):
    """A state that moved would be another program's input at the next step, and at a resumed one."""
    wanted = state_shardings(state, setup.backbone.shardings, replicated(setup.backbone.mesh))
    leaves = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(wanted), strict=True)
    moved = [
        f"{jax.tree_util.keystr(path)}: {leaf.sharding.spec}, expected {sharding.spec}"
        for (path, leaf), sharding in leaves
        if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    ]
    assert not moved


def test_parameters_are_really_cut(cut, trained):
    name = "text/layers/mlp/up/kernel"
    leaf = placed(cut, trained)[name]
    layers, width, mlp = leaf.shape
    assert {shard.data.shape for shard in leaf.addressable_shards} == {(layers, width // 2, mlp // 2)}


def test_cut_sft_step_equals_the_one_on_one_device(small, cut, trained):
    results = []
    for setup in (small, cut):
        phase = setup.sft_phase()
        batch, _ = phase.batch(visits_of(setup, setup.data.sft, NUMBERS))
        step = make_sft_step(setup.backbone, OPTIMIZER, setup.config.sft, towers_trained=True)
        state, metrics = step(fresh_state(setup, trained, EVERYTHING), put(batch, setup.backbone.mesh))
        results.append((gradients(trained, state), jax.device_get(metrics)))
        assert_stays_in_place(setup, state)
    (one, metrics), (other, cut_metrics) = results
    assert_same_gradients(one, other)
    for name in ("loss", "loss/slow", "loss/fast", "grad_norm"):
        np.testing.assert_allclose(cut_metrics[name], metrics[name], rtol=1e-5, err_msg=name)


def test_cut_rollout_and_update_equal_those_on_one_device(small, cut, trained):
    results = []
    for setup in (small, cut):
        rows = setup.config.rl.prompts_per_step
        buckets = plan_buckets(setup.config, setup.backbone.config, setup.data.rl, rows)
        policy = placed(setup, trained)
        maker = setup.rl_step(buckets)
        rollout = maker.rollout(policy, policy, visits_of(setup, setup.data.rl, NUMBERS), 0)
        update = setup.programs.make_update(OPTIMIZER)
        state, metrics = update(fresh_state(setup, trained, TEXT_ONLY), rollout.experience, np.float32(0.04))
        results.append((rollout, gradients(trained, state), jax.device_get(metrics)))
        assert_stays_in_place(setup, state)
    (one, gradient, metrics), (other, cut_gradient, cut_metrics) = results
    assert other.table["completion"] == one.table["completion"]
    np.testing.assert_allclose(other.table["logprob"], one.table["logprob"], atol=2e-4)
    # Advantages divide differences of confidences by their spread within a group.
    np.testing.assert_allclose(other.table["advantage"], one.table["advantage"], atol=5e-3)
    assert np.ptp(one.table["advantage"]) > 1
    for name, leaf in gradient.items():
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(cut_gradient[name], leaf, rtol=0, atol=1e-3 * scale, err_msg=name)
    for name in ("entropy", "sampling/sampling_logp_difference/mean"):
        np.testing.assert_allclose(cut_metrics[name], metrics[name], rtol=1e-4, err_msg=name)
    assert 0 <= cut_metrics["kl"] < 1e-9


def test_minibatches_of_a_cut_rollout_are_its_prompts_in_their_order(cut, trained):
    """Its rows lie on half of the devices first, and on all of them afterwards."""
    setup = with_config(cut, rl={"steps_per_generation": 2})
    rows = setup.config.rl.prompts_per_rollout
    buckets = plan_buckets(setup.config, setup.backbone.config, setup.data.rl, rows)
    policy = placed(setup, trained)
    visits = visits_of(setup, setup.data.rl, [0, 1, None, 3, 4, 5, 0, 2])
    experience = setup.rl_step(buckets).rollout(policy, policy, visits, 0).experience
    whole = jax.tree.map(np.asarray, experience)
    for number in range(2):
        part, at = setup.programs.minibatch(experience, number), slice(4 * number, 4 * number + 4)
        wanted = row_shardings(part, setup.backbone.mesh)
        for leaf, sharding in zip(jax.tree.leaves(part), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        np.testing.assert_array_equal(part.prompts.uid_B, whole.prompts.uid_B[at])
        np.testing.assert_array_equal(part.prompts.features_BRD, whole.prompts.features_BRD[at])
        np.testing.assert_array_equal(part.targets.advantage_BG, whole.targets.advantage_BG[at])
        np.testing.assert_array_equal(part.targets.old_logprob_BGC, whole.targets.old_logprob_BGC[at])
        assert float(part.rollout_mean_tokens) == whole.targets.mask_BGC.sum() / 2
