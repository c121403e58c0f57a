"""SFT and RL of the lab: the product's own advantages, runs that do not touch each other, and seeds that come again."""

import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mer_r1_jax.config.schema import ConfigError
from mer_r1_jax.lab import teaching
from mer_r1_jax.lab.experiment import named_arms
from mer_r1_jax.lab.scenes import SETS, SKIPPED, STOP
from mer_r1_jax.lab.worlds import with_settings
from mer_r1_jax.rl import advantage as product
from mer_r1_jax.rl.confidence import NO_SET
from mer_r1_jax.rl.own_function import OwnFunctionError, own_function

OWN = """
import jax.numpy as jnp

def nothing(rewards, config):
    return jnp.zeros_like(rewards.f1_BG)

def calibrated(rewards, config):
    return rewards.f1_BG + config.calibration_weight * rewards.plus_BG
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's, beside which the command is started."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own_function.cache_clear()
    return name


@pytest.fixture(scope="module")
def start_S(few, few_scenes):
    return teaching.fine_tune(few, few_scenes.sft, [0, 1])


@pytest.fixture(scope="module")
def trained(few_scenes, start_S):
    """(config, seeds, names) -> parameters after RL [A, S, ...] and what was sampled; each is made once."""

    @functools.cache
    def train(config, seeds, names):
        arms = named_arms(names, config.rl)
        first = {name: value[np.array(seeds)] for name, value in start_S.items()}
        stops = list(teaching.reinforce(config, few_scenes.rl, first, seeds, arms, every=2))
        assert [steps for steps, _, _ in stops] == [2, 4]
        return jax.device_get(stops[-1][1]), np.concatenate([log for _, _, log in stops], axis=2)

    return train


def run_of(params_AS, arm, seed):
    return {name: value[arm, seed] for name, value in params_AS.items()}


def largest_difference(params, other):
    return max(float(np.abs(params[name] - other[name]).max()) for name in params)


def one_groups(config, few_scenes, start_S, prompts=40):
    """Groups sampled by the first seed's policy."""
    config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, prompts_per_step=prompts))
    draw = jax.tree.map(lambda x: jnp.asarray(x[0, 0]), teaching._draws(config, len(few_scenes.rl.truth_N), [5]))
    params = {name: value[0] for name, value in start_S.items()}
    clips = few_scenes.rl
    groups = teaching._groups(params, draw, jnp.asarray(clips.display_N9), jnp.asarray(clips.truth_N), config)
    return config, params, draw, groups, clips.truth_N[np.asarray(draw.row_B)]


