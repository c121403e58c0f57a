"""Loading tokenizers: from a folder, and what is said about folders that hold none."""

from __future__ import annotations

import pytest
from support.tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mer_r1_jax.media.tokenizer import TokenizerError, load_tokenizer


def test_a_saved_tokenizer_loads_and_cuts_text_alike(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "<|im_start|>user\nI'm 12 <|VIDEO|>é\n\n<|im_end|>"
    assert loaded(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert loaded.eos_token == "<|im_end|>"


def test_a_missing_folder(tmp_path):
    with pytest.raises(TokenizerError, match="no such folder.*model.tokenizer_path"):
        load_tokenizer(tmp_path / "none")


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match="no tokenizer that loads"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(TokenizerError, match="no tokenizer that loads"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_another_family(tmp_path):
    other = Tokenizer(models.WordLevel({"a": 0, "<|im_start|>": 1, "<|im_end|>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=other).save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match=r"lacks <\|AUDIO\|>, .*expected Qwen2.5-Omni's special tokens"):
        load_tokenizer(tmp_path)
