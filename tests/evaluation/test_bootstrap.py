"""Bootstrap intervals: they cover the truth as often as they say; pairing, seeds and clips count as documented.

First over clips, then, against counts by hand, over seeds and clips.
"""

import numpy as np
import pytest
from scipy import stats

from mer_r1_jax.evaluation import bootstrap
from mer_r1_jax.evaluation.bootstrap import (
    Difference,
    Resampled,
    mean_interval,
    mean_over_seeds,
    paired_difference,
)


def scores(seed, clips=300, seeds=1):
    """Scores of an old and a new policy: clips differ a lot, seeds a little, the gain is 3 points on average."""
    rng = np.random.default_rng(seed)
    clip = rng.beta(2, 2, clips)
    before = clip + rng.normal(0, 0.05, (seeds, clips))
    return before + 0.03 + rng.normal(0, 0.1, (seeds, clips)), before


def test_interval_is_scipys_percentile_bootstrap():
    after, before = scores(0)
    ours = paired_difference(after[0], before[0], resamples=20_000)
    theirs = stats.bootstrap(
        ((after - before)[0],), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.points == pytest.approx(100 * (after - before).mean())
    assert (ours.low, ours.high) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=0.03)
    assert ours.clips == 300 and ours.seeds == 1 and ours.is_clear


def test_interval_covers_the_true_difference_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        differences = rng.exponential(0.1, 60) - 0.07  # skewed, true mean 3 points
        interval = mean_interval(differences, seed=trial, resamples=1000)
        covered += interval.low <= 3 <= interval.high
    assert 0.90 <= covered / 400 <= 0.98


def test_scores_are_paired_by_clip():
    after, before = scores(1)
    paired = paired_difference(after, before)
    mixed = paired_difference(after[:, ::-1], before)
    assert mixed.points == pytest.approx(paired.points)
    assert mixed.high - mixed.low > 2.5 * (paired.high - paired.low)


def test_seeds_are_averaged_for_each_clip():
    after, before = scores(2, seeds=3)
    together = paired_difference(after, before, seed=5)
    averaged = paired_difference(after.mean(axis=0), before.mean(axis=0), seed=5)
    bounds = [(interval.points, interval.low, interval.high) for interval in (together, averaged)]
    assert bounds[0] == pytest.approx(bounds[1])
    assert together.clips == 300 and together.seeds == 3 and "3 seeds" in str(together)
    # Three seeds of the same clips are not three times as many clips: what clips have in common stays.
    repeated = paired_difference(np.repeat(after[:1], 3, axis=0), np.repeat(before[:1], 3, axis=0), seed=5)
    alone = paired_difference(after[:1], before[:1], seed=5)
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))
    one_start = paired_difference(after, before[:1])
    assert one_start.points == pytest.approx(100 * (after.mean() - before[0].mean())) and one_start.seeds == 3
    uneven = paired_difference(after, before[:2])
    assert uneven.points == pytest.approx(100 * (after.mean() - before[:2].mean()))


def test_interval_is_a_function_of_scores_and_seed(monkeypatch):
    after, before = scores(3)
    first = paired_difference(after, before, seed=1)
    assert first == paired_difference(after, before, seed=1)
    assert first != paired_difference(after, before, seed=2)
    assert bootstrap.RESAMPLES >= 10_000
    drawn = []
    means = bootstrap._drawn_means
    monkeypatch.setattr(bootstrap, "_drawn_means", lambda *a: drawn.append(means(*a)) or drawn[-1])
    monkeypatch.setattr(bootstrap, "_DRAWS_AT_ONCE", 70_000)  # drawn in pieces, the last one shorter
    paired_difference(after, before)
    assert drawn[0].shape == (bootstrap.RESAMPLES,)


def test_no_difference_is_not_clear():
    _, before = scores(4)
    same = paired_difference(before, before)
    assert (same.points, same.low, same.high) == (0, 0, 0) and not same.is_clear
    seeds = paired_difference(np.repeat(before, 3, axis=0), before)  # a mean of three would differ in the last place
    assert (seeds.points, seeds.low, seeds.high) == (0, 0, 0)
    assert Difference(-2.0, -3.0, -1.0, 9).is_clear and not Difference(2.0, -0.1, 4.1, 9).is_clear
    assert str(Difference(-2.0, -3.0, 1.0, 9)) == "−2.0 points (95% interval −3.0 to +1.0, 9 clips)"


def test_scores_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="scores of 3 and 2 clips"):
        paired_difference(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="at least two clips"):
        paired_difference(np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match="1 scores that are no finite number"):
        paired_difference(np.array([1, np.nan, 0]), np.ones(3))


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
