"""The stages between items and scores: a response, its steps, their ratings. Each goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from typing import Protocol as Interface

from mer_r1_jax.data.threads import map_ordered
from mer_r1_jax.evaluation.judge.client import ChatClient, JudgeError, Message
from mer_r1_jax.evaluation.mme import prompts
from mer_r1_jax.evaluation.mme.parse import UnreadableReplyError, parse_scores, parse_steps
from mer_r1_jax.evaluation.mme.pictures import Pictures
from mer_r1_jax.evaluation.mme.protocol import digest_of
from mer_r1_jax.evaluation.mme.reader import Benchmark, Item
from mer_r1_jax.evaluation.mme.tasks import TASKS
from mer_r1_jax.evaluation.result_log import FAILED, ResultLog
from mer_r1_jax.media.errors import MediaError

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


def extract(
    log: ResultLog, predictions: ResultLog, asked: Sequence[Asked], client: ChatClient, reasks: int, progress: Progress
) -> None:
    """Turns answers into steps."""

    def made_from(one: Asked) -> str:
        return digest_of(predictions.rows[one.key]["text"])

    def work(one: Asked) -> Mapping[str, Any] | Failure:
        messages = prompts.steps_messages(TASKS[one.item.task], predictions.rows[one.key]["text"])
        asking = _Asking(client, prompts.STEPS_VERSION, prompts.STEPS_MAX_TOKENS, reasks)
        steps = asking.read(messages, parse_steps)
        if isinstance(steps, Failure):
            return steps
        return {"steps": steps, "of": made_from(one), "asks": asking.asks}

    answered = [one for one in asked if predictions.done(one.key)]
    _fill(log, "steps", answered, made_from, work, client, progress)


def judge(
    log: ResultLog,
    steps: ResultLog,
    benchmark: Benchmark,
    asked: Sequence[Asked],
    client: ChatClient,
    reasks: int,
    pictures: Pictures | None,
    progress: Progress,
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
        messages = prompts.judge_messages(TASKS[item.task], item.labels, item.audio_clue, found, frames)
        asking = _Asking(client, prompts.JUDGE_VERSION, prompts.JUDGE_MAX_TOKENS, reasks)
        scores = asking.read(messages, lambda reply: parse_scores(reply, len(found), len(item.labels)))
        if isinstance(scores, Failure):
            return scores
        shown = [f"{score.numerator}/{score.denominator}" for score in scores]
        return {"scores": shown, "of": made_from(one), "asks": asking.asks, "frames": len(frames)}

    split = [one for one in asked if steps.done(one.key)]
    _fill(log, "judge", split, made_from, work, client, progress)


def _fill(
    log: ResultLog,
    stage: str,
    asked: Sequence[Asked],
    made_from: Callable[[Asked], str],
    work: Callable[[Asked], Mapping[str, Any] | Failure],
    client: ChatClient,
    progress: Progress,
) -> None:
    """Works on what has no result yet, or one made from something else."""
    lacking = [one for one in asked if not (log.done(one.key) and log.rows[one.key]["of"] == made_from(one))]
    done = len(asked) - len(lacking)
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


class _Asking:
    """One question, asked again where the reply cannot be read.

    Attributes:
        asks: replies it took.
    """

    def __init__(self, client: ChatClient, version: str, max_tokens: int, reasks: int):
        self.client, self.version, self.max_tokens, self.reasks = client, version, max_tokens, reasks
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
                asked = prompts.again_messages(messages, reply, problem, self.asks + 1)
        failure = Failure(UNREADABLE, f"no reply of {self.client.model} can be read; the last: {problem}")
        self.client.reject(JudgeError(failure.reason, failure.message))
        return failure
