"""Verdicts on numbers made by hand: t over seeds, Holm's levels, and every rule of the protocol both ways."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from mer_r1_jax.evaluation.over_seeds import holm
from mer_r1_jax.study.hypotheses import CALIBRATED, Stage, registered, second_weight
from mer_r1_jax.study.verdicts import Claim, Paired, holm_levels, judge

WOBBLE = np.asarray([-0.3, 0.1, 0.2, -0.1, 0.3, -0.2]) / 100  # of six seeds, in shares; its mean is 0


def seeds(points, wobble=1.0):
    """A share of six seeds around so many points."""
    return points / 100 + wobble * WOBBLE


def stage(**changes):
    """Numbers on which all six hypotheses are confirmed; changes are (world, row, measure) joined by __ -> shares."""
    row = {
        "slow_f1": 50, "fast_f1": 48, "slow_recall": 40, "fast_recall": 60, "slow_precision": 70, "fast_precision": 50,
        "sampled_f1": 45, "confidence_right": 50, "confidence_wrong": 20,
        "recall_spread_over_rl": 14, "precision_spread_over_rl": 28,
    }  # fmt: skip
    better = {"slow_f1": 58, "slow_recall": 60}
    rows = {
        "sft": row | {"slow_f1": 42, "fast_f1": 54},
        "baseline": row | {"slow_f1": 57, "slow_recall": 55},
        "rd": row,
        "ad": row | better,
        "mer_r1": row | better | {"sampled_f1": 47, "confidence_right": 52, "confidence_wrong": 18},
    }
    rows |= {f"{arm}@1": rows["mer_r1"] for arm in CALIBRATED}
    values = {
        world: {
            # Each row and measure wobbles in its own way, or paired differences would not vary at all.
            name: {
                measure: seeds(points, np.random.default_rng([len(name), n]).uniform(0.5, 1.5))
                for n, (measure, points) in enumerate(row.items())
            }
            for name, row in rows.items()
        }
        for world in ("U", "O", "T")
    }
    for place, shares in changes.items():
        world, name, measure = place.split("__")
        values[world][name] = values[world][name] | {measure: shares}
    return Stage(values)


def outcomes(stage):
    return {verdict.claim.key: verdict.outcome for verdict in judge(registered(stage))}


def test_an_interval_is_students_and_of_the_product():
    one = Paired("x", (1.0, 2.0, 4.0, 3.0, 2.5))
    expected = stats.ttest_1samp(one.points_S, 0)
    low, high = expected.confidence_interval(0.99)
    found = one.estimate(0.01)
    assert (found.low, found.high) == pytest.approx((low, high)) and found.mean == pytest.approx(2.5)
    assert one.p_value == pytest.approx(expected.pvalue)
    assert Paired("x", (0.0, 0.0)).p_value == 1 and Paired("x", (0.1, 0.1)).p_value == 0
    assert Paired("x", (3.0,)).p_value == 1 and Paired("x", (3.0,)).estimate().low == -np.inf
    assert Paired.of("x", [0.5, 0.25], [0.25, 0.5]).points_S == (25.0, -25.0)


def test_levels_are_holms_and_exclude_zero_where_holm_rejects():
    assert holm_levels([0.001, 0.2, 0.012]) == pytest.approx([0.05 / 3, 0.05, 0.05 / 2])
    # The second smallest fails at .05 / 2: the third keeps that level, though .03 is below .05.
    assert holm_levels([0.001, 0.03, 0.028]) == pytest.approx([0.05 / 3, 0.025, 0.025])
    rng = np.random.default_rng(0)
    for _ in range(200):
        p_values = (rng.random(6) ** 3).tolist()
        rejected = [p < level for p, level in zip(p_values, holm_levels(p_values), strict=True)]
        assert rejected == [adjusted < 0.05 for adjusted in holm(p_values)]


def test_a_family_costs_each_claim_some_of_its_certainty():
    """A difference that is clear alone and not among six."""
    alone = Paired("x", (0.2, 1.4, 0.1, 1.9, 0.3, 1.1))
    assert 0.05 / 6 < alone.p_value < 0.05

    def claim(key, measure):
        return Claim(key, "", (measure,), lambda found: (found[0].is_above_zero, found[0].is_below_zero))

    noise = Paired("noise", (1.0, -1.0, 0.5, -0.4, 0.1, -0.3))
    (one,) = judge([claim("a", alone)])
    first, *_ = judge([claim("a", alone), *(claim(str(n), noise) for n in range(5))])
    assert one.outcome == "confirmed" and first.outcome == "undecided" and first.level == pytest.approx(0.05 / 6)


def test_all_six_can_be_confirmed():
    assert outcomes(stage()) == dict.fromkeys(("H1", "H2", "H3", "H4a", "H4b", "H5"), "confirmed")
    (h2,) = [verdict for verdict in judge(registered(stage())) if verdict.claim.key == "H2"]
    assert [estimate.mean for estimate in h2.estimates] == pytest.approx([8, 20, 20])
    assert [one.mean for one in h2.beside] == pytest.approx([8, 14, 14])  # E in O, then the gaps of the spreads


FLAT = 1000  # times the wobble: nothing can be seen


@pytest.mark.parametrize(
    ("key", "changes", "outcome"),
    [
        ("H1", {"U__sft__fast_f1": seeds(40, 2)}, "refuted"),
        ("H1", {"U__sft__fast_recall": seeds(41, FLAT)}, "undecided"),
        ("H1", {"O__sft__fast_f1": seeds(40, 2)}, "confirmed"),  # judged in U alone
        ("H2", {"U__ad__slow_f1": seeds(50.5, 1.7)}, "refuted"),  # above zero, and surely by less than a point
        ("H2", {"U__ad__slow_f1": seeds(54, FLAT)}, "undecided"),
        ("H2", {"O__ad__slow_recall": seeds(30, 2)}, "undecided"),  # the wrong sign in O
        ("H2", {"O__ad__slow_recall": seeds(40.1, 4)}, "undecided"),  # no sign in O
        ("H3", {"U__ad__slow_recall": seeds(50, 2)}, "refuted"),
        ("H3", {"U__ad__slow_recall": seeds(55.1, 4)}, "undecided"),
        ("H4a", {"T__mer_r1__sampled_f1": seeds(45.6, 1.6)}, "refuted"),
        ("H4a", {"T__mer_r1__sampled_f1": seeds(47, FLAT)}, "undecided"),
        ("H4a", {"U__mer_r1__sampled_f1": seeds(45.1, 2)}, "confirmed"),  # judged in T alone
        ("H4b", {"T__mer_r1__confidence_wrong": seeds(23, 2)}, "refuted"),
        (
            "H4b",
            {"T__mer_r1__confidence_right": seeds(50, 1.2), "T__mer_r1__confidence_wrong": seeds(20, 0.8)},
            "refuted",  # neither has moved by three quarters of a point
        ),
        ("H4b", {"T__mer_r1__confidence_wrong": seeds(20, 9)}, "undecided"),
        ("H5", {"U__mer_r1__slow_f1": seeds(46, 2)}, "refuted"),
        ("H5", {"U__baseline__fast_f1": seeds(57, 9)}, "undecided"),
        ("H5", {"U__rd__slow_f1": seeds(40, 2)}, "confirmed"),  # rd is not in it
    ],
)
def test_each_rule_decides_as_the_protocol_says(key, changes, outcome):
    found = outcomes(stage(**changes))
    assert found[key] == outcome, found


def test_the_noisier_reward_decides_which_sign_is_right():
    recall_noisier = {f"{w}__{arm}__recall_spread_over_rl": seeds(40) for w in ("U", "O") for arm in ("ad", "rd")}
    assert outcomes(stage(**recall_noisier))["H2"] == "undecided"  # ad should then find less than rd
    in_o = {place: value for place, value in recall_noisier.items() if place[0] == "O"}
    assert outcomes(stage(**in_o, O__ad__slow_recall=seeds(30, 2)))["H2"] == "confirmed"


def test_where_both_rules_hold_the_smaller_claim_is_not_confirmed():
    verdict = judge(registered(stage(U__ad__slow_f1=seeds(50.5, 1.7))))[1]
    assert verdict.outcome == "refuted" and verdict.estimates[0].is_above_zero
    assert verdict.why == "the rule that confirms it holds too"


def test_too_few_seeds_or_no_measure_decide_nothing():
    numbers = stage()
    few = {
        world: {row: {name: values[:4] for name, values in of.items()} for row, of in rows.items()}
        for world, rows in numbers.worlds.items()
    }
    verdicts = judge(registered(dataclasses.replace(numbers, worlds=few)))
    assert {verdict.outcome for verdict in verdicts} == {"undecided"}
    assert verdicts[0].why == "4 of the 5 seeds that can decide anything"
    without = judge(registered(dataclasses.replace(numbers, worlds={"U": numbers.worlds["U"]})))
    assert [(v.claim.key, v.why) for v in without if v.why] == [
        ("H2", "not measured: O"),
        ("H4a", "not measured: T"),
        ("H4b", "not measured: T"),
    ]


def test_the_second_weight_is_a_family_of_its_own():
    claims = second_weight(stage())
    assert len(claims) == 2 * len(CALIBRATED) and claims[0].key == "H4a mer_r1@1"
    assert {verdict.outcome for verdict in judge(claims)} == {"confirmed"}
    assert "mer_r1@1 − ad, T" in claims[0].measures[0].label


def test_stage_b_is_judged_in_its_one_world():
    numbers = stage()
    one = Stage({"U": numbers.worlds["U"]}, calibrated_in="U", calibrated_by="slow_f1", sign_in=("U",))
    found = {verdict.claim.key: verdict for verdict in judge(registered(one))}
    assert [found[key].outcome for key in ("H1", "H2", "H3", "H4b", "H5")] == ["confirmed"] * 5
    assert found["H4a"].outcome == "refuted"  # greedy answers of mer_r1 and ad are alike here
    assert found["H4a"].estimates[0].label == "greedy E, mer_r1 − ad, U"
