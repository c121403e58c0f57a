"""Tokenizers that cut an answer in another way than Qwen's own: tags as tokens, and sentencepiece models."""

import dataclasses
import functools

import numpy as np
import pytest
from support.prompts import TinyRecord, tiny_thinker
from support.spm_tokenizer import write_sentencepiece_model
from support.tiny_tokenizer import tiny_tokenizer
from tokenizers import AddedToken

from mer_r1_jax.config.schema import DataConfig, MediaConfig
from mer_r1_jax.emotion.answer_form import EMPTY_THINK, TAGS, parse_answer
from mer_r1_jax.media.clips import Clips
from mer_r1_jax.media.prompt import PromptBuilder, PromptError
from mer_r1_jax.media.tokenizer import SPECIAL_TOKENS, load_tokenizer
from mer_r1_jax.rl.tags import AnswerTags, TagError

BESIDE = AddedToken("</think>", special=True, lstrip=True, rstrip=True)


def with_added(folder, tokens, special=False):
    """The small tokenizer with tokens added, as a cold-started model's folder holds it."""
    tiny_tokenizer().save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    tokenizer.save_pretrained(folder)
    return folder


MAKERS = {
    "tags": functools.partial(with_added, tokens=TAGS),
    "special_tags": functools.partial(with_added, tokens=TAGS, special=True),
    "think_only": functools.partial(with_added, tokens=TAGS[:2], special=True),
    "tags_that_swallow_spaces": functools.partial(with_added, tokens=[*TAGS[::3], BESIDE]),
    "joined_tags": functools.partial(with_added, tokens=["<think>\n", "</think>\n<answer>"], special=True),
    "sentencepiece": write_sentencepiece_model,
    "sentencepiece_control": functools.partial(write_sentencepiece_model, as_control=True),
    "sentencepiece_plain": functools.partial(
        write_sentencepiece_model, add_dummy_prefix=False, normalization_rule_name="identity"
    ),
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(MAKERS[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def tags(tokenizer):
    return AnswerTags(tokenizer)


def thinker_of(tokenizer):
    ids = {field: tokenizer.convert_tokens_to_ids(token) for field, token in SPECIAL_TOKENS.items()}
    thinker = tiny_thinker()
    size = dataclasses.replace(thinker.text, vocab_size=len(tokenizer) + 8)
    ends = dict(pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    return dataclasses.replace(
        thinker, text=size, eos_token_ids=(tokenizer.convert_tokens_to_ids("<|im_end|>"),), **ids, **ends
    )


def test_a_slow_answer_can_be_demonstrated_sampled_read_and_located(tags):
    ids, _ = tags.slow_target("The voice\n trembles, é 快", "surprised, afraid")
    text = tags.completion_text(ids, len(ids))
    assert text == "<think>The voice\n trembles, é 快</think>\n<answer>surprised, afraid</answer>"
    parsed = parse_answer(text)
    assert parsed.format_reward == 1.0 and parsed.words == ("surprised", "afraid")
    thinker = thinker_of(tags.tokenizer)
    banned = tags.banned_ids(thinker.text.vocab_size, eos_ids=thinker.eos_token_ids, extra=thinker.media_token_ids)
    assert not set(banned) & set(ids.tolist())
    located = tags.locate(ids, len(ids))
    assert list(located.first_token) == ["surprised", "afraid"]
    for word, token in located.first_token.items():
        assert word.startswith(tags.text(ids[token : token + 1]).strip("> ,"))


def test_the_fast_prefix_is_the_empty_think_block(tags):
    assert tags.text(tags.empty_think) == EMPTY_THINK
    ids, mask = tags.fast_target("happy")
    assert tags.completion_text(ids, len(ids)) == f"{EMPTY_THINK}happy</answer>"
    assert tuple(ids[~mask]) == tags.empty_think


def test_frames_of_turns_and_media_stay_banned(tags):
    thinker = thinker_of(tags.tokenizer)
    banned = tags.banned_ids(thinker.text.vocab_size, eos_ids=thinker.eos_token_ids)
    named = ("<|im_start|>", "<|endoftext|>", *SPECIAL_TOKENS.values())
    assert set(tags.tokenizer.convert_tokens_to_ids(list(named))) <= set(banned)
    assert thinker.eos_token_ids[0] not in banned and set(range(len(tags.tokenizer), thinker.text.vocab_size)) <= set(
        banned
    )


def test_the_default_question_is_asked_and_special_tokens_are_still_refused(tokenizer):
    built = PromptBuilder(tokenizer, MediaConfig(), thinker_of(tokenizer), DataConfig.system_prompt, 2000)
    record = TinyRecord(({"role": "user", "content": DataConfig.question},), subtitle="I never <think> so")
    prompt = built.build(record, Clips())
    assert AnswerTags(tokenizer).text(prompt.ids).replace(" ", "") == prompt.text.replace(" ", "")
    assert np.count_nonzero(prompt.ids == tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    for token in ("<|im_end|>", "<|VIDEO|>"):
        with pytest.raises(PromptError, match="expected plain text"):
            built.build(dataclasses.replace(record, subtitle=f"a {token} b"), Clips())


def test_other_added_tokens_are_refused_in_questions_as_before(tmp_path):
    tokenizer = load_tokenizer(with_added(tmp_path, ["<tool>", "<thinking>"]))
    built = PromptBuilder(tokenizer, MediaConfig(), thinker_of(tokenizer), "", 2000)
    for token in ("<tool>", "<thinking>"):
        with pytest.raises(PromptError, match=token):
            built.build(TinyRecord(({"role": "user", "content": f"a {token}"},)), Clips())


def test_a_sentencepiece_tokenizer_saved_again_cuts_alike(tmp_path):
    first = load_tokenizer(write_sentencepiece_model(tmp_path / "one"))
    first.save_pretrained(tmp_path / "two")
    again = load_tokenizer(tmp_path / "two")
    text = "<|im_start|>user\nWhat does the person feel?<|im_end|>\n"
    assert again.encode(text, add_special_tokens=False) == first.encode(text, add_special_tokens=False)


def test_a_sentencepiece_model_without_bytes_says_what_it_needs(tmp_path):
    tokenizer = load_tokenizer(write_sentencepiece_model(tmp_path, byte_fallback=False))
    with pytest.raises(TagError, match="byte_fallback|back unchanged"):
        AnswerTags(tokenizer)
