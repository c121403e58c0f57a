"""The chat of a line: from `messages`, `conversations`, `prompt`, `question` and `system` to turns with plain text.

Media that stand in the content as parts leave a placeholder in the text and their paths beside it.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from mer_r1_jax.data.content_parts import COLUMN, PartError, read_parts
from mer_r1_jax.data.problems import PLACEHOLDER, SPECIAL_TOKEN, LineProblems, check_text, shown
from mer_r1_jax.json_lines import JsonLineError, kind_of, parse_value

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
_EXAMPLE = '{"role": "user", "content": "..."}'


@dataclasses.dataclass
class Chat:
    """The chat of a line.

    Attributes:
        messages: turns with plain text, the last one the user's.
        target: content of an assistant turn that follows them, or None.
        media: column -> a path, or None for "as the column says", for each part of the content that is a medium.
    """

    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)
    target: str | None = None
    media: dict[str, list[str | None]] = dataclasses.field(default_factory=dict)


def read_chat(row: dict[str, Any], names: dict[str, str], question: str, problems: LineProblems) -> Chat | None:
    """The chat of a line, or None when there is a problem with it.

    Args:
        row: the line's columns under our own names.
        names: our name -> the name that the line gives a column.
        question: asked where the line brings none.
        problems: where what is wrong is added.
    """
    before = len(problems.found)
    if "messages" in row and "question" in row:
        one, other = names["messages"], names["question"]
        problems.add(other, f"both `{one}` and `{other}`", "one of them", f"drop `{other}`")
        return None
    # ShareGPT's turns are named as the chat turns they become.
    name = "prompt" if names.get("messages") == "prompt" else "messages"
    chat = _Turns(name, problems).read(row["messages"]) if "messages" in row else _question(row, question, problems)
    if chat is not None:
        _add_system(chat, row.get("system"), problems)
    return chat if len(problems.found) == before else None


def _question(row: dict[str, Any], question: str, problems: LineProblems) -> Chat | None:
    asked = row.get("question", question)
    if not isinstance(asked, str) or not asked.strip():
        got, mend = f"{kind_of(asked)} {shown(asked)}", "write the question, or leave it out"
        problems.add("question", got, "a text that is not empty", mend)
        return None
    if _is_chat(asked):
        got, mend = (
            f"a chat written as a text, {shown(asked)}",
            "write the turns as a JSON list, without quotes around it",
        )
        problems.add("question", got, "a question, or a list of turns", mend)
        return None
    check_text(problems, "question", asked, SPECIAL_TOKEN)
    return Chat([{"role": "user", "content": asked}])


def _is_chat(text: str) -> bool:
    """Whether a text is a list of turns, as tables hold them that know no lists."""
    if not text.lstrip().startswith("["):
        return False
    try:
        turns = parse_value(text)
    except JsonLineError:
        return re.match(r"\s*\[\s*\{\s*'(?:role|from|content|value)'\s*:", text) is not None  # as Python prints it
    return isinstance(turns, list) and any(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns)


def _add_system(chat: Chat, system: Any, problems: LineProblems) -> None:
    """Puts the column `system` before the turns; a blank one, as LLaMA-Factory writes it, says nothing."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return
    if not isinstance(system, str):
        problems.add("system", f"{kind_of(system)} {shown(system)}", "a text", 'write "system": "..." or leave it out')
        return
    check_text(problems, "system", system, SPECIAL_TOKEN, PLACEHOLDER)
    if chat.messages and chat.messages[0]["role"] == "system":
        problems.add("system", "a `system` and a system turn", "one of them", "drop one of the two")
        return
    chat.messages.insert(0, {"role": "system", "content": system})


