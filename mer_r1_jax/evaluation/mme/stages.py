"""The stages between items and scores: a response, its steps, their ratings. Each goes on where it was interrupted.

What extractor and judge wrote is read tolerant of form and strict about counts: what cannot be read for certain is
refused, never guessed at, and asked again or counted as a failure.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any
from typing import Protocol as Interface

from mer_r1_jax.data.threads import map_ordered
from mer_r1_jax.evaluation.clip_frames import Pictures
from mer_r1_jax.evaluation.judge.client import ChatClient, JudgeError, Message
from mer_r1_jax.evaluation.mme import judging
from mer_r1_jax.evaluation.mme.judging import MAX_STEPS, digest_of
from mer_r1_jax.evaluation.mme.mme_reader import Benchmark, Item
from mer_r1_jax.evaluation.mme.mme_tasks import TASKS
from mer_r1_jax.evaluation.result_log import FAILED, ResultLog
from mer_r1_jax.media.opening import MediaError

_STEPS_BLOCK = re.compile(r"<steps?>(.*?)</steps?>", re.DOTALL | re.IGNORECASE)
_SCORE_BLOCK = re.compile(r"<scores?>(.*?)</scores?>", re.DOTALL | re.IGNORECASE)
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_LONGEST = 50_000  # characters of a reply; the patterns take quadratic time on some
_STEP = re.compile(r"\bstep\s*#?\s*(\d{1,3})\b[\s*_]*[:.)\-–—=][\s*_]*", re.IGNORECASE)
_RATING = re.compile(
    r"\bstep\s*#?\s*(\d{1,3})\b[\s*_]*[:.)\-–—=]+[\s*_`]*(\d{1,3})(?:\s*/\s*(\d{1,3}))?(?!\d|[./]\s*\d)", re.IGNORECASE
)


class UnreadableReplyError(ValueError):
    """A reply that does not say what was asked for; the message says what it lacks, for the one who wrote it."""


def parse_steps(reply: str) -> list[str]:
    """Steps, at least one, in order; numbering must run from 1 without gaps.

    Raises:
        UnreadableReplyError: no steps, an empty one, too many, or numbers out of order.
    """
    text = _block(reply, _STEPS_BLOCK, "<steps>")
    marks = list(_STEP.finditer(text))
    if not marks:
        raise UnreadableReplyError('it has no line that begins with "Step 1:"')
    _check_numbers([int(mark.group(1)) for mark in marks])
    if len(marks) > MAX_STEPS:
        raise UnreadableReplyError(f"it has {len(marks)} steps, expected at most {MAX_STEPS}")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    steps = [" ".join(text[mark.end() : end].split()).strip("*_ ") for mark, end in zip(marks, ends, strict=True)]
    if not all(steps):
        raise UnreadableReplyError(f"step {steps.index('') + 1} is empty")
    return steps


def parse_scores(reply: str, steps: int, labels: int = 1) -> list[Fraction]:
    """One rating for each step: 0 or 1, and hits / labels for the last.

    Args:
        reply: what the judge wrote.
        steps: it was given.
        labels: the item has; the last rating's denominator.

    Raises:
        UnreadableReplyError: another number of ratings, or one that cannot be.
    """
    text = _block(reply, _SCORE_BLOCK, "<score>")
    found = list(_RATING.finditer(text))
    if len(found) != steps:
        raise UnreadableReplyError(f"it has {len(found)} ratings, expected {steps}, one for each step")
    _check_numbers([int(match.group(1)) for match in found])
    return [
        _rating(number, match.group(2), match.group(3), labels if number == steps else 1)
        for number, match in enumerate(found, start=1)
    ]


def _rating(number: int, hits: str, total: str | None, labels: int) -> Fraction:
    given = f"{hits}/{total}" if total else hits
    if total is None and labels > 1:
        raise UnreadableReplyError(f"the rating of step {number} is {given}, expected the number of hits/{labels}")
    if total is not None and int(total) != labels or int(hits) > labels:
        expected = (
            " or ".join(f"{count}/{labels}" for count in range(labels + 1))
            if labels < 3
            else f"0/{labels} to {labels}/{labels}"
        )
        raise UnreadableReplyError(f"the rating of step {number} is {given}, expected {expected}")
    return Fraction(int(hits), labels)


def _block(reply: str, pattern: re.Pattern[str], tag: str) -> str:
    """What stands in the one block of a reply; all of it where there is no tag. Thoughts before it do not count."""
    if len(reply) > _LONGEST:
        raise UnreadableReplyError(f"it has {len(reply)} characters, expected at most {_LONGEST}")
    reply = _THOUGHTS.sub("", reply, count=1)
    blocks = list(dict.fromkeys(block.strip() for block in pattern.findall(reply)))
    if len(blocks) > 1:
        raise UnreadableReplyError(f"it has {len(blocks)} blocks in {tag}, expected one")
    return blocks[0] if blocks else reply


def _check_numbers(numbers: list[int]) -> None:
    if numbers != list(range(1, len(numbers) + 1)):
        shown = ", ".join(map(str, numbers[:30]))
        raise UnreadableReplyError(f"its steps are numbered {shown}, expected 1 to {len(numbers)} in order")


UNREADABLE = "unreadable"  # why a question failed: no reply could be read
Progress = Callable[[str, int, int], None]  # stage, results there, results in all


@dataclasses.dataclass(frozen=True)
class Asked:
    """One item in one mode.

    Attributes:
        item: the question.
        mode: slow | fast, or response where the answers were made elsewhere.
    """

    item: Item
    mode: str

    @property
    def key(self) -> str:
        """Unique in a log."""
        return f"{self.mode}/{self.item.key}"


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why there is no result: a short slug for counting, and the whole story."""

    reason: str
    message: str


