"""One deadline and one count of bytes over a whole HTTP exchange, from the look-up of the host to the last byte.

The HTTP library limits the time between two bytes, and hands on whatever a server sends: a header that drips, interim
replies without end, empty chunks. So the connections below it are wrapped: each wait gets what is left of the
exchange's time, and each read what is left of its bytes.
"""

from __future__ import annotations

import contextlib
import contextvars
import http.cookiejar
import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpcore
import httpx

_PIECE = 4096  # bytes written at once: a server that hardly reads cannot hold one write up for long


class ReplyTooLarge(Exception):
    """The other side sent more bytes than an exchange may have."""


class _Bounds:
    """What is left of one exchange."""

    def __init__(self, seconds: float, most_bytes: int):
        self.deadline = time.monotonic() + seconds
        self.bytes_left = most_bytes

    def seconds(self, too_late: type[Exception]) -> float:
        """Seconds left, more than none.

        Raises:
            too_late: there are none.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise too_late("the whole exchange took too long")
        return left


# An exchange stays in one thread, while a connection is handed from one exchange to the next.
_current: contextvars.ContextVar[_Bounds] = contextvars.ContextVar("bounds of this thread's exchange")


@contextlib.contextmanager
def bounded(seconds: float, most_bytes: int) -> Iterator[None]:
    """Bounds what a client of `client` sends and receives inside, of this thread.

    Args:
        seconds: from here to the last byte; beyond, the library's own time-out errors are raised.
        most_bytes: received, headers and the form of the body included; beyond, `ReplyTooLarge` is raised.
    """
    token = _current.set(_Bounds(seconds, most_bytes))
    try:
        yield
    finally:
        _current.reset(token)


def client(**settings: Any) -> httpx.Client:
    """An HTTP client for use inside `bounded`. It keeps no cookies and follows no redirect.

    Args:
        settings: of httpx.Client.
    """
    no_cookies = http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=()))
    made = httpx.Client(follow_redirects=False, cookies=no_cookies, **settings)
    # The library takes another backend for plain connections only; a proxy of the environment needs it as well.
    for transport in (made._transport, *made._mounts.values()):
        if transport is not None:
            assert isinstance(transport, httpx.HTTPTransport)  # all that a client makes for itself
            transport._pool._network_backend = _Backend(transport._pool._network_backend)
    return made


class _Backend(httpcore.NetworkBackend):
    """Opens connections within the bounds."""

    def __init__(self, inner: httpcore.NetworkBackend):
        self._inner = inner

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = _addresses(host, port, _current.get().seconds(httpcore.ConnectTimeout))
        for position, address in enumerate(addresses):
            # One that does not answer leaves time for the others.
            seconds = _current.get().seconds(httpcore.ConnectTimeout) / (len(addresses) - position)
            try:
                return _Stream(self._inner.connect_tcp(address, port, seconds, local_address, socket_options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if position == len(addresses) - 1:
                    raise
        raise httpcore.ConnectError("the host has no address")

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.NetworkStream:
        seconds = _current.get().seconds(httpcore.ConnectTimeout)
        return _Stream(self._inner.connect_unix_socket(path, seconds, socket_options))

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(min(seconds, _current.get().seconds(httpcore.ConnectTimeout)))


class _Stream(httpcore.NetworkStream):
    """A connection that reads and writes within the bounds."""

    def __init__(self, inner: httpcore.NetworkStream):
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        bounds = _current.get()
        data = self._inner.read(max_bytes, bounds.seconds(httpcore.ReadTimeout))
        bounds.bytes_left -= len(data)
        if bounds.bytes_left < 0:
            raise ReplyTooLarge
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _PIECE):
            self._inner.write(buffer[start : start + _PIECE], _current.get().seconds(httpcore.WriteTimeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        seconds = _current.get().seconds(httpcore.ConnectTimeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, seconds))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _addresses(host: str, port: int, seconds: float) -> list[str]:
    """A host's addresses. The system's look-up knows no time limit, so it runs aside and is left alone when late."""
    found: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.put(list(dict.fromkeys(str(entry[4][0]) for entry in entries)))
        except (OSError, UnicodeError):
            found.put([])

    threading.Thread(target=look_up, daemon=True, name="judge-address").start()
    try:
        return found.get(timeout=seconds)
    except queue.Empty:
        raise httpcore.ConnectTimeout("the host's address was not found in time") from None
