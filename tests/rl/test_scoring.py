"""Sampled token ids read, scored and given anchors: completions written by hand, a real tokenizer, real wheels."""

import types

import numpy as np
import pytest
from support.answers import completions_of, slow
from support.tiny_tokenizer import tiny_tokenizer

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.emotion.candidates import CandidateTable
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.rl.confidence import NO_SET
from mer_r1_jax.rl.scoring import AnswerScorer
from mer_r1_jax.rl.tags import AnswerTags
from mer_r1_jax.run.setup import Setup


@pytest.fixture(scope="module")
def wheels():
    return load_wheels()


@pytest.fixture(scope="module")
def candidates(wheels):
    return CandidateTable(tiny_tokenizer(), wheels)


@pytest.fixture
def scorer_of(wheels, candidates):
    def make(**settings):
        return AnswerScorer(
            AnswerTags(tiny_tokenizer()),
            wheels,
            candidates,
            RlConfig(**({"max_answer_words": 4, "max_fast_context": 24} | settings)),
        )

    return make


def test_rewards_of_right_wrong_padded_and_missing_answers(scorer_of):
    rows = [[slow("happy"), slow("sad"), slow("happy, sad"), "<think>The voice"]]
    scored = scorer_of().groups(completions_of(rows), [("happy",)])
    rewards = scored.rewards
    np.testing.assert_allclose(rewards.recall_BG, [[1, 0, 1, 0]])
    np.testing.assert_allclose(rewards.precision_BG, [[1, 0, 0.5, 0]])
    np.testing.assert_allclose(rewards.f1_BG, [[1, 0, 2 / 3, 0]])
    np.testing.assert_array_equal(rewards.format_BG, [[1, 1, 1, 0]])
    assert rewards.valid_BG.all() and rewards.scored_BG.all()
    assert [answer.parsed.words for answer in scored.answers[0]] == [("happy",), ("sad",), ("happy", "sad"), ()]
    assert scored.answers[0][0].text == rows[0][0]  # without the end of the turn


def test_answer_is_read_from_the_first_closed_block_whatever_the_format(scorer_of):
    rows = [[slow("happy") + " and more", "<answer>happy</answer>", slow("", "x"), slow("happy", "")]]
    scored = scorer_of().groups(completions_of(rows), [("happy",)])
    np.testing.assert_array_equal(scored.rewards.format_BG, [[0, 0, 0, 0]])
    np.testing.assert_allclose(scored.rewards.f1_BG, [[1, 1, 0, 1]])


def test_cut_completion_is_scored_and_marked(scorer_of):
    rows = [[slow("happy") + "...", "<think>The voice and...", slow("happy"), slow("happy")]]
    scored = scorer_of().groups(completions_of(rows), [("happy",)])
    assert [answer.truncated for answer in scored.answers[0]] == [True, True, False, False]
    np.testing.assert_allclose(scored.rewards.f1_BG, [[1, 0, 1, 1]])


def test_row_without_a_prompt_has_no_answers_and_counts_nothing(scorer_of):
    rows = [[slow("happy")] * 2, [None] * 2]
    scored = scorer_of().groups(completions_of(rows), [("happy",), None])
    assert scored.answers[1] == ()
    np.testing.assert_array_equal(scored.rewards.valid_BG, [[True, True], [False, False]])
    np.testing.assert_array_equal(scored.rewards.scored_BG, [[True, True], [False, False]])
    assert (scored.anchors.set_BGWQ[1] == NO_SET).all() and not scored.anchors.fast.exists_BGC[1].any()
    assert not any(scored.counts.values())


def test_truth_on_no_wheel_cannot_be_scored(scorer_of):
    scored = scorer_of().groups(completions_of([[slow("happy"), slow("sad")]]), [("neutrality-of-stone",)])
    assert not scored.rewards.scored_BG.any() and scored.rewards.valid_BG.all()
    assert (scored.anchors.set_BGWQ == NO_SET).all()


def test_the_authors_earlier_reading_is_three_switches(scorer_of):
    rows = [[slow("sad") + " and more", "sad, serious", slow("", "x"), slow("sad")]]
    usual = scorer_of().groups(completions_of(rows), [("serious",)])
    earlier = scorer_of(wheels_without_truth="zero", untagged_answer="split", format_reward="lenient")
    scored = earlier.groups(completions_of(rows), [("serious",)])
    np.testing.assert_allclose(usual.rewards.recall_BG, [[1 / 3, 0, 0, 1 / 3]])
    np.testing.assert_allclose(scored.rewards.recall_BG, [[1 / 5, 3 / 5, 0, 1 / 5]], rtol=1e-6)
    np.testing.assert_array_equal(usual.rewards.format_BG, [[0, 0, 0, 1]])
    np.testing.assert_array_equal(scored.rewards.format_BG, [[1, 0, 1, 1]])
    # Confidences are of well-formed answers still.
    assert usual.counts["bad_format"] == scored.counts["bad_format"] == 3