@dataclasses.dataclass(frozen=True)
class Asking:
    """How an LLM is asked.

    Attributes:
        client: of the LLM.
        reasks: further attempts at a reply that cannot be read.
        progress: called after every result.
    """

    client: ChatClient
    reasks: int
    progress: Progress


class Predictor(Interface):
    """Whoever answers the questions.

    Attributes:
        modes: in which each item is answered.
        fingerprint: what the answers follow from, as JSON values.
    """

    modes: tuple[str, ...]
    fingerprint: Mapping[str, Any]

    def answers(self, asked: Sequence[Asked]) -> Iterator[tuple[Asked, Mapping[str, Any] | Failure]]:
        """An answer with its `text`, or why there is none, for each, in any order."""
        ...


def asked_of(benchmark: Benchmark, modes: Iterable[str]) -> list[Asked]:
    """Every item in every mode."""
    modes = tuple(modes)
    return [Asked(item, mode) for item in benchmark.items for mode in modes]


def predict(log: ResultLog, asked: Sequence[Asked], predictor: Predictor, progress: Progress) -> None:
    """Answers what has no answer yet."""
    lacking = [one for one in asked if not log.done(one.key)]
    done = len(asked) - len(lacking)
    progress("predict", done, len(asked))
    for one, answer in predictor.answers(lacking):
        _note(log, one.key, answer)
        done += 1
        progress("predict", done, len(asked))


def extract(log: ResultLog, predictions: ResultLog, asked: Sequence[Asked], asking: Asking) -> None:
    """Turns answers into steps."""

    def made_from(one: Asked) -> str:
        return digest_of(predictions.rows[one.key]["text"])

    def work(one: Asked) -> Mapping[str, Any] | Failure:
        messages = judging.steps_messages(TASKS[one.item.task], predictions.rows[one.key]["text"])
        question = _Question(asking, judging.STEPS_VERSION, judging.STEPS_MAX_TOKENS)
        steps = question.read(messages, parse_steps)
        if isinstance(steps, Failure):
            return steps
        return {"steps": steps, "of": made_from(one), "asks": question.asks}

    answered = [one for one in asked if predictions.done(one.key)]
    _fill(log, "steps", answered, made_from, work, asking)


