"""Loading a Qwen tokenizer without torch, and checking that it and the model agree on the special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mer_r1_jax.foreign_text import printable
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf.foreign import content_problem, path_problem
from mer_r1_jax.omni.hf.sums import VOCABULARY_FILES, check_sums

if TYPE_CHECKING:  # transformers takes seconds to import, and imports torch where that is installed
    from transformers import PreTrainedTokenizerBase

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PAD_TOKEN = "<|endoftext|>"
SPECIAL_TOKENS = {  # field of ThinkerConfig -> the token it is the id of
    "audio_token_id": "<|AUDIO|>",
    "image_token_id": "<|IMAGE|>",
    "video_token_id": "<|VIDEO|>",
    "audio_start_token_id": "<|audio_bos|>",
    "audio_end_token_id": "<|audio_eos|>",
    "vision_start_token_id": "<|vision_bos|>",
    "vision_end_token_id": "<|vision_eos|>",
}


SENTENCEPIECE_FILES = ("tokenizer.model", "spm.model")
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
# Classes that settings name -> the class that AutoTokenizer takes for them.
_WITHOUT_TORCH = {"Qwen2Tokenizer": "Qwen2Tokenizer", "Qwen2TokenizerFast": "Qwen2Tokenizer"}


class TokenizerError(ValueError):
    """A tokenizer that is missing, unreadable, or not one of Qwen2.5-Omni's kind."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face directory, from local files only and without running code from it.

    A directory may hold tokenizer.json, the older vocab.json and merges.txt, or a sentencepiece model.

    Raises:
        TokenizerError: if the directory or its files are missing, are not as exported, or lack a special token.
    """
    path = Path(path)
    try:
        here = path.is_dir()
    except OSError:
        here = False
    if not here:
        raise TokenizerError(f"{path_problem(path)}. It has to hold tokenizer.json; set model.tokenizer_path.")
    _check_files(path)
    try:
        tokenizer = _load(path)
    # tokenizers raises bare Exceptions for files it cannot use, and RecursionError is one more way to be hostile.
    except Exception as error:
        holds_one = any((path / name).is_file() for name in (*VOCABULARY_FILES, *SENTENCEPIECE_FILES))
        if not holds_one and (problem := path_problem(path)):
            raise TokenizerError(f"{problem}. There is no tokenizer that loads; set model.tokenizer_path.") from error
        reason = printable(str(error).strip().split("\n")[0] or type(error).__name__, 300)
        raise TokenizerError(
            f"{path}: no tokenizer that loads ({reason}); expected tokenizer.json and tokenizer_config.json. "
            "Copy them from the model's release, or set model.tokenizer_path."
        ) from error
    vocabulary = tokenizer.get_vocab()
    named = (TURN_START, TURN_END, *SPECIAL_TOKENS.values())
    missing = [token for token in named if token not in vocabulary]
    if missing:
        raise TokenizerError(
            f"{path}: the tokenizer lacks {', '.join(missing)}; expected Qwen2.5-Omni's special tokens "
            "(Qwen2.5-VL's are named differently)."
        )
    # A sentencepiece model knows them as words of its user; unmarked they would be sampled.
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if unmarked := [token for token in (*named, PAD_TOKEN) if token in vocabulary and token not in special]:
        tokenizer.add_tokens(unmarked, special_tokens=True)
    return tokenizer


def _check_files(path: Path) -> None:
    """Refuses files that are not what their names say before a library opens them."""
    present = [path / name for name in (*VOCABULARY_FILES, *SETTINGS_FILES, *SENTENCEPIECE_FILES)]
    present = [file for file in dict.fromkeys(present) if file.exists()]
    for file in present:
        if problem := content_problem(file):
            raise TokenizerError(f"{file}: {problem}; expected a file of a tokenizer.")
    check_sums([file for file in present if file.name in VOCABULARY_FILES], TokenizerError)


def _load(path: Path) -> PreTrainedTokenizerBase:
    import transformers

    LlamaTokenizer = transformers.LlamaTokenizer
    local: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)
    older = all((path / name).is_file() for name in ("vocab.json", "merges.txt"))
    if (path / "tokenizer.json").is_file() or older:
        # AutoTokenizer imports torch where that is installed, which takes seconds and hundreds of megabytes.
        named = getattr(transformers, _WITHOUT_TORCH.get(_named_class(path) or "", "AutoTokenizer"))
        tokenizer = named.from_pretrained(str(path), **local)
        if not (isinstance(tokenizer, LlamaTokenizer) and tokenizer.add_prefix_space):
            return tokenizer
    elif not any((path / name).is_file() for name in SENTENCEPIECE_FILES):
        return transformers.AutoTokenizer.from_pretrained(str(path), **local)
    # Whatever class the settings name: of all of transformers' conversions of a sentencepiece model this one alone
    # gives texts back unchanged. A space put in front of every text would stand between the pieces of an answer.
    return LlamaTokenizer.from_pretrained(str(path), add_prefix_space=False, **local)


def _named_class(path: Path) -> str | None:
    """The class that a folder's settings name; None where there are none. They have been looked at before."""
    settings = path / "tokenizer_config.json"
    named = json.loads(settings.read_bytes()).get("tokenizer_class") if settings.is_file() else None
    return named if isinstance(named, str) else None


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, thinker: ThinkerConfig) -> None:
    """Raises TokenizerError where the model's configuration and the tokenizer number a special token differently."""
    wrong = [
        f"{field} is {getattr(thinker, field)}, but {token} has id {tokenizer.convert_tokens_to_ids(token)}"
        for field, token in SPECIAL_TOKENS.items()
        if getattr(thinker, field) != tokenizer.convert_tokens_to_ids(token)
    ]
    if len(tokenizer) > thinker.text.vocab_size:
        wrong.append(f"vocab_size is {thinker.text.vocab_size}, but the tokenizer has {len(tokenizer)} tokens")
    if wrong:
        raise TokenizerError(
            "tokenizer and model configuration do not belong together: " + "; ".join(wrong) + ". "
            "Set model.tokenizer_path to the tokenizer the model was made with."
        )
