"""A folder with a sentencepiece model, as Llama's relatives bring one: BPE with byte fallback, trained in a moment."""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece
from support.tiny_tokenizer import SPECIAL_TOKENS, TEXTS

OPTIONS = dict(model_type="bpe", vocab_size=420, byte_fallback=True, hard_vocab_limit=False, minloglevel=2)


def write_sentencepiece_model(folder: Path, *, as_control: bool = False, **options) -> Path:
    """Writes tokenizer.model with Omni's special tokens in it into a folder, and returns the folder.

    Args:
        folder: made if need be.
        as_control: put the special tokens in as control symbols instead of user-defined ones.
        options: of the trainer, instead of OPTIONS.
    """
    folder.mkdir(parents=True, exist_ok=True)
    symbols = {"control_symbols" if as_control else "user_defined_symbols": list(SPECIAL_TOKENS)}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 30), model_writer=model, **(OPTIONS | symbols | options)
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder
