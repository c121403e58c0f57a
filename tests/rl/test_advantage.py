"""Advantages: TRL's group normalisation, the stated value in every degenerate case, and the variance argument."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.config.schema import ConfigError, RlConfig
from mer_r1_jax.rl.advantage import (
    ARMS,
    Rewards,
    advantages,
    permute_within_groups,
    zero_spread,
    zscore,
)

B, G = 3, 5
CONFIG = RlConfig()
PER_GROUP = [name for name in ARMS if name != "gdpo"]  # whose advantages hang on nothing but their group
NO_CONFIDENCE = [name for name, arm in ARMS.items() if not arm.needs_confidence]
SPECIFICATION = {  # one group's advantages out of z-scores, written down anew
    "baseline": lambda z, r: z(r["f1"] + 0.1 * r["format"]),
    "rd": lambda z, r: z(r["recall"] + r["precision"]) + 0.1 * z(r["format"]),
    "ad": lambda z, r: z(r["recall"]) + z(r["precision"]) + 0.1 * z(r["format"]),
    "gdpo": lambda z, r: SPECIFICATION["ad"](z, r),  # before it is whitened over the step
    "mer_r1": lambda z, r: SPECIFICATION["ad"](z, r) + 0.1 * (z(r["plus"]) + z(r["minus"])),
    "sfcc_word": lambda z, r: SPECIFICATION["mer_r1"](z, r),
    "sfcc_recall_only": lambda z, r: SPECIFICATION["ad"](z, r) + 0.1 * z(r["plus"]),
    "sfcc_reward_space": lambda z, r: (
        z(r["recall"] + 0.1 * r["plus"]) + z(r["precision"] + 0.1 * r["minus"]) + 0.1 * z(r["format"])
    ),
    "sfcc_mixed": lambda z, r: (
        z(r["recall"] + 0.1 * r["plus"]) + z(r["precision"]) + 0.1 * z(r["minus"]) + 0.1 * z(r["format"])
    ),
    "sfcc_loss": lambda z, r: SPECIFICATION["ad"](z, r),
}


def simulated(seed=0, shape=(B, G)):
    rng = np.random.default_rng(seed)
    draw = lambda: rng.uniform(size=shape).astype(np.float32)  # noqa: E731
    every = np.ones(shape, bool)
    return Rewards(
        recall_BG=draw(),
        precision_BG=draw(),
        f1_BG=draw(),
        format_BG=(draw() > 0.3).astype(np.float32),
        valid_BG=every,
        scored_BG=every,
        plus_BG=draw() - 0.5,
        minus_BG=draw() - 0.5,
        plus_valid_BG=every,
        minus_valid_BG=every,
    )


def of_arm(arm, rewards, config=CONFIG):
    return np.asarray(advantages(arm, rewards, config))


def torch_zscore(x, scale):
    """TRL's lines (GRPOTrainer, rewards to advantages) with its own nanstd; NaN stands for an invalid value."""
    import torch
    from trl.trainer.utils import nanstd

    rewards = torch.tensor(np.asarray(x, np.float32))
    std = nanstd(rewards) if scale == "batch" else nanstd(rewards, dim=1, keepdim=True)
    centred = rewards - torch.nanmean(rewards, dim=1, keepdim=True)
    return torch.nan_to_num(centred if scale == "none" else centred / (std + 1e-4), nan=0.0).numpy()


