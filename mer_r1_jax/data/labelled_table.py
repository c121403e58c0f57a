"""Any set of clips with a table of labels: which column means what is said by whoever has it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mer_r1_jax.config.schema import DataConfig
from mer_r1_jax.data.conversion import (
    Account,
    ConversionError,
    Draft,
    LabelError,
    below,
    present,
    read_table,
    words_of,
)
from mer_r1_jax.data.problems import PLACEHOLDER, LineProblems
from mer_r1_jax.data.turns import Chat, read_chat
from mer_r1_jax.emotion.answer_form import parse_answer
from mer_r1_jax.json_lines import JsonLineError, parse_value

_PLACE = "{}"  # in a form of paths: what stands in the column
_LONGEST_ANSWER = 200  # characters of a last turn without <answer> that is taken for words


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableColumns:
    """Which column means what; "" where there is none.

    Attributes:
        id: unique name of the clip; the video's path where there is none.
        video, audio: paths, or names that `video_path` and `audio_path` make paths of. Without `audio` the video's own
            sound is heard.
        video_path, audio_path: forms of the paths, such as `clips/{}.mp4`.
        label: emotion words, or the keys of a map to them.
        text: what is said.
        reasoning: how the emotions show.
        chat: turns; without `label` the last one, the assistant's, is the label.
    """

    id: str = ""
    video: str = ""
    audio: str = ""
    video_path: str = _PLACE
    audio_path: str = _PLACE
    label: str = ""
    text: str = ""
    reasoning: str = ""
    chat: str = ""

    def named(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        names = (self.id, self.video, self.audio, self.label, self.text, self.reasoning, self.chat)
        return tuple(dict.fromkeys(filter(None, names)))


def read_label_map(path: str | os.PathLike, account: Account) -> dict[str, list[str]]:
    """label -> emotion words, from a JSON object, or from a table with the columns `label` and `word`.

    Raises:
        ConversionError: it is neither.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        found: dict[str, list[str]] = {}
        for number, row in read_table(path, ("label", "word"), account):
            try:
                found.setdefault(_key(row["label"]), []).extend(words_of(row["word"]))
            except LabelError as error:
                raise ConversionError(
                    f"--label_map: {path}:{number}: got {error}; expected a label and an emotion word; correct the row"
                ) from error
        return found
    try:
        given = parse_value(path.read_text(encoding="utf-8"))
        if not isinstance(given, dict) or not given:
            raise LabelError("no object")
        return {key.strip(): words_of(words) for key, words in given.items()}
    except (OSError, UnicodeDecodeError, JsonLineError, LabelError) as error:
        raise ConversionError(
            f'--label_map: {path}: got {error}; expected {{"0": "happy", "1": ["sad", "worried"], ...}}; correct it'
        ) from error


def read_labelled_table(
    file: str | os.PathLike,
    columns: TableColumns,
    label_map: dict[str, list[str]] | None,
    root: str | os.PathLike,
    account: Account,
) -> Iterator[Draft]:
    """Yields the clips of a table.

    Args:
        file: the table, of any kind that is read.
        columns: what they mean.
        label_map: label -> words; None where the column holds words.
        root: folder of the media; absolute paths below it become relative to it.
        account: is given clips that are left out and why.

    Raises:
        ConversionError: no column names a medium, or none holds the label; the file cannot be read.
    """
    if not (columns.video or columns.audio or columns.chat):
        raise ConversionError("--video is empty, expected the column with the clips; name it, or --audio")
    if not (columns.label or columns.chat):
        raise ConversionError("--label is empty, expected the column with the emotions; name it, or --chat")
    root = Path(root)
    texts = (columns.id, columns.text, columns.reasoning)
    for number, row in read_table(file, columns.named(), account, texts=texts):
        draft = _draft(row, columns, root, f"{Path(file).name}:{number}", account)
        if draft is None:
            continue
        if _labelled(draft, row, columns, label_map, account):
            yield draft


