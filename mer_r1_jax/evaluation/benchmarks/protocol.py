"""How an answer becomes words, and words a polarity. Scores of different protocols are not comparable.

Words: `answer` takes what stands in the answer tag, by the official splitter (ours, the default); `extractor` has an
LLM read the answer, as the official pipeline does with another prompt and model. Polarity: `wheels` is an offline rule
over the wheels (ours, the default); `extractor` asks the LLM.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mer_r1_jax.emotion.answer_form import clean_extractor_text, distinct_words, outside_think, split_words
from mer_r1_jax.emotion.metrics import SENTIMENTS
from mer_r1_jax.emotion.polarity import polarity
from mer_r1_jax.emotion.wheels import Wheels
from mer_r1_jax.evaluation.benchmarks import prompts
from mer_r1_jax.evaluation.benchmarks.errors import BenchmarkError
from mer_r1_jax.evaluation.benchmarks.sets import WAF

WORDS_CHOICES = ("answer", "extractor")
POLARITY_CHOICES = ("wheels", "extractor")
OFFICIAL_WHEELS = {  # digests of the published folder (zeroQiaoba/AffectGPT, emotion_wheel/), both variants
    "cb97b0735bb7123d6560a08c9a0f2713ba5dc963b809af5fcbdb083cae489f99": "official",
    "2c0274d52114a2d40dcc7d6652478debc8d336ff49b87aa4658d320823d24e81": "official",
}


class Extractor(Protocol):
    """A chat client as `evaluation.judge.client.ChatClient`."""

    model: str

    def ask_many(
        self, list_of_messages: Sequence[list[dict[str, str]]], *, prompt_version: str, max_tokens: int
    ) -> list[str | Exception]:
        """A reply, or the reason why there is none, for each chat."""


@dataclasses.dataclass(frozen=True)
class Scoring:
    """A protocol: everything besides answers and truths that a score follows from.

    Attributes:
        words: answer | extractor.
        polarity: wheels | extractor.
        wheels: how the wheels are called, and the hash of their content.
        variant: of the wheels: unibench | mer2026.
        extractor: the LLM's name; "" where none is used.
    """

    words: str
    polarity: str
    wheels: str
    variant: str
    extractor: str = ""

    @property
    def key(self) -> str:
        """Short and stable, for file names."""
        text = json.dumps([dataclasses.asdict(self), self._versions()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def describe(self) -> str:
        """For the head of a column."""
        words = "words: answer tag" if self.words == "answer" else f"words: {self.extractor} ({prompts.WORDS_VERSION})"
        rule = (
            "polarity: rule over the wheels"
            if self.polarity == "wheels"
            else f"polarity: {self.extractor} ({prompts.POLARITY_VERSION})"
        )
        return f"{words}; {rule}; wheels: {self.wheels}, variant {self.variant}"

    def as_json(self) -> dict[str, Any]:
        """The protocol with its key and description."""
        return dataclasses.asdict(self) | self._versions() | {"key": self.key, "description": self.describe()}

    def _versions(self) -> dict[str, str]:
        versions = {}
        if self.words == "extractor":
            versions["words_prompt"] = prompts.WORDS_VERSION
        if self.polarity == "extractor":
            versions["polarity_prompt"] = prompts.POLARITY_VERSION
        return versions


@dataclasses.dataclass(frozen=True)
class Extracted:
    """What a protocol made of answers, in their order.

    Attributes:
        words: of each answer; None where the extractor failed.
        polarities: of each answer, for waf; None where the extractor failed, () for other metrics.
        failures: reason -> how often the extractor gave nothing.
    """

    words: tuple[tuple[str, ...] | None, ...]
    polarities: tuple[str | None, ...]
    failures: dict[str, int]


def make_scoring(
    words: str, polarity_rule: str, wheels: Wheels, wheel_dir: str, extractor: Extractor | None
) -> Scoring:
    """The protocol of these choices.

    Raises:
        BenchmarkError: an unknown choice, or an extractor that is needed and not there.
    """
    for flag, choice, choices in (("words", words, WORDS_CHOICES), ("polarity", polarity_rule, POLARITY_CHOICES)):
        if choice not in choices:
            raise BenchmarkError(f"--{flag}: got {choice!r}, expected one of {', '.join(choices)}")
    if extractor is None and "extractor" in (words, polarity_rule):
        raise BenchmarkError(
            "an extractor is asked for, but none is named: give --extractor_url and --extractor_model, any "
            "OpenAI-compatible chat endpoint; or use --words=answer --polarity=wheels, which need none"
        )
    digest = wheels_digest(wheels)
    name = OFFICIAL_WHEELS.get(digest, "of a given folder" if wheel_dir else "shipped")
    used = extractor.model if extractor is not None and "extractor" in (words, polarity_rule) else ""
    return Scoring(words, polarity_rule, f"{name} ({digest[:8]})", wheels.variant, used)


def wheels_digest(wheels: Wheels) -> str:
    """SHA-256 of what the wheels say: two folders with equal content are the same wheels."""
    content = [wheels.variant, [[sorted(wheel.items()) for wheel in level] for level in wheels.levels], wheels.cores]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def extract(
    lines: Sequence[Mapping[str, Any]], metric: str, scoring: Scoring, wheels: Wheels, extractor: Extractor | None
) -> Extracted:
    """Words, and for waf the polarity, of answers.

    Args:
        lines: of an answer file.
        metric: set_f1 | hit | waf.
        scoring: the protocol.
        wheels: for the rule.
        extractor: the LLM, where the protocol uses one.
    """
    failures: dict[str, int] = {}
    if scoring.words == "answer":
        words = [tuple(line["words"]) for line in lines]
    else:
        texts = [_described(line) for line in lines]
        replies = _replies(extractor, texts, prompts.words_messages, prompts.WORDS_VERSION, prompts.WORDS_MAX_TOKENS)
        words = [
            _read(reply, _extracted_words, failures) if text else () for text, reply in zip(texts, replies, strict=True)
        ]
    if metric != WAF:
        return Extracted(tuple(words), (), failures)
    if scoring.polarity == "wheels":
        return Extracted(tuple(words), tuple(None if w is None else polarity(w, wheels) for w in words), failures)
    asked = [w or () for w in words]
    replies = _replies(
        extractor, asked, prompts.polarity_messages, prompts.POLARITY_VERSION, prompts.POLARITY_MAX_TOKENS
    )
    polarities = [
        None if w is None else "neutral" if not w else _read(reply, _sentiment, failures)
        for w, reply in zip(words, replies, strict=True)
    ]
    return Extracted(tuple(words), tuple(polarities), failures)


def _described(line: Mapping[str, Any]) -> str:
    """What the extractor reads: the answer block, or without one the text outside the think block."""
    answer = line["answer"] if line["answer"] is not None else outside_think(line["text"])
    return answer.strip()


def _replies(extractor, inputs: Sequence[Any], messages, version: str, max_tokens: int) -> list[Any]:
    """A reply for each input, each distinct one asked once; None for an empty input, which is not asked."""
    distinct = list(dict.fromkeys(value for value in inputs if value))
    answers = (
        extractor.ask_many([messages(value) for value in distinct], prompt_version=version, max_tokens=max_tokens)
        if distinct
        else []
    )
    of = dict(zip(distinct, answers, strict=True))
    return [of.get(value) for value in inputs]


def _read(reply: str | Exception, read, failures: dict[str, int]) -> Any:
    if isinstance(reply, Exception):
        reason = str(getattr(reply, "reason", type(reply).__name__))
        failures[reason] = failures.get(reason, 0) + 1
        return None
    return read(reply)


def _extracted_words(reply: str) -> tuple[str, ...]:
    return distinct_words(split_words(clean_extractor_text(reply)))


def _sentiment(reply: str) -> str:
    """The official rule: anything but exactly one of the three words counts as neutral."""
    return reply.strip() if reply.strip() in SENTIMENTS else "neutral"