@pytest.mark.torch
@given(
    x=arrays(np.float32, (B, G), elements=st.floats(-2, 2, width=16)),
    invalid=arrays(np.bool_, (B, G)),
    scale=st.sampled_from(["group", "batch", "none"]),
)
@settings(max_examples=150)
def test_group_normalisation_equals_trl(x, invalid, scale):
    z = np.asarray(zscore(x, ~invalid, scale))
    expected = torch_zscore(np.where(invalid, np.nan, x), scale)
    assert np.isfinite(z).all() and not z[invalid].any()
    for row in range(B):
        held = x[row][~invalid[row]]
        if len(held) < 2 or held.max() == held.min():
            assert not z[row].any()
        else:
            np.testing.assert_allclose(z[row], expected[row], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("arm", PER_GROUP)
def test_every_arm_is_its_formula(arm):
    rewards = simulated()
    names = ("recall", "precision", "f1", "format", "plus", "minus")
    for row in range(B):
        group = {name: getattr(rewards, f"{name}_BG")[row].astype(np.float64) for name in names}
        expected = SPECIFICATION[arm](lambda x: (x - x.mean()) / (x.std(ddof=1) + 1e-4), group)
        np.testing.assert_allclose(of_arm(arm, rewards)[row], expected, atol=2e-5)


def test_the_list_of_arms_is_complete_and_says_what_each_needs():
    assert set(ARMS) == set(SPECIFICATION)
    for name, arm in ARMS.items():
        read = set()

        class Group(dict):
            def __getitem__(self, reward, read=read):
                read.add(reward)
                return np.zeros(2)

        SPECIFICATION[name](lambda x: x, Group())
        assert arm.needs_confidence == (bool(read & {"plus", "minus"}) or arm.calibration_loss), name
    assert [name for name, arm in ARMS.items() if arm.candidates == "word"] == ["sfcc_word"]
    assert [name for name, arm in ARMS.items() if arm.calibration_loss] == ["sfcc_loss"]


@given(
    recall=arrays(np.float32, (B, G), elements=st.floats(0, 1, width=16)),
    shift=st.floats(-5, 5),
    scale=st.floats(0.2, 20),
    which=st.sampled_from(["recall_BG", "precision_BG"]),
)
@settings(max_examples=80)
def test_ad_ignores_shifts_and_positive_scalings_of_one_reward(recall, shift, scale, which):
    """Up to the 1e-4 beside the standard deviation, whose share the tolerance states."""
    spread = recall.std(-1, ddof=1)
    assume(spread.min() > 0.02)
    before = dataclasses.replace(simulated(1), **{which: recall})
    after = dataclasses.replace(before, **{which: (recall * scale + shift).astype(np.float32)})
    largest_z = np.abs(recall - recall.mean(-1, keepdims=True)).max(-1) / spread
    shares = largest_z * 1e-4 * (1 / spread + 1 / (scale * spread))
    rounding = largest_z * 4e-6 * (abs(shift) + scale + 1) / (scale * spread)
    difference = np.abs(of_arm("ad", after) - of_arm("ad", before)).max(-1)
    assert (difference <= shares + rounding + 1e-5).all()


@pytest.mark.parametrize(
    ("sigma_r", "sigma_p", "rho"), [(0.1, 0.4, 0.2), (0.3, 0.3, -0.3), (0.5, 0.15, 0.6), (0.1, 0.5, -0.4)]
)
def test_correlations_of_the_two_normalisations(sigma_r, sigma_p, rho):
    """rd follows the noisier reward, by (s_R + r s_P) / s_sum and its mirror; ad follows both, by sqrt((1 + r) / 2)."""
    rng = np.random.default_rng(0)
    size = 40_000  # one very large group, so that its moments are the population's
    x = rng.normal(size=(2, size))
    x -= x.mean(1, keepdims=True)
    x[1] -= x[0] * (x[0] @ x[1]) / (x[0] @ x[0])  # exactly uncorrelated
    x /= x.std(1, keepdims=True)
    recall, precision = sigma_r * x[0], sigma_p * (rho * x[0] + np.sqrt(1 - rho**2) * x[1])
    rewards = dataclasses.replace(
        simulated(0, (1, size)),
        recall_BG=recall[None].astype(np.float32),
        precision_BG=precision[None].astype(np.float32),
        format_BG=np.ones((1, size), np.float32),
    )
    sigma_sum = np.sqrt(sigma_r**2 + sigma_p**2 + 2 * rho * sigma_r * sigma_p)

    def correlations(arm):
        advantage = of_arm(arm, rewards)[0]
        return np.corrcoef(advantage, recall)[0, 1], np.corrcoef(advantage, precision)[0, 1]

    expected = (sigma_r + rho * sigma_p) / sigma_sum, (sigma_p + rho * sigma_r) / sigma_sum
    rd, ad = correlations("rd"), correlations("ad")
    np.testing.assert_allclose(rd, expected, atol=1e-3)
    np.testing.assert_allclose(ad, [np.sqrt((1 + rho) / 2)] * 2, atol=1e-3)
    if sigma_p != sigma_r:
        assert (rd[1] > rd[0] + 0.05) == (sigma_p > sigma_r)
        assert abs(ad[1] - ad[0]) < 2e-3


@given(rewards_2BG=arrays(np.float32, (2, B, G), elements=st.floats(0, 1, width=16)))
@settings(max_examples=100)
def test_in_every_group_the_noisier_reward_owns_rd_and_neither_owns_ad(rewards_2BG):
    """The formulas with a group's own spreads and correlation, the way they act in training."""
    recall_BG, precision_BG = rewards_2BG
    ones_BG = np.ones((B, G), np.float32)
    rewards = dataclasses.replace(simulated(), recall_BG=recall_BG, precision_BG=precision_BG, format_BG=ones_BG)
    rd_BG, ad_BG = of_arm("rd", rewards), of_arm("ad", rewards)
    for recall, precision, rd, ad in zip(recall_BG, precision_BG, rd_BG, ad_BG, strict=True):
        s_r, s_p = recall.std(ddof=1, dtype=np.float64), precision.std(ddof=1, dtype=np.float64)
        if min(s_r, s_p) < 0.05 or abs(rho := np.corrcoef(recall, precision)[0, 1]) > 0.95:
            continue
        of_sum = np.sqrt(s_r**2 + s_p**2 + 2 * rho * s_r * s_p)
        expected = [(s_r + rho * s_p) / of_sum, (s_p + rho * s_r) / of_sum]
        of_rd = [np.corrcoef(rd, values)[0, 1] for values in (recall, precision)]
        of_ad = [np.corrcoef(ad, values)[0, 1] for values in (recall, precision)]
        np.testing.assert_allclose(of_rd, expected, atol=2e-3)
        np.testing.assert_allclose(of_ad, [np.sqrt((1 + rho) / 2)] * 2, atol=5e-3)  # 1e-4 stands beside each spread
        if abs(s_r - s_p) > 0.1:
            assert (of_rd[0] > of_rd[1]) == (s_r > s_p)


@pytest.mark.parametrize(("mu_r", "mu_p"), [(0.5, 0.5), (0.8, 0.4), (0.3, 0.9)])
def test_f1_weighs_recall_and_precision_by_the_other_ones_mean(mu_r, mu_p):
    """Near (mu_R, mu_P), F1 changes by 2 mu_P^2 / (mu_R + mu_P)^2 a unit of recall: it follows the smaller."""
    f1 = lambda r, p: 2 * r * p / (r + p)  # noqa: E731
    step = 1e-6
    weights = [
        (f1(mu_r + step, mu_p) - f1(mu_r - step, mu_p)) / (2 * step),
        (f1(mu_r, mu_p + step) - f1(mu_r, mu_p - step)) / (2 * step),
    ]
    total = (mu_r + mu_p) ** 2
    np.testing.assert_allclose(weights, [2 * mu_p**2 / total, 2 * mu_r**2 / total], rtol=1e-6)


@pytest.mark.parametrize("arm", ARMS)
def test_reward_functions_are_normalised_apart_and_added_to_every_arm(arm):
    rewards = simulated(10)
    custom = jax.tree.map(np.array, (simulated(11).recall_BG * 40, simulated(12).recall_BG))
    custom[0][0, 1] = np.nan  # unscored
    custom[1][1] = np.nan  # nothing was scored in this group
    custom[1][2, 1:] = np.nan  # one value has nothing to be compared with
    weights = (0.5, -2.0)
    added = of_arm(arm, dataclasses.replace(rewards, custom_BG=custom), RlConfig(reward_weights=weights))
    expected = of_arm(arm, rewards).astype(np.float64)
    for values, weight in zip(custom, weights, strict=True):
        for row in range(B):
            held = values[row][np.isfinite(values[row])].astype(np.float64)
            if held.size > 1:
                z = (values[row] - held.mean()) / (held.std(ddof=1) + 1e-4)
                expected[row] += weight * np.nan_to_num(z)
    np.testing.assert_allclose(added, expected, atol=3e-5)
    # An absent row has none, whatever stands there.
    absent = dataclasses.replace(rewards, custom_BG=custom, valid_BG=np.arange(B)[:, None] > np.zeros((1, G)))
    assert not of_arm(arm, absent, RlConfig(reward_weights=weights))[0].any()


@pytest.mark.parametrize("arm", PER_GROUP)
def test_degenerate_groups_give_exactly_zero(arm):
    """Equal rewards, a single valid completion, an absent row: zero, not NaN; and the other rows do not notice."""
    rewards = simulated(4)
    whole = of_arm(arm, rewards)
    flat = jax.tree.map(np.array, rewards)
    for name in ("recall_BG", "precision_BG", "f1_BG", "format_BG", "plus_BG", "minus_BG"):
        getattr(flat, name)[0] = np.float32(1 / 3)
    lonely = dataclasses.replace(flat, valid_BG=flat.valid_BG.copy())
    lonely.valid_BG[1] = [True] + [False] * (G - 1)
    result = of_arm(arm, lonely)
    assert not result[:2].any()
    np.testing.assert_array_equal(result[2], whole[2])


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_values_give_exactly_zero_although_their_mean_is_rounded(scale):
    values = np.linspace(0.01, 0.99, 99, dtype=np.float32)
    for generations in (3, 5, 6, 7):
        x = np.repeat(values[:, None], generations, axis=1)
        assert (x - np.asarray(jax.numpy.mean(x, -1, keepdims=True))).any()  # rounding does leave something
        assert not np.asarray(zscore(x, np.ones_like(x, bool), scale)).any()


@pytest.mark.parametrize("arm", ARMS)
def test_values_that_are_not_finite_are_invalid(arm):
    rewards = jax.tree.map(np.array, simulated(5))
    for name in ("recall_BG", "precision_BG", "f1_BG", "plus_BG", "minus_BG"):
        getattr(rewards, name)[0, :2] = [np.nan, np.inf]
    assert np.isfinite(of_arm(arm, rewards)).all()


def test_words_without_confidence_leave_only_their_own_term_out():
    """A completion without a wrong word has z(R-) = 0 and is not in the mean and spread of the others."""
    rewards = jax.tree.map(np.array, simulated(6))
    rewards.minus_valid_BG[0, 0] = False
    rewards.minus_BG[0, 0] = 99.0
    difference = of_arm("mer_r1", rewards)[0] - of_arm("sfcc_recall_only", rewards)[0]
    held = rewards.minus_BG[0, 1:].astype(np.float64)
    expected = 0.1 * (held - held.mean()) / (held.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(difference, [0, *expected], atol=2e-5)
    # In reward space the missing calibration adds nothing, and precision still counts.
    mixed = of_arm("sfcc_reward_space", rewards)
    rewards.minus_BG[0, 0] = 0.0
    rewards.minus_valid_BG[0, 0] = True
    np.testing.assert_array_equal(mixed, of_arm("sfcc_reward_space", rewards))


def test_gdpo_is_trls_normalize_then_sum():
    """TRL, GRPOTrainer: each reward normalised over its group, summed with its weight, whitened over the step."""
    rewards = simulated(20)
    z = [
        (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-4)
        for x in (np.asarray(v, np.float64) for v in (rewards.recall_BG, rewards.precision_BG, rewards.format_BG))
    ]
    summed = z[0] + z[1] + 0.1 * z[2]
    expected = (summed - summed.mean()) / (summed.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(of_arm("gdpo", rewards), expected, atol=3e-5)


def test_gdpo_gives_nothing_to_groups_without_spread_nor_to_absent_answers():
    rewards = jax.tree.map(np.array, simulated(21))
    for name in ("recall_BG", "precision_BG", "f1_BG", "format_BG"):
        getattr(rewards, name)[0] = np.float32(1 / 3)
    rewards = dataclasses.replace(rewards, valid_BG=rewards.valid_BG.copy())
    rewards.valid_BG[1, 3:] = False
    result = of_arm("gdpo", rewards)
    assert not result[0].any() and not result[1, 3:].any() and np.isfinite(result).all()
    held = result[1:][rewards.valid_BG[1:]]
    # Whitened: near unit spread over the answers that count (the flat group counts with its zeros, as in TRL).
    assert np.concatenate([held, result[0]]).std(ddof=1) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("arm", PER_GROUP)
def test_unscorable_prompts_are_judged_by_their_format_alone(arm):
    rewards = jax.tree.map(np.array, simulated(7))
    rewards.scored_BG[1] = False
    rewards.format_BG[1] = [1, 0, 1, 1, 0]
    z = np.asarray(zscore(rewards.format_BG, rewards.valid_BG))[1]
    own = np.asarray(zscore(0.1 * rewards.format_BG, rewards.valid_BG))[1]
    np.testing.assert_allclose(of_arm(arm, rewards)[1], own if arm == "baseline" else 0.1 * z, atol=1e-6)


def test_batch_scale_divides_by_the_spread_of_the_whole_batch():
    rewards = simulated(8)
    x = rewards.recall_BG.astype(np.float64)
    expected = (x - x.mean(1, keepdims=True)) / (x.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(zscore(rewards.recall_BG, rewards.valid_BG, "batch"), expected, atol=1e-5)


def test_permuted_rewards_keep_their_groups_and_belong_together():
    rewards = simulated(9, (64, G))
    rewards = dataclasses.replace(rewards, custom_BG=(2 * rewards.recall_BG,))
    permuted = jax.tree.map(np.asarray, permute_within_groups(rewards, jax.random.key(0)))
    np.testing.assert_array_equal(np.sort(permuted.recall_BG, -1), np.sort(rewards.recall_BG, -1))
    pairs = lambda r: {(float(a), float(b)) for a, b in zip(r.recall_BG.ravel(), r.plus_BG.ravel())}  # noqa: B905, E731
    assert pairs(permuted) == pairs(rewards)
    np.testing.assert_array_equal(permuted.custom_BG[0], 2 * permuted.recall_BG)
    rewards, permuted = (dataclasses.replace(r, custom_BG=()) for r in (rewards, permuted))
    unmoved = (permuted.recall_BG == rewards.recall_BG).mean()
    assert unmoved < 0.35  # 1 / G when the order is random
    correlation = np.corrcoef(of_arm("ad", permuted).ravel(), rewards.recall_BG.ravel())[0, 1]
    assert abs(correlation) < 0.2 < np.corrcoef(of_arm("ad", rewards).ravel(), rewards.recall_BG.ravel())[0, 1]


def test_groups_without_spread_are_found():
    x = np.array([[1, 1, 1], [1, 2, 1], [1, 2, 3], [5, 5, 5]], np.float32)
    valid = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1], [0, 0, 0]], bool)
    np.testing.assert_array_equal(zero_spread(x, valid), [True, True, False, False])


def test_wrong_arms_and_scales_are_refused():
    rewards = dataclasses.replace(simulated(), plus_BG=None, minus_BG=None, plus_valid_BG=None, minus_valid_BG=None)
    with pytest.raises(ValueError, match="expected one of baseline, rd, ad, "):
        advantages("mer_r2", rewards, CONFIG)
    with pytest.raises(ValueError, match="confidences"):
        advantages("mer_r1", rewards, CONFIG)
    with pytest.raises(ConfigError, match="rl.scale_rewards: got 'std', expected one of group, batch, none"):
        from_mapping({"rl": {"scale_rewards": "std"}})
    for arm in NO_CONFIDENCE:
        assert np.isfinite(of_arm(arm, rewards)).all()