@pytest.mark.parametrize("name", product.ARMS)
def test_an_arms_advantage_is_the_products_on_rewards_made_anew(few, few_scenes, start_S, name):
    """Rewards written again in NumPy, word by word, from the tokens and from logits without the sampler."""
    config, params, draw, groups, truth_B = one_groups(few, few_scenes, start_S)
    token = np.asarray(groups.token_BGP)
    shape = token.shape[:2]
    rewards = {key: np.zeros(shape, np.float32) for key in ("recall", "precision", "f1", "plus", "minus")}
    has = {key: np.zeros(shape, bool) for key in ("plus", "minus")}
    fast_token = token.copy()
    fast_token[..., : config.trace_length] = SKIPPED
    display = groups.display_B1
    both = [np.asarray(teaching.tiny_policy.logits(params, display, t, config)) for t in (token, fast_token)]
    by_word = product.ARMS[name].candidates == "word"
    for b, g in np.ndindex(shape):
        truth = set(np.flatnonzero(SETS[truth_B[b]]))
        places = [p for p in range(config.trace_length, token.shape[2]) if token[b, g, p] != STOP]
        said = [(token[b, g, p] - 11) // 4 for p in places]
        common = len(truth & set(said))
        rewards["recall"][b, g] = common / len(truth)
        rewards["precision"][b, g] = common / len(set(said))
        rewards["f1"][b, g] = 2 * common / (len(truth) + len(set(said)))
        gaps = {"plus": [], "minus": []}
        for p, category in zip(places, said, strict=True):
            same = [token[b, g, p]] if by_word else list(range(11 + 4 * category, 15 + 4 * category))
            slow, fast = (np.log(np.exp(raw[b, g, p] - raw[b, g, p].max())[same].sum()
                                 / np.exp(raw[b, g, p] - raw[b, g, p].max()).sum()) for raw in both)  # fmt: skip
            slow, fast = max(slow, np.log(1e-10)), max(fast, np.log(1e-10))
            gaps["plus" if category in truth else "minus"].append(slow - fast if category in truth else fast - slow)
        for key, found in gaps.items():
            has[key][b, g] = bool(found)
            rewards[key][b, g] = np.mean(found) if found else 0.0
    everywhere = jnp.ones(shape, bool)
    made = product.Rewards(
        **{f"{key}_BG": jnp.asarray(value) for key, value in rewards.items()},
        format_BG=jnp.ones(shape), valid_BG=everywhere, scored_BG=everywhere,
        plus_valid_BG=jnp.asarray(has["plus"]), minus_valid_BG=jnp.asarray(has["minus"]),
    )  # fmt: skip
    (arm,) = named_arms([name], config.rl)
    found = teaching.advantage(arm, groups, draw.order_BG)
    expected = product.advantages(name, made, config.rl)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    assert has["plus"].any() and has["minus"].any() and float(jnp.abs(expected).max()) > 0.5


def test_a_category_counts_once_where_the_setting_says_so(few, few_scenes, start_S):
    config = with_settings(few, {"rl.calibration_counts": "category"})
    _, _, _, groups, _ = one_groups(config, few_scenes, start_S)
    words = np.asarray(groups.token_BGP)[..., few.trace_length :]
    counted = ((np.asarray(groups.anchors.set_BGWQ) != NO_SET) & ~np.asarray(groups.anchors.repeat_BGWQ))[..., 0]
    repeats = 0
    for b, g in np.ndindex(words.shape[:2]):
        said = [(word - 11) // 4 for word in words[b, g] if word != STOP]
        first = [category not in said[:place] for place, category in enumerate(said)]
        assert list(counted[b, g]) == first + [False] * (words.shape[2] - len(said))
        repeats += len(said) - sum(first)
    assert repeats > 10


def test_the_control_hands_out_the_same_rewards_in_another_order(few, few_scenes, start_S):
    config, _, draw, groups, _ = one_groups(few, few_scenes, start_S)
    method, control = named_arms(["mer_r1", "permuted"], config.rl)
    own, permuted = (np.asarray(teaching.advantage(arm, groups, draw.order_BG)) for arm in (method, control))
    np.testing.assert_allclose(np.sort(own, axis=1), np.sort(permuted, axis=1), atol=1e-5)
    assert (np.abs(own - permuted) > 0.1).mean() > 0.3


def test_a_changed_formula_of_the_product_changes_the_lab(few, trained, start_S, monkeypatch):
    config = with_settings(few, {"rl.beta": 0})
    zero = dataclasses.replace(product.ARMS["rd"], advantage=lambda rewards, config: 0.0 * rewards.f1_BG)
    monkeypatch.setitem(product.ARMS, "rd", zero)
    product.arm_of.cache_clear()
    after, _ = trained(config, (0, 1), ("rd", "ad"))
    product.arm_of.cache_clear()
    start = {name: value[0] for name, value in start_S.items()}
    assert largest_difference(run_of(after, 0, 0), start) == 0  # no advantage and no KL: nothing to learn
    assert largest_difference(run_of(after, 1, 0), start) > 1e-3


def test_an_arm_of_the_users_is_trained_beside_the_products(own, few, trained, start_S):
    config = with_settings(few, {"rl.beta": 0})
    names = (f"{own}.nothing", "baseline", f"{own}.calibrated", f"{own}.calibrated@2")
    params, _ = trained(config, (0, 1), names)
    for seed in range(2):
        before = {name: value[seed] for name, value in start_S.items()}
        moved = [largest_difference(run_of(params, arm, seed), before) for arm in range(4)]
        assert moved[0] == 0 and min(moved[1:]) > 1e-3
    assert largest_difference(run_of(params, 2, 0), run_of(params, 3, 0)) > 1e-5  # the weight behind @ reaches it


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mer_r2", "arm: got 'mer_r2', expected baseline, rd, .*, permuted or module.function"),
        ("mer_r1@much", "calibration_weight: got 'much' .*expected float"),
        ("ad@-1", "calibration_weight: got -1.0, expected"),
        ("nowhere.function", "the module nowhere cannot be imported"),
    ],
)
def test_an_arm_that_cannot_be_is_refused_before_anything_is_drawn(few, name, said):
    with pytest.raises((ConfigError, OwnFunctionError), match=said):
        named_arms([name], few.rl)


