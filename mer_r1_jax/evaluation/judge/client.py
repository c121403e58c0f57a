"""A judge behind any OpenAI-compatible chat endpoint: cached, retried, bounded in requests, time and tokens.

The key comes from the environment when a request is sent and is kept nowhere. What the judge writes is text: it is
never run, and whoever asked has to check it.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tenacity

from mer_r1_jax.data.threads import map_ordered
from mer_r1_jax.evaluation.judge.answer_cache import AnswerCache, question_key
from mer_r1_jax.evaluation.judge.endpoint import Endpoint, JudgeAbortedError, JudgeError, Reply, TransientError

__all__ = ["ChatClient", "JudgeAbortedError", "JudgeError", "Message", "image_part", "text_part"]

Message = dict[str, Any]  # {"role": ..., "content": text or list of parts}, as the chat endpoint takes it

LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the endpoint asks for
_MEANT_WAIT = 86_400.0  # seconds; an endpoint that asks for more says nothing
FEWEST_QUESTIONS = 10  # the failed fraction is one of at least so many questions
_CHARACTERS_PER_TOKEN = 3  # on the safe side, for endpoints that do not count


@dataclasses.dataclass
class Tally:
    """What became of the questions of one client.

    Attributes:
        requests: HTTP requests sent, retries included.
        replies: of these, those that brought a chat completion.
        answered: questions with an answer, those of the cache included.
        cached: of these, those of the cache.
        failed: reason -> questions without an answer.
        tokens: spent, as the endpoint counts them, or estimated where it does not.
        seconds: the replies took, without waits between attempts.
    """

    requests: int = 0
    replies: int = 0
    answered: int = 0
    cached: int = 0
    failed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    tokens: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(eq=False, kw_only=True, repr=False)
class ChatClient:
    """Asks a chat model. Safe to use from several threads.

    Args:
        base_url: of the endpoint, such as https://host/v1.
        model: the judge's name there.
        api_key_env: environment variable that holds the key; unset for a server that wants none.
        cache_dir: folder of answers, keyed by model, prompt version and input.
        concurrency: questions at once.
        timeout: seconds one request may take.
        max_retries: further attempts at a question when one fails in a way that may pass.
        max_failed_frac: share of the questions that may stay without an answer before the rest is not asked either.
        token_budget: tokens this client may spend; 0 = no limit.
        backoff: seconds before the first retry; the wait doubles each time, with jitter. A Retry-After goes first.
        max_tokens_field: what the endpoint calls the answer's token limit; newer models of OpenAI's want
            max_completion_tokens.

    Raises:
        JudgeAbortedError: settings that cannot be used.
    """

    base_url: str
    model: str
    cache_dir: str | Path
    api_key_env: str = "JUDGE_API_KEY"
    concurrency: int = 4
    timeout: float = 60.0
    max_retries: int = 5
    max_failed_frac: float = 0.1
    token_budget: int = 0
    backoff: float = 1.0
    max_tokens_field: str = "max_tokens"

    def __post_init__(self):
        _check(model=self.model, concurrency=self.concurrency, timeout=self.timeout, max_retries=self.max_retries)
        self.tally = Tally()
        self._endpoint = Endpoint(self.base_url, self.api_key_env, self.concurrency, self.timeout)
        self._cache = AnswerCache(Path(self.cache_dir))
        self._stopped = threading.Event()
        self._aborted: JudgeAbortedError | None = None  # the first reason, which the others are told too
        self._lock = threading.Lock()
        self._in_work: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)

    def ask(
        self, messages: Sequence[Message], *, prompt_version: str, max_tokens: int, temperature: float = 0.0
    ) -> str:
        """The judge's answer to one conversation.

        Args:
            messages: of the conversation.
            prompt_version: of the text they were made from; a new version is a new question.
            max_tokens: the answer may have.
            temperature: of sampling.

        Raises:
            JudgeError: this question has no answer.
            JudgeAbortedError: none will have: too many failed, the budget is spent, the key is refused.
        """
        request = {"messages": list(messages), "max_tokens": max_tokens, "temperature": temperature}
        key = question_key(self.model, prompt_version, request)
        with self._lock:
            in_work = self._in_work[key]
        with in_work:  # the same question from two threads is asked once
            try:
                entry = self._cache.get(key)
                if entry is not None:
                    with self._lock:
                        self.tally.cached += 1
                else:
                    entry = self._fetch(key, prompt_version, request)
                answer = _accepted(entry, max_tokens)
            except JudgeError as error:
                self._fail(error)
                raise
            except JudgeAbortedError as error:
                self._abort(error)
                raise
        with self._lock:
            self.tally.answered += 1
        return answer

    def ask_many(
        self,
        list_of_messages: Sequence[Sequence[Message]],
        *,
        prompt_version: str,
        max_tokens: int,
        temperature: float = 0.0,
    ) -> list[str | JudgeError]:
        """Answers, or the reason why there is none, in the order of the questions; arguments as `ask`.

        Raises:
            JudgeAbortedError: as `ask`. Answers there were are in the cache: asking again goes on from there.
        """

        def one(messages: Sequence[Message]) -> str | JudgeError:
            try:
                return self.ask(messages, prompt_version=prompt_version, max_tokens=max_tokens, temperature=temperature)
            except JudgeError as error:
                return error

        return [answer for _, answer in map_ordered(one, list_of_messages, self.concurrency, self.stop)]

    def reject(self, error: JudgeError) -> None:
        """Counts the last answer to a question as failed after all: it says nothing that can be used.

        Raises:
            JudgeAbortedError: too many failed.
        """
        with self._lock:
            self.tally.answered -= 1
        self._fail(error)

    def credit(self, answered: int) -> None:
        """Counts questions that an earlier run has had answered, so that the failed fraction is of all of them."""
        with self._lock:
            self.tally.answered += answered
            self.tally.cached += answered

    def metrics(self) -> dict[str, float]:
        """`judge/latency` (mean seconds of a request that brought a reply), `judge/failed_frac`, and counts."""
        with self._lock:
            tally = self.tally
            failed = sum(tally.failed.values())
            return {
                "judge/latency": tally.seconds / max(1, tally.replies),
                "judge/failed_frac": failed / max(1, tally.answered + failed),
                "judge/requests": float(tally.requests),
                "judge/cached": float(tally.cached),
                "judge/tokens": float(tally.tokens),
            } | {f"judge/failed/{reason}": float(count) for reason, count in sorted(tally.failed.items())}

    def stop(self) -> None:
        """Lets questions that wait for another attempt give up; no further one is asked."""
        self._abort(JudgeAbortedError("the judge was stopped; what was answered is kept"))

    def close(self) -> None:
        """Stops and closes the connections."""
        self.stop()
        self._endpoint.close()

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _fetch(self, key: str, prompt_version: str, request: dict[str, Any]) -> dict[str, Any]:
        """Asks the endpoint, with retries, and keeps the answer."""
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(1 + self.max_retries),
            wait=self._wait,
            retry=tenacity.retry_if_exception_type(TransientError),
            sleep=tenacity.sleep_using_event(self._stopped),
            reraise=True,
        )
        body = {"model": self.model, "messages": request["messages"], "temperature": request["temperature"]}
        body[self.max_tokens_field] = request["max_tokens"]
        try:
            reply = retrying(self._attempt, body)
        except TransientError as error:
            attempts = retrying.statistics["attempt_number"]
            raise JudgeError(error.reason, f"{error} ({attempts} attempts)") from None
        entry = {
            "model": self.model,
            "prompt_version": prompt_version,
            "answer": reply.text,
            "finish_reason": reply.finish_reason,
            "tokens": reply.tokens,
        }
        self._cache.put(key, entry)
        return entry

    def _attempt(self, body: dict[str, Any]) -> Reply:
        with self._lock:
            if self._aborted is not None:
                raise JudgeAbortedError(str(self._aborted))
            if 0 < self.token_budget <= self.tally.tokens:
                raise JudgeAbortedError(
                    f"the judge's token budget is spent: {self.tally.tokens} of {self.token_budget} tokens; what was "
                    "answered is kept, a larger budget goes on from there"
                )
            self.tally.requests += 1
        start = time.monotonic()
        reply = self._endpoint.post(body)
        tokens = reply.tokens
        if tokens is None:
            tokens = (_text_length(body["messages"]) + len(reply.text)) // _CHARACTERS_PER_TOKEN
        with self._lock:
            self.tally.replies += 1
            self.tally.tokens += tokens
            self.tally.seconds += time.monotonic() - start
        return reply

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome and state.outcome.exception()
        assert isinstance(error, TransientError)  # no other is tried again
        asked = error.retry_after
        grown = tenacity.wait_exponential_jitter(initial=self.backoff, max=LONGEST_WAIT, jitter=self.backoff)(state)
        return grown if asked is None or asked > _MEANT_WAIT else min(max(asked, 0.0), LONGEST_WAIT)

    def _fail(self, error: JudgeError) -> None:
        """Counts a failure, and aborts when there are too many."""
        with self._lock:
            self.tally.failed[error.reason] += 1
            failed = sum(self.tally.failed.values())
            asked = self.tally.answered + failed
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.tally.failed.most_common())
        if failed > self.max_failed_frac * max(asked, FEWEST_QUESTIONS):
            aborted = JudgeAbortedError(
                f"{failed} of {asked} questions have no answer of the judge ({reasons}), more than "
                f"max_failed_frac = {self.max_failed_frac:g} allows; the last: {error}. What was answered is kept: the "
                "same command goes on from there"
            )
            self._abort(aborted)
            raise aborted from error

    def _abort(self, error: JudgeAbortedError) -> None:
        with self._lock:
            self._aborted = self._aborted or error
        self._stopped.set()


def text_part(text: str) -> dict[str, Any]:
    """Text beside images in one message."""
    return {"type": "text", "text": text}


def image_part(jpeg: bytes) -> dict[str, Any]:
    """A JPEG picture inside a message, as a data URL."""
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
    return {"type": "image_url", "image_url": {"url": url}}


def _accepted(entry: dict[str, Any], max_tokens: int) -> str:
    """The answer of an entry. What was cut or withheld would be so again, so it is kept, and refused each time."""
    if entry.get("finish_reason") == "length":
        raise JudgeError("truncated", f"the judge's answer was cut at max_tokens = {max_tokens}")
    if entry.get("finish_reason") == "content_filter":
        raise JudgeError("filtered", "the endpoint's content filter withheld the answer")
    if not entry["answer"].strip():
        raise JudgeError("no_text", "the judge answered without any text")
    return entry["answer"]


def _text_length(messages: Sequence[Message]) -> int:
    """Characters of text; pictures are not counted."""
    contents = [message["content"] for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    texts = [content for content in contents if isinstance(content, str)] + [part.get("text", "") for part in parts]
    return sum(map(len, texts))


def _check(*, model: str, concurrency: int, timeout: float, max_retries: int) -> None:
    problems = []
    if not model:
        problems.append("model is empty, expected the judge's name at the endpoint")
    if concurrency < 1:
        problems.append(f"concurrency is {concurrency}, expected at least 1")
    if not timeout > 0:
        problems.append(f"timeout is {timeout}, expected seconds above 0")
    if max_retries < 0:
        problems.append(f"max_retries is {max_retries}, expected 0 or more")
    if problems:
        raise JudgeAbortedError("the judge cannot be used: " + "; ".join(problems))
