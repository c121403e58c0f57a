"""Loading tokenizers: from a folder, and what is said about folders that hold none."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


def change(folder, name, edit):
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


def code_of_their_own(folder):
    (folder / "evil.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\nclass T: pass\nclass C: pass\n")
    own = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}
    change(folder, "tokenizer_config.json", lambda settings: settings.update(own))
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoTokenizer": "evil.T"}}
    (folder / "config.json").write_text(json.dumps(config))


def pipe(folder):
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


def pipe_of_a_template(folder):
    os.mkfifo(folder / "chat_template.jinja")


@pytest.mark.parametrize(
    "damage",
    [
        code_of_their_own,
        pipe,
        pipe_of_a_template,
        lambda folder: (folder / "tokenizer.json").write_text('{"a":' * 60_000 + "1" + "}" * 60_000),
        lambda folder: (folder / "tokenizer_config.json").write_text('{"a":' * 60_000 + "1" + "}" * 60_000),
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        lambda folder: (folder / "tokenizer_config.json").write_text('{"a": ' + "1" * 5000 + "}"),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe\x00"),
        lambda folder: (folder / "mer_r1.sha256").write_text("0" * 64 + "  tokenizer.json\n"),
        lambda folder: (
            (folder / "tokenizer.json").rename(folder / "elsewhere.json"),
            (folder / "tokenizer.model").write_bytes(b"no sentencepiece model"),
        ),
    ],
)
def test_a_hostile_folder_is_refused_and_runs_nothing(tmp_path, damage):
    tiny_tokenizer().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(TokenizerError) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and len(str(error.value)) < 1200
    assert not (tmp_path / "RAN").exists()


def test_a_qwen_tokenizer_loads_without_torch_as_auto_tokenizer_does(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    text = "So he's sad...  12345\n<think>é</think><|im_end|>"
    code = (
        "import sys; from mer_r1_jax.media.tokenizer import load_tokenizer; "
        "tokenizer = load_tokenizer(sys.argv[1]); print('torch' in sys.modules, *tokenizer(sys.argv[2])['input_ids'])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), text], capture_output=True, text=True, timeout=300
    )
    auto = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert ended.stdout.split() == ["False", *map(str, auto(text)["input_ids"])], ended.stderr


def test_commands_start_without_transformers():
    """Importing it takes seconds, and imports torch where that is installed."""
    code = (
        "import sys, mer_r1_jax.run.setup, mer_r1_jax.cli; print('transformers' in sys.modules, 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ended.stdout.split() == ["False", "False"], ended.stderr
