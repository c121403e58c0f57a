"""What the lab is for: what it shows of a world. Trains small policies to their end."""

import pytest

from mer_r1_jax.lab.experiment import PERMUTED, SFT, SLOW_MINUS_FAST, named_arms, run
from mer_r1_jax.lab.lab_report import text
from mer_r1_jax.lab.worlds import WORLDS, with_settings

SMALLER = {"sft_clips": 2500, "rl_clips": 2000, "eval_clips": 400}
SMALLER |= {"sft.max_steps": 1000, "sft.prompts_per_step": 128, "rl.max_steps": 100}
SEEDS = [0, 1]


def experiment(world, names, seeds=SEEDS):
    config = with_settings(WORLDS[world], SMALLER)
    told = []
    result = run(world, config, named_arms(names, config.rl), seeds, told.append)
    assert "RL: step 100 of 100" in "".join(told)
    return result


@pytest.fixture(scope="module")
def few_named():
    """World U, in which slow answers name too few."""
    return experiment("U", ["baseline", "rd", "ad", PERMUTED])


def test_rewards_that_say_nothing_gain_nothing(few_named):
    assert few_named.mean(PERMUTED, "slow_f1") - few_named.mean(SFT, "slow_f1") < 0.02
    assert few_named.mean("baseline", "slow_f1") - few_named.mean(SFT, "slow_f1") > 0.06
    assert abs(few_named.sampled[PERMUTED]["drift"].mean()) < 0.06


def test_the_noisier_reward_owns_the_sum(few_named):
    """Precision varies more within groups than recall: `rd` follows it and names too few, `ad` does not."""
    sampled = few_named.sampled["rd"]
    assert sampled["precision_spread"].mean() > 1.4 * sampled["recall_spread"].mean()
    drift = [few_named.sampled[arm]["drift"].mean() for arm in ("rd", "ad", "baseline")]
    assert drift == sorted(drift)
    for measure in ("slow_f1", "slow_recall"):
        assert few_named.difference("ad", "rd", measure).points > 2
    assert few_named.mean("rd", "slow_precision") > few_named.mean("ad", "slow_precision")


def test_an_arms_way_leads_from_sft_to_where_it_is_measured(few_named):
    for arm in few_named.arms:
        steps, points = zip(*few_named.paths[arm], strict=True)
        assert steps == (0, 20, 40, 60, 80, 100)
        for row, point in ((SFT, points[0]), (arm, points[-1])):
            measured = [few_named.mean(row, f"slow_{name}") for name in ("recall", "precision", "f1")]
            assert point == pytest.approx(measured, abs=1e-6)
    recall = [point[0] for point in few_named.stop_curve]
    assert recall == sorted(recall) and recall[-1] > recall[0] + 0.05  # the later the end, the more is named


def test_few_seeds_call_nothing_clear(few_named):
    gain = few_named.difference("baseline", SFT, "slow_f1")
    by_seed = few_named.values("baseline", "slow_f1").mean(axis=1) - few_named.values(SFT, "slow_f1").mean(axis=1)
    assert gain.points == pytest.approx(100 * by_seed.mean(), abs=1e-3) and gain.seeds == len(SEEDS)
    assert not gain.is_clear
    assert "nothing is called clear" in text(few_named) and "*" not in text(few_named).replace("*:", "")


def test_where_reasonings_conclude_the_gap_closes():
    """As in rendered runs of such a world: slow answers are precise and fast ones broad, and fast is ahead; RL gains
    recall for some precision, which closes the gap, and permuted rewards do not gain. (How close the arms end takes
    eight seeds at full size to see: docs/lab.md.)"""
    twin = experiment("concluding", ["baseline", "mer_r1", PERMUTED], seeds=[0])
    assert twin.difference(SFT, None, SLOW_MINUS_FAST).points < -2
    assert twin.mean(SFT, "slow_precision") > twin.mean(SFT, "fast_precision") + 0.02
    assert twin.mean(SFT, "slow_recall") < twin.mean(SFT, "fast_recall") - 0.05
    for arm in ("baseline", "mer_r1"):
        change = {name: twin.difference(arm, SFT, f"slow_{name}").points for name in ("f1", "recall", "precision")}
        assert change["f1"] > 3 and change["recall"] > 5 and change["precision"] < 0
        assert twin.difference(arm, SFT, SLOW_MINUS_FAST).points > 3
    assert twin.difference(PERMUTED, SFT, "slow_f1").points < 2
