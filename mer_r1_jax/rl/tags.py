"""The tags of an answer as token ids: SFT targets, the empty think block, and where the words of a sample stand.

Qwen's split rule lets the `>` of `<answer>` join the first word (`>happy`) and `><` span two tags. So targets are
tokenised piece by piece, and a sampled completion is never tokenised again: words are found through the bytes of its
own tokens. Models may have the tags as tokens of their own, which changes their ids and nothing else here.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence

import numpy as np

from mer_r1_jax.emotion.answer_form import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    BRIDGE,
    EMPTY_THINK,
    TAGS,
    THINK_OPEN,
    WORD,
    is_answer_tag,
)
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.media.tokenizer import TURN_END

_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # sentencepiece's spelling of a byte


class TagError(ValueError):
    """A tokenizer or a target text that the tags cannot work with; the message says what is wrong and what to do."""


@dataclasses.dataclass(frozen=True)
class LocatedAnswer:
    """Where the answer of a completion stands among its tokens.

    Attributes:
        opening: index of the token that holds the `>` of `<answer>`.
        merged: that token also holds letters of the answer, so the answer cannot be continued from the empty think
            block token by token.
        first_token: word (lower-case, trimmed) -> index of the token that holds its first character, first occurrence.
    """

    opening: int
    merged: bool
    first_token: dict[str, int]


class AnswerTags:
    """The tags under one tokenizer.

    Attributes:
        tokenizer: a byte-level BPE tokenizer (Qwen's), or one of a sentencepiece model with byte tokens.
        bridge: ids("</think>\\n<answer>").
        empty_think: E = ids("<think>") + bridge, the prefix of fast answers and the start of every
            fast scoring context.
        answer_close: ids("</answer>").
        turn_end: the id of `<|im_end|>`, which closes the turn.

    Raises:
        TagError: the tokenizer has no tokens for bytes, knows no `<|im_end|>`, or does not give the tags back.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        turn_end = tokenizer.convert_tokens_to_ids(TURN_END)
        if turn_end is None or tokenizer.convert_ids_to_tokens(turn_end) != TURN_END:
            raise TagError(f"the tokenizer has no token {TURN_END}: a Qwen tokenizer is needed (model.tokenizer_path)")
        self.turn_end: int = turn_end
        self._added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        self._bytes: dict[int, bytes] = {}
        # Only sentencepiece spells bytes so: its other tokens are plain text, with U+2581 for a space.
        self._pieces = "<0x0A>" in tokenizer.get_vocab()
        self.bridge: tuple[int, ...] = self._bridge()
        self.empty_think: tuple[int, ...] = (*self.ids(THINK_OPEN), *self.bridge)
        self.answer_close: tuple[int, ...] = self.ids(ANSWER_CLOSE)
        if (got := self.text(self.empty_think)) != EMPTY_THINK:
            raise TagError(f"the tokenizer turns {EMPTY_THINK!r} into {got!r}: it has to give texts back unchanged")

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of one piece of text, without any token added around it."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def slow_target(self, reasoning: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """A slow demonstration, tokenised piece by piece, and which of its tokens are in the loss (all of them).

        Args:
            reasoning: what stands in the think block.
            answer: the comma list of emotion words.

        Returns:
            ids int32 [C] and loss mask bool [C]; the last id is the turn's end.

        Raises:
            TagError: a piece is empty, holds a tag, or tokenises into a special token.
        """
        ids = [*self.ids(THINK_OPEN), *self._piece("reasoning", reasoning), *self.bridge, *self._close(answer)]
        return np.asarray(ids, np.int32), np.ones(len(ids), bool)

    def fast_target(self, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """A fast demonstration: the empty think block and the answer; the empty think block is not in the loss.

        A loss there would teach slow answers to skip thinking. Arguments and errors as `slow_target`.
        """
        ids = [*self.empty_think, *self._close(answer)]
        mask = np.ones(len(ids), bool)
        mask[: len(self.empty_think)] = False
        return np.asarray(ids, np.int32), mask

    def text(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", "replace")

    def completion_text(self, ids: Sequence[int] | np.ndarray, length: int) -> str:
        """The text of a completion of `length` tokens, without the end of the turn."""
        kept = list(ids[:length])
        return self.text(kept[:-1] if kept and kept[-1] == self.turn_end else kept)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; ids beyond the tokenizer (a padded vocabulary) stand for nothing."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._decode(token_id)
        return self._bytes[token_id]

    def locate(self, ids: Sequence[int] | np.ndarray, length: int) -> LocatedAnswer | None:
        """Finds the first closed answer block of a completion and the first token of each of its words.

        Args:
            ids: int32 [C], the completion's own ids.
            length: how many of them exist.

        Returns:
            None when there is no `<answer>` that is closed by `</answer>`.
        """
        # In bytes throughout: a token may end in the middle of a character.
        pieces = [self.token_bytes(int(i)) for i in ids[:length]]
        whole = b"".join(pieces)
        opening = whole.find(ANSWER_OPEN.encode())
        start = opening + len(ANSWER_OPEN)
        end = whole.find(ANSWER_CLOSE.encode(), start)
        if opening < 0 or end < 0:
            return None
        ends = np.cumsum([len(piece) for piece in pieces])  # byte after each token
        token = int(np.searchsorted(ends, start - 1, side="right"))
        # What the token with the `>` holds beyond it.
        rest = whole[start : min(int(ends[token]), end)].decode("utf-8", "replace")
        first_token = {
            word: int(np.searchsorted(ends, start + offset, side="right"))
            for word, offset in _word_offsets(whole[start:end]).items()
        }
        return LocatedAnswer(token, any(c.isalnum() or c == "\ufffd" for c in rest), first_token)

    def banned_ids(self, vocabulary: int, *, eos_ids: Sequence[int], extra: Sequence[int] = ()) -> tuple[int, ...]:
        """Ids that must never be sampled: special tokens, `extra` (media placeholders), and ids without a token.

        An answer's tags may be sampled, also where they are special tokens.

        Args:
            vocabulary: N, rows of the output head, which may be more than the tokenizer has tokens.
            eos_ids: end tokens, which stay allowed.
            extra: further ids.
        """
        added = self.tokenizer.added_tokens_decoder.items()
        special = {i for i, token in added if token.special and not is_answer_tag(token.content)}
        without_token = set(range(len(self.tokenizer), vocabulary))
        banned = (special | without_token | set(extra)) - set(eos_ids)
        return tuple(sorted(i for i in banned if i < vocabulary))

    def _bridge(self) -> tuple[int, ...]:
        whole = self.ids(BRIDGE)
        if self.text(whole) == BRIDGE:
            return whole
        # Tags that are tokens of their own can swallow the white space around them (rstrip, lstrip).
        opening, closing = BRIDGE.split("\n")
        return (*self.ids(opening), *self.ids("\n"), *self.ids(closing))

    def _piece(self, name: str, text: str) -> tuple[int, ...]:
        if not text.strip():
            raise TagError(f"the {name} of a target is empty: give it words or leave the target out")
        if found := [tag for tag in TAGS if tag in text]:
            raise TagError(f"the {name} of a target holds the tag {found[0]}: leave it out, tags are added here")
        ids = self.ids(text)
        if found := [self._added[i] for i in ids if i in self._added]:
            raise TagError(f"the {name} of a target holds the special token {found[0]}: remove it from the text")
        return ids

    def _close(self, answer: str) -> tuple[int, ...]:
        return (*self._piece("answer", answer), *self.answer_close, self.turn_end)

    def _decode(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        if token_id >= len(self.tokenizer):
            return b""
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if self._pieces:
            byte = _BYTE_PIECE.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()
        try:
            return bytes(_byte_of_character()[character] for character in token)
        except KeyError as error:
            raise TagError(
                f"token {token_id} is {printable(token, 50)!r}, which is not written in byte-level BPE's alphabet: "
                "words can only be located with a byte-level tokenizer such as Qwen's, or with a sentencepiece model "
                "that has tokens for bytes (trained with byte_fallback)"
            ) from error


def _word_offsets(answer: bytes) -> dict[str, int]:
    """Word -> byte offset of its first occurrence in an answer; words as `parse_answer` gives them."""
    text = answer.decode("utf-8", "surrogateescape")  # one character per byte that is no UTF-8, so offsets add up
    # Brackets around the whole list belong to no word.
    bracket = text.startswith("[")
    offsets: dict[str, int] = {}
    for match in WORD.finditer(text, bracket, len(text) - text[bracket:].endswith("]")):
        word = match.group()
        lead = len(word) - len(word.lstrip())
        if word.strip():
            before = text[: match.start() + lead].encode("utf-8", "surrogateescape")
            offsets.setdefault(word.lower().strip(), len(before))
    return offsets


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 characters stand for themselves, other bytes for U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
