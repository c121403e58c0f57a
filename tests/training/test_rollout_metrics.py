"""What is logged of rewards and advantages, against numpy: spreads and correlations are within groups."""

import dataclasses

import jax
import numpy as np
import pytest

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.emotion.rewards import answer_rewards
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.rl.advantage import Rewards, advantages
from mer_r1_jax.training.rollout_log import advantage_metrics, reward_metrics

SHAPE = (6, 5)


@pytest.fixture
def rewards():
    rng = np.random.default_rng(0)
    recall = rng.uniform(size=SHAPE).astype(np.float32)
    # Groups differ a lot and recall and precision fall together across them, but rise together within them.
    level = np.linspace(0, 3, SHAPE[0], dtype=np.float32)[:, None]
    every = np.ones(SHAPE, bool)
    valid = every.copy()
    valid[2, 3:] = False
    return Rewards(
        recall_BG=recall + level,
        precision_BG=0.5 * recall + 0.3 * rng.uniform(size=SHAPE).astype(np.float32) - level,
        f1_BG=rng.uniform(size=SHAPE).astype(np.float32),
        format_BG=(rng.uniform(size=SHAPE) > 0.2).astype(np.float32),
        valid_BG=valid,
        scored_BG=every,
        plus_BG=rng.normal(size=SHAPE).astype(np.float32),
        minus_BG=rng.normal(size=SHAPE).astype(np.float32),
        plus_valid_BG=every,
        minus_valid_BG=every,
        categories_BG=rng.integers(1, 4, SHAPE).astype(np.float32),
    )


def centred(values, held):
    """Deviations from each group's mean, of the values that count, in one row."""
    return np.concatenate([row[on] - row[on].mean() for row, on in zip(np.float64(values), held, strict=True)])


def test_spreads_and_the_correlation_of_rewards_are_within_groups(rewards):
    metrics = jax.device_get(jax.jit(reward_metrics, static_argnums=1)(rewards, 0.1))
    held = rewards.valid_BG
    rows = [row[on] for row, on in zip(np.float64(rewards.recall_BG), held, strict=True)]
    assert metrics["rewards/recall/group_std"] == pytest.approx(np.mean([row.std(ddof=1) for row in rows]), rel=1e-4)
    expected = np.corrcoef(centred(rewards.recall_BG, held), centred(rewards.precision_BG, held))[0, 1]
    assert metrics["rewards/recall/precision_corr"] == pytest.approx(expected, abs=1e-4)
    assert expected > 0.5 > 0 > np.corrcoef(rewards.recall_BG[held], rewards.precision_BG[held])[0, 1]


def test_an_advantage_is_held_against_rewards_and_the_number_of_categories(rewards):
    config = RlConfig(arm="mer_r1", calibration_weight=0.5)
    given = np.asarray(advantages("mer_r1", rewards, config))
    metrics = jax.device_get(jax.jit(advantage_metrics, static_argnums=3)(given, rewards, rewards, config))
    held = rewards.valid_BG
    for name in ("recall", "precision", "categories"):
        other = centred(getattr(rewards, f"{name}_BG"), held)
        expected = np.corrcoef(centred(given, held), other)[0, 1]
        assert metrics[f"advantages/corr/{name}"] == pytest.approx(expected, abs=1e-4)
    # mer_r1 adds its terms, so their shares are covariances with the whole.
    whole = centred(given, held)
    plain = centred(advantages("ad", rewards, config), held)
    assert metrics["advantages/share/calibration"] == pytest.approx((whole - plain) @ whole / (whole @ whole), abs=1e-4)
    no_format = centred(advantages("mer_r1", rewards, dataclasses.replace(config, format_weight=0.0)), held)
    assert metrics["advantages/share/format"] == pytest.approx((whole - no_format) @ whole / (whole @ whole), abs=1e-4)


def test_where_nothing_varies_everything_is_zero(rewards):
    flat = jax.tree.map(lambda x: np.ones_like(x), rewards)
    config = RlConfig(arm="ad")
    given = advantages("ad", flat, config)
    metrics = jax.device_get(advantage_metrics(given, flat, flat, config) | reward_metrics(flat, 0.1))
    for name in ("advantages/corr/recall", "advantages/share/format", "rewards/recall/precision_corr"):
        assert metrics[name] == 0
    assert metrics["rewards/f1/group_std"] == 0


def test_the_controls_advantage_is_held_against_what_each_answer_earned_itself(rewards):
    """Handed to the answer beside it, rewards still make up the whole advantage, and say nothing about an answer."""
    config = RlConfig(arm="ad", calibration_weight=0.0)
    given_away = jax.tree.map(lambda x: np.roll(x, 1, axis=-1), rewards)
    given = np.asarray(advantages("ad", given_away, config))
    metrics = jax.device_get(advantage_metrics(given, given_away, rewards, config))
    held = rewards.valid_BG & rewards.scored_BG
    expected = np.corrcoef(centred(given, held), centred(rewards.recall_BG, held))[0, 1]
    assert metrics["advantages/corr/recall"] == pytest.approx(expected, abs=1e-4)
    assert (
        metrics["advantages/corr/recall"]
        < 0.3
        < np.corrcoef(centred(given, held), centred(given_away.recall_BG, held))[0, 1]
    )


def test_words_of_a_category_named_before_are_repeats():
    wheels = load_wheels("")
    one = answer_rewards(["happy", "sad"], ["happy", "sad"], wheels)
    assert one.n_repeats == 0
    more = answer_rewards(["happy", "joyful", "sad", "qwertz"], ["happy", "sad"], wheels)
    per_wheel = [wheels.category("happy", q) == wheels.category("joyful", q) for q in range(len(wheels))]
    assert any(per_wheel) and more.n_repeats == pytest.approx(np.mean(per_wheel))
    assert more.n_unknown == 1
