"""From one line of a data file to the columns of a record, collecting everything that is wrong with the line."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mer_r1_jax.data.paths import MediaPathError, resolve_media
from mer_r1_jax.data.problems import PLACEHOLDER, SPECIAL_TOKEN, STRUCTURE_TAG, LineProblems, Problem, check_text, shown
from mer_r1_jax.data.turns import Chat, read_chat
from mer_r1_jax.emotion.answer_form import blocks_of, format_answer, split_label
from mer_r1_jax.json_lines import JsonLineError, kind_of, parse_value, unfit_values

ALIASES = {
    "id": (),
    "messages": ("conversations", "prompt"),
    "question": ("problem", "query"),
    "system": (),
    "videos": ("video",),
    "audios": ("audio",),
    "images": ("image",),
    "subtitle": (),
    "solution": (),
    "reasoning": (),
    "use_audio_in_video": (),
}
NAMES = {alias: column for column, aliases in ALIASES.items() for alias in (column, *aliases)}
# Names of the columns that hold one text: in a CSV file their cells are no lists, whatever they look like.
TEXTS = frozenset(
    alias for alias, column in NAMES.items() if column in ("id", "question", "system", "subtitle", "reasoning")
)
MEDIA = {"videos": "<video>", "audios": "<audio>", "images": "<image>"}

_LIST_AS_TEXT = re.compile(r"""\s*\[\s*(?:['"].*['"])?\s*\]\s*""", re.DOTALL)
_TARGET_FORM = "<think>reasoning</think> and <answer>emotion words</answer>, each once, in this order, nothing else"


class LineReader:
    """Reads one line. `read` returns the columns of a Record, or None; `problems` says why.

    Args:
        file, line: where the line stands, for messages.
        media_root: folder the media paths are relative to.
        question: asked where the line brings none.
        require: what the record must bring, of `target` and `solution`.

    Attributes:
        known: the columns of the line that are ours, under our own names.
        extra: its further columns.
    """

    def __init__(self, file: str, line: int, media_root: str | os.PathLike, question: str, require: Sequence[str]):
        self.file, self.line = file, line
        self.media_root, self.question, self.require = media_root, question, require
        self.known: dict[str, Any] = {}
        self.extra: dict[str, Any] = {}
        self._problems = LineProblems(file, line)
        self._names: dict[str, str] = {}  # our name of a column -> the line's

    @property
    def problems(self) -> list[Problem]:
        """What is wrong with the line."""
        return self._problems.found

    def read(self, text: str) -> dict[str, Any] | None:
        """Columns of the record in `text`, or None when there is any problem."""
        row = self._parse(text)
        if row is None:
            return None
        self._sort_columns(row)
        row = self.known
        record_id = self._problems.record_id = self._record_id(row)
        media = {column: self._media(column, row) for column in MEDIA}
        subtitle = self._text("subtitle", row)
        interleaves = self._flag("use_audio_in_video", row)
        solution = self._solution(row)
        read = read_chat(row, self._names, self.question, self._problems)
        chat = read or Chat()
        before = len(self.problems)
        media = self._with_parts(media, chat)
        parts_agree = len(self.problems) == before
        target = self._slow_target(row, chat.target, solution)
        if "audios" not in row and not any(media["audios"]) and chat.messages:
            # R1-Omni's files write `<audio>` for the sound track of the video they name.
            if _count(chat.messages, "<audio>") == len(media["videos"]):
                media["audios"] = media["videos"]
        if parts_agree:
            self._check_placeholders(chat.messages, media)
        if read is not None:  # a chat that cannot be read may hold the media
            self._check_presence(row, media, subtitle, solution, target)
        if self.problems:
            return None
        if not solution and target is not None and (blocks := blocks_of(target)):
            solution = tuple(split_label(blocks[1]))
        return {
            "id": record_id,
            "messages": tuple(chat.messages),
            **media,
            "subtitle": subtitle,
            "solution": solution,
            "target": target,
            "use_audio_in_video": interleaves,
            "extra": self.extra,
        }

    def _fail(self, field: str, got: str, expected: str, mend: str) -> None:
        self._problems.add(field, got, expected, mend)

    def _parse(self, text: str) -> dict[str, Any] | None:
        try:
            row = parse_value(text)
        except JsonLineError as error:
            faults = [error.fault]
        else:
            if not isinstance(row, dict):
                got, mend = f"{kind_of(row)} {shown(row)}", 'write {"id": ..., "videos": [...], ...}'
                self._fail("", got, "a JSON object", mend)
                return None
            faults = unfit_values(row)
        for fault in faults:
            self._fail(fault.field, fault.got, fault.expected, fault.mend)
        return None if faults else row

    def _sort_columns(self, row: dict[str, Any]) -> None:
        """Splits a line into known columns under their own names and further ones; null means absent."""
        for name, column in NAMES.items():
            if row.get(name) is None:
                continue
            if name == "prompt" and isinstance(row[name], str):
                column = "question"  # TRL's `prompt` is a text or a chat
            if column in self.known:
                given = f"both {self._names[column]} and {name}"
                self._fail(name, given, f"one of them; both mean `{column}`", "drop one")
                continue
            self.known[column], self._names[column] = row[name], name
        self.extra = {name: value for name, value in row.items() if name not in NAMES}

    def _with_parts(self, media: dict[str, tuple[str, ...]], chat: Chat) -> dict[str, tuple[str, ...]]:
        """The media of the columns, or those that stand in the content as parts; both may be given if they agree."""
        merged = dict(media)
        for column, paths in chat.media.items():
            named = tuple(path for path in paths if path is not None)
            if not named:
                continue  # the columns say which; that there are as many is checked with the placeholders
            if len(named) < len(paths):
                got = f"{len(named)} of {len(paths)} parts that name their file"
                self._fail("messages", got, f"all or none, with the paths in `{column}`", "name the file in every part")
            elif media[column] and media[column] != named:
                got = f"{shown(list(named))} in the content and {shown(list(media[column]))} in `{column}`"
                self._fail(column, got, "the same files in the same order", f"drop `{column}`, or correct it")
            else:
                self._check_paths("messages", named)
                merged[column] = named
        return merged

    def _record_id(self, row: dict[str, Any]) -> str:
        value = row.get("id", f"{Path(self.file).stem}:{self.line}")
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            self._fail(
                "id", f"{kind_of(value)} {shown(value)}", "a text that is not empty, or a whole number", "correct it"
            )
            return ""
        if any(unicodedata.category(character) == "Cc" for character in str(value)):
            self._fail("id", f"control characters in {shown(value)}", "an id in plain text", "correct it")
            return ""
        return str(value)

    def _media(self, column: str, row: dict[str, Any]) -> tuple[str, ...]:
        value = row.get(column, ())
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, list | tuple):
            self._fail(column, f"{kind_of(value)} {shown(value)}", "a list of paths", f'write "{column}": ["clip.mp4"]')
            return ()
        self._check_paths(column, paths)
        return tuple(path for path in paths if isinstance(path, str))

    def _check_paths(self, column: str, paths: Sequence[Any]) -> None:
        for place, path in enumerate(paths):
            field = f"{column}[{place}]" if column in MEDIA else column
            if not isinstance(path, str):
                self._fail(field, f"{kind_of(path)} {shown(path)}", "a path", f'write "{column}": ["clip.mp4"]')
                continue
            if _LIST_AS_TEXT.fullmatch(path):
                got, mend = (
                    f"a list written as a text, {shown(path)}",
                    "write it as a JSON list, without quotes around it",
                )
                self._fail(field, got, "a path", mend)
                continue
            try:
                resolve_media(self.media_root, path)
            except MediaPathError as error:
                self._fail(field, error.got, error.expected, error.mend)

    def _text(self, column: str, row: dict[str, Any]) -> str | None:
        """A free text without placeholders, special tokens or tags; None when absent or blank."""
        value = row.get(column)
        if value is None:
            return None
        if not isinstance(value, str):
            self._fail(column, f"{kind_of(value)} {shown(value)}", "a text", f'write "{column}": "..." or leave it out')
            return None
        check_text(self._problems, column, value, PLACEHOLDER, SPECIAL_TOKEN, STRUCTURE_TAG)
        return value.strip() or None

    def _flag(self, column: str, row: dict[str, Any]) -> bool | None:
        """True or false, or None when absent; a table of text has it as a word."""
        value = row.get(column)
        known = {"true": True, "false": False}
        flag = known.get(value.strip().lower()) if isinstance(value, str) else value
        if value is None or isinstance(flag, bool):
            return flag
        self._fail(column, f"{kind_of(value)} {shown(value)}", "true or false", "write one of them, or leave it out")
        return None

    def _solution(self, row: dict[str, Any]) -> tuple[str, ...]:
        value = row.get("solution")
        if value is None:
            return ()
        example = 'write "solution": ["happy", "relieved"] or "happy, relieved"'
        problems_before = len(self.problems)
        if isinstance(value, str):
            check_text(self._problems, "solution", value, PLACEHOLDER, SPECIAL_TOKEN, STRUCTURE_TAG)
            if len(self.problems) > problems_before:
                return ()
        words = split_label(value) if isinstance(value, str) else value
        if not isinstance(words, list):
            self._fail("solution", f"{kind_of(value)} {shown(value)}", "a list of words or a comma text", example)
            return ()
        clean: list[str] = []
        for place, word in enumerate(words):
            field = f"solution[{place}]"
            if not isinstance(word, str):
                self._fail(field, f"{kind_of(word)} {shown(word)}", "an emotion word", example)
                continue
            before = len(self.problems)
            check_text(self._problems, field, word, PLACEHOLDER, SPECIAL_TOKEN, STRUCTURE_TAG)
            if isinstance(value, str):
                clean.append(word)
                continue
            if len(split_label(word, joined=False)) > 1 and len(self.problems) == before:
                self._fail(field, shown(word), "one emotion word or phrase, no comma or other separator", example)
            clean.extend(split_label(word))
        if not clean and len(self.problems) == problems_before:
            self._fail(
                "solution", shown(value), "at least one emotion word", 'write "neutral", or leave the column out'
            )
        return tuple(clean)

    def _slow_target(self, row: dict[str, Any], turn: str | None, solution: tuple[str, ...]) -> str | None:
        """The canonical slow target, from the assistant turn or from `reasoning` and `solution`."""
        reasoning = self._text("reasoning", row)
        if turn is not None and reasoning is not None:
            self._fail("reasoning", "a reasoning and an assistant turn", "one demonstration", "drop one of the two")
            return None
        if turn is not None:
            blocks = [block.strip() for block in blocks_of(turn) or ()]
            if not blocks or not all(blocks) or any(STRUCTURE_TAG.search(block) for block in blocks):
                mend = "write the blocks, or give plain labels in `solution` instead of an assistant turn"
                self._fail("messages[-1].content", shown(turn), _TARGET_FORM, mend)
                return None
            return format_answer(*blocks)
        if reasoning is None:
            return None
        if not solution:
            self._fail("solution", "a `reasoning` without a `solution`", "both", "add the emotion words as `solution`")
            return None
        return format_answer(reasoning, ", ".join(solution))

    def _check_placeholders(self, messages: list[dict[str, str]], media: dict[str, tuple[str, ...]]) -> None:
        counts = {column: _count(messages, placeholder) for column, placeholder in MEDIA.items()}
        if not any(counts.values()):
            return
        for column, placeholder in MEDIA.items():
            if counts[column] != len(media[column]):
                self._fail(
                    "messages",
                    f"{counts[column]} {placeholder} for {len(media[column])} path(s) in `{column}`",
                    f"one {placeholder} per path",
                    "make them agree, or write no placeholder at all: the media then come before the text",
                )

    def _check_presence(self, row, media, subtitle, solution, target) -> None:
        if not any(media.values()) and not subtitle and not any(column in row for column in MEDIA):
            expected = "at least one of `videos`, `audios`, `images`, `subtitle`"
            self._fail("videos", "no medium and no subtitle", expected, "name the clip, or correct the column's name")
        if self.problems:
            return
        if "target" in self.require and target is None:
            expected = "a demonstration: an assistant turn, or `reasoning` with `solution`"
            self._fail("reasoning", "nothing", expected, "add it; SFT learns from demonstrations")
        if "solution" in self.require and not solution and target is None:
            self._fail("solution", "nothing", "emotion words", 'add "solution": ["happy", "relieved"]')


def _count(messages: list[dict[str, str]], placeholder: str) -> int:
    return sum(message["content"].count(placeholder) for message in messages if message["role"] == "user")
