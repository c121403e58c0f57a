"""Gated answers: the threshold is the best on one half, and what is said of it is counted on the other."""

import dataclasses
import json

import numpy as np
import pytest

from mer_r1_jax.evaluation.bootstrap import intervals, mean_of, paired
from mer_r1_jax.evaluation.gate import (
    BothAnswers,
    confidence_of,
    fit_and_measure,
    fit_threshold,
    halves,
    is_sure,
    mean_confidence,
    reason,
)
from mer_r1_jax.evaluation.gate_figure import gate_figure


def both_of(confidence, fast, slow, clips=None):
    count = len(confidence)
    arrays = [np.asarray(values, np.float64) for values in (confidence, fast, slow)]
    tokens = np.arange(count) % 3 + 5.0, np.arange(count) % 7 + 40.0
    return BothAnswers(tuple(clips or map(str, range(count))), *arrays, *tokens)


def random_answers(seed, count=60):
    """Fast answers that are better the surer they are, some without a confidence, some confidences equal."""
    rng = np.random.default_rng(seed)
    confidence = rng.integers(0, 25, count) / 25
    fast = np.clip(confidence + rng.normal(0, 0.3, count), 0, 1)
    confidence[rng.random(count) < 0.1] = np.nan
    return both_of(confidence, fast, rng.uniform(0.2, 0.8, count))


def gated(both, threshold):
    """(answered fast, F1, tokens) one by one, as the rule is written."""
    sure = [not np.isnan(one) and one >= threshold for one in both.confidence_N]
    f1 = [fast if is_fast else slow for is_fast, fast, slow in zip(sure, both.fast_f1_N, both.slow_f1_N, strict=True)]
    tokens = [
        fast if is_fast else fast + slow
        for is_fast, fast, slow in zip(sure, both.fast_tokens_N, both.slow_tokens_N, strict=True)
    ]
    return np.asarray(sure), np.asarray(f1), np.asarray(tokens)


@pytest.mark.parametrize("seed", range(8))
def test_no_threshold_is_better_on_the_clips_it_is_fitted_on_and_none_as_good_is_lower(seed):
    both = random_answers(seed)
    threshold = fit_threshold(both)
    best = gated(both, threshold)[1].mean()
    tried = {other: gated(both, other)[1].mean() for other in np.linspace(0, 1, 1001)}
    assert max(tried.values()) <= best + 1e-9
    calls = np.sum(~gated(both, threshold)[0])
    assert all(np.sum(~gated(both, other)[0]) >= calls for other, f1 in tried.items() if f1 > best - 1e-9)


@pytest.mark.parametrize(("fast", "slow", "expected"), [(0.9, 0.5, 0.0), (0.5, 0.9, 1.0), (0.5, 0.5, 0.0)])
def test_the_better_mode_alone_is_among_the_choices(fast, slow, expected):
    both = both_of([0.2, 0.4, 0.6, np.nan], [fast] * 4, [slow] * 4)
    assert fit_threshold(both) == expected


def test_halves_keep_a_clip_together_and_do_not_hang_on_the_order():
    clips = [f"clip-{number // 2}" for number in range(41)]
    first, second = halves(clips)
    assert sorted([*first, *second]) == list(range(41))
    named = [{clips[place] for place in half} for half in (first, second)]
    assert not named[0] & named[1] and (len(named[0]), len(named[1])) == (10, 11)
    turned = halves(clips[::-1])
    assert {clips[::-1][place] for place in turned[0]} == named[0]
    assert {clips[place] for place in halves(clips, seed=1)[0]} != named[0]


