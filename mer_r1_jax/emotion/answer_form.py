"""The form of an answer, `<think>R</think>\\n<answer>W</answer>`: its tags, how it is written, and how it is read.

This is the one place that knows the form; data, RL and evaluation take it from here. W is split into words by the
official MER-UniBench rule (zeroQiaoba/AffectGPT, toolkit/utils), quirks included: only quotes and ASCII commas
separate, so "happy; sad", "happy/sad", "happy and sad", a newline or a Chinese comma leave one unknown word, and other
punctuation stays ("happy." is unknown).

A *label* that somebody wrote into a data file is not an answer under that rule, so `split_label` reads it more widely:
there a word that is lost is lost from the truth.
"""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from mer_r1_jax.json_lines import cut

MODES = ("slow", "fast")  # reasoning first, or the answer at once
AUTO = "auto"  # fast, and slow where the model is not sure of that (evaluation/gate.py)
TAGS = THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE = "<think>", "</think>", "<answer>", "</answer>"
BRIDGE = f"{THINK_CLOSE}\n{ANSWER_OPEN}"  # one newline between the blocks (ours)
EMPTY_THINK = THINK_OPEN + BRIDGE  # what a fast answer is given
WORD = re.compile("""[^,'"]+""")  # what `split_words` separates words by

_BLOCKS = re.compile(rf"\s*{THINK_OPEN}(.*?){THINK_CLOSE}\s*{ANSWER_OPEN}(.*?){ANSWER_CLOSE}\s*", re.DOTALL)
_BEGINNING = re.compile(rf"{THINK_OPEN}.*?{THINK_CLOSE}\s*{ANSWER_OPEN}.*?{ANSWER_CLOSE}", re.DOTALL)
_ONLY_TAGS = re.compile(rf"\s*((?:{'|'.join(TAGS)})\s*)+")
_THINK_BLOCK = re.compile(rf"{THINK_OPEN}.*?({THINK_CLOSE}|$)", re.DOTALL)
_EXTRACTOR_PREFIXES = ("输入", "输出", "翻译", "让我们来翻译一下", "output", "Output", "input", "Input")

# of labels, after NFKC
_BRACKETS = ("[]", "()", "{}", "【】", "「」", "『』", "《》", "〈〉", "〔〕", "<>", "⟨⟩")
_QUOTES = "'\"`´‘’‚‛“”„‟«»＂＇"
_STOPS = ".。…!?:;~"
_AROUND = " \t\r\n"
_LABEL_SEPARATOR = re.compile(r"[,;/|\\\n\r\t、،؛・。•·→+]+|[.!?]\s+|\.{2,}|->|\s[-–—]+\s")
# Of Chinese words only where letters of another script or blanks stand beside them: 温和 is one word.
_JOINING = re.compile(
    r"\s+(?:and|or)\s+|\s*&\s*|\s+(?:和|与|及|以及|或)\s+|(?<=[A-Za-z])\s*(?:和|与|及|以及|或)\s*(?=[A-Za-z])",
    re.IGNORECASE,
)
_HEADING = re.compile(r"^(?:(?:the\s+)?(?:emotion|label|answer)s?(?:\s+(?:is|are))?|情感|情绪|标签|答案)\s*:\s*", re.I)
# between a closing and an opening quote or bracket
_QUOTES_APART = re.compile(rf"(?<=[{_QUOTES}])\s+(?=[{_QUOTES}])|(?<=[\])}}】」』》〉〕>])\s*(?=[\[({{【「『《〈〔<])")
_NUMBERED = re.compile(
    r"(?:^|(?<=[\s,;\[(]))\(?"
    r"(?:\d{1,2}\s*[.)、:](?:\s+|(?=[^\W\d]))|[A-Za-z][.)]\s+|[一二三四五六七八九十]{1,2}[.、])|\(\d{1,2}\)"
)


