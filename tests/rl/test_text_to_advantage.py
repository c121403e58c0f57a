"""From what a policy may write to its advantages: whatever is answered, finite and as stated, in every arm."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.answers import completions_of, slow
from support.tiny_tokenizer import tiny_tokenizer

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.emotion.candidates import CandidateTable, WordTable
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.rl.advantage import ARMS, advantages
from mer_r1_jax.rl.confidence import NO_SET, calibration
from mer_r1_jax.rl.losses import loss_mask
from mer_r1_jax.rl.scoring import AnswerScorer
from mer_r1_jax.rl.tags import AnswerTags

G = 4
# On the wheels or not, one token or several (the tests' tokenizer has 400), sharing first tokens, merged with the tag.
WORDS = ("happy", "sad", "Calm", "surprised", "apprehensive", "gloopy", "self-satisfied", "", "快乐", "happy.")
TRUTHS = (("happy",), ("sad", "calm"), ("gloopy", "happy"), ("neutrality-of-stone",), ())
WHOLE = st.lists(st.sampled_from(WORDS), max_size=3).map(", ".join).map(functools.partial(slow, reasoning="The"))
BROKEN = st.sampled_from(["", "<answer>sad</answer>", "<think>The", "<think></think>\n<answer>sad</answer>", "happy"])
TEXT = st.one_of(WHOLE, WHOLE.map(lambda text: text[:-4] + "..."), WHOLE.map(lambda text: text + "..."), BROKEN)


@functools.cache
def scorer(table):
    tokenizer, wheels = tiny_tokenizer(), load_wheels()
    config = RlConfig(max_answer_words=4, max_fast_context=24)
    return AnswerScorer(AnswerTags(tokenizer), wheels, table(tokenizer, wheels), config)


def scored(rows, truths, arm="mer_r1", seed=0):
    """Rewards of texts, their confidences drawn at random, and the scored groups."""
    groups = scorer(WordTable if ARMS[arm].candidates == "word" else CandidateTable).groups(
        completions_of(rows), truths
    )
    rng = np.random.default_rng(seed)
    slow_BGWQ, fast_BGWQ = -rng.exponential(3, (2, *groups.anchors.set_BGWQ.shape)).astype(np.float32)
    calibrated = dataclasses.asdict(calibration(slow_BGWQ, fast_BGWQ, groups.anchors))
    return dataclasses.replace(groups.rewards, **calibrated), groups


def of_arm(arm, rewards, **config):
    return np.asarray(advantages(arm, rewards, RlConfig(**config)))


@given(
    rows=st.lists(st.lists(TEXT, min_size=G, max_size=G), min_size=2, max_size=2),
    same=TEXT,
    truths=st.lists(st.sampled_from(TRUTHS), min_size=3, max_size=3),
    scale=st.sampled_from(["group", "batch", "none"]),
    table=st.sampled_from(["mer_r1", "sfcc_word"]),
)
@settings(max_examples=20)
def test_any_answers_give_finite_advantages_that_sum_to_nothing(rows, same, truths, scale, table):
    rewards, _ = scored([*rows, [same] * G], truths, table)
    rewards = dataclasses.replace(rewards, plus_BG=np.array(rewards.plus_BG), minus_BG=np.array(rewards.minus_BG))
    rewards.plus_BG[2] = rewards.plus_BG[2, 0]  # of equal answers, equal confidences
    rewards.minus_BG[2] = rewards.minus_BG[2, 0]
    for name in ("recall_BG", "precision_BG", "f1_BG", "format_BG", "plus_BG", "minus_BG"):
        assert np.isfinite(getattr(rewards, name)).all(), name
    wheels = scorer(CandidateTable).wheels
    known = [any(wheels.is_known(word) for word in truth) for truth in truths]
    np.testing.assert_array_equal(rewards.scored_BG, np.repeat(known, G).reshape(3, G))
    for arm in ARMS:
        advantage_BG = of_arm(arm, rewards, scale_rewards=scale)
        assert np.isfinite(advantage_BG).all()
        np.testing.assert_allclose(advantage_BG.sum(-1), 0, atol=2e-4)  # every z is centred on its valid values
        assert not advantage_BG[2].any()


def test_answers_without_a_known_word_have_no_precision_rather_than_a_nan():
    rewards, _ = scored([[slow("happy"), slow("gloopy"), slow("gloopy, 快乐"), slow("")]], [("happy",)])
    np.testing.assert_array_equal(rewards.precision_BG, [[1, 0, 0, 0]])
    np.testing.assert_array_equal(rewards.recall_BG, [[1, 0, 0, 0]])
    np.testing.assert_array_equal(rewards.format_BG, [[1, 1, 1, 0]])
    assert not rewards.plus_valid_BG[0, 1:].any() and not rewards.minus_valid_BG[0, 1:].any()
    # One right answer of four has z = (1 - 1/4) / (1/2) in recall and in precision; three of four are well-formed.
    right, formed = np.array([0.75, -0.25, -0.25, -0.25]), np.array([0.25, 0.25, 0.25, -0.75])
    np.testing.assert_allclose(of_arm("ad", rewards)[0], (2 * right + 0.1 * formed) / (0.5 + 1e-4), rtol=1e-5)


@pytest.mark.parametrize("truth", [(), ("neutrality-of-stone",)])
@pytest.mark.parametrize("arm", ARMS)
def test_truth_that_says_nothing_leaves_the_format_alone(arm, truth):
    rewards, _ = scored([[slow("happy"), slow("sad"), "happy", slow("calm")]], [truth], arm)
    z = np.array([0.25, 0.25, -0.75, 0.25])
    z *= 0.1 / (0.1 * 0.5 + 1e-4) if arm == "baseline" else 0.1 / (0.5 + 1e-4)
    if arm == "gdpo":  # whitened over the step, which is this group
        z /= z.std(ddof=1) + 1e-4
    np.testing.assert_allclose(of_arm(arm, rewards)[0], z, rtol=1e-4)


@pytest.mark.parametrize("arm", ARMS)
def test_group_cut_short_before_any_answer_teaches_nothing(arm):
    rows = [["<think>The voice..."] * G, [slow("happy"), slow("sad") + "...", slow("calm"), "<think>The..."]]
    completions = completions_of(rows)
    rewards, groups = scored(rows, [("happy",)] * 2, arm)
    assert all(answer.truncated for answer in groups.answers[0])
    assert not of_arm(arm, rewards)[0].any()
    # A cut answer stays in its group's statistics; it leaves the loss only when asked, and then with all its tokens.
    assert of_arm(arm, rewards)[1].all()
    kept = loss_mask(completions.mask_BGC, completions.truncated_BG, True).any(-1)
    np.testing.assert_array_equal(kept, [[False] * 4, [True, False, True, False]])


def test_words_that_share_their_first_token_with_another_category_have_no_confidence_there():
    table = CandidateTable(tiny_tokenizer(), load_wheels())
    assert 0 < table.share_lost < 1
    _, groups = scored([[slow("happy, ashamed, sad"), slow("apprehensive, happy")] * 2], [("happy",)])
    assert not any(groups.counts.values())  # every answer keeps its confidences
    held = lost = 0
    for generation in range(2):
        sets_WQ = groups.anchors.set_BGWQ[0, generation]
        for w, word in enumerate(groups.answers[0][generation].parsed.words):
            np.testing.assert_array_equal(sets_WQ[w], table.word(word))
            categories = [load_wheels().category(word, wheel) for wheel in range(len(sets_WQ[w]))]
            held += sum(s != NO_SET for s in sets_WQ[w])
            lost += sum(c is not None and s == NO_SET for c, s in zip(categories, sets_WQ[w], strict=True))
    assert held and lost  # both kinds occur
    assert len(tiny_tokenizer().encode("apprehensive")) > 1


def test_an_answer_merged_with_its_tag_keeps_its_rewards_and_has_no_confidence():
    """`>s` is one token of the tests' tokenizer: recall and precision count, R+ and R- are invalid, so their z is 0."""
    rows = [[slow("surprised"), slow("happy"), slow("happy, calm"), slow("happy, sad")]]
    rewards, groups = scored(rows, [("surprised", "happy")])
    assert groups.counts["merged_tag"] == 1
    assert rewards.recall_BG[0, 0] > 0 and rewards.format_BG[0, 0] == 1
    assert not rewards.plus_valid_BG[0, 0] and rewards.plus_valid_BG[0, 1:].all()
    difference = of_arm("mer_r1", rewards) - of_arm("ad", rewards)
    assert difference[0, 0] == 0 and difference[0, 1:].any()
