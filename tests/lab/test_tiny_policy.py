"""The tiny policy: sampling and scoring agree, nothing illegal is said, a fast answer skips its reasoning."""

import jax.numpy as jnp
import numpy as np
import pytest

from mer_r1_jax.lab import tiny_policy
from mer_r1_jax.lab.scenes import FIRST_WORD, NOTHING, SKIPPED, STOP, WORD_TOKEN, WORDS_EACH
from mer_r1_jax.lab.teaching import training_sampling
from mer_r1_jax.lab.worlds import ANSWER_WORDS
from mer_r1_jax.rl.sampling import greedy

CLIPS = 200


def policy(config, scale=3.0):
    """Random parameters with strong opinions."""
    return {name: scale * value for name, value in tiny_policy.init(config, np.random.default_rng(1)).items()}


def sampled(config, params, *, fast=False, stop_bias=0.0, how=None):
    rng = np.random.default_rng(2)
    display = jnp.asarray(rng.integers(0, 10, (CLIPS, 9)))
    uniform = rng.random((config.trace_length + ANSWER_WORDS, CLIPS), np.float32)
    how = how or training_sampling(config.rl)
    token, raw = tiny_policy.sample(params, display, uniform, tiny_policy.Manner(how, fast, stop_bias), config)
    return display, np.asarray(token), raw


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("world", ["few", "from_trace"])
def test_logits_of_a_sampled_answer_are_those_it_was_sampled_with(request, world, fast):
    config = request.getfixturevalue(world)
    params = policy(config)
    display, token, raw = sampled(config, params, fast=fast)
    again = tiny_policy.logits(params, display, token, config, answer_only=True)
    whole = tiny_policy.logits(params, display, token, config)
    there = np.asarray(tiny_policy.spoken(token))[:, config.trace_length :]
    np.testing.assert_allclose(np.asarray(again)[there], np.asarray(raw)[there], rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(again, whole[:, config.trace_length :])


def test_only_what_may_stand_at_a_place_is_sampled_and_no_word_twice(few):
    _, token, _ = sampled(few, policy(few, scale=1.0))
    trace, answer = np.split(token, [few.trace_length], axis=1)
    assert trace.min() >= 0 and trace.max() == NOTHING
    assert (answer[:, 0] != STOP).all() and answer.min() >= FIRST_WORD
    lengths = set()
    for row in answer.tolist():
        words = [word for word in row if word != STOP]
        assert len(set(words)) == len(words) and row == words + [STOP] * (ANSWER_WORDS - len(words))
        lengths.add(len(words))
    assert len(lengths) == ANSWER_WORDS  # answers of every length occur


def test_a_fast_answer_skips_its_reasoning_and_is_another_answer(few):
    params, how = policy(few), greedy(training_sampling(few.rl))
    _, slow, _ = sampled(few, params, how=how)
    _, fast, _ = sampled(few, params, fast=True, how=how)
    assert (fast[:, : few.trace_length] == SKIPPED).all()
    assert (slow[:, few.trace_length :] != fast[:, few.trace_length :]).any()


def test_an_answer_from_the_trace_alone_does_not_see_the_clip_but_a_fast_one_does(from_trace):
    params = policy(from_trace)
    display, token, _ = sampled(from_trace, params)
    other = jnp.roll(display, 1, axis=0)
    raw = [tiny_policy.logits(params, seen, token, from_trace) for seen in (display, other)]
    trace = from_trace.trace_length
    np.testing.assert_array_equal(raw[0][:, trace:], raw[1][:, trace:])
    assert not np.allclose(raw[0][:, :trace], raw[1][:, :trace])
    fast = jnp.asarray(token).at[:, :trace].set(SKIPPED)
    raw = [tiny_policy.logits(params, seen, fast, from_trace, answer_only=True) for seen in (display, other)]
    assert not np.allclose(raw[0], raw[1])


def test_a_biased_end_makes_answers_longer_or_shorter(few):
    lengths = [(sampled(few, policy(few, 1.0), stop_bias=bias)[1] != STOP).sum() for bias in (-2.0, 0.0, 2.0)]
    assert lengths[0] > lengths[1] > lengths[2]


def test_confidences_sum_over_a_category_and_over_the_word_alone():
    rng = np.random.default_rng(3)
    raw = rng.normal(size=(7, STOP + 1)).astype(np.float32)
    token = rng.integers(FIRST_WORD, STOP, 7)
    found = np.asarray(tiny_policy.confidences(jnp.asarray(raw), jnp.asarray(token)))
    probability = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
    for row, word in enumerate(token):
        first = FIRST_WORD + WORDS_EACH * ((word - FIRST_WORD) // WORDS_EACH)
        by_category = probability[row, first : first + WORDS_EACH].sum()
        np.testing.assert_allclose(np.exp(found[row]), [by_category, probability[row, word]], rtol=1e-4)
    certain = jnp.full((1, STOP + 1), -1e9).at[0, FIRST_WORD].set(0.0)
    assert float(tiny_policy.confidences(certain, jnp.array([STOP - 1]))[0, 0]) == pytest.approx(np.log(1e-10))


def test_an_answers_code_has_a_bit_for_each_category_it_names():
    happy, joyful = (WORD_TOKEN[word] for word in ("happy", "joyful"))  # joy is the first category
    fourth = FIRST_WORD + 3 * WORDS_EACH
    answers = jnp.array([[happy, joyful, fourth, STOP, STOP], [fourth, STOP, STOP, STOP, STOP]])
    assert tiny_policy.answer_code(answers).tolist() == [0b1001, 0b1000]


def test_the_first_stop_is_spoken_and_nothing_after_it():
    row = jnp.array([FIRST_WORD, FIRST_WORD + 1, STOP, STOP, STOP])
    assert tiny_policy.spoken(row).tolist() == [True, True, True, False, False]
    assert all(tiny_policy.spoken(jnp.arange(5)).tolist())
