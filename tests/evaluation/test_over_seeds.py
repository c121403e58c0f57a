"""Means, differences and orders over seeds and clips, against counts by hand and by simulation."""

import numpy as np
import pytest
from scipy import stats

from mer_r1_jax.evaluation.over_seeds import Resampled, crossed_difference, holm, mean_over_seeds


def flat(*by_seed, clips=4):
    """Scores that are the same for all clips of a seed: only the draw of seeds matters."""
    return np.repeat(np.asarray(by_seed, np.float64)[:, None], clips, axis=1)


def test_standard_error_is_that_of_the_seeds():
    mean = mean_over_seeds([0.7, 0.8, 0.9])
    assert mean.mean == pytest.approx(0.8)
    assert mean.error == pytest.approx(0.1 / np.sqrt(3))  # standard deviation 0.1 with ddof 1
    assert mean.values == (0.7, 0.8, 0.9)
    assert mean_over_seeds([0.7]).error is None


def test_seeds_are_drawn_as_well_as_clips():
    # Two seeds that gain 10 and 30 points on every clip: draws of two give 10, 20, 20 or 30.
    draws = Resampled({"before": flat(0, 0), "after": flat(0.1, 0.3)})
    drawn = 100 * (draws.draws[1] - draws.draws[0])
    values, counts = np.unique(drawn.round(6), return_counts=True)
    assert values.tolist() == [10, 20, 30]
    assert counts / counts.sum() == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    # The clips agree, so the interval is Student's of two values: 20 +- 12.706 * 10.
    difference = draws.difference("after", "before")
    assert (difference.points, difference.low, difference.high) == pytest.approx(
        (20, 20 - 127.06, 20 + 127.06), abs=0.01
    )
    assert (difference.clips, difference.seeds) == (4, 2)
    assert difference.p_value == pytest.approx(stats.ttest_1samp([10, 30], 0).pvalue)


