"""Columns that are not ours: which of them look as if they were meant to be read.

A clip, a label or a question in a column of another name would be passed over, and the model trained without it. So a
column whose name or content looks like one of those stops the file, unless the setting `data.extra_columns` names it,
as one does for what reward functions read. Other columns are kept and counted.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mer_r1_jax.data.problems import Problem, shown
from mer_r1_jax.emotion.answer_form import split_label
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.json_lines import cut

OF_OUR_WORLD = ("cues", "oracle", "truth_categories")  # what the synthetic world adds to its held-out records
_SIMILAR = 0.82  # difflib ratio from which an unknown column counts as a mistyped one
_MOST_LEAVES = 1000  # of one value that are looked at
_LONG_LABEL = 200  # characters; what is longer is no label of these few words

# our column -> words that mean it when they stand in the name of another column
_MEANT = {
    "videos": "video videos clip clips movie movies film films vid vids mp4 avi mkv mov webm visual visuals 视频",
    "audios": "audio audios wav wavs mp3 flac voice voices speech sound sounds 音频 语音",
    "images": "image images img imgs picture pictures pic pics photo photos frame frames face faces jpg png 图片 图像",
    "subtitle": "subtitle subtitles transcript transcripts transcription transcriptions caption captions text texts "
    "sentence sentences utterance utterances asr srt chinese english 字幕 文本",
    "solution": "label labels answer answers emotion emotions emo openset truth truths groundtruth gt gold target "
    "targets class category categories sentiment sentiments senti feeling feelings annotation "
    "annotations reference references expected onehot 标签 情感 情绪 答案",
    "messages": "conversation conversations chat chats dialog dialogs dialogue dialogues turns message messages "
    "history completion completions response responses output outputs chosen",
    "question": "prompt prompts question questions instruction instructions input inputs 问题",
    "reasoning": "reason reasons rationale rationales explanation explanations thinking think thought thoughts cot",
    "system": "system",
}
_WORD = {word: column for column, words in _MEANT.items() for word in words.split()}
_OF_TEXT = frozenset("annotation annotations reference references expected".split())  # labels where they are texts
_FILE = frozenset(
    "path paths file files filename filenames filepath filepaths media medias multimedia url urls uri uris 路径".split()
)
_ANY_MEDIUM = "videos`, `audios` or `images"
# words that make of such a name something about the clip or the label, not the thing itself
_ABOUT = frozenset(
    "count num n confidence agreement source lang language version time start end duration length len weight weights "
    "intensity quality difficulty hash md5 format standard".split()
)
_ABOUT_MEDIA = _ABOUT | frozenset(
    "id ids idx index fps rate width height size seconds sec sha256 codec score type title".split()
)
_VOCABULARY = frozenset((*_WORD, *_FILE, *_ABOUT_MEDIA))
# Words that are recognised at the end of a longer one, `ovlabel`, and such as are at its start, `videopath`.
_ENDS = re.compile(
    r"(.+?)((?:video|audio|image|label|emotion|answer|openset|prompt|transcript|subtitle|path|file(?:name|path)?)s?)"
)
_STARTS = re.compile(r"((?:video|audio|image|label|emotion|answer|openset|prompt|transcript|subtitle)s?)(.+)")
_IDEOGRAPHS = re.compile(r"[\u4e00-\u9fff]+")
# The least ambiguous words for a feeling: a column that holds nothing else is a label, whatever its name.
_FEELINGS = frozenset(
    "happy happiness sad sadness angry anger fearful disgusted surprised scared worried anxious excited frustrated "
    "高兴 开心 悲伤 难过 愤怒 生气 惊讶 恐惧 害怕 厌恶".split()
)
_MEDIA_SUFFIX = re.compile(
    r"\.(?:mp4|avi|mkv|mov|webm|flv|wmv|m4v|mpe?g|3gp|ogv|m2?ts|m3u8|wav|mp3|flac|ogg|oga|opus|m4a|aac|wma|aiff?|amr"
    r"|png|jpe?g|bmp|gif|webp|tiff?|heic)(?:[?#]\S*)?\s*\Z",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Suspicion:
    """Why a column that is not ours stops the file.

    Attributes:
        column: its name, with the keys inside it where it holds objects.
        why: what it looks like.
        meant: our column it may stand for.
    """

    column: str
    why: str
    meant: str


class ForeignColumns:
    """The columns of one file that are not ours.

    Args:
        ours: every name that is read -> our name of the column.
        allowed: names that `data.extra_columns` gives.
    """

    def __init__(self, ours: Mapping[str, str], allowed: Sequence[str]):
        self._ours = ours
        self._allowed = frozenset((*allowed, *OF_OUR_WORLD))
        self._suspects: dict[str, tuple[int, int, Suspicion]] = {}  # column -> first line, lines, why
        self.unread: dict[str, int] = {}  # column -> lines that have it, of those nobody named
        self._with_text: list[str] = []

    @property
    def suspected(self) -> bool:
        """Whether any column looks as if it was meant to be read."""
        return bool(self._suspects)

    def add(self, line: int, extra: dict[str, Any], known: Iterable[str]) -> None:
        """Looks at the further columns of a line that has `known` under our own names."""
        known = set(known)
        for name, value in extra.items():
            if name in self._allowed or _says_nothing(value):
                continue
            self.unread[name] = self.unread.get(name, 0) + 1
            if name not in self._with_text and any(isinstance(leaf, str) for _, leaf in _leaves(value)):
                self._with_text.append(name)
            if name in self._suspects:
                first, lines, why = self._suspects[name]
                self._suspects[name] = first, lines + 1, why
            elif why := self._mistyped(name, known) or suspicion(name, value):
                self._suspects[name] = line, 1, why

    def problems(self, file: str) -> list[Problem]:
        """One problem a column, at its first line."""
        return [_problem(file, line, lines, name, why) for name, (line, lines, why) in self._suspects.items()]

    def without_media(self, file: str, subtitles: int) -> Problem | None:
        """The problem of a file no record of which has a medium, or None where that is evidently meant.

        It is meant where all there is to read is read: records with a subtitle and no further column that holds text.
        """
        if subtitles and not self._with_text:
            return None
        columns = ", ".join(printable(name, 40) for name in self._with_text[:8])
        got = "no record with a clip, a sound or a picture"
        got += f", and columns that are not read: {columns}" if columns else ", nor with a subtitle"
        expected = "`videos`, `audios` or `images`, in the columns or as parts of the content"
        mend = "rename the column that names the clips"
        if subtitles:
            mend += "; if the subtitles alone are meant, name the other columns in data.extra_columns"
        return Problem(file=file, line=0, field="videos", got=got, expected=expected, mend=mend)

    def _mistyped(self, name: str, known: set[str]) -> Suspicion | None:
        plain = name.strip().lower()
        close = [plain] if plain in self._ours else []
        if not close and _ABOUT_MEDIA & set(_words(name)):
            return None  # `question_id` is no `question`
        close = close or difflib.get_close_matches(name, [n for n in self._ours if len(n) > 4], n=1, cutoff=_SIMILAR)
        if close and self._ours[close[0]] not in known:
            return Suspicion(name, f"resembles `{close[0]}`", close[0])
        return None


def suspicion(name: str, value: Any) -> Suspicion | None:
    """Why a column that is not ours looks as if it was meant to be read, or None."""
    for keys, leaf in _leaves(value):
        if isinstance(leaf, str) and _MEDIA_SUFFIX.search(leaf):
            meant = _meant_by(keys[-1] if keys else name, leaf) or _meant_by(name, leaf)
            media = meant if meant in ("videos", "audios", "images") else _ANY_MEDIUM
            return Suspicion(_dotted(name, keys), f"names a file, {cut(leaf, 40)}", media)
    for keys, leaf in (((), value), *_leaves(value)):
        meant = _meant_by(keys[-1] if keys else name, leaf)
        if meant is not None:
            return Suspicion(_dotted(name, keys), f"means `{meant}` by its name", meant)
    if isinstance(value, list) and any(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in value):
        return Suspicion(name, "holds chat turns", "messages")
    for keys, leaf in _leaves(value):
        if (
            isinstance(leaf, str)
            and len(leaf) < _LONG_LABEL
            and _FEELINGS.issuperset(words := _label_words(leaf))
            and words
        ):
            return Suspicion(_dotted(name, keys), f"holds emotion words, {cut(leaf, 40)}", "solution")
    return None


def _label_words(text: str) -> list[str]:
    return [word.lower() for word in split_label(text)]


def _words(name: str) -> list[str]:
    """The words of a column's name: `videoPath`, `video-path_1`, `videopath` and `ovlabel` have two each."""
    spelt = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    words: list[str] = []
    for word in re.split(r"[\W_]+", spelt):
        plain = word.rstrip("0123456789") or word
        if plain in _VOCABULARY:
            words.append(plain)
        elif _IDEOGRAPHS.fullmatch(plain):
            inside = [known for known in _VOCABULARY if _IDEOGRAPHS.match(known) and known in plain]
            words.extend(sorted(inside, key=plain.find))
        elif (found := _STARTS.fullmatch(plain)) and found[2] in _VOCABULARY:
            words.extend(found.groups())
        elif found := _ENDS.fullmatch(plain):
            words.extend(found.groups())
        elif word:
            words.append(word)
    return words


