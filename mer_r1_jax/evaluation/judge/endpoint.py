"""One request to an OpenAI-compatible /chat/completions, and every way in which it can go wrong, told apart."""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import json
import logging
import os
from collections.abc import Generator
from typing import Any

import httpx

from mer_r1_jax.evaluation.judge import exchange
from mer_r1_jax.foreign_text import printable


class JudgeError(RuntimeError):
    """One question the judge did not answer, after every allowed retry.

    Attributes:
        reason: a short slug for counting: rate_limited, server_error, timeout, connection, bad_reply, no_text,
            truncated, filtered, refused.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class JudgeAbortedError(RuntimeError):
    """The judge cannot be used as it is, so the rest is not asked either; what was answered is kept in the cache."""


MAX_REPLY_BYTES = 8 << 20  # of an exchange as it is sent, headers included; more is no chat reply
_MOST_TOKENS = 1 << 40  # of one reply; more is no count
_QUOTED = 300  # characters of a reply shown in an error
_TRANSIENT = {408: "timeout", 409: "server_error", 425: "server_error", 429: "rate_limited"}
_USELESS = {  # status -> what to do; the next question would fail alike
    401: "check the key in ${variable}",
    402: "the account has no credit left",
    404: "check the base URL, which ends before /chat/completions, and the model's name",
}


class TransientError(JudgeError):
    """A failure that may pass. `retry_after` is how long the endpoint asked to wait, in seconds, if it did."""

    def __init__(self, reason: str, message: str, retry_after: float | None = None):
        super().__init__(reason, message)
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the model wrote.

    Attributes:
        text: of the first choice; "" when it has none.
        finish_reason: why it ended: "stop", "length", "content_filter", ...
        tokens: of the prompt and the answer together, as the endpoint counts them; None when it does not say.
    """

    text: str
    finish_reason: str
    tokens: int | None


class Endpoint:
    """A chat endpoint. Safe to use from several threads.

    Args:
        base_url: such as https://host/v1; no user name, password or query in it.
        api_key_env: environment variable that holds the key.
        concurrency: connections at once.
        timeout: seconds one request may take from start to end.
    """

    def __init__(self, base_url: str, api_key_env: str, concurrency: int, timeout: float):
        self.key = KeyFromEnvironment(api_key_env)
        self._timeout = timeout
        self._url = _checked_url(base_url)
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        for library in ("httpx", "httpcore"):  # they log what the server said, which may be the key
            logging.getLogger(library).setLevel(logging.WARNING)
        # Redirects are not followed: another host has no business with the key.
        self._client = exchange.client(
            timeout=timeout,
            limits=limits,
            auth=self.key,
            headers={"Accept-Encoding": "identity"},  # a packed reply can be of any size
            verify=self._url.startswith("https:"),  # loading certificates takes a while, and http has none to check
        )

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def post(self, body: dict[str, Any]) -> Reply:
        """Sends one request.

        Raises:
            TransientError: a failure that another attempt may not meet.
            JudgeError: reason "refused", the endpoint does not want this question.
            JudgeAbortedError: no question can be asked like this.
        """
        self.key.check()
        try:
            status, headers, body_text = self._exchange(body)
        except httpx.TimeoutException:
            raise TransientError("timeout", f"no whole reply within {self._timeout:g} s") from None
        except exchange.ReplyTooLarge:
            raise TransientError("bad_reply", f"a reply of more than {MAX_REPLY_BYTES >> 20} MiB") from None
        except (httpx.RequestError, httpx.InvalidURL, ValueError) as error:
            # The library's own words may quote headers; the class says enough.
            raise TransientError("connection", f"the connection failed ({type(error).__name__})") from None
        if status != 200:
            raise self._failure(status, headers, body_text)
        return self._reply(body_text)

    def _exchange(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, str]:
        """Status, headers, and body without the key, which some endpoints quote."""
        # Escaped, so that half characters in somebody's text can be sent.
        content, headers = json.dumps(body).encode("ascii"), {"Content-Type": "application/json"}
        with (
            exchange.bounded(self._timeout, MAX_REPLY_BYTES),
            self._client.stream("POST", self._url, content=content, headers=headers) as response,
        ):
            packed = response.headers.get("content-encoding", "identity").strip().lower()
            if packed not in ("", "identity"):
                if response.status_code == 200:
                    raise TransientError("bad_reply", f"got a reply packed as {_quote(packed)}, expected it plain")
                return response.status_code, response.headers, ""
            text = b"".join(response.iter_raw()).decode("utf-8", "replace")
            return response.status_code, response.headers, self.key.redact(text)

    def _failure(self, status: int, headers: httpx.Headers, text: str) -> JudgeError | JudgeAbortedError:
        said = _quote(text)
        message = f"HTTP {status}: {said}" if said else f"HTTP {status}"
        if status in _USELESS or 300 <= status < 400:
            hint = _USELESS.get(status, "redirects are not followed; give the address it ends at")
            return JudgeAbortedError(f"{self._url}: {message}; {hint.replace('{variable}', self.key.variable)}")
        if status == 429 and "insufficient_quota" in said:
            return JudgeAbortedError(f"{self._url}: {message}; the account's quota is used up")
        if status in _TRANSIENT or status >= 500:
            reason = _TRANSIENT.get(status, "server_error")
            return TransientError(reason, message, _retry_after(headers.get("retry-after")))
        return JudgeError("refused", message)

    def _reply(self, body_text: str) -> Reply:
        try:
            content = json.loads(body_text)
            choice = content["choices"][0]
            text = _text_of(choice["message"].get("content"))
            finish = choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            said = _quote(body_text) or "nothing"
            raise TransientError("bad_reply", f"expected a chat completion as JSON, got: {said}") from None
        # JSON can hold the key in escapes, and half characters, which no file can.
        text = self.key.redact(text).encode("utf-8", "replace").decode()
        finish = printable(self.key.redact(finish), _QUOTED) if isinstance(finish, str) else ""
        return Reply(text, finish, _tokens(content.get("usage")))