def test_words_beyond_the_truths_count_cost_the_penalty(scorer_of):
    rows = [[slow("happy"), slow("happy, delighted, joyful")]]
    free = scorer_of().groups(completions_of(rows), [("happy",)]).rewards
    paid = scorer_of(word_penalty=0.25).groups(completions_of(rows), [("happy",)]).rewards
    for name in ("recall_BG", "precision_BG", "f1_BG"):
        before, after = getattr(free, name), getattr(paid, name)
        np.testing.assert_allclose(after - before, [[0, -0.5]], atol=1e-6, err_msg=name)


def test_anchors_tell_correct_words_from_wrong_ones_on_every_wheel(scorer_of, wheels, candidates):
    scorer = scorer_of()
    scored = scorer.groups(completions_of([[slow("happy, sad")]]), [("happy",)])
    anchors = scored.anchors
    for w, word in enumerate(("happy", "sad")):
        for wheel in range(len(wheels)):
            category, known = wheels.category(word, wheel), wheels.category("happy", wheel)
            held = anchors.set_BGWQ[0, 0, w, wheel] != NO_SET
            assert held == (category is not None and known is not None and candidates.word(word)[wheel] != NO_SET)
            assert anchors.correct_BGWQ[0, 0, w, wheel] == (category is not None and category == known)
    # The fast context is the empty think block and the sample's own ids up to the last word.
    forced = len(scorer.tags.empty_think)
    text = scorer.tags.text(anchors.fast.id_BGC[0, 0][anchors.fast.exists_BGC[0, 0]])
    assert text.startswith("<think></think>\n<answer>happy,")
    own = anchors.slow_BGW[0, 0, 0]
    assert anchors.fast_BGW[0, 0, 0] == forced and anchors.fast_BGW[0, 0, 1] - forced == anchors.slow_BGW[0, 0, 1] - own


def test_fast_answers_get_confidences_only_when_their_format_is_excused(scorer_of):
    rows = [["<think></think>\n<answer>happy</answer>"]]
    asked = scorer_of().groups(completions_of(rows), [("happy",)])
    assert (asked.anchors.set_BGWQ == NO_SET).all() and asked.counts["bad_format"] == 1
    excused = scorer_of().groups(completions_of(rows), [("happy",)], require_format=False)
    assert (excused.anchors.set_BGWQ != NO_SET).any() and excused.counts["bad_format"] == 0


def test_words_asked_about_behind_their_reasoning_alone_need_no_room_for_a_fast_context(scorer_of):
    rows, truth = [[slow("happy, sad")]], [("happy",)]
    whole = scorer_of().groups(completions_of(rows), truth).anchors
    short = scorer_of(max_fast_context=8)
    dropped = short.groups(completions_of(rows), truth)
    assert dropped.counts["too_long"] == 1 and (dropped.anchors.set_BGWQ == NO_SET).all()
    kept = short.groups(completions_of(rows), truth, fast_contexts=False)
    assert kept.counts["too_long"] == 0 and not kept.anchors.fast.exists_BGC.any()
    for name in ("slow_BGW", "set_BGWQ", "correct_BGWQ"):
        np.testing.assert_array_equal(getattr(kept.anchors, name), getattr(whole, name))


def test_surplus_words_are_counted_and_get_no_confidence(scorer_of):
    rows = [[slow("happy, sad, angry")]]
    scored = scorer_of(max_answer_words=2).groups(completions_of(rows), [("happy", "angry")])
    assert scored.counts["surplus_words"] == 1
    assert scored.anchors.set_BGWQ.shape[2] == 2
    assert scored.answers[0][0].rewards.n_words == 3


def test_evaluations_read_and_score_answers_as_they_always_do():
    rl = RlConfig(word_penalty=0.5, wheels_without_truth="zero", untagged_answer="split", format_reward="lenient")
    setup = types.SimpleNamespace(config=types.SimpleNamespace(rl=rl), _scorer=lambda config: config)
    assert Setup.eval_scorer.fget(setup) == RlConfig()
