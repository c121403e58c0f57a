"""The world's tokenizer: Qwen's shape, whole words, distinct first tokens, files that load without torch."""

import json
import subprocess
import sys

import pytest

from mer_r1_jax.data.synthetic.world import load_lexicon
from mer_r1_jax.data.synthetic.world_tokenizer import (
    SPECIAL_TOKENS,
    VOCABULARY,
    save_tokenizer,
    special_ids,
    train_tokenizer,
)
from mer_r1_jax.emotion.candidates import CandidateTable
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.rl.tags import AnswerTags

LEXICON = load_lexicon()


@pytest.fixture(scope="module")
def wheels():
    return load_wheels()


@pytest.fixture(scope="module")
def tokenizer(wheels):
    return train_tokenizer(LEXICON, wheels)


def _ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_come_last_in_the_released_order(tokenizer):
    assert len(tokenizer) == VOCABULARY
    first = VOCABULARY - len(SPECIAL_TOKENS)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(first, VOCABULARY))
    assert special_ids(tokenizer)["eos_token_ids"] == (first + 2,)


@pytest.mark.parametrize("text", ["héllo  wörld\n\n1234 'tis <answer>joyful, sad</answer>", "喜怒哀樂 🙂", "\t x"])
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(_ids(tokenizer, text)) == text


def test_answer_words_are_single_tokens(tokenizer):
    for words in LEXICON["words"].values():
        for word in words:
            assert len(_ids(tokenizer, word)) == len(_ids(tokenizer, f" {word}")) == 1
            assert len(_ids(tokenizer, f"happy, {word}")) == 3


def test_a_greater_sign_joins_the_first_word_as_in_qwen(tokenizer):
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("<answer>happy</answer>")
    assert [piece for piece, _ in pieces] == ["<answer", ">happy", "</", "answer", ">"]


def test_targets_fit_the_completion_cap(tokenizer):
    tags = AnswerTags(tokenizer)
    assert len(tags.empty_think) <= 8
    assert tokenizer.decode(list(tags.empty_think)) == "<think></think>\n<answer>"


def test_first_tokens_of_different_categories_stay_distinct(tokenizer, wheels):
    table = CandidateTable(tokenizer, wheels)
    assert table.share_lost < 0.13
    for words in LEXICON["words"].values():  # those that clips are labelled with keep theirs
        for word in words:
            (first,) = _ids(tokenizer, f" {word}")
            sets = [place for place in table.word(word) if place >= 0]
            assert len(sets) == sum(wheels.category(word, wheel) is not None for wheel in range(len(wheels)))
            assert all(first in table.ids_ZY[place] for place in sets)


def test_training_is_deterministic(tokenizer, wheels):
    again = train_tokenizer(LEXICON, wheels)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_the_saved_directory_loads_without_torch(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["feature_size"] == 128
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from transformers import AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})\n"
        "chat = [{'role': 'user', 'content': [{'type': 'video'}, {'type': 'text', 'text': 'Why?'}]}]\n"
        "print(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))\n"
        "print(tokenizer('happy, sad')['input_ids'], tokenizer.video_token, type(tokenizer).__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_bos|><|VIDEO|><|vision_eos|>Why?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert run.stdout.splitlines()[-1] == f"{_ids(tokenizer, 'happy, sad')} <|VIDEO|> Qwen2Tokenizer"
