"""From one line of a data file to the columns of a record, collecting everything that is wrong with the line."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mer_r1_jax.data.paths import MediaPathError, resolve_media
from mer_r1_jax.data.problems import Problem, shown

ALIASES = {
    "id": (),
    "messages": ("conversations",),
    "question": ("problem", "query"),
    "videos": ("video",),
    "audios": ("audio",),
    "images": ("image",),
    "subtitle": (),
    "solution": (),
    "reasoning": (),
}
MEDIA = {"videos": "<video>", "audios": "<audio>", "images": "<image>"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
ROLES = ("system", "user", "assistant")

_PLACEHOLDER = re.compile(r"<(?:video|audio|image)>")
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]{1,64}\|>")
_STRUCTURE_TAG = re.compile(r"</?(?:subtitle|think|answer)>")
_TARGET = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_TARGET_FORM = "<think>reasoning</think> and <answer>emotion words</answer>, each once, in this order, nothing else"
_SIMILAR = 0.82  # difflib ratio from which an unknown column counts as a mistyped one


class LineReader:
    """Reads one line. `read` returns the columns of a Record, or None; `problems` says why.

    Args:
        file, line: where the line stands, for messages.
        media_root: folder the media paths are relative to.
        question: asked where the line brings none.
        require: what the record must bring, of `target` and `solution`.
    """

    def __init__(self, file: str, line: int, media_root: str | os.PathLike, question: str, require: Sequence[str]):
        self.file, self.line = file, line
        self.media_root, self.question, self.require = media_root, question, require
        self.problems: list[Problem] = []
        self._id = ""

    def read(self, text: str) -> dict[str, Any] | None:
        """Columns of the record in `text`, or None when there is any problem."""
        row = self._parse(text)
        if row is None:
            return None
        row, extra = self._canonical(row)
        self._id = self._record_id(row)
        media = {column: self._media(column, row) for column in MEDIA}
        subtitle = self._text("subtitle", row)
        solution = self._solution(row)
        messages, target = self._messages(row)
        target = self._slow_target(row, target, solution)
        if "audios" not in row and messages:
            # R1-Omni's files write `<audio>` for the sound track of the video they name.
            if _count(messages, "<audio>") == len(media["videos"]):
                media["audios"] = media["videos"]
        self._check_placeholders(messages, media)
        self._check_presence(row, media, subtitle, solution, target)
        if self.problems:
            return None
        if not solution and target is not None:
            answer = target.split("<answer>")[1].removesuffix("</answer>")
            solution = tuple(word.strip() for word in answer.split(",") if word.strip())
        return {
            "id": self._id,
            "messages": tuple(messages),
            **media,
            "subtitle": subtitle,
            "solution": solution,
            "target": target,
            "extra": extra,
        }

    def _fail(self, field: str, got: str, expected: str, mend: str) -> None:
        self.problems.append(
            Problem(
                file=self.file, line=self.line, field=field, got=got, expected=expected, mend=mend, record_id=self._id
            )
        )

    def _parse(self, text: str) -> dict[str, Any] | None:
        try:
            row = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            mend = "put exactly one object on the line, strings in double quotes, no trailing comma"
            self._fail("", f"malformed JSON at column {error.colno} ({error.msg})", "one JSON object per line", mend)
            return None
        except (_BadJson, RecursionError) as error:
            self._fail("", str(error), "plain JSON with each key once", "correct the line")
            return None
        if not isinstance(row, dict):
            self._fail("", f"{_kind(row)} {shown(row)}", "a JSON object", 'write {"id": ..., "videos": [...], ...}')
            return None
        return row

    def _canonical(self, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Splits a line into known columns under their own names and further ones; null means absent."""
        known: dict[str, Any] = {}
        names = {alias: column for column, aliases in ALIASES.items() for alias in (column, *aliases)}
        for name, column in names.items():
            if row.get(name) is None:
                continue
            if column in known:
                given = [n for n, c in names.items() if c == column and row.get(n) is not None]
                self._fail(name, f"both {' and '.join(given)}", f"one of them; both mean `{column}`", "drop one")
                continue
            known[column] = _from_sharegpt(row[name]) if name == "conversations" else row[name]
        extra = {name: value for name, value in row.items() if name not in names}
        for name in extra:
            close = difflib.get_close_matches(name, [n for n in names if len(n) > 4], n=1, cutoff=_SIMILAR)
            if close and names[close[0]] not in known:
                self._fail(
                    name, "an unknown column", f"`{close[0]}`, which it resembles", "correct or rename the column"
                )
        return known, extra

    def _record_id(self, row: dict[str, Any]) -> str:
        value = row.get("id", f"{Path(self.file).stem}:{self.line}")
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            self._fail(
                "id", f"{_kind(value)} {shown(value)}", "a text that is not empty, or a whole number", "correct it"
            )
            return ""
        return str(value)

    def _media(self, column: str, row: dict[str, Any]) -> tuple[str, ...]:
        value = row.get(column, ())
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, list | tuple):
            self._fail(column, f"{_kind(value)} {shown(value)}", "a list of paths", f'write "{column}": ["clip.mp4"]')
            return ()
        for place, path in enumerate(paths):
            field = f"{column}[{place}]"
            if not isinstance(path, str):
                self._fail(field, f"{_kind(path)} {shown(path)}", "a path", f'write "{column}": ["clip.mp4"]')
                continue
            try:
                resolve_media(self.media_root, path)
            except MediaPathError as error:
                self._fail(field, error.got, error.expected, error.mend)
        return tuple(path for path in paths if isinstance(path, str))

    def _text(self, column: str, row: dict[str, Any]) -> str | None:
        """A free text without placeholders, special tokens or tags; None when absent or blank."""
        value = row.get(column)
        if value is None:
            return None
        if not isinstance(value, str):
            self._fail(column, f"{_kind(value)} {shown(value)}", "a text", f'write "{column}": "..." or leave it out')
            return None
        self._check_text(column, value, _PLACEHOLDER, _SPECIAL_TOKEN, _STRUCTURE_TAG)
        return value.strip() or None

    def _check_text(self, field: str, text: str, *forbidden: re.Pattern) -> None:
        for pattern in forbidden:
            found = pattern.search(text)
            if found:
                kind = {_PLACEHOLDER: "a media placeholder", _SPECIAL_TOKEN: "a special token"}.get(pattern, "a tag")
                mend = f"take {found.group()} out of the text; the model would read it as structure, not as words"
                self._fail(field, f"{found.group()} in {shown(text)}", f"a text without {kind}", mend)
        if any("\ud800" <= character <= "\udfff" for character in text):
            self._fail(field, "half of a surrogate pair", "valid Unicode text", "correct the \\u escapes")

    def _solution(self, row: dict[str, Any]) -> tuple[str, ...]:
        value = row.get("solution")
        if value is None:
            return ()
        example = 'write "solution": ["happy", "relieved"] or "happy, relieved"'
        problems_before = len(self.problems)
        words = value.split(",") if isinstance(value, str) else value
        if not isinstance(words, list):
            self._fail("solution", f"{_kind(value)} {shown(value)}", "a list of words or a comma text", example)
            return ()
        for place, word in enumerate(words):
            field = f"solution[{place}]"
            if not isinstance(word, str):
                self._fail(field, f"{_kind(word)} {shown(word)}", "an emotion word", example)
            elif "," in word and isinstance(value, list):
                self._fail(field, shown(word), "one emotion word or phrase, no comma", example)
            else:
                self._check_text(field, word, _PLACEHOLDER, _SPECIAL_TOKEN, _STRUCTURE_TAG)
        clean = tuple(word.strip() for word in words if isinstance(word, str) and word.strip())
        if not clean and len(self.problems) == problems_before:
            self._fail(
                "solution", shown(value), "at least one emotion word", 'write "neutral", or leave the column out'
            )
        return clean

    def _messages(self, row: dict[str, Any]) -> tuple[list[dict[str, str]], str | None]:
        """Turns up to the last user turn, and the content of an assistant turn after it."""
        if "messages" in row and "question" in row:
            self._fail("question", "both `messages` and `question`", "one of them", "drop `question`")
            return [], None
        if "messages" not in row:
            question = row.get("question", self.question)
            if not isinstance(question, str) or not question.strip():
                expected = "a text that is not empty"
                self._fail(
                    "question", f"{_kind(question)} {shown(question)}", expected, "write the question, or leave it out"
                )
                return [], None
            self._check_text("question", question, _SPECIAL_TOKEN)
            return [{"role": "user", "content": question}], None
        turns = row["messages"]
        if not isinstance(turns, list) or not turns:
            example = 'write "messages": [{"role": "user", "content": "..."}]'
            self._fail("messages", f"{_kind(turns)} {shown(turns)}", "a list of turns that is not empty", example)
            return [], None
        if not all([self._turn_is_good(f"messages[{place}]", turn) for place, turn in enumerate(turns)]):
            return [], None
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        target = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
        self._check_order([message["role"] for message in messages])
        return messages, target

    def _turn_is_good(self, field: str, turn: Any) -> bool:
        example = '{"role": "user", "content": "..."}'
        if not isinstance(turn, dict):
            self._fail(field, f"{_kind(turn)} {shown(turn)}", f"a turn like {example}", "correct the turn")
            return False
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            self._fail(f"{field}.role", shown(role), f"one of {', '.join(ROLES)}", f"write the turn as {example}")
            return False
        if not isinstance(content, str) or not content.strip():
            mend = "write plain text; media belong in `videos`, `audios`, `images`, with placeholders in the text"
            self._fail(f"{field}.content", f"{_kind(content)} {shown(content)}", "a text that is not empty", mend)
            return False
        forbidden = [_SPECIAL_TOKEN] if role == "user" else [_SPECIAL_TOKEN, _PLACEHOLDER]
        self._check_text(f"{field}.content", content, *forbidden)
        return True

    def _check_order(self, roles: list[str]) -> None:
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if len(turns) % 2 == 0 or any(role != ("user", "assistant")[n % 2] for n, role in enumerate(turns)):
            expected = "a system turn or none, then user and assistant turns in alternation, beginning with user"
            self._fail(
                "messages", f"the roles {', '.join(roles) or 'of an assistant alone'}", expected, "reorder the turns"
            )

    def _slow_target(self, row: dict[str, Any], turn: str | None, solution: tuple[str, ...]) -> str | None:
        """The canonical slow target, from the assistant turn or from `reasoning` and `solution`."""
        reasoning = self._text("reasoning", row)
        if turn is not None and reasoning is not None:
            self._fail("reasoning", "a reasoning and an assistant turn", "one demonstration", "drop one of the two")
            return None
        if turn is not None:
            found = _TARGET.fullmatch(turn)
            blocks = [block.strip() for block in found.groups()] if found else []
            if not found or not all(blocks) or any(_STRUCTURE_TAG.search(block) for block in blocks):
                mend = "write the blocks, or give plain labels in `solution` instead of an assistant turn"
                self._fail("messages[-1].content", shown(turn), _TARGET_FORM, mend)
                return None
            return f"<think>{blocks[0]}</think>\n<answer>{blocks[1]}</answer>"
        if reasoning is None:
            return None
        if not solution:
            self._fail("solution", "a `reasoning` without a `solution`", "both", "add the emotion words as `solution`")
            return None
        return f"<think>{reasoning}</think>\n<answer>{', '.join(solution)}</answer>"

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


class _BadJson(ValueError):
    """Valid for Python's json module, but not what a data file may contain."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise _BadJson(f"the key {next(name for name in names if names.count(name) > 1)!r} twice in one object")
    return row


def _no_constant(name: str) -> None:
    raise _BadJson(f"the number {name}, which JSON does not know")


def _from_sharegpt(turns: Any) -> Any:
    """ShareGPT turns as chat turns; what has another form is left for the checks that follow."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    return [
        {"role": SHAREGPT_ROLES.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}
        if "from" in turn
        else turn
        for turn in turns
    ]


def _count(messages: list[dict[str, str]], placeholder: str) -> int:
    return sum(message["content"].count(placeholder) for message in messages if message["role"] == "user")


def _kind(value: Any) -> str:
    names = {bool: "a boolean", str: "the text", list: "the list", dict: "the object", type(None): "null"}
    return names.get(type(value), "the number")