def _draft(row: dict[str, Any], columns: TableColumns, root: Path, where: str, account: Account) -> Draft | None:
    """A clip with what is shown of it and what is asked, or None where its files are not there."""
    made: dict[str, Any] = {}
    for column, form, ours in (
        (columns.video, columns.video_path, "videos"),
        (columns.audio, columns.audio_path, "audios"),
    ):
        if column and row[column] is not None:
            made[ours] = [below(root, form.replace(_PLACE, str(row[column]).strip()))]
    if columns.chat:
        chat = _chat(row, columns.chat, where, account)
        if chat is None:
            return None
        made["messages"] = chat.messages
        made |= {kind: [below(root, str(path)) for path in paths] for kind, paths in chat.media.items() if all(paths)}
        if chat.target is not None:
            made["answer"] = chat.target  # taken out again where the label is read
    media = [path for kind in ("videos", "audios", "images") for path in made.get(kind, ())]
    given = row[columns.id] if columns.id else media[0] if media else None
    name = str(given).strip() if given is not None else where
    if not media:
        account.leave_out("no video and no sound is named", name)
        return None
    if not all(present(root, path) for path in media):
        account.leave_out("no file of that name below --root", name)
        return None
    placed = any(PLACEHOLDER.search(turn["content"]) for turn in made.get("messages", ()))
    if "audios" not in made and "videos" in made and not placed:  # a chat with placeholders says itself what is heard
        made["audios"] = made["videos"]
    if columns.text and (text := str(row[columns.text] or "").strip()):
        made["subtitle"] = text
    return Draft(name=name, row=made)


def _chat(row: dict[str, Any], column: str, where: str, account: Account) -> Chat | None:
    problems = LineProblems(where, 0)
    chat = read_chat({"messages": row[column]}, {"messages": column}, DataConfig.question, problems)
    if chat is None or problems.found:
        reason = problems.found[0].expected if problems.found else "a list of turns"
        account.leave_out(f"`{column}` is not {reason}", where)
        return None
    return chat


def _labelled(
    draft: Draft, row: dict[str, Any], columns: TableColumns, label_map: dict[str, list[str]] | None, account: Account
) -> bool:
    """Adds a clip's emotion words and reasoning, and says whether its words can be read."""
    turn = draft.row.pop("answer", None)
    try:
        if columns.label:
            words = _words(row[columns.label], label_map)
            reasoning = row[columns.reasoning] if columns.reasoning else turn and parse_answer(turn).reasoning
        else:
            reasoning, words = _of_turn(turn, label_map)
    except LabelError as error:
        account.leave_out(str(error), draft.name)
        return False
    if not words:
        account.leave_out("no label", draft.name)
        return False
    draft.row["solution"] = words
    if text := str(reasoning or "").strip():
        draft.row["reasoning"] = text
    return True


def _of_turn(turn: str | None, label_map: dict[str, list[str]] | None) -> tuple[str | None, list[str]]:
    """Reasoning and words of a last turn: of its blocks, or all of it where it is short enough to be words."""
    if turn is None:
        raise LabelError("no answer in a last turn")
    parsed = parse_answer(turn)
    if parsed.answer_text is not None:
        return parsed.reasoning, _words(parsed.answer_text, label_map)
    if len(turn) > _LONGEST_ANSWER:
        raise LabelError(f"a last turn of more than {_LONGEST_ANSWER} characters without <answer>")
    return None, _words(turn, label_map)


def _words(label: Any, label_map: dict[str, list[str]] | None) -> list[str]:
    if label is None:
        return []
    if label_map is not None:
        key = _key(label)
        if key not in label_map:
            raise LabelError(f"a label that is not in --label_map: {key[:40]}")
        return label_map[key]
    if isinstance(label, int | float) or _is_number(str(label)):
        raise LabelError("a number for a label, and no --label_map")
    return words_of(label)


def _key(label: Any) -> str:
    """A label as both tables have it. Raises LabelError where there is none."""
    if label is None:
        raise LabelError("no label")
    # 3.0 is how a table with empty cells writes 3
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label).strip()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
