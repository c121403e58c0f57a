"""Loading a Qwen tokenizer without torch, and checking that it and the model agree on the special tokens."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mer_r1_jax.omni.config import ThinkerConfig

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = {  # field of ThinkerConfig -> the token it is the id of
    "audio_token_id": "<|AUDIO|>",
    "image_token_id": "<|IMAGE|>",
    "video_token_id": "<|VIDEO|>",
    "audio_start_token_id": "<|audio_bos|>",
    "audio_end_token_id": "<|audio_eos|>",
    "vision_start_token_id": "<|vision_bos|>",
    "vision_end_token_id": "<|vision_eos|>",
}


class TokenizerError(ValueError):
    """A tokenizer that is missing, unreadable, or not one of Qwen2.5-Omni's kind."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face directory, from local files only and without running code from it.

    Raises:
        TokenizerError: if the directory or its files are missing or lack a special token.
    """
    if not Path(path).is_dir():
        raise TokenizerError(f"{path}: no such folder; expected one with tokenizer.json. Set model.tokenizer_path.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise TokenizerError(
            f"{path}: no tokenizer that loads ({reason}); expected tokenizer.json and tokenizer_config.json. "
            "Copy them from the model's release, or set model.tokenizer_path."
        ) from error
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (TURN_START, TURN_END, *SPECIAL_TOKENS.values()) if token not in vocabulary]
    if missing:
        raise TokenizerError(
            f"{path}: the tokenizer lacks {', '.join(missing)}; expected Qwen2.5-Omni's special tokens "
            "(Qwen2.5-VL's are named differently)."
        )
    return tokenizer


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
