"""Slow and fast confidence against a brute-force oracle: word by word, full softmax, one context at a time."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from support.rl_policy import bound, carried, log_softmax, packed_hidden, policy, prompts, row_logits
from support.tiny_tokenizer import tiny_tokenizer

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.emotion.answer_form import parse_answer
from mer_r1_jax.emotion.candidates import CandidateTable, WordTable
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.evaluation.answering import beside
from mer_r1_jax.rl import confidence
from mer_r1_jax.rl.confidence import NO_SET, AnswerToScore, AskedWords, build_anchors, calibration
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.rl.tags import AnswerTags
from mer_r1_jax.training.rl_step import ask

LENGTHS, WIDTH, LENGTH, WORDS, CONTEXT = (7, 9), 9, 64, 4, 48
CONFIG = RlConfig(max_answer_words=WORDS, max_fast_context=CONTEXT)
TRUTHS = (("happy", "calm"), ("angry", "worried", "sad"))
SILENT = (1, 2)  # the prompt and the wheel
TEXTS = (
    (
        "<think>Smiles.</think>\n<answer>joyful, sad</answer>",  # one right, one wrong
        "<think>The voice is calm.</think>\n<answer>Calm,HAPPY, delighted, happy</answer>",  # all right, a repeat
        "<think>No.</think>\n<answer>happy</answer> and more",  # not well-formed
        "<think>Odd.</think>\n<answer>gloopy, table</answer>",  # on no wheel
        "<think>Hm.</think>\n<answer>furious</answer>",  # all wrong
    ),
    (
        "<think>Loud.</think>\n<answer>['furious', 'anxious']</answer>",
        "<think>Low.</think>\n<answer>sad, angry, calm, afraid, joyful</answer>",  # a word too many
        "<think>Empty.</think>\n<answer></answer>",
        "<think>Long.</think>\n<answer>" + "zq" * 20 + ", sad</answer>",  # does not fit
        "",
    ),
)


@functools.cache
def world():
    tokenizer, wheels = tiny_tokenizer(), load_wheels()
    return AnswerTags(tokenizer), wheels, CandidateTable(tokenizer, wheels)


@functools.cache
def true_categories(row):
    """The truth's categories on each wheel; on one wheel the second prompt's truth has none."""
    wheels = world()[1]
    found = [frozenset(wheels.categories(TRUTHS[row], wheel)) for wheel in range(len(wheels))]
    assert all(found)
    return [frozenset() if (row, wheel) == SILENT else held for wheel, held in enumerate(found)]


@functools.cache
def sampled():
    """Completions with these texts, tokenised piece by piece as the policy writes them."""
    tags = world()[0]
    id_BGC = np.zeros((2, 5, LENGTH), np.int32)
    length_BG = np.zeros((2, 5), np.int32)
    for row, texts in enumerate(TEXTS):
        for generation, text in enumerate(texts):
            if text:
                head, _, tail = text.partition("</think>\n<answer>")
                ids = [*tags.ids(head), *tags.empty_think[len(tags.ids("<think>")) :], *tags.ids(tail), tags.turn_end]
                id_BGC[row, generation, : len(ids)] = ids
                length_BG[row, generation] = len(ids)
    return id_BGC, length_BG


@functools.cache
def anchored(table=None):
    tags, wheels, candidates = world()
    id_BGC, length_BG = sampled()
    answers = []
    for row in range(2):
        parsed = [parse_answer(tags.completion_text(*pair)) for pair in zip(id_BGC[row], length_BG[row], strict=True)]
        answers.append(
            [
                AnswerToScore(ids=ids, length=int(length), words=one.words, usable=one.format_reward == 1)
                for ids, length, one in zip(id_BGC[row], length_BG[row], parsed, strict=True)
            ]
        )
    return build_anchors(
        answers,
        [true_categories(row) for row in range(2)],
        tags=tags,
        category=wheels.category,
        candidate_sets=(table or candidates).word,
        config=CONFIG,
    )


@jax.jit
def on_device(params, slow_h, fast_h, anchors, candidate_ids):
    slow, fast = confidence.confidences(bound(params), slow_h, fast_h, anchors, candidate_ids, chunk=32)
    return slow, fast, confidence.calibration(slow, fast, anchors), confidence.confidence_metrics(slow, fast, anchors)


@functools.cache
def scored(word_candidates=False):
    table = WordTable(tiny_tokenizer(), world()[1]) if word_candidates else world()[2]
    anchors, _ = anchored(table if word_candidates else None)
    id_BGC, length_BG = sampled()
    own = Continuations(id_BGC=id_BGC, exists_BGC=np.arange(LENGTH) < length_BG[..., None])
    slow_h, fast_h = packed_hidden(policy()[2], *prompts(LENGTHS, WIDTH), own, anchors.fast)
    return jax.tree.map(np.asarray, on_device(policy()[2], slow_h, fast_h, anchors, table.ids_ZY))


@functools.cache
def first_tokens(wheel, category):
    forms = world()[1].forms(wheel)[category]
    spelled = [s for f in forms for s in (f.lower(), f.capitalize(), " " + f.lower(), " " + f.capitalize())]
    return {tiny_tokenizer().encode(s)[0] for s in spelled}


def candidate_ids(wheel, category):
    """V(c), written down anew: first tokens of four spellings of each form, minus those of the other categories."""
    others = [first_tokens(wheel, name) for name in world()[1].groups(wheel) if name != category]
    return sorted(first_tokens(wheel, category) - set().union(*others))


@functools.cache
def brute_force(row, generation):
    """[(word, wheel, correct, slow, fast)] of one completion, from its own ids, one context at a time."""
    tags, wheels, _ = world()
    id_BGC, length_BG = sampled()
    ids = [int(i) for i in id_BGC[row, generation, : length_BG[row, generation]]]
    texts = [tags.tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
    opening = next(n for n, text in enumerate(texts) if "<answer>" in text)
    inputs = prompts(LENGTHS, WIDTH)
    found = []
    for word in parse_answer(texts[-1].removesuffix("<|im_end|>")).words[:WORDS]:
        at = texts[-1].lower().index(word, texts[-1].index("<answer>"))
        token = next(n for n, text in enumerate(texts) if len(text) > at)
        slow = np.exp(log_softmax(row_logits(*inputs, row, ids[:token])[-1]))
        fast_ids = [*tags.ids("<think>"), *tags.ids("</think>\n<answer>"), *ids[opening + 1 : token]]
        fast = np.exp(log_softmax(row_logits(*inputs, row, fast_ids)[-1]))
        for wheel in range(len(wheels)):
            category, truth = wheels.category(word, wheel), true_categories(row)[wheel]
            if category is None or not truth or not (held := candidate_ids(wheel, category)):
                continue
            values = (np.log(max(p[held].sum(), 1e-10)) for p in (slow, fast))
            found.append((word, wheel, category in truth, *values))
    return found


WITH_CONFIDENCE = ((0, 0), (0, 1), (0, 4), (1, 0), (1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("row", "generation"), WITH_CONFIDENCE)
def test_confidences_equal_brute_force(row, generation):
    anchors, _ = anchored()
    slow, fast, _, _ = scored()
    expected = brute_force(row, generation)
    assert expected
    words = list(dict.fromkeys(word for word, *_ in expected))
    id_BGC, length_BG = sampled()
    order = parse_answer(world()[0].completion_text(id_BGC[row, generation], length_BG[row, generation])).words
    held = anchors.set_BGWQ[row, generation] != NO_SET
    assert held.sum() == len(expected)
    for word, wheel, correct, slow_expected, fast_expected in expected:
        w = order.index(word)
        assert held[w, wheel]
        assert anchors.correct_BGWQ[row, generation, w, wheel] == correct
        np.testing.assert_allclose(slow[row, generation, w, wheel], slow_expected, atol=2e-4)
        np.testing.assert_allclose(fast[row, generation, w, wheel], fast_expected, atol=2e-4)
    assert len(words) == held.any(-1).sum()


@pytest.mark.slow
@pytest.mark.parametrize("packed", (True, False))
def test_words_of_several_texts_get_the_same_confidences_in_one_pass(packed):
    """As an evaluation asks: each answer beside one with other words, and the fast contexts as texts of their own."""
    anchors, _ = anchored()
    id_BGC, length_BG = sampled()
    exists_BGC = np.arange(LENGTH) < length_BG[..., None]
    own = AskedWords(
        continuation=Continuations(id_BGC=id_BGC, exists_BGC=exists_BGC),
        index_BGW=anchors.slow_BGW,
        set_BGWQ=anchors.set_BGWQ,
    )
    # The last completion of a row and so on: nobody may see it, and its own words have their places.
    twin = jax.tree.map(lambda leaf: leaf[:, ::-1], own)
    fast = AskedWords(continuation=anchors.fast, index_BGW=anchors.fast_BGW, set_BGWQ=anchors.set_BGWQ)
    asked = (beside(own, twin), beside(fast, fast))
    tokens, features, next_position_B = prompts(LENGTHS, WIDTH)
    slow, at_once = jax.jit(
        lambda params, asked: ask(
            bound(params), carried(tokens, features, next_position_B), asked, world()[2].ids_ZY, packed=packed
        )
    )(policy()[2], asked)
    expected_slow, expected_fast, _, _ = scored()
    held = anchors.set_BGWQ != NO_SET
    assert held.sum() > 20
    for found, expected in (
        (slow[:, :5], expected_slow), (slow[:, :4:-1], expected_slow),
        (at_once[:, :5], expected_fast), (at_once[:, 5:], expected_fast),
    ):  # fmt: skip
        np.testing.assert_allclose(np.asarray(found)[held], expected[held], atol=2e-4)
    assert np.ptp(expected_slow[held]) > 1  # so that another word's value would be seen


def loop_calibration(found, correct, sign):
    """R+ or R-: mean over words per wheel, then over the wheels with such words; None without any."""
    wheels = sorted({wheel for _, wheel, right, *_ in found if right == correct})
    means = [
        np.mean([sign * (slow - fast) for _, k, right, slow, fast in found if k == wheel and right == correct])
        for wheel in wheels
    ]
    return np.mean(means) if means else None


@pytest.mark.slow
def test_calibration_rewards_equal_brute_force():
    _, _, calibrated, _ = scored()
    kinds = set()
    for row in range(2):
        for generation in range(5):
            found = brute_force(row, generation) if (row, generation) in WITH_CONFIDENCE else []
            for value, valid, correct, sign in (
                (calibrated.plus_BG, calibrated.plus_valid_BG, True, 1),
                (calibrated.minus_BG, calibrated.minus_valid_BG, False, -1),
            ):
                expected = loop_calibration(found, correct, sign)
                assert valid[row, generation] == (expected is not None)
                np.testing.assert_allclose(value[row, generation], expected or 0.0, atol=4e-4)
                kinds.add((correct, expected is None))
    assert len(kinds) == 4
    assert np.abs(calibrated.plus_BG).max() > 0.05  # far above the tolerance


@pytest.mark.slow
def test_metrics_are_means_over_words_and_wheels():
    _, _, _, metrics = scored()
    found = [word for row, generation in WITH_CONFIDENCE for word in brute_force(row, generation)]
    for name, held in (("", (True, False)), ("_correct", (True,)), ("_wrong", (False,))):
        kept = [word for word in found if word[2] in held]
        np.testing.assert_allclose(metrics[f"confidence/slow{name}"], np.mean([np.exp(w[3]) for w in kept]), atol=1e-5)
        np.testing.assert_allclose(metrics[f"confidence/fast{name}"], np.mean([np.exp(w[4]) for w in kept]), atol=1e-5)


def test_what_gets_no_confidence_is_counted():
    anchors, counts = anchored()
    assert counts == {"bad_format": 2, "merged_tag": 0, "too_long": 1, "surplus_words": 1, "unlocated_words": 0}
    for row, generation in ((0, 2), (0, 3), (1, 2), (1, 3), (1, 4)):
        assert (anchors.set_BGWQ[row, generation] == NO_SET).all()
    for row, generation in ((0, 2), (1, 2), (1, 3), (1, 4)):
        assert not anchors.fast.exists_BGC[row, generation].any()


def test_a_merged_tag_gives_no_confidence():
    """The `>` token of a sample also holds the first letter: its fast context cannot be cut out of its ids."""
    tags, wheels, candidates = world()
    whole = tiny_tokenizer().encode("<think>Hm.</think>\n<answer>surprised, sad</answer>")
    located = tags.locate(whole, len(whole))
    assert located.merged  # the tests' tokenizer learnt `>s` from its texts
    answer = AnswerToScore(ids=np.asarray(whole, np.int32), length=len(whole), words=("surprised", "sad"), usable=True)
    categories = [[wheels.categories(("sad",), wheel) for wheel in range(len(wheels))]]
    anchors, counts = build_anchors(
        [[answer]],
        categories,
        tags=tags,
        category=wheels.category,
        candidate_sets=candidates.word,
        config=CONFIG,
    )
    assert counts["merged_tag"] == 1
    assert (anchors.set_BGWQ == NO_SET).all() and not anchors.fast.exists_BGC.any()


def test_words_on_wheels_where_the_truth_has_no_category_do_not_count():
    anchors, _ = anchored()
    row, wheel = SILENT
    used = (anchors.set_BGWQ != NO_SET).any(axis=(1, 2))
    assert not used[row, wheel]
    assert used[row].sum() == used.shape[1] - 1 and used[1 - row, wheel]


def test_a_category_may_count_once():
    """rl.calibration_counts: R+ is over every right word, or leaves out where an earlier word named the category."""
    tags, wheels, candidates = world()
    ids = tiny_tokenizer().encode("<think>Hm.</think>\n<answer>\njoyful, sad, happy</answer>")
    words = ("joyful", "sad", "happy")
    answer = AnswerToScore(ids=np.asarray(ids, np.int32), length=len(ids), words=words, usable=True)
    truth = [[wheels.categories(words, wheel) for wheel in range(len(wheels))]]  # all words are right
    anchors, plus = {}, {}
    for counts in ("word", "category"):
        config = dataclasses.replace(CONFIG, calibration_counts=counts)
        about = {"tags": tags, "category": wheels.category, "candidate_sets": candidates.word, "config": config}
        anchors[counts] = build_anchors([[answer]], truth, **about)[0]
        slow_BGWQ = np.zeros(anchors[counts].set_BGWQ.shape, np.float32)
        slow_BGWQ[0, 0, :3] = np.array([1.0, 2.0, 6.0])[:, None]  # nats for joyful, sad, happy
        plus[counts] = float(calibration(slow_BGWQ, np.zeros_like(slow_BGWQ), anchors[counts]).plus_BG[0, 0])
    # Confidences themselves, which evaluations show, are those of all words whatever counts.
    np.testing.assert_array_equal(anchors["word"].set_BGWQ, anchors["category"].set_BGWQ)
    held_WQ = anchors["word"].set_BGWQ[0, 0, :3] != NO_SET
    same_Q = np.array([wheels.category("joyful", q) == wheels.category("happy", q) for q in range(len(wheels))])
    assert (same_Q & held_WQ[2]).any()
    nats_W = np.array([1.0, 2.0, 6.0])
    for counts in ("word", "category"):
        kept_WQ = held_WQ.copy()
        if counts == "category":
            kept_WQ[2] &= ~same_Q
        on_wheels = [kept_WQ[:, q] for q in range(len(wheels)) if kept_WQ[:, q].any()]
        means = [nats_W[kept_W].mean() for kept_W in on_wheels]
        assert plus[counts] == pytest.approx(np.mean(means), abs=1e-5)
    assert plus["category"] < plus["word"] - 0.5


@pytest.mark.slow
def test_word_candidates_use_the_words_own_tokens():
    """The arm `sfcc_word`: the confidence of a word's own first tokens is never above its category's, sharing aside."""
    slow, _, _, _ = scored(word_candidates=True)
    anchors, _ = anchored(WordTable(tiny_tokenizer(), world()[1]))
    tags, _, _ = world()
    id_BGC, length_BG = sampled()
    ids = [int(i) for i in id_BGC[0, 0, : length_BG[0, 0]]]
    for w, word in enumerate(("joyful", "sad")):
        token = int(anchors.slow_BGW[0, 0, w])
        p = np.exp(log_softmax(row_logits(*prompts(LENGTHS, WIDTH), 0, ids[:token])[-1]))
        own = {tags.ids(s)[0] for s in (word, " " + word, word.capitalize(), " " + word.capitalize())}
        held = anchors.set_BGWQ[0, 0, w] != NO_SET
        assert held.any()
        np.testing.assert_allclose(slow[0, 0, w][held], np.log(p[sorted(own)].sum()), atol=2e-4)


@pytest.mark.slow
def test_equal_contexts_have_no_difference():
    """A completion whose think block is empty is its own fast context: slow and fast agree to rounding."""
    tags, wheels, candidates = world()
    ids = np.asarray([*tags.empty_think, *tags.ids("sad, joyful"), *tags.answer_close, tags.turn_end], np.int32)
    answer = AnswerToScore(ids=ids, length=len(ids), words=("sad", "joyful"), usable=True)
    categories = [[wheels.categories(("sad",), wheel) for wheel in range(len(wheels))]] * 2
    anchors, _ = build_anchors(
        [[answer], [answer]],
        categories,
        tags=tags,
        category=wheels.category,
        candidate_sets=candidates.word,
        config=CONFIG,
    )
    padded = np.zeros((2, 1, LENGTH), np.int32)
    padded[:, 0, : len(ids)] = ids
    exists = np.broadcast_to(np.arange(LENGTH) < len(ids), padded.shape)
    own = Continuations(id_BGC=padded, exists_BGC=exists)
    slow_h, fast_h = packed_hidden(policy()[2], *prompts(LENGTHS, WIDTH), own, anchors.fast)
    slow, fast, _, _ = on_device(policy()[2], slow_h, fast_h, anchors, candidates.ids_ZY)
    held = anchors.set_BGWQ != NO_SET
    assert held.any()
    np.testing.assert_allclose(np.asarray(slow)[held], np.asarray(fast)[held], atol=2e-5)


@pytest.mark.slow
def test_probabilities_below_the_floor_are_held_there_and_absent_sets_give_no_nan():
    D = policy()[0].text.hidden_size
    h = np.ones((1, D), np.float32)
    sets = np.array([[0, NO_SET, 1]])
    table = np.array([[3, -1], [4, 5]])

    def score(params):
        text = params["text"]
        kernel_DN = text["head"]["kernel"].at[:, 7].add(80 / D)  # everything else is below 1e-10
        peaked = params | {"text": text | {"head": {"kernel": kernel_DN}}}
        return confidence.set_logprobs(bound(peaked), h, sets, table)

    np.testing.assert_allclose(score(policy()[2]), np.full((1, 3), np.log(1e-10)), rtol=1e-6)
    gradients = jax.grad(lambda params: score(params).sum())(policy()[2])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_calibration_loss_is_the_mean_shortfall_and_moves_the_slow_side_only():
    slow, fast, _, _ = scored()
    anchors, _ = anchored()
    held = anchors.set_BGWQ != NO_SET
    words, total = 0, 0.0
    for index in np.ndindex(held.shape[:3]):
        on = np.flatnonzero(held[index])
        if on.size:
            gaps = fast[index][on] - slow[index][on]
            total += np.maximum(np.where(anchors.correct_BGWQ[index][on], gaps, -gaps), 0).mean()
            words += 1
    assert words == confidence.calibration_words(anchors)
    loss = functools.partial(confidence.calibration_loss, anchors=anchors, total_words=np.float32(words))
    np.testing.assert_allclose(loss(slow, fast), total / words, rtol=1e-5)
    slow_gradient, fast_gradient = jax.grad(loss, (0, 1))(slow, fast)
    assert np.asarray(slow_gradient)[held].any() and not np.asarray(slow_gradient)[~held].any()
    assert not np.asarray(fast_gradient).any()
    shares = [
        confidence.calibration_loss(slow[r], fast[r], jax.tree.map(lambda x, r=r: x[r], anchors), np.float32(words))
        for r in (slice(0, 1), slice(1, 2))
    ]
    np.testing.assert_allclose(sum(shares), total / words, rtol=1e-5)
