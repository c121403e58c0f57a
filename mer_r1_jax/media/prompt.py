"""A record and its decoded clips become one prompt: text, token ids, positions, and where each embedding comes from.

Qwen2.5-Omni's ChatML, written out here because it is a dozen lines and needs no template engine. T is the prompt's
length in tokens, F the mel frames of an audio clip, M its mel bins.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.emotion.answer_form import is_answer_tag
from mer_r1_jax.media.clips import AudioInput, Clips, VisionInput, interleaves
from mer_r1_jax.media.tokenizer import TURN_END, TURN_START, check_special_tokens
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.positions import (
    AUDIO,
    VIDEO,
    MediaSizes,
    PositionError,
    feature_sources,
    interleave,
    rope_positions,
)

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

IMAGE = "image"
KINDS = (VIDEO, AUDIO, IMAGE)  # also the order in which media are placed where a record does not place them
ITEM_TEXT = {
    VIDEO: "<|vision_bos|><|VIDEO|><|vision_eos|>",
    AUDIO: "<|audio_bos|><|AUDIO|><|audio_eos|>",
    IMAGE: "<|vision_bos|><|IMAGE|><|vision_eos|>",
}
ASSISTANT_TURN = f"{TURN_START}assistant\n"
_PLACEHOLDER = re.compile("(" + "|".join(f"<{kind}>" for kind in KINDS) + ")")
_SUBTITLE_TAG = re.compile("</?subtitle>")


class PromptError(ValueError):
    """A record that cannot become a prompt; the message names the record's id."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """One prompt, ready to be batched.

    Attributes:
        id: the record's id.
        ids: int32[T] token ids, placeholders expanded, ending where the assistant's turn opens.
        source: int32[T, 2] (clip, feature row) of each media token, (-1, 0) elsewhere; clips count through `vision`,
            then through `audio`, and feature rows through the clip as it is, unpadded.
        position: int32[3, T] rotary positions on the time, height and width axes.
        next_position: position of the first completion token, on all three axes.
        vision: images and videos in reading order.
        audio: audio clips in reading order.
        text: the rendered prompt with each medium as a single placeholder.
        stats: tokens by part ("text", "video", "image", "audio"), "frames" and "audio_seconds" shown, and how many
            audio clips were cut ("audio_cut"), or missing and skipped or replaced by silence ("silent_audio"); with
            "audio_filled", "mute_audio" and "cancelled_audio" as `Clips` has them.
    """

    id: str
    ids: np.ndarray
    source: np.ndarray
    position: np.ndarray
    next_position: int
    vision: tuple[VisionInput, ...] = ()
    audio: tuple[AudioInput, ...] = ()
    text: str = ""
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Item:
    """A medium in the reading order: its kind and its clip; a video may bring its own audio, interleaved with it."""

    kind: str
    clip: VisionInput | AudioInput
    own_audio: AudioInput | None = None


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A place in a turn where the next medium of a kind goes."""

    kind: str


