"""The key of an endpoint: read from the environment when a request is sent, and kept nowhere."""

from __future__ import annotations

import os
from collections.abc import Generator

import httpx

from mer_r1_jax.evaluation.judge.errors import JudgeAbortedError

REDACTED = "[key]"


class KeyFromEnvironment(httpx.Auth):
    """Puts the key of an environment variable into each request. Without one, requests go without: local servers.

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
