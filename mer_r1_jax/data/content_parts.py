"""The content of a chat turn as a list of parts, as Hugging Face, TRL, Qwen and OpenAI-style files write it.

Read is what is certain: `{"type": "text", "text": ...}`, and `image`, `video` and `audio` parts that name one file,
under any of the keys in use, or none where the columns name it. Everything else is refused by name: a part that is
passed over is a model trained blind.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mer_r1_jax.json_lines import cut, kind_of

COLUMN = {"video": "videos", "audio": "audios", "image": "images"}
# type of a part -> what it holds
TYPES = {"text": "text", "input_text": "text"} | {
    name: kind for kind in COLUMN for name in (kind, f"{kind}_url", f"input_{kind}")
}
_ADDRESS = ("path", "url", "file")  # keys that hold a file whatever its kind
_EXPECTED = "parts of type text, image, video or audio"
_MEND_TYPE = 'write it as {"type": "text", "text": ...} or {"type": "video", "video": "clip.mp4"}, or take it out'


class PartError(ValueError):
    """A part that cannot be read with certainty.

    Attributes:
        place: what is at fault, from the content on, e.g. `[1].type`.
        got, expected, mend: the parts of the message.
    """

    def __init__(self, place: str, got: str, expected: str, mend: str):
        super().__init__(f"{place}: got {got}; expected {expected}; to mend it, {mend}")
        self.place, self.got, self.expected, self.mend = place, got, expected, mend


@dataclasses.dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        kind: text, video, audio or image.
        value: the text; of a medium its path, or None where the columns name it.
    """

    kind: str
    value: str | None


def read_parts(content: list[Any]) -> list[Part]:
    """The parts of a turn's content, in order.

    Raises:
        PartError: for the first part that is of an unknown type or form, or says more than a file's name.
    """
    return [_read_part(f"[{place}]", part) for place, part in enumerate(content)]


def _read_part(place: str, part: Any) -> Part:
    if not isinstance(part, dict):
        raise PartError(place, f"{kind_of(part)} {cut(part)}", _EXPECTED, _MEND_TYPE)
    given = {key: value for key, value in part.items() if value is not None and value != [] and value != ""}
    kind = _kind(place, part, given)
    if kind == "text":
        return _read_text(place, part, given)
    return _read_medium(place, kind, given)


def _kind(place: str, part: dict[str, Any], given: dict[str, Any]) -> str:
    """text, video, audio or image; Qwen's files leave the type out where a key says it."""
    name = given.get("type")
    if name is None:
        kinds = {TYPES[key] for key in given if key in TYPES}
        if len(kinds) == 1:
            return kinds.pop()
        if not given and "text" in part:
            return "text"
        raise PartError(f"{place}.type", f"no type in {cut(part)}", _EXPECTED, _MEND_TYPE)
    if not isinstance(name, str) or name not in TYPES:
        raise PartError(f"{place}.type", f"{kind_of(name)} {cut(name)}", _EXPECTED, _MEND_TYPE)
    return TYPES[name]


def _read_text(place: str, part: dict[str, Any], given: dict[str, Any]) -> Part:
    _refuse_others(place, given, ("type", "text"))
    text = part.get("text")
    if not isinstance(text, str):
        example = 'write {"type": "text", "text": "..."}'
        raise PartError(f"{place}.text", f"{kind_of(text)} {cut(text)}", "a text", example)
    return Part("text", text)


def _read_medium(place: str, kind: str, given: dict[str, Any]) -> Part:
    keys = (kind, f"{kind}_url", f"input_{kind}", f"{kind}_path", *_ADDRESS)
    _refuse_others(place, given, ("type", *keys))
    named = {key: given[key] for key in keys if key in given}
    if not named:
        return Part(kind, None)
    paths = {key: _path(f"{place}.{key}", kind, value) for key, value in named.items()}
    if len(set(paths.values())) > 1:
        raise PartError(place, f"{' and '.join(paths)} that differ", "one file for each part", "keep one of them")
    return Part(kind, next(iter(paths.values())))


def _path(place: str, kind: str, value: Any) -> str:
    """The file's name, which may stand one level deeper: `{"url": ...}`, or `{"bytes": null, "path": ...}`."""
    example = f'write {{"type": "{kind}", "{kind}": "clips/a"}} with the name of one file'
    if isinstance(value, dict):
        inner = {key: entry for key, entry in value.items() if entry is not None}
        if len(inner) == 1 and (key := next(iter(inner))) in _ADDRESS:
            place, value = f"{place}.{key}", inner[key]
    if not isinstance(value, str) or not value.strip():
        raise PartError(place, f"{kind_of(value)} {cut(value)}", "a path", example)
    return value


def _refuse_others(place: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    """Refuses what would change what is seen or heard, such as Qwen's `fps` or `video_start`, and is not read."""
    for key in given:
        if key not in known:
            mend = "take it out; what is seen of a clip is the same for all records and stands in media.* (fps, pixels)"
            raise PartError(f"{place}.{key}", f"{cut(key)}, which is not read", f"only {', '.join(known)}", mend)