class PromptBuilder:
    """Builds prompts for one tokenizer and one model."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        media: MediaConfig,
        thinker: ThinkerConfig,
        system_prompt: str,
        max_prompt_length: int,
    ):
        """
        Args:
            tokenizer: Qwen2.5-Omni's, or one with its special tokens.
            media: whether a video's audio is interleaved with it where its record does not say.
            thinker: special ids, rates and merge size.
            system_prompt: system turn of records that bring none.
            max_prompt_length: most tokens of a prompt, media included.

        Raises:
            TokenizerError: if tokenizer and model number the special tokens differently.
        """
        check_special_tokens(tokenizer, thinker)
        self.tokenizer = tokenizer
        self.media = media
        self.thinker = thinker
        self.system_prompt = system_prompt
        self.max_prompt_length = max_prompt_length
        self._special = re.compile("|".join(re.escape(token) for token in sorted(_added_tokens(tokenizer))))

    def build(self, record, clips: Clips) -> Prompt:
        """Builds the prompt of a record.

        Args:
            record: a `data.records.Record`: `id`, `messages`, `subtitle` and `use_audio_in_video` are used.
            clips: its decoded media.

        Raises:
            PromptError: naming the id: text with special tokens or misplaced placeholders, media that do not match the
                placeholders, or a prompt longer than the cap.
        """
        try:
            text, items = self._render(record, clips)
            ids, lengths = self._expand(text, items)
            self._check_length(lengths)
            return self._prompt(record, clips, text, ids, items, lengths)
        except (PromptError, PositionError) as error:
            raise PromptError(f"{record.id}: {error}") from None

    def _render(self, record, clips: Clips) -> tuple[str, list[_Item]]:
        """Returns the chat as text, each medium a single placeholder, and the media in reading order."""
        waiting = self._items(record, clips)
        turns = [(turn["role"], self._parts(turn)) for turn in record.messages]
        first = next((parts for role, parts in turns if role == "user"), None)
        if first is None:
            raise PromptError("got no user turn, expected one that asks the question; add it to `messages`")
        if not any(isinstance(part, _Slot) for _, parts in turns for part in parts):
            first[:0] = [_Slot(kind) for kind in KINDS for _ in waiting[kind]]
        if record.subtitle is not None:
            subtitle = self._checked(record.subtitle, "subtitle", _PLACEHOLDER, _SUBTITLE_TAG)
            _insert_after_media(first, f"<subtitle>{subtitle}</subtitle>\n")
        if turns[0][0] != "system":
            turns.insert(0, ("system", [self.system_prompt]))
        items: list[_Item] = []
        text = "".join(f"{TURN_START}{role}\n{self._turn(parts, waiting, items)}{TURN_END}\n" for role, parts in turns)
        surplus = [f"{len(left)} more {kind} clip(s)" for kind, left in waiting.items() if left]
        if surplus:
            raise PromptError(
                f"got {' and '.join(surplus)} than placeholders; write one <video>, <audio> or <image> for each "
                "clip, or none at all to have them put first"
            )
        return text + ASSISTANT_TURN, items

    def _items(self, record, clips: Clips) -> dict[str, list[_Item | None]]:
        """Media by kind, in the record's order. None stands for an audio clip that has no tokens of its own."""
        own = clips.video_audios if interleaves(record, self.media) else (None,) * len(clips.videos)
        return {
            VIDEO: [_Item(VIDEO, clip, audio) for clip, audio in zip(clips.videos, own, strict=True)],
            AUDIO: [None if clip is None else _Item(AUDIO, clip) for clip in clips.audios],
            IMAGE: [_Item(IMAGE, clip) for clip in clips.images],
        }

    def _parts(self, turn: dict[str, str]) -> list[str | _Slot]:
        """Splits a turn into checked texts and the places of media."""
        role = turn["role"]
        parts: list[str | _Slot] = []
        for piece in filter(None, _PLACEHOLDER.split(turn["content"])):
            if not _PLACEHOLDER.fullmatch(piece):
                parts.append(self._checked(piece, f"{role} turn"))
            elif role == "user":
                parts.append(_Slot(piece.strip("<>")))
            else:
                raise PromptError(f"got {piece} in a {role} turn, expected media in user turns only; move it")
        return parts

    def _turn(self, parts: Sequence[str | _Slot], waiting: dict[str, list], items: list[_Item]) -> str:
        """Renders one turn, moving the media it shows from `waiting` to `items`."""
        written = []
        for part in parts:
            if isinstance(part, str):
                written.append(part)
                continue
            if not waiting[part.kind]:
                raise PromptError(f"got more <{part.kind}> placeholders than {part.kind} clips; write one for each")
            item = waiting[part.kind].pop(0)
            if item is not None:
                items.append(item)
                written.append(ITEM_TEXT[part.kind])
        return "".join(written)

    def _checked(self, text: str, where: str, *forbidden: re.Pattern) -> str:
        """Returns the text if it holds nothing that the model would take for a medium or for the frame of a turn."""
        for pattern in (self._special, *forbidden):
            if found := pattern.search(text):
                raise PromptError(
                    f"got {found.group()!r} in the {where} ({_around(text, found)}), expected plain text; take it out"
                )
        return text

    def _expand(self, text: str, items: Sequence[_Item]) -> tuple[np.ndarray, dict[str, int]]:
        """Tokenises and gives each medium as many placeholder tokens as it has feature rows.

        Returns:
            int32[T] ids, and the tokens by part.
        """
        thinker = self.thinker
        token_of = {VIDEO: thinker.video_token_id, AUDIO: thinker.audio_token_id, IMAGE: thinker.image_token_id}
        tokens = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        where = np.flatnonzero(np.isin(tokens, list(token_of.values())))
        if len(where) != len(items):  # cannot happen while ITEM_TEXT and the tokenizer agree
            raise PromptError(f"got {len(where)} placeholder tokens for {len(items)} media")
        lengths = {"text": len(tokens) - len(where), VIDEO: 0, IMAGE: 0, AUDIO: 0}
        pieces, done = [], 0
        for at, item in zip(where, items, strict=True):
            pieces.append(tokens[done:at])
            done = at + 1
            lengths[item.kind] += item.clip.rows
            if item.own_audio is None or not isinstance(item.clip, VisionInput):
                pieces.append(np.full(item.clip.rows, token_of[item.kind], np.int32))
                continue
            lengths[AUDIO] += item.own_audio.rows + 2
            pieces.append(np.array([thinker.audio_start_token_id], np.int32))
            seconds = float(item.clip.second_per_grid)
            for piece in interleave(item.clip.grid, seconds, item.own_audio.rows, thinker):
                pieces.append(np.full(piece.stop - piece.start, token_of[piece.kind], np.int32))
            pieces.append(np.array([thinker.audio_end_token_id], np.int32))
        pieces.append(tokens[done:])
        return np.concatenate(pieces), lengths

    def _check_length(self, lengths: dict[str, int]) -> None:
        total = sum(lengths.values())
        if total <= self.max_prompt_length:
            return
        mend = {
            "text": "shorten the question or subtitle",
            VIDEO: "lower media.fps, media.max_frames or media.video_max_pixels (and video_min_pixels)",
            IMAGE: "lower media.image_max_pixels",
            AUDIO: "lower media.max_audio_seconds",
        }
        parts = ", ".join(f"{count} {part}" for part, count in lengths.items() if count)
        advice = "; ".join(
            mend[part] for part in sorted(lengths, key=lambda part: lengths[part], reverse=True) if lengths[part]
        )
        raise PromptError(
            f"got a prompt of {total} tokens ({parts}), expected at most "
            f"data.max_prompt_length={self.max_prompt_length}; {advice}; or raise data.max_prompt_length"
        )

    def _prompt(self, record, clips: Clips, text, ids, items: Sequence[_Item], lengths) -> Prompt:
        seen = [(item.kind, item.clip) for item in items if isinstance(item.clip, VisionInput)]
        vision = tuple(clip for _, clip in seen)
        audio = tuple(clip for item in items for clip in _audio_of(item))
        images = [(number, clip) for number, (kind, clip) in enumerate(seen) if kind == IMAGE]
        videos = [(number, clip) for number, (kind, clip) in enumerate(seen) if kind == VIDEO]
        source = feature_sources(
            ids,
            self.thinker,
            images=[(number, np.arange(clip.rows)) for number, clip in images],
            videos=[(number, np.arange(clip.rows)) for number, clip in videos],
            audios=[(len(vision) + number, np.arange(clip.rows)) for number, clip in enumerate(audio)],
        )
        position, next_position = rope_positions(
            ids,
            self.thinker,
            MediaSizes(
                image_grids=[clip.grid for _, clip in images],
                video_grids=[clip.grid for _, clip in videos],
                second_per_grids=[float(clip.second_per_grid) for _, clip in videos],
                audio_lengths=[len(clip.mel) for clip in audio],
                use_audio_in_video=any(item.own_audio is not None for item in items),
            ),
        )
        stats = dict(
            lengths,
            frames=sum(len(clip.frames) for clip in vision),
            audio_seconds=sum(clip.seconds for clip in audio),
            audio_cut=clips.audio_cut,
            silent_audio=clips.silent_audio,
            audio_filled=clips.audio_filled,
            mute_audio=clips.mute_audio,
            cancelled_audio=clips.cancelled_audio,
        )
        return Prompt(
            id=record.id,
            ids=ids,
            source=source,
            position=position,
            next_position=next_position,
            vision=vision,
            audio=audio,
            text=text,
            stats=stats,
        )


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> Iterable[str]:
    """Every token that the tokenizer cuts out of running text, but for an answer's tags, which a question may name."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return {token for token in tokens if not is_answer_tag(token)}


def _insert_after_media(parts: list[str | _Slot], text: str) -> None:
    """Inserts a text after the media and white space that a turn opens with."""
    for at, part in enumerate(parts):
        if isinstance(part, str) and part.strip():
            rest = part.lstrip()
            parts[at : at + 1] = [part.removesuffix(rest), text, rest]
            return
    parts.append(text)


def _audio_of(item: _Item) -> tuple[AudioInput, ...]:
    """The audio clip an item brings, if any."""
    if isinstance(item.clip, AudioInput):
        return (item.clip,)
    return () if item.own_audio is None else (item.own_audio,)


def _around(text: str, found: re.Match, width: int = 20) -> str:
    """A few characters of the text around a match, for an error message."""
    start, stop = max(0, found.start() - width), found.end() + width
    return f"{'…' if start else ''}{text[start:stop]}{'…' if stop < len(text) else ''}"