def _quote(text: str) -> str:
    """What the endpoint said, on one short line."""
    return printable(" ".join(text.split()), _QUOTED)


def _checked_url(base_url: str) -> str:
    mend = "expected http(s)://host[:port]/v1, and the key in an environment variable"
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, TypeError):
        raise JudgeAbortedError(f"the judge's base URL cannot be read; {mend}") from None
    # The address itself stays out of the message: it may hold a key.
    if url.userinfo or url.query or url.fragment:
        raise JudgeAbortedError(f"the judge's base URL holds a user name, password, query or fragment; {mend}")
    if url.scheme not in ("http", "https") or not url.host:
        raise JudgeAbortedError(f"the judge's base URL does not begin with http(s)://host; {mend}")
    return str(url).rstrip("/") + "/chat/completions"


def _text_of(content: Any) -> str:
    """A message's text: plain, or a list of parts."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content if isinstance(content, str) else ""


def _tokens(usage: Any) -> int | None:
    if not isinstance(usage, dict):
        return None
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    whole = [count for count in counts if type(count) is int and 0 <= count < _MOST_TOKENS]
    return sum(whole) if whole else None


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header: a number, or a date."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    return max(0.0, seconds) if seconds == seconds else None


REDACTED = "[key]"


class KeyFromEnvironment(httpx.Auth):
    """Puts the key of an environment variable into each request, and keeps it nowhere. Local servers need none.

    Args:
        variable: name of the environment variable.
    """

    def __init__(self, variable: str):
        self.variable = variable

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if key := self._key():
            request.headers["Authorization"] = f"Bearer {key}"
        yield request

    def check(self) -> None:
        """Refuses a key that cannot be sent: the HTTP library would quote it in its error.

        Raises:
            JudgeAbortedError: it holds blanks, line ends or letters beyond ASCII.
        """
        if not _sendable(self._key()):  # not in a variable here: some tracebacks show them
            raise JudgeAbortedError(
                f"the key in ${self.variable} holds blanks, line ends or letters beyond ASCII, which no request can "
                "carry; export it again"
            )

    def redact(self, text: str) -> str:
        """The text without the key: endpoints quote it in their errors."""
        key = self._key()
        return text.replace(key, REDACTED) if key else text

    def _key(self) -> str:
        return os.environ.get(self.variable, "").strip()


def _sendable(key: str) -> bool:
    return key.isascii() and key.isprintable() and " " not in key
