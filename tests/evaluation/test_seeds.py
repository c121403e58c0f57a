"""Means over seeds and their bootstrap, against counts by hand."""

import numpy as np
import pytest

from mer_r1_jax.evaluation.bootstrap import Resampled, mean_over_seeds


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
    difference = draws.difference("after", "before")
    assert (difference.points, difference.low, difference.high) == pytest.approx((20, 10, 30))
    assert (difference.clips, difference.seeds) == (4, 2)
    drawn = 100 * (draws._draws[1] - draws._draws[0])
    values, counts = np.unique(drawn.round(6), return_counts=True)
    assert values.tolist() == [10, 20, 30]
    assert counts / counts.sum() == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_one_seed_leaves_the_clips():
    # Two clips, gains 0 and 1: draws of two clips give 0, 0.5 or 1, a quarter, a half, a quarter of them.
    draws = Resampled({"before": np.zeros((1, 2)), "after": np.array([[0.0, 1.0]])})
    values, counts = np.unique(draws._draws[1], return_counts=True)
    assert values.tolist() == [0, 0.5, 1]
    assert counts / counts.sum() == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_differences_are_paired_by_clip_and_seed():
    rng = np.random.default_rng(0)
    before = rng.random((3, 50))  # clips and seeds that differ a lot
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
    assert (first._draws == Resampled(scores, seed=1)._draws).all()
    assert (first._draws != Resampled(scores, seed=2)._draws).any()
    monkeypatch.setattr("mer_r1_jax.evaluation.bootstrap._DRAWS_AT_ONCE", 20 * 3000)
    np.testing.assert_allclose(first._draws, Resampled(scores, seed=1)._draws, rtol=1e-12)


def test_scores_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="the same seeds"):
        Resampled({"a": np.zeros((2, 3)), "b": np.zeros((3, 3))})
    with pytest.raises(ValueError, match="at least two clips"):
        Resampled({"a": np.zeros((2, 1))})
    with pytest.raises(ValueError, match="no finite number"):
        Resampled({"a": np.full((2, 3), np.nan)})