def test_switches_that_the_lab_does_not_follow_are_refused(few):
    with pytest.raises(ConfigError, match=r"rl.entropy_coef: got 0.1, expected 0.0: the lab does not have this switch"):
        with_settings(few, {"rl.entropy_coef": 0.1})


NAMES = ("baseline", "mer_r1", "sfcc_loss", "permuted")


@pytest.mark.parametrize(("arm", "seed"), [(0, 1), (1, 0), (2, 1), (3, 0)])
def test_runs_together_are_the_runs_one_by_one(few, trained, arm, seed):
    """Among them the arm with a loss on confidences, which is added for it alone."""
    together, log = trained(few, (0, 1), NAMES)
    alone, own_log = trained(few, (seed,), (NAMES[arm],))
    # Sums are taken in another order, and Adam's first steps make much of little.
    assert largest_difference(run_of(together, arm, seed), run_of(alone, 0, 0)) < 2e-4
    np.testing.assert_allclose(log[arm, seed], own_log[0, 0], atol=2e-3)
    assert np.isfinite(log).all() and log.shape == (4, 2, 4, len(teaching.SAMPLED))


def test_every_run_goes_its_own_way(few, trained):
    together, _ = trained(few, (0, 1), NAMES)
    runs = [run_of(together, arm, seed) for arm, seed in ((0, 0), (1, 0), (2, 0), (3, 0), (0, 1))]
    assert min(largest_difference(one, other) for one, other in itertools.combinations(runs, 2)) > 1e-3


def test_a_seed_comes_again_letter_by_letter(few, few_scenes, trained, start_S):
    again = teaching.fine_tune(few, few_scenes.sft, [1])
    assert largest_difference({n: v[0] for n, v in again.items()}, {n: v[1] for n, v in start_S.items()}) < 1e-4
    assert largest_difference({n: v[0] for n, v in start_S.items()}, {n: v[1] for n, v in start_S.items()}) > 0.1
    first, log = trained(few, (0, 1), NAMES)
    second, log_again = trained.__wrapped__(few, (0, 1), NAMES)
    assert all((first[name] == second[name]).all() for name in first) and (log == log_again).all()


def test_drift_is_the_correlation_of_the_advantage_with_the_number_of_categories(few, few_scenes, start_S):
    _, _, _, groups, _ = one_groups(few, few_scenes, start_S)
    named = np.asarray(groups.named_BG)
    centred = named - named.mean(axis=1, keepdims=True)
    place = teaching.SAMPLED.index("drift")
    for given, drift in ((centred, 1.0), (-2 * centred, -1.0), (0 * centred, 0.0)):
        seen = teaching._observed(groups, jnp.asarray(given), jnp.float32(0))
        assert float(seen[place]) == pytest.approx(drift, abs=1e-5)
    recall = np.asarray(groups.score_3BG)[0]
    seen = teaching._observed(groups, jnp.asarray(centred), jnp.float32(0))
    expected = recall.std(axis=1, ddof=1).mean()
    assert float(seen[teaching.SAMPLED.index("recall_spread")]) == pytest.approx(expected, rel=1e-4)
