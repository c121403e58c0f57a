"""What the lab is for: what it shows of a world. Trains small policies to their end."""

import io

import pytest

from mer_r1_jax.lab.experiment import PERMUTED, SFT, SLOW_MINUS_FAST, named_arms, run
from mer_r1_jax.lab.lab_report import text
from mer_r1_jax.lab.worlds import WORLDS, with_settings

SMALLER = {"sft_clips": 1500, "rl_clips": 2000, "eval_clips": 600}


def experiment(world, names, settings):
    config = with_settings(WORLDS[world], SMALLER | settings)
    told = io.StringIO()
    result = run(world, config, named_arms(names, config.rl), [0, 1, 2], lambda line: told.write(f"{line}\n"))
    assert "RL: step" in told.getvalue()
    return result


@pytest.fixture(scope="module")
def few_named():
    """World U, in which slow answers name too few."""
    settings = {"sft.max_steps": 600, "sft.prompts_per_step": 128, "rl.max_steps": 80}
    return experiment("U", ["baseline", "rd", "ad", PERMUTED], settings)


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
        assert few_named.difference("ad", "rd", measure).mean > 0.03
    assert few_named.mean("rd", "slow_precision") > few_named.mean("ad", "slow_precision")


def test_an_arms_way_leads_from_sft_to_where_it_is_measured(few_named):
    for arm in few_named.arms:
        steps, points = zip(*few_named.paths[arm], strict=True)
        assert steps == (0, 16, 32, 48, 64, 80)
        for row, point in ((SFT, points[0]), (arm, points[-1])):
            measured = [few_named.mean(row, f"slow_{name}") for name in ("recall", "precision", "f1")]
            assert point == pytest.approx(measured, abs=1e-6)
    recall = [point[0] for point in few_named.stop_curve]
    assert recall == sorted(recall) and recall[-1] > recall[0] + 0.05  # the later the end, the more is named


def test_few_seeds_call_nothing_clear(few_named):
    assert not few_named.difference("baseline", SFT, "slow_f1").is_clear(3)
    assert few_named.difference("baseline", SFT, "slow_f1").is_clear(5)  # the interval itself is far from zero
    assert "nothing is called clear" in text(few_named) and "*" not in text(few_named).replace("*:", "")


def test_the_twin_of_the_rendered_world_goes_where_rendered_runs_go():
    """docs/results.md: slow answers are precise and fast ones broad, fast is ahead; RL gains recall for some precision
    and puts slow ahead; the arms end close together, and permuted rewards do not gain."""
    twin = experiment("rendered", ["baseline", "rd", "ad", "mer_r1", PERMUTED], {})
    assert twin.mean(SFT, "slow_precision") > twin.mean(SFT, "fast_precision") + 0.02
    assert twin.mean(SFT, "slow_recall") < twin.mean(SFT, "fast_recall") - 0.05
    assert twin.mean(SFT, SLOW_MINUS_FAST) < 0
    for arm in ("baseline", "rd", "ad", "mer_r1"):
        change = {name: twin.difference(arm, SFT, f"slow_{name}").mean for name in ("f1", "recall", "precision")}
        assert change["f1"] > 0.03 and change["recall"] > 0.05 and change["precision"] < 0
        assert twin.mean(arm, SLOW_MINUS_FAST) > 0
        assert abs(twin.difference(arm, "baseline", "slow_f1").mean) < 0.02
    assert twin.difference(PERMUTED, SFT, "slow_f1").mean < 0.02
