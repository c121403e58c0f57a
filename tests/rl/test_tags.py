"""Tags as token ids: piecewise targets, and words found through the bytes of a sample's own tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_tokenizer import TEXTS, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mer_r1_jax.emotion.answer_form import EMPTY_THINK, parse_answer
from mer_r1_jax.rl.tags import AnswerTags, TagError

REASONING = "The brows are raised and the voice trembles."


@pytest.fixture(scope="module")
def tags():
    return AnswerTags(tiny_tokenizer())


def test_slow_targets_are_tokenised_piece_by_piece(tags):
    ids, mask = tags.slow_target(REASONING, "surprised, afraid")
    pieces = ["<think>", REASONING, "</think>\n<answer>", "surprised, afraid", "</answer>"]
    expected = [i for piece in pieces for i in tiny_tokenizer().encode(piece)]
    np.testing.assert_array_equal(ids, [*expected, tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")])
    assert mask.all()
    assert tags.completion_text(ids, len(ids)) == "".join(pieces)
    whole = tiny_tokenizer().encode("".join(pieces))
    assert whole != expected  # or the pieces would not matter under this tokenizer


def test_fast_targets_have_no_loss_on_the_empty_think_block(tags):
    ids, mask = tags.fast_target("surprised, afraid")
    prefix = len(tags.empty_think)
    np.testing.assert_array_equal(ids[:prefix], tags.empty_think)
    assert tags.text(ids[:prefix]) == EMPTY_THINK
    assert not mask[:prefix].any() and mask[prefix:].all()
    assert ids[-1] == tags.turn_end
    assert tags.empty_think == (*tags.ids("<think>"), *tags.ids("</think>\n<answer>"))


@pytest.mark.parametrize(
    ("reasoning", "answer", "message"),
    [
        (" ", "happy", "reasoning of a target is empty"),
        (REASONING, "", "answer of a target is empty"),
        ("see <answer>", "happy", "holds the tag <answer>"),
        (REASONING, "happy<|im_end|>", "special token <|im_end|>"),
        ("a <|AUDIO|> cue", "happy", "special token <|AUDIO|>"),
    ],
)
def test_targets_that_would_break_the_format_are_refused(tags, reasoning, answer, message):
    with pytest.raises(TagError, match=message.replace("|", r"\|")):
        tags.slow_target(reasoning, answer)


@given(text=st.text(max_size=40))
@settings(max_examples=100)
def test_text_of_ids_is_the_tokenizers_own_decoding(text):
    tags = AnswerTags(tiny_tokenizer())
    ids = tiny_tokenizer().encode(text)
    decode = tiny_tokenizer().decode
    assert tags.text(ids) == decode(ids, clean_up_tokenization_spaces=False)
    for cut in range(len(ids)):  # cuts in the middle of a character included
        assert tags.text(ids[:cut]) == decode(ids[:cut], clean_up_tokenization_spaces=False)


ANSWERS = (
    "happy, sad",
    "Happy,sad,  ANXIOUS ,happy",
    "not happy, happy",
    "['angry', 'afraid']",
    "[worried]",
    "happy; sad",
    "surprised",
    " joyful,delighted ",
    "a\nb, c",
    "été, 快乐, happy",
    ",, happy",
)


@pytest.mark.parametrize("answer", ANSWERS)
def test_each_parsed_word_is_located_at_the_token_of_its_first_character(tags, answer):
    ids, _ = tags.slow_target(REASONING, answer)
    located = tags.locate(ids, len(ids))
    words = parse_answer(tags.completion_text(ids, len(ids))).words
    assert words and set(words) <= set(located.first_token)
    assert not located.merged
    assert tags.text(ids[: located.opening + 1]).endswith("<answer>")
    assert tags.text([*tags.empty_think, *ids[located.opening + 1 :]]).startswith(EMPTY_THINK + answer)
    for word, token in located.first_token.items():
        before, upto = tags.text(ids[:token]), tags.text(ids[: token + 1])
        # The word begins inside that token: what follows the text before it starts with separators and then the word.
        rest = tags.text(ids)[len(before) :]
        assert rest.lstrip(" ,'\"[\n").lower().startswith(word)
        assert len(upto.rstrip()) > len(before.rstrip(" ,'\"[\n"))


def test_the_first_of_equal_words_and_whole_words_count(tags):
    ids, _ = tags.slow_target(REASONING, "not happy, happy")
    located = tags.locate(ids, len(ids))
    assert located.first_token["happy"] > located.first_token["not happy"]
    assert tags.text(ids[located.first_token["happy"] :]).strip(" ,").startswith("happy</answer>")
    ids, _ = tags.slow_target(REASONING, "happy, sad, happy")
    assert tags.locate(ids, len(ids)).first_token["happy"] == tags.locate(ids, len(ids)).opening + 1


def test_a_tag_merged_with_the_first_word_is_detected():
    """Qwen's split rule makes `>happy` one piece; trained on enough of them, BPE makes it one token."""
    merged = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    merged.train_from_iterator([*TEXTS, *["<answer>happy</answer>"] * 50], trainer)
    merged.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merged)
    tags = AnswerTags(tokenizer)
    sampled = tokenizer.encode("<think>x</think>\n<answer>happy, sad</answer>")
    pieces = [tags.text([i]) for i in sampled]
    assert any(piece.startswith(">h") for piece in pieces)
    located = tags.locate(sampled, len(sampled))
    assert located.merged
    assert pieces[located.opening].startswith(">h")
    piecewise, _ = tags.slow_target("x", "happy, sad")
    assert not tags.locate(piecewise, len(piecewise)).merged


@pytest.mark.parametrize(
    "text", ["", "happy", "<answer>happy", "<think>a</think>\n<answer", "</answer><answer>happy", "<think></think>"]
)
def test_no_closed_answer_block_gives_no_location(tags, text):
    ids = tiny_tokenizer().encode(text)
    assert tags.locate(ids, len(ids)) is None


def test_tokens_beyond_the_length_are_not_read(tags):
    ids, _ = tags.slow_target(REASONING, "happy")
    assert tags.locate(ids, len(ids)) is not None
    assert tags.locate(ids, len(ids) - 1 - len(tags.answer_close)) is None


def test_banned_ids_are_the_special_ones_and_those_without_a_token(tags):
    tokenizer = tiny_tokenizer()
    banned = tags.banned_ids(len(tokenizer) + 5, eos_ids=(tags.turn_end,), extra=(7,))
    names = {tokenizer.convert_ids_to_tokens(i) for i in banned if i < len(tokenizer)}
    assert {"<|AUDIO|>", "<|IMAGE|>", "<|VIDEO|>", "<|im_start|>", "<|endoftext|>", "<|audio_bos|>"} <= names
    assert tags.turn_end not in banned and 7 in banned
    assert set(range(len(tokenizer), len(tokenizer) + 5)) <= set(banned)
    assert not set(tags.empty_think) & set(banned)
    assert tags.banned_ids(20, eos_ids=(tags.turn_end,)) == ()


def test_tokenizers_without_the_turn_end_or_without_bytes_are_refused():
    words = Tokenizer(models.WordLevel({"<think>": 0, "é ": 1, "[UNK]": 2, "<|im_end|>": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(TagError, match="give texts back"):
        AnswerTags(PreTrainedTokenizerFast(tokenizer_object=words))
    none = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(TagError, match="im_end"):
        AnswerTags(PreTrainedTokenizerFast(tokenizer_object=none, unk_token="[UNK]"))