def judge(
    log: ResultLog,
    steps: ResultLog,
    benchmark: Benchmark,
    asked: Sequence[Asked],
    asking: Asking,
    pictures: Pictures | None,
) -> None:
    """Rates steps; `pictures` None shows the judge no frames."""

    def made_from(one: Asked) -> str:
        return digest_of(steps.rows[one.key]["steps"], one.item.labels, one.item.audio_clue)

    def work(one: Asked) -> Mapping[str, Any] | Failure:
        found, item = steps.rows[one.key]["steps"], one.item
        frames: list[bytes] = []
        if pictures is not None:
            if item.video is None:
                return Failure("clip_missing", f"{item.video_id}: the clip is not there, so the judge cannot see it")
            try:
                frames = pictures.of(benchmark.root / item.video, benchmark.root)
            except MediaError as error:
                return Failure(f"clip_{error.reason}", str(error))
        messages = judging.judge_messages(TASKS[item.task], item.labels, item.audio_clue, found, frames)
        question = _Question(asking, judging.JUDGE_VERSION, judging.JUDGE_MAX_TOKENS)
        scores = question.read(messages, lambda reply: parse_scores(reply, len(found), len(item.labels)))
        if isinstance(scores, Failure):
            return scores
        shown = [f"{score.numerator}/{score.denominator}" for score in scores]
        return {"scores": shown, "of": made_from(one), "asks": question.asks, "frames": len(frames)}

    split = [one for one in asked if steps.done(one.key)]
    _fill(log, "judge", split, made_from, work, asking)


def _fill(
    log: ResultLog,
    stage: str,
    asked: Sequence[Asked],
    made_from: Callable[[Asked], str],
    work: Callable[[Asked], Mapping[str, Any] | Failure],
    asking: Asking,
) -> None:
    """Works on what has no result yet, or one made from something else."""
    lacking = [one for one in asked if not (log.done(one.key) and log.rows[one.key]["of"] == made_from(one))]
    done = len(asked) - len(lacking)
    client, progress = asking.client, asking.progress
    client.credit(done)
    progress(stage, done, len(asked))
    waiting = lambda: progress(stage, done, len(asked))  # noqa: E731 - which also asks whether to stop
    for one, result in map_ordered(work, lacking, client.concurrency, client.stop, waiting):
        _note(log, one.key, result)
        done += 1
        progress(stage, done, len(asked))


def _note(log: ResultLog, key: str, result: Mapping[str, Any] | Failure) -> None:
    """Writes down a result, or why there is none. Lone surrogates become "?": no judge and no report can take them."""
    if isinstance(result, Failure):
        result = {FAILED: result.reason, "message": result.message}
    row = json.dumps({"key": key, **result}, ensure_ascii=False).encode("utf-8", "replace")
    log.append([json.loads(row)])


class _Question:
    """One question, asked again where the reply cannot be read.

    Attributes:
        asks: replies it took.
    """

    def __init__(self, asking: Asking, version: str, max_tokens: int):
        self.client, self.version, self.max_tokens, self.reasks = asking.client, version, max_tokens, asking.reasks
        self.asks = 0

    def read(self, messages: list[Message], parse: Callable[[str], Any]) -> Any:
        """What the reply says, or a Failure. What was wrong with a reply is told; the replies stay in the cache."""
        asked, problem = messages, ""
        for _ in range(1 + self.reasks):
            try:
                reply = self.client.ask(asked, prompt_version=self.version, max_tokens=self.max_tokens)
            except JudgeError as error:
                return Failure(error.reason, str(error))
            self.asks += 1
            try:
                return parse(reply)
            except UnreadableReplyError as error:
                problem = str(error)
                asked = judging.again_messages(messages, reply, problem, self.asks + 1)
        failure = Failure(UNREADABLE, f"no reply of {self.client.model} can be read; the last: {problem}")
        self.client.reject(JudgeError(failure.reason, failure.message))
        return failure
