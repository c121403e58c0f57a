"""The MER-UniBench scores: cases counted by hand on the shipped wheels, and the official examples where at hand."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import official_data
from support.official_data import needs_official_data

from mer_r1_jax.emotion import answer_form, official_scores
from mer_r1_jax.emotion.wheels import VARIANTS, load_wheels

WHEELS = load_wheels()
MER2026 = load_wheels(variant="mer2026")


@pytest.fixture(scope="module")
def examples():
    return json.loads(official_data.EXAMPLES.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def official():
    return {variant: load_wheels(official_data.WHEELS, variant) for variant in VARIANTS}


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value


@needs_official_data
def test_official_parse_and_clean_up(examples):
    assert examples["parse"] and examples["llm_postprocess"]
    for case in examples["parse"]:
        assert answer_form.split_words(case["input"]) == case["output"]
    for case in examples["llm_postprocess"]:
        assert answer_form.clean_extractor_text(case["input"]) == case["output"]


@needs_official_data
@pytest.mark.parametrize("variant", VARIANTS)
def test_official_words(examples, official, variant):
    wheels = official[variant]
    for case in examples["word"]:
        want = case[variant]
        for level in (1, 2):
            got = [wheels.category(case["input"], k, level) for k in range(5)]
            assert got == want[f"level{level}"], case["input"]
        base = next(iter(wheels.base_words.get(case["input"].strip().lower(), ())), None)
        assert base == want["case1"]
        assert next(iter(wheels.wheel_words.get(base, ())), None) == want["case2"]


@needs_official_data
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", [1, 2])
def test_official_pairs(examples, official, variant, level):
    wheels = official[variant]
    for case in examples["pair"]:
        want = case[variant][f"level{level}"]
        truth, words = answer_form.split_words(case["gt"]), answer_form.split_words(case["pred"])
        score = official_scores.set_f1([words], [truth], wheels, level=level)
        assert [_null(v) for v in (score.score, score.precision, score.recall)] == [
            want["f"], want["precision"], want["recall"]
        ], case["id"]  # fmt: skip
        got = [[_null(wheel.precision), _null(wheel.recall)] for wheel in score.per_wheel]
        assert got == want["per_wheel_precision_recall"], case["id"]
        for name, found in (("gt_sets", truth), ("pred_sets", words)):
            assert [sorted(wheels.categories(found, k, level)) for k in range(5)] == [sorted(s) for s in want[name]]


@needs_official_data
def test_official_hit(examples, official):
    for case in examples["hit"]:
        words = [answer_form.split_words(text) for text in case["pred"]]
        score = official_scores.hit(words, case["gt"], official["unibench"])
        assert _null(score.score) == case["hit"] and _null(score.precision) == case["mscore"], case["id"]
        got = [[_null(wheel.score), _null(wheel.precision)] for wheel in score.per_wheel]
        assert got == case["per_wheel_hit_mscore"], case["id"]


@needs_official_data
def test_official_waf(examples):
    for case in examples["waf"]:
        score = official_scores.waf(case["sentiment"], case["label"])
        assert (score.score, score.accuracy) == (case["waf"], case["acc"]), case["id"]


@needs_official_data
def test_our_wheels_cover_the_official_vocabulary(official):
    wheels = official["unibench"]
    words = {word for found in wheels.wheel_words.values() for word in found}
    assert len(words) == 253 and len(wheels.base_words) == 7386
    assert sum(map(WHEELS.is_known, words)) / len(words) >= 0.95
    assert sum(map(WHEELS.is_known, wheels.base_words)) / len(wheels.base_words) >= 0.80


@needs_official_data
def test_upstream_error_about_fear_is_kept_and_mended_by_variant(official):
    kept = [official["unibench"].category("fear", k) for k in range(5)]
    assert kept == ["scared", "happy", "joyful", "genius", "joyful"]
    mended = [official["mer2026"].category("fear", k) for k in range(5)]
    assert mended == ["scared", "fearful", "scared", "fear", "scared"]


# Five cases counted by hand on the shipped wheels (tests/emotion/test_rewards.py lists the categories they rest on).


def test_set_f1_by_hand_two_samples():
    """Wheel F comes from mean precision and recall: not the mean of per-sample F."""
    score = official_scores.set_f1([["happy", "sad"], ["angry"]], [["happy"], ["angry", "sad"]], WHEELS)
    # every wheel: precisions 1/2 and 1, recalls 1 and 1/2, so P = R = F = 3/4 (per-sample F would give 2/3)
    assert (score.score, score.precision, score.recall) == (0.75, 0.75, 0.75)
    assert (score.n, score.n_scored) == (2, 2)


def test_set_f1_by_hand_wheels_differ():
    """angry for disgusted is right on wheels 3 and 5 only; elsewhere P + R = 0."""
    score = official_scores.set_f1([["angry"]], [["disgusted"]], WHEELS)
    assert [wheel.precision for wheel in score.per_wheel] == [0, 0, 1, 0, 1]
    assert math.isnan(score.score) and score.precision == score.recall == 0.4
    assert official_scores.set_f1([["angry"]], [["disgusted"]], MER2026).score == 0.4


def test_set_f1_by_hand_skipped_samples():
    """neutral is skipped everywhere, serious on wheels 3 and 5; an empty prediction counts 0."""
    truths = [["neutral"], ["serious"], ["happy"]]
    score = official_scores.set_f1([["happy"], [], ["joyful"]], truths, WHEELS)
    assert [wheel.n_scored for wheel in score.per_wheel] == [2, 2, 1, 2, 1]
    assert [wheel.recall for wheel in score.per_wheel] == [0.5, 0.5, 1.0, 0.5, 1.0]
    assert score.score == score.recall == pytest.approx((0.5 * 3 + 2) / 5) and score.n_scored == 2


def test_hit_by_hand():
    """Extra predictions cost nothing; serious is scored on wheels 1, 2 and 4, and hit by sad on wheel 2."""
    score = official_scores.hit([["sad", "angry", "happy"], ["sad"]], ["happy", "serious"], WHEELS)
    assert [wheel.score for wheel in score.per_wheel] == [0.5, 1.0, 1.0, 0.5, 1.0]
    assert score.score == score.recall == 0.8
    # labels name the categories of happy and serious: of sad, angry, happy only happy counts, on wheel 2 sad too
    assert [wheel.precision for wheel in score.per_wheel] == [0.5, 0.75, 1.0, 0.5, 1.0]


def test_waf_by_hand():
    """Labels 0 go; "Positive" is no sentiment and so negative. True +, +, -: predicted +, -, -."""
    score = official_scores.waf(["positive", "Positive", "neutral", "positive"], [0.4, 1.0, -2.0, 0.0])
    # positive: precision 1, recall 1/2, F 2/3, weight 2/3; negative: precision 1/2, recall 1, F 2/3, weight 1/3
    assert score.score == pytest.approx(2 / 3)
    assert (score.accuracy, score.n, score.n_scored) == (pytest.approx(2 / 3), 4, 3)


def test_empty_data_sets_are_undefined():
    assert math.isnan(official_scores.set_f1([], [], WHEELS).score)
    assert math.isnan(official_scores.hit([["happy"]], ["neutral"], WHEELS).score)
    assert math.isnan(official_scores.waf(["positive"], [0.0]).score)
    assert official_scores.set_f1([], [], MER2026).score == 0.0


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 predictions for 1"):
        official_scores.set_f1([[], []], [[]], WHEELS)


samples = st.lists(st.sampled_from(["happy", "sad", "angry", "disgusted", "serious", "neutral", "xyzzy"]), max_size=4)


@settings(max_examples=100)
@given(st.lists(st.tuples(samples, samples), min_size=1, max_size=5))
def test_scores_are_bounded_and_ignore_order(pairs):
    predictions, truths = zip(*pairs, strict=True)
    score = official_scores.set_f1(predictions, truths, MER2026)
    assert 0 <= score.score <= 1 and 0 <= score.precision <= 1 and 0 <= score.recall <= 1
    shuffled = official_scores.set_f1(predictions[::-1], truths[::-1], MER2026)
    assert (shuffled.score, shuffled.n_scored) == (pytest.approx(score.score), score.n_scored)
    perfect = official_scores.set_f1(truths, truths, MER2026)
    assert all(wheel.score == (1.0 if wheel.n_scored else 0.0) for wheel in perfect.per_wheel)