def _meant_by(name: str, value: Any) -> str | None:
    """Our column that a name means, going by its words; None where it means none, or only something about one."""
    words = _words(name)
    found = [_WORD[word] for word in words if word in _WORD]
    meant = found[-1] if found else _ANY_MEDIUM if _FILE & set(words) else None
    # A number is no path and no text, but it can be a label.
    number_counts = meant == "solution" and not _OF_TEXT & set(words)
    about = _ABOUT if number_counts else _ABOUT_MEDIA
    if meant is None or about & set(words):
        return None
    if not number_counts and not any(isinstance(leaf, str) for _, leaf in _leaves(value)):
        return None
    return meant


def _leaves(value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys that lead to it, leaf) for what stands inside a value, at most `_MOST_LEAVES`."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), value)]
    seen = 0
    while waiting and seen < _MOST_LEAVES:
        keys, entry = waiting.pop()
        if isinstance(entry, dict):
            waiting.extend(((*keys, str(key)), inner) for key, inner in reversed(entry.items()))
        elif isinstance(entry, list):
            waiting.extend((keys, inner) for inner in reversed(entry))
        else:
            seen += 1
            yield keys, entry


def _says_nothing(value: Any) -> bool:
    return value is None or value in ("", [], {}) or (isinstance(value, str) and not value.strip())


def _dotted(name: str, keys: tuple[str, ...]) -> str:
    return ".".join((name, *keys))


def _problem(file: str, line: int, lines: int, name: str, why: Suspicion) -> Problem:
    if why.why.startswith("resembles"):
        got, mend = (
            "an unknown column",
            "correct or rename the column, or name it in data.extra_columns if it is not for the model",
        )
        expected = f"`{why.meant}`, which it resembles"
    else:
        inside = "" if why.column == name else f", at {shown(why.column)}"
        got = f"a column that is not read and {why.why}{inside}"
        expected = "columns that are read, or are known to be for reward functions"
        mend = f"rename it to `{why.meant}`, or name it in data.extra_columns if it is not for the model"
    if lines > 1:
        got += f" (in {lines} records)"
    return Problem(file=file, line=line, field=printable(name, 80), got=got, expected=expected, mend=mend)
