"""Every arm makes its own advantages of one and the same rollout and trains on them; reward functions join in."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.small_run import visits_of

from mer_r1_jax.emotion.candidates import WordTable
from mer_r1_jax.rl.advantage import ARMS
from mer_r1_jax.rl.reward_funcs import TAKEN, RewardFunctions
from mer_r1_jax.training.prompts import plan_buckets
from mer_r1_jax.training.state import init_state, trainable_names

TEXT_ONLY = trainable_names(train_audio=False, train_vision=False)
EQUAL = {frozenset({"ad", "sfcc_loss"})}  # the calibration of sfcc_loss is beside the policy loss, not in A


@pytest.fixture(scope="module")
def rollout_of(small, trained):
    """(rl settings, other parts) -> rollout of four clips. All share the compiled programs and the random bits."""
    buckets = plan_buckets(small.config, small.backbone.config, small.data.rl, small.config.rl.prompts_per_step)
    visits = visits_of(small, small.data.rl, [0, 1, 2, 3])

    def rollout_of(settings, **parts):
        config = dataclasses.replace(small.config, rl=dataclasses.replace(small.config.rl, **settings))
        setup = dataclasses.replace(small, config=config, **parts)
        return setup.rl_step(buckets).rollout(trained, trained, visits, 0)

    return rollout_of


@pytest.fixture(scope="module")
def word_table(small):
    return WordTable(small.tokenizer, small.wheels)


@pytest.fixture(scope="module")
def rollouts(rollout_of, word_table):
    """arm -> its rollout."""
    words = {"candidates": word_table}
    return {arm: rollout_of({"arm": arm}, **(words if ARMS[arm].candidates == "word" else {})) for arm in ARMS}


def test_arms_share_the_samples_and_differ_in_what_they_make_of_them(rollouts):
    tables = {arm: rollout.table for arm, rollout in rollouts.items()}
    for name in ("completion", "recall", "precision", "f1", "format"):
        assert all(table[name] == tables["baseline"][name] for table in tables.values()), name
    assert tables["sfcc_word"]["r_plus"] != tables["mer_r1"]["r_plus"]  # another set of candidates
    for one, other in itertools.combinations(ARMS, 2):
        gap = np.abs(np.subtract(tables[one]["advantage"], tables[other]["advantage"])).max()
        assert (gap < 1e-6) if {one, other} in EQUAL else (gap > 1e-4), (one, other)


def z(values):
    """z of one group; None left out, 0 where invalid or without spread."""
    held = np.asarray([value for value in values if value is not None], np.float64)
    if held.size < 2 or np.ptp(held) == 0:
        return np.zeros(len(values))
    return np.asarray([0.0 if v is None else (v - held.mean()) / (held.std(ddof=1) + 1e-4) for v in values])


def groups(table, *names, size=4):
    return zip(*([table[name][i : i + size] for i in range(0, len(table[name]), size)] for name in names), strict=True)


def plus(rewards, calibration):
    return [reward + 0.1 * (value or 0.0) for reward, value in zip(rewards, calibration, strict=True)]


FORMULAS = {
    "rd": lambda r, p, plus_, minus: z(np.add(r, p)),
    "ad": lambda r, p, plus_, minus: z(r) + z(p),
    "mer_r1": lambda r, p, plus_, minus: z(r) + z(p) + 0.1 * (z(plus_) + z(minus)),
    "sfcc_word": lambda r, p, plus_, minus: z(r) + z(p) + 0.1 * (z(plus_) + z(minus)),
    "sfcc_recall_only": lambda r, p, plus_, minus: z(r) + z(p) + 0.1 * z(plus_),
    "sfcc_reward_space": lambda r, p, plus_, minus: z(plus(r, plus_)) + z(plus(p, minus)),
    "sfcc_mixed": lambda r, p, plus_, minus: z(plus(r, plus_)) + z(p) + 0.1 * z(minus),
    "sfcc_loss": lambda r, p, plus_, minus: z(r) + z(p),
}


@pytest.mark.parametrize("arm", FORMULAS)
def test_advantages_are_the_arms_formula_of_what_the_table_shows(rollouts, arm):
    table = rollouts[arm].table
    columns = groups(table, "recall", "precision", "r_plus", "r_minus", "format", "advantage")
    for *rewards, form, advantage in columns:
        np.testing.assert_allclose(advantage, FORMULAS[arm](*rewards) + 0.1 * z(form), atol=2e-3)


@pytest.fixture(scope="module")
def gradients(small, trained, rollouts):
    """arm -> (gradients by name, metrics) of one whole update by plain gradient descent."""
    update = small.programs.make_update(optax.sgd(1.0))
    made = {}
    for arm, rollout in rollouts.items():
        state = init_state(jax.tree.map(jnp.array, trained), TEXT_ONLY, optax.sgd(1.0), "float32")
        state, metrics = update(state, rollout.experience, np.float32(0.04))
        moved = {name: np.asarray(trained[name] - new) for name, new in state.split()[0].items()}
        made[arm] = moved, jax.device_get(metrics)
    return made


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains(gradients, arm):
    moved, metrics = gradients[arm]
    assert np.isfinite(metrics["loss"]) and metrics["skipped_steps"] == 0
    assert np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0
    assert all(np.isfinite(leaf).all() for leaf in moved.values()) and any(leaf.any() for leaf in moved.values())


def test_calibration_loss_moves_the_policy_beside_the_advantages(gradients):
    (plain, _), (calibrated, metrics) = gradients["ad"], gradients["sfcc_loss"]
    assert metrics["calibration_loss"] > 0
    assert max(np.abs(plain[name] - calibrated[name]).max() for name in plain) > 1e-6
    assert [arm for arm, (_, metrics) in gradients.items() if "calibration_loss" in metrics] == ["sfcc_loss"]


def test_reward_functions_join_the_arm_and_a_faulty_group_keeps_its_other_rewards(small, rollout_of, rollouts):
    paths = [f"support.reward_functions.{name}" for name in ("letters", "not_of_the_first", "recall")]
    settings = {"reward_funcs": tuple(paths), "reward_weights": (0.5, 2.0, 1.0)}
    functions = RewardFunctions(paths, timeout=60.0, max_faulty_rollouts=3)
    try:
        rollout = rollout_of(settings, reward_funcs=functions)
    finally:
        functions.close()
    table, plain = rollout.table, rollouts["mer_r1"].table
    assert table["completion"] == plain["completion"]
    assert table["letters"] == [len(text) for text in table["completion"]]
    assert table["not_of_the_first"] == [None] * 4 + table["letters"][4:]
    assert table["support.reward_functions.recall"] == [1.0] * 16  # `recall` is the name of another column
    columns = ("letters", "not_of_the_first", "advantage", "before")
    faults = [bool(faults) for faults in table["reward_faults"]]
    assert faults == [True] * 4 + [False] * 12
    assert "not_of_the_first: it raised ValueError: not this one" in table["reward_faults"][0][0]
    for own, other, added, before in groups(table | {"before": plain["advantage"]}, *columns):
        np.testing.assert_allclose(added, before + 0.5 * z(own) + 2.0 * z(other), atol=2e-3)
    metrics = rollout.metrics
    assert metrics["rewards/not_of_the_first/unscored"] == 0.25 and metrics["rewards/not_of_the_first/faults"] == 4
    assert metrics["rewards/letters/unscored"] == 0 and metrics["rewards/letters/mean"] == np.mean(table["letters"])
    assert np.ptp(table["letters"]) > 0 and "timing_s/reward_funcs" in metrics
    assert "rewards/letters/mean" not in rollouts["mer_r1"].metrics and "reward_faults" not in plain


def test_names_that_metrics_and_tables_have_are_kept_from_reward_functions(rollouts):
    rollout = rollouts["mer_r1"]
    rewards = {name.split("/")[1] for name in rollout.metrics if name.startswith("rewards/")}
    assert set(rollout.table) | rewards | {"reward_faults"} == TAKEN
