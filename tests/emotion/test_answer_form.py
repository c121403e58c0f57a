"""Parsing answers: format reward, first closed block, the official splitter and clean-up."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer_r1_jax.emotion import answer_form

GOOD = "<think>She smiles.</think>\n<answer>Happy, proud , happy</answer>"


def test_well_formed_answer():
    parsed = answer_form.parse_answer(GOOD)
    assert parsed == answer_form.ParsedAnswer("She smiles.", "Happy, proud , happy", ("happy", "proud"), 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<think></think>\n<answer>happy</answer>", ("happy",)),  # empty think block
        ("<think> \n</think>\n<answer>happy</answer>", ("happy",)),
        ("<think>a</think>\n<answer></answer>", ()),
        ("<think>a</think>\n<answer> \n</answer>", ()),
        ("<think>a</think><answer>happy</answer> so", ("happy",)),  # something after
        ("well <think>a</think><answer>happy</answer>", ("happy",)),  # something before
        ("<think>a</think> so <answer>happy</answer>", ("happy",)),  # something between
        ("<think>a</think><answer>happy</answer><answer>sad</answer>", ("happy",)),  # two answers: the first counts
        ("<think>a</think><think>b</think><answer>happy</answer>", ("happy",)),
        ("<answer>happy</answer><think>a</think>", ("happy",)),  # wrong order
        ("<answer>happy</answer>", ("happy",)),
        ("<think>a</think><answer>happy", ()),  # never closed
        ("<think>a<answer>happy</answer></think>", ("happy",)),
        ("happy", ()),
        ("", ()),
        ("<THINK>a</THINK><ANSWER>happy</ANSWER>", ()),
    ],
)
def test_malformed_answers_lose_the_format_reward_only(text, words):
    parsed = answer_form.parse_answer(text)
    assert parsed.format_reward == 0.0
    assert parsed.words == words


@pytest.mark.parametrize(
    ("text", "lenient"),
    [
        ("<think>a</think>\n<answer>happy</answer>", True),
        ("<think>a</think><answer>happy</answer> and more", True),
        ("<think></think>\n<answer></answer>", True),
        ("<think>a</think><think>b</think>\n<answer>sad</answer><answer>happy</answer>", True),
        ("So: <think>a</think>\n<answer>happy</answer>", False),  # from the very beginning
        ("<think>a</think> so <answer>happy</answer>", False),
        ("<answer>happy</answer><think>a</think>", False),
        ("<think>a</think>\n<answer>happy", False),
    ],
)
def test_a_lenient_format_is_a_think_block_and_an_answer_block_at_the_beginning(text, lenient):
    assert answer_form.parse_answer(text, lenient=True).format_reward == lenient
    plain = answer_form.parse_answer(text)
    assert plain == dataclasses.replace(
        answer_form.parse_answer(text, lenient=True), format_reward=float(answer_form.is_well_formed(text))
    )


def test_an_answer_without_tags_is_split_where_that_is_asked_for():
    for text, words in (("Happy, sad", ("happy", "sad")), ("<answer>happy, proud", ("<answer>happy", "proud"))):
        assert answer_form.parse_answer(text).words == ()
        assert answer_form.parse_answer(text, untagged=True).words == words
    # An empty block is an answer, which says nothing.
    assert answer_form.parse_answer("well, <answer></answer>", untagged=True).words == ()


def test_think_blocks_of_malformed_answers():
    assert answer_form.parse_answer("<think> a </think>").reasoning == "a"
    assert answer_form.parse_answer("<think></think>\n<answer>x</answer>").reasoning == ""
    assert answer_form.parse_answer("<think>a").reasoning is None
    assert answer_form.parse_answer("a</think>").reasoning is None


@pytest.mark.parametrize("space", ["", "\n", " \n\n"])
def test_white_space_around_blocks_is_no_mistake(space):
    text = f"{space}<think>a</think>{space}<answer>x</answer>{space}"
    assert answer_form.parse_answer(text).format_reward == 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, []),
        (float("nan"), []),
        ("", []),
        ("[happy, sad]", ["happy", "sad"]),
        ("[]", []),
        ("[", []),  # the official code raises IndexError
        ("]", []),
        ("[[happy]]", ["[happy]"]),
        ("['happy', \"Sad\"]", ["happy", "Sad"]),
        ("happy; sad", ["happy; sad"]),
        ("happy/sad", ["happy/sad"]),
        ("happy，sad", ["happy，sad"]),
        ("happy\nsad", ["happy\nsad"]),
        ("don't", ["don", "t"]),
        (" happy ,, ", ["happy"]),
        ([" Happy ", ""], [" Happy ", ""]),
    ],
)
def test_official_splitter(text, words):
    assert answer_form.split_words(text) == words


@pytest.mark.parametrize("bad", [3, {"a": 1}, [1, 2], True])
def test_splitter_refuses_other_types(bad):
    with pytest.raises(TypeError, match="expected text"):
        answer_form.split_words(bad)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("输出: [高兴]", "[高兴]"),
        (" Output:：[happy,\nsad] ", "[happy,sad]"),
        ("output: input: happy", ": input: happy".removeprefix(":").strip()),
        ("inputoutput happy", "output happy"),  # tested once each, in order
        ("outputInput happy", "happy"),
        ("happy\nsad", "happysad"),
    ],
)
def test_official_clean_up(text, clean):
    assert answer_form.clean_extractor_text(text) == clean


@given(st.text(alphabet="<>/thinkanswer ,\n'[]", max_size=60) | st.lists(st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "happy", ",", "\n", " "]), max_size=12).map("".join))  # fmt: skip
def test_any_text_parses(text):
    parsed = answer_form.parse_answer(text)
    assert parsed.format_reward in (0.0, 1.0)
    assert len(set(parsed.words)) == len(parsed.words)
    assert all(word and word == word.strip().lower() for word in parsed.words)
    if parsed.format_reward:
        assert parsed.reasoning and parsed.answer_text.strip()