@dataclasses.dataclass(frozen=True)
class ParsedAnswer:
    """What one answer says.

    Attributes:
        reasoning: the text of the first closed think block, trimmed; None when there is no such block.
        answer_text: the text of the first closed answer block as it stands; None when there is no such block.
        words: the distinct words of that block, lower-case and trimmed, in order; empty when there is no such block.
        format_reward: 1.0 when the text is well formed (`is_well_formed`), or where that is enough, when it begins with
            a think block and an answer block; else 0.0.
    """

    reasoning: str | None
    answer_text: str | None
    words: tuple[str, ...]
    format_reward: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model says about a clip.

    Attributes:
        mode: slow (after reasoning) or fast (at once); of a gated answer the one that was taken.
        reasoning: what stands in the think block; None where there is none, or, in `Model.answer`, nothing in it.
        words: the emotion words, lower-case, in the order of the answer; empty where it cannot be read.
        probabilities: word -> probability of its categories where it is said, mean over the wheels, in [0, 1]; a word
            that is on no wheel has none.
        categories: word -> its category on each of the five wheels, None where it has none.
        truncated: the answer was cut at the length cap.
        text: everything that was generated, the empty think block of a fast answer included.
        why: of a gated answer, why this mode was taken; else "".
        wheel_probabilities: word -> those that `probabilities` is the mean of, None on a wheel without the word; a word
            that is on no wheel has none.
    """

    mode: str
    reasoning: str | None
    words: tuple[str, ...]
    probabilities: Mapping[str, float]
    categories: Mapping[str, tuple[str | None, ...]]
    truncated: bool
    text: str
    why: str = ""
    wheel_probabilities: Mapping[str, tuple[float | None, ...]] = dataclasses.field(default_factory=dict)


def format_answer(reasoning: str, answer: str) -> str:
    """The text of an answer with these two blocks."""
    return f"{THINK_OPEN}{reasoning}{BRIDGE}{answer}{ANSWER_CLOSE}"


def blocks_of(text: str) -> tuple[str, str] | None:
    """The two blocks as they stand, where they and white space are all of the text; else None."""
    found = _BLOCKS.fullmatch(text)
    return (found[1], found[2]) if found else None


def is_answer_tag(token: str) -> bool:
    """Whether a token is one or several of the tags and white space, as cold-started models add them."""
    return _ONLY_TAGS.fullmatch(token) is not None


def outside_think(text: str) -> str:
    """What is left of a text without its think blocks, closed or not, and without tags."""
    text = _THINK_BLOCK.sub(" ", text)
    for tag in TAGS:
        text = text.replace(tag, " ")
    return text


def parse_answer(text: str, *, untagged: bool = False, lenient: bool = False) -> ParsedAnswer:
    """Reads the text of one completion, without the token that ends the turn.

    Words are read from the first closed answer block whatever the format. A fast answer, parsed together with the empty
    think block it was prefilled with, has format reward 0: its reasoning is empty.

    Args:
        text: of the completion.
        untagged: where there is no closed answer block, the whole text is split into words, which are otherwise none.
        lenient: the format asks only for a think block at the very beginning and an answer block after it: text behind
            them, empty and repeated blocks pass.
    """
    reasoning = _first_block(text, THINK_OPEN, THINK_CLOSE)
    answer = _first_block(text, ANSWER_OPEN, ANSWER_CLOSE)
    words = distinct_words(split_words(text if answer is None and untagged else answer))
    formed = _BEGINNING.match(text) is not None if lenient else is_well_formed(text)
    return ParsedAnswer(reasoning if reasoning is None else reasoning.strip(), answer, words, float(formed))


def _first_block(text: str, opening: str, closing: str) -> str | None:
    start = text.find(opening)
    end = text.find(closing, start + len(opening)) if start >= 0 else -1
    return text[start + len(opening) : end] if end >= 0 else None


def is_well_formed(text: str) -> bool:
    """Whether a text is one think block and one answer block, neither empty, with white space alone around them."""
    once = all(text.count(tag) == 1 for tag in (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE))
    blocks = blocks_of(text) if once else None
    return blocks is not None and all(block.strip() for block in blocks)


def split_words(answer: str | Sequence[str] | None) -> list[str]:
    """The official splitter. A list passes unchanged; None, NaN (an empty csv cell) and "" give no words.

    One leading "[" and one trailing "]" go; quotes and ASCII commas separate; words are trimmed but keep their case. On
    a lone "[" the official code raises IndexError (it looks for the "]" in an empty string); here it gives no words.

    Raises:
        TypeError: `answer` is neither text, a list of texts, nor missing.
    """
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        return []
    if isinstance(answer, (list, tuple)) and all(isinstance(word, str) for word in answer):
        return list(answer)
    if not isinstance(answer, str):
        raise TypeError(f"got {cut(answer)}; expected text with words between commas, or a list of words")
    answer = answer.removeprefix("[").removesuffix("]")
    return [word.strip() for word in re.split("['\",]", answer) if word.strip()]


def split_label(text: str, joined: bool = True) -> list[str]:
    """The emotion words of a label, in whatever form it was written down.

    The official splitter's brackets, quotes and commas, and besides: separators of other scripts and full width, `;`,
    `/`, `|` and line breaks; quotes with nothing but white space between them, as NumPy prints lists; numbers, letters
    or dashes before the words; quotes, brackets and stops around them; "and" and its like between them. An apostrophe
    inside a word stays, and so does every word: what is on no wheel is for the caller to count.

    Args:
        text: the label.
        joined: whether "angry and sad" are two words.
    """
    # NFKC makes full-width letters and punctuation plain; format characters (zero width, direction) are never meant.
    plain = unicodedata.normalize("NFKC", re.sub("[\u2460-\u2473\u3000]", ",", text))  # circled numbers, wide blank
    plain = "".join(character for character in plain if unicodedata.category(character) != "Cf")
    plain = _HEADING.sub("", plain.strip(_AROUND))
    pieces = _LABEL_SEPARATOR.split(_QUOTES_APART.sub(",", _NUMBERED.sub(",", plain)))
    words = [word for word in (_bare(piece) for piece in pieces) if word]
    words = [re.sub(r"^(?:and|or|&)\s+", "", word) for word in words] if len(words) > 1 else words
    return [one for word in words for one in _JOINING.split(word) if one] if joined else words


def _bare(piece: str) -> str:
    """A word without what stands around it; a bracket stays where its partner is inside the word."""
    word = piece.strip()
    while word:
        shorter = word.strip(_QUOTES + " \t-*•·").rstrip(_STOPS)
        for opening, closing in _BRACKETS:
            if closing not in shorter[1:]:
                shorter = shorter.removeprefix(opening)
            if opening not in shorter[:-1]:
                shorter = shorter.removesuffix(closing)
            if shorter.startswith(opening) and shorter.endswith(closing):
                shorter = shorter[1:-1]
        if shorter == word:
            break
        word = shorter
    return word


def distinct_words(words: Iterable[str]) -> tuple[str, ...]:
    """Lower-case, trimmed words without repeats and blanks, in order."""
    lowered = (word.lower().strip() for word in words)
    return tuple(dict.fromkeys(word for word in lowered if word))


def clean_extractor_text(text: str) -> str:
    """The official clean-up of what the word-extracting LLM wrote, applied before `split_words`.

    Quirks: the prefixes are tested once each and in order, so "Inputoutput: x" keeps "output"; newlines are deleted
    rather than replaced, so two words on two lines grow together.
    """
    text = text.strip()
    for prefix in _EXTRACTOR_PREFIXES:
        text = text.removeprefix(prefix)
    text = text.strip().removeprefix(":").removeprefix("：").strip()
    return text.replace("\n", "").strip()
