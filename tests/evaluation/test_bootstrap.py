"""Bootstrap intervals over clips: they cover the truth as often as they say; pairing counts as documented."""

import numpy as np
import pytest
from scipy import stats

from mer_r1_jax.evaluation import bootstrap
from mer_r1_jax.evaluation.bootstrap import (
    Difference,
    mean_interval,
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