def test_what_is_measured_is_counted_on_the_other_half():
    both = random_answers(3)
    found = fit_and_measure(both)
    fitting, measuring = (both.picked(places) for places in halves(both.clips))
    assert found["threshold"] == fit_threshold(fitting) and found["clips_fitted"] == found["clips_measured"] == 30
    assert found["without_confidence"] == np.isnan(measuring.confidence_N).sum() > 0
    assert len(found["curve"]) > 5
    for point in (found["fitted"], *found["curve"]):
        sure, f1, tokens = gated(measuring, point["threshold"])
        assert point["coverage"]["value"] == pytest.approx(sure.mean())
        assert point["f1"]["value"] == pytest.approx(f1.mean())
        assert point["tokens"]["value"] == pytest.approx(tokens.mean())
        risk = 1 - measuring.fast_f1_N[sure].mean() if sure.any() else None
        assert point["risk"]["value"] == (None if risk is None else pytest.approx(risk))
        assert point["f1"]["low"] <= point["f1"]["value"] <= point["f1"]["high"]
    chosen, slow = mean_of(gated(measuring, found["threshold"])[1]), mean_of(measuring.slow_f1_N)
    # One engine and one seed: the same draws, so the very same intervals.
    assert found["slow"]["f1"]["low"] == pytest.approx(intervals(slow)["score"].low)
    difference = paired(chosen, slow)["score"]
    assert found["against_slow"] == pytest.approx(
        {"points": difference.points, "low": difference.low, "high": difference.high}
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_half_that_is_measured_has_no_say_in_the_threshold():
    both = random_answers(5)
    measured = halves(both.clips)[1]
    fast = both.fast_f1_N.copy()
    fast[measured] = 1 - fast[measured]
    changed = fit_and_measure(dataclasses.replace(both, fast_f1_N=fast))
    assert changed["threshold"] == fit_and_measure(both)["threshold"]
    assert changed["fitted"]["f1"] != fit_and_measure(both)["fitted"]["f1"]


def test_too_few_clips_are_said_to_be_too_few():
    few = fit_and_measure(both_of([0.1] * 6, [0.5] * 6, [0.5] * 6, clips=list("aabbcc")))
    assert few == {"threshold": None, "why_none": "3 scored clips; 4 or more can be halved"}
    assert gate_figure(few) is None and gate_figure(None) is None
    silent = fit_and_measure(both_of([np.nan] * 6, [0.5] * 6, [0.6] * 6))
    assert silent["fitted"]["coverage"]["value"] == 0 and silent["fitted"]["risk"]["value"] is None
    assert "<" not in gate_figure(silent).caption, "drawn all the same"


def test_a_confidence_is_the_mean_over_words_of_the_mean_over_their_wheels():
    nan = np.nan
    probability_WQ = np.asarray([[0.2, 0.4, nan], [nan, nan, nan], [0.9, nan, nan]])
    assert mean_confidence(probability_WQ) == pytest.approx((0.3 + 0.9) / 2)
    assert confidence_of({"a": 0.3, "b": None, "c": 0.9}) == pytest.approx((0.3 + 0.9) / 2)
    assert mean_confidence(probability_WQ[1:2]) is mean_confidence(np.zeros((0, 5))) is confidence_of({}) is None


@pytest.mark.parametrize(
    ("confidence", "threshold", "sure", "said"),
    [
        (0.7, 0.6, True, "0.70 is not below the threshold 0.60"),
        (0.6, 0.6, True, "0.60 is not below the threshold 0.60"),
        (0.59996, 0.6, False, "0.59996 is below the threshold 0.60000"),
        (None, 0.0, False, "no word of the fast answer has a confidence"),
        (0.0, 0.0, True, "not below"),
    ],
)
def test_the_reason_says_what_was_compared(confidence, threshold, sure, said):
    assert is_sure(confidence, threshold) is sure and said in reason(confidence, threshold)


def test_the_picture_says_what_was_fitted_and_measured():
    found = fit_and_measure(random_answers(3))
    picture = gate_figure(found)
    assert f"{found['threshold']:.3f}" in picture.caption and "30 held-out clips" in picture.caption
    assert f"{found['fitted']['tokens']['value']:.1f} tokens" in picture.caption


def test_records_of_one_clip_make_no_interval_narrower():
    once = random_answers(3)
    places = np.repeat(np.arange(len(once.clips)), 7)
    first, again = fit_and_measure(once), fit_and_measure(once.picked(places))
    assert again["records_measured"] == 7 * first["records_measured"]
    for name in ("against_fast", "against_slow"):
        assert again[name] == pytest.approx(first[name])
    for found, other in zip(first["curve"], again["curve"], strict=False):
        if found["threshold"] == other["threshold"]:
            assert other["f1"] == pytest.approx(found["f1"]) and other["coverage"] == pytest.approx(found["coverage"])