def test_interval_of_one_seed_is_students_over_clips():
    values = np.random.default_rng(3).normal(0.05, 0.2, size=40).clip(-1, 1)
    difference = crossed_difference(values[None])
    expected = stats.ttest_1samp(100 * values, 0)
    assert (difference.low, difference.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert difference.p_value == pytest.approx(expected.pvalue)


def test_mean_squares_are_those_of_a_table_worked_by_hand():
    # Points; rows are seeds. Means of seeds 3, 5, 10 and of clips 4, 8; mean 6; rest +-1, +-1, 0, 0... by subtraction.
    d_SN = np.array([[2, 4], [2, 8], [8, 12]], np.float64)
    # MS_seeds = 2 * 13 = 26 (2 df), MS_clips = 3 * 8 = 24 (1 df), rest [1 -1; -1 1; 0 0]: MS_rest = 4 / 2 = 2 (2 df).
    variance = (26 + 24 - 2) / 6
    freedom = 48**2 / (26**2 / 2 + 24**2 / 1 + 2**2 / 2)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    found = crossed_difference(d_SN / 100)
    assert (found.points, found.low, found.high) == pytest.approx((6, 6 - half, 6 + half))


@pytest.mark.parametrize(("seeds", "of_seed"), [(3, 0.0), (3, 2.0), (6, 2.0)])
def test_interval_holds_the_truth_as_often_as_it_says(seeds, of_seed):
    """Where clips dominate, and where seeds do. 400 intervals of 95%: 4 standard deviations are 4.4 points."""
    rng = np.random.default_rng(seeds)
    held = 0
    for _ in range(400):
        d_SN = (
            of_seed * rng.normal(size=(seeds, 1)) + 5 * rng.normal(size=(1, 100)) + 16 * rng.normal(size=(seeds, 100))
        )
        found = crossed_difference(d_SN / 100)
        held += found.low <= 0 <= found.high
    assert 0.906 <= held / 400 <= 0.994


def test_nothing_is_clear_over_few_seeds():
    shift = np.full((4, 50), 0.1)
    assert crossed_difference(shift).low > 0 and not crossed_difference(shift).is_clear
    assert crossed_difference(shift).has_few_seeds
    assert crossed_difference(np.full((5, 50), 0.1)).is_clear


def test_holm_adjusts_a_family():
    # Sorted: .01 * 4, .02 * 3, .03 * 2 raised to the .06 before it, .5 * 1.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_one_seed_leaves_the_clips():
    # Two clips, gains 0 and 1: draws of two clips give 0, 0.5 or 1, a quarter, a half, a quarter of them.
    draws = Resampled({"before": np.zeros((1, 2)), "after": np.array([[0.0, 1.0]])})
    values, counts = np.unique(draws.draws[1], return_counts=True)
    assert values.tolist() == [0, 0.5, 1]
    assert counts / counts.sum() == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_differences_are_paired_by_clip_and_seed():
    rng = np.random.default_rng(0)
    before = rng.random((5, 50))  # clips and seeds that differ a lot
    draws = Resampled({"before": before, "after": before + 0.01, "same": before.copy()})
    shifted = draws.difference("after", "before")
    assert (shifted.low, shifted.high) == pytest.approx((1, 1)) and shifted.is_clear
    same = draws.difference("same", "before")
    assert (same.points, same.low, same.high) == (0, 0, 0) and not same.is_clear


@pytest.mark.parametrize("clips", [7, 50, 321])
def test_equal_rows_are_equal_to_the_last_bit_wherever_they_stand(clips):
    """Whatever order the processor's BLAS adds up in: it differs between a matrix's first rows and its last ones."""
    rng = np.random.default_rng(clips)
    one, seed_shared = rng.random((3, clips)), rng.random((3, clips))
    seed_shared[1] = one[1]  # one seed in common is paired as well
    rows = {f"{number}": one.copy() for number in range(9)} | {"other": seed_shared}
    draws = Resampled(rows, resamples=501)
    for number in range(9):
        same = draws.difference(f"{number}", "0")
        assert (same.points, same.low, same.high) == (0, 0, 0)
        assert draws.order(["0", f"{number}"]).share == 0  # a tie is no order
    only_shared = Resampled({"a": one[1:2], "b": seed_shared[1:2], "c": one[:1]}, resamples=501)
    assert (only_shared.difference("b", "a").low, only_shared.difference("b", "a").high) == (0, 0)


def test_order_is_counted_over_draws_and_seeds():
    # b beats a in the first seed and loses in the second: of four draws of two seeds one has b ahead, two are ties.
    order = Resampled({"a": flat(0.5, 0.5), "b": flat(0.6, 0.4), "c": flat(0.9, 0.9)}).order(["a", "b", "c"])
    assert order.share == pytest.approx(0.25, abs=0.02)
    assert order.steps[0][:2] == ("a", "b") and order.steps[0][2] == order.share
    assert order.steps[1] == ("b", "c", 1.0)
    assert order.by_seed == (True, False) and order.chance == pytest.approx(1 / 6)
    assert order.observed[-1] == "c" and order.expected == ("a", "b", "c")
    assert order.commonest == ("a", "b", "c")  # a tie stands as it was expected
    assert order.commonest_share == pytest.approx(0.75, abs=0.02)
    reversed_order = Resampled({"a": flat(0.9, 0.8), "b": flat(0.2, 0.1)}).order(["a", "b"])
    assert reversed_order.share == 0 and reversed_order.observed == ("b", "a") == reversed_order.commonest


def test_draws_are_a_function_of_scores_and_seed_however_they_are_cut(monkeypatch):
    scores = {"a": np.random.default_rng(1).random((3, 20)), "b": np.random.default_rng(2).random((3, 20))}
    first = Resampled(scores, seed=1)
    assert (first.draws == Resampled(scores, seed=1).draws).all()
    assert (first.draws != Resampled(scores, seed=2).draws).any()
    monkeypatch.setattr("mer_r1_jax.evaluation.bootstrap._DRAWS_AT_ONCE", 20 * 3000)
    np.testing.assert_allclose(first.draws, Resampled(scores, seed=1).draws, rtol=1e-12)


def test_scores_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="the same seeds"):
        Resampled({"a": np.zeros((2, 3)), "b": np.zeros((3, 3))})
    with pytest.raises(ValueError, match="at least two clips"):
        Resampled({"a": np.zeros((2, 1))})
    with pytest.raises(ValueError, match="no finite number"):
        Resampled({"a": np.full((2, 3), np.nan)})
