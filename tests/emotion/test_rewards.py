"""Answer rewards: cases counted by hand on the shipped wheels, and what must hold for any words."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer_r1_jax.emotion.rewards import answer_rewards, category_sets, constant_floor, majority_answer
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.evaluation.benchmarks.word_protocol import polarity

WHEELS = load_wheels()

# The categories these counts rest on, wheel 1 to 5:
#   happy  enjoyment joy      joy     happy     positive and lively
#   proud  pride     optimism joy     sure      positive thoughts
#   sad    sadness   sadness  sadness sad       negative and passive
#   angry  anger     anger    anger   angry     negative and forceful
#   disgusted disgust disgust anger   disgusted negative and forceful
#   serious interest sadness  -       thinking  -


@pytest.mark.parametrize(
    ("words", "truth", "recall", "precision", "f1"),
    [
        (["joyful"], ["happy"], 1, 1, 1),
        # happy and proud fall together on wheel 3 only: recall (4 * 1/2 + 1) / 5, precision 1, F1 (4 * 2/3 + 1) / 5
        (["happy"], ["happy", "proud"], 0.6, 1.0, (4 * 2 / 3 + 1) / 5),
        # the other way round
        (["happy", "proud"], ["happy"], 1.0, 0.6, (4 * 2 / 3 + 1) / 5),
        # angry and disgusted fall together on wheels 3 and 5: one of one right there, none elsewhere
        (["angry"], ["disgusted"], 0.4, 0.4, 0.4),
        # truth has no category on wheels 3 and 5: three wheels are scored, and on wheel 2 sad is right
        (["sad"], ["serious"], 1 / 3, 1 / 3, 1 / 3),
        ([], ["happy"], 0, 0, 0),
        (["xyzzy"], ["happy"], 0, 0, 0),
        (["sad", "xyzzy"], ["sad"], 1, 1, 1),  # an unknown word costs nothing
        (["happy", "joyful", "cheerful"], ["sad", "joyful"], 0.5, 1, 2 / 3),  # nor does repeating a category
    ],
)
def test_rewards_counted_by_hand(words, truth, recall, precision, f1):
    got = answer_rewards(words, truth, WHEELS)
    assert (got.recall, got.precision, got.f1) == pytest.approx((recall, precision, f1), abs=1e-12)
    assert got.scorable


def test_words_are_counted():
    got = answer_rewards(["Happy", " happy", "xyzzy", "neutral"], ["sad"], WHEELS)
    assert (got.n_words, got.n_unknown, got.n_categories) == (3, 2, 1.0)


@pytest.mark.parametrize("truth", [[], ["neutral"], ["xyzzy", ""]])
def test_unscorable_truth(truth):
    got = answer_rewards(["happy"], truth, WHEELS, word_penalty=0.5)
    assert (got.recall, got.precision, got.f1, got.scorable) == (0.0, 0.0, 0.0, False)


def test_wheels_without_a_true_category_count_nothing_or_are_left_out():
    """Three of five wheels have a category for serious, and on one of them sad is right."""
    got = answer_rewards(["sad"], ["serious"], WHEELS, all_wheels=True)
    assert (got.recall, got.precision, got.f1) == (pytest.approx(1 / 5),) * 3
    assert answer_rewards(["sad"], ["sad"], WHEELS, all_wheels=True).f1 == 1.0  # all five have one
    assert not answer_rewards(["sad"], ["neutral"], WHEELS, all_wheels=True).scorable


def test_word_penalty_counts_words_beyond_the_truth():
    got = answer_rewards(["happy", "joyful", "glad"], ["happy"], WHEELS, word_penalty=0.1)
    assert (got.recall, got.precision, got.f1) == pytest.approx((0.8, 0.8, 0.8))
    assert answer_rewards(["happy"], ["happy", "sad"], WHEELS, word_penalty=0.1).precision == 1.0


words = st.lists(st.sampled_from(sorted(WHEELS.base_words)) | st.sampled_from(["neutral", "", "xyzzy"]), max_size=6)


@settings(max_examples=200)
@given(words, words)
def test_reward_bounds_and_symmetry(predicted, truth):
    got = answer_rewards(predicted, truth, WHEELS)
    values = (got.recall, got.precision, got.f1)
    assert all(math.isfinite(value) and -1e-12 <= value <= 1 + 1e-12 for value in values)
    assert got.scorable == any(category_sets(truth, WHEELS))
    assert answer_rewards(predicted[::-1] * 2, truth, WHEELS) == got
    assert got.f1 <= (got.recall + got.precision) / 2 + 1e-12, "a harmonic mean, averaged"
    if got.scorable:
        assert answer_rewards(truth, truth, WHEELS).f1 == pytest.approx(1.0)
    if got.scorable and all(category_sets(predicted, WHEELS)) and all(category_sets(truth, WHEELS)):
        swapped = answer_rewards(truth, predicted, WHEELS)
        assert (swapped.recall, swapped.precision) == pytest.approx((got.precision, got.recall))
        assert swapped.f1 == pytest.approx(got.f1)


def test_majority_answer_is_the_best_constant():
    truths = [["happy"], ["joyful"], ["happy", "sad"], ["angry"], ["neutral"]]
    words = majority_answer(truths, WHEELS)
    assert words[0] == "happy"
    floor = constant_floor(words, truths, WHEELS)
    assert floor.n_scored == 4
    for other in (["sad"], ["angry"], ["happy", "sad", "angry"], ["happy"]):
        assert floor.f1 >= constant_floor(other, truths, WHEELS).f1 - 1e-12
    # happy alone: right on all but "angry"; F1 1, 1, 2/3, 0
    assert constant_floor(["happy"], truths, WHEELS).f1 == pytest.approx((1 + 1 + 2 / 3 + 0) / 4)


def test_majority_answer_takes_as_many_words_as_help():
    assert set(majority_answer([["happy", "sad"]] * 3 + [["angry"]], WHEELS)) == {"happy", "sad"}


def test_majority_answer_without_known_truth():
    assert majority_answer([["neutral"], []], WHEELS) == ()
    assert constant_floor((), [["neutral"]], WHEELS).f1 == 0.0


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["happy"], "positive"),
        (["calm", "grateful", "annoyed"], "positive"),
        (["sad", "furious"], "negative"),
        (["stressed"], "negative"),
        (["surprised"], "neutral"),
        (["neutral"], "neutral"),
        ([], "neutral"),
        (["happy", "sad"], "neutral"),
        (["Hopeful", "hopeful", "sad"], "neutral"),
        (["happy", "sneaky"], "neutral"),  # sneaky is on three wheels only and weighs as much
    ],
)
def test_polarity_rule(found, expected):
    assert polarity(found, WHEELS) == expected