class _Turns:
    """Reads a list of turns.

    Args:
        name: of the column, for messages.
        problems: where what is wrong is added.
    """

    def __init__(self, name: str, problems: LineProblems):
        self.name, self.problems = name, problems
        self.media: dict[str, list[str | None]] = {}
        self._literal = False  # a placeholder stands in the text itself

    def read(self, turns: Any) -> Chat | None:
        """The turns up to the user's last one, and the content of an assistant turn after it."""
        if not isinstance(turns, list) or not turns:
            example = f'write "{self.name}": [{_EXAMPLE}]'
            got = f"{kind_of(turns)} {shown(turns)}"
            self.problems.add(self.name, got, "a list of turns that is not empty", example)
            return None
        read = [self._turn(f"{self.name}[{place}]", turn) for place, turn in enumerate(turns)]
        messages = [message for message in read if message is not None]
        if len(messages) < len(turns):
            return None
        if self.media and self._literal:
            mend = "write all media as parts, or all as placeholders with their paths in the columns"
            self.problems.add(self.name, "media parts and placeholders in the text", "one of the two", mend)
            return None
        target = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
        self._check_order([message["role"] for message in messages])
        return Chat(messages, target, self.media)

    def _turn(self, field: str, turn: Any) -> dict[str, str] | None:
        """A turn as role and plain text, or None when there is a problem with it."""
        if not isinstance(turn, dict):
            got = f"{kind_of(turn)} {shown(turn)}"
            self.problems.add(field, got, f"a turn like {_EXAMPLE}", "correct the turn")
            return None
        role, content, others = _role_and_content(turn)
        if not isinstance(role, str) or role not in ROLES:
            expected, mend = f"one of {', '.join(ROLES)}", f"write the turn as {_EXAMPLE}"
            self.problems.add(f"{field}.role", shown(role), expected, mend)
            return None
        if others:
            mend = "take it out; media, labels and settings of a turn belong into columns of the line"
            self.problems.add(f"{field}.{others[0]}", "a key that is not read", "role and content alone", mend)
            return None
        text = self._content(f"{field}.content", role, content)
        return None if text is None else {"role": role, "content": text}

    def _content(self, field: str, role: str, content: Any) -> str | None:
        if isinstance(content, list) and content:
            content = self._joined(field, role, content)
            if content is None:
                return None
        elif isinstance(content, str):
            self._literal = self._literal or bool(PLACEHOLDER.search(content))
        if not isinstance(content, str) or not content.strip():
            mend = "write plain text, or parts of type text, image, video and audio"
            self.problems.add(field, f"{kind_of(content)} {shown(content)}", "a text that is not empty", mend)
            return None
        forbidden = [SPECIAL_TOKEN] if role == "user" else [SPECIAL_TOKEN, PLACEHOLDER]
        check_text(self.problems, field, content, *forbidden)
        return content

    def _joined(self, field: str, role: str, content: list[Any]) -> str | None:
        """Parts as one text, as the model's own chat template joins them: with nothing between."""
        try:
            parts = read_parts(content)
        except PartError as error:
            self.problems.add(f"{field}{error.place}", error.got, error.expected, error.mend)
            return None
        pieces = []
        for place, part in enumerate(parts):
            if part.kind == "text" and part.value is not None:
                self._literal = self._literal or bool(PLACEHOLDER.search(part.value))
                pieces.append(part.value)
                continue
            if role != "user":
                where, mend = f"{field}[{place}]", "move it into a user turn"
                self.problems.add(
                    where, f"a medium ({part.kind}) in the {role} turn", "media in user turns alone", mend
                )
                return None
            self.media.setdefault(COLUMN[part.kind], []).append(part.value)
            pieces.append(f"<{part.kind}>")
        return "".join(pieces)

    def _check_order(self, roles: list[str]) -> None:
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if len(turns) % 2 == 0 or any(role != ("user", "assistant")[n % 2] for n, role in enumerate(turns)):
            got = f"the roles {', '.join(roles) or 'of an assistant alone'}"
            expected = "a system turn or none, then user and assistant turns in alternation, beginning with user"
            self.problems.add(self.name, got, expected, "reorder the turns")


def _role_and_content(turn: dict[str, Any]) -> tuple[Any, Any, list[str]]:
    """Role and content of a chat turn or a ShareGPT one, and the keys beside them that say something."""
    keys = ("from", "value") if "from" in turn else ("role", "content")
    role, content = turn.get(keys[0]), turn.get(keys[1])
    if keys[0] == "from" and isinstance(role, str):
        role = SHAREGPT_ROLES.get(role, role)
    others = [key for key, value in turn.items() if key not in keys and value not in (None, [], "")]
    return role, content, others
