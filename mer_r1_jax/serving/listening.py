"""Where the page's server listens, and whose names it answers to."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import threading
from collections.abc import Sequence
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

HERE = ("localhost", "127.0.0.1", "[::1]")  # how a browser on this machine names it


class ListenError(OSError):
    """The server cannot listen there; the message says why and where it could."""


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names_of(host: str, more: Sequence[str] = ()) -> tuple[str, ...]:
    """Names that requests to an address may be for.

    Args:
        host: that is listened at.
        more: further names of this machine.

    Raises:
        ListenError: every address is listened at, and no name is given: any name would have to do, and with it those
            that a page elsewhere makes lead here.
    """
    for name in more:
        if not name or "*" in name or (":" in name and not name.startswith("[")):
            raise ListenError(
                f"--allowed_host: got {name!r}, expected one name as others call this machine by, without a port and "
                "without *; write it alone, such as --allowed_host=lab.example.org"
            )
    if host in ("", "0"):
        host = "0.0.0.0"  # which it means
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified and not more:
            raise ListenError(
                f"--host: got {host}, every address of this machine, without a name; expected the names that others "
                "call it by: add --allowed_host=NAME"
            )
    written = f"[{host}]" if ":" in host else host
    return tuple(dict.fromkeys((*HERE, written, *more)))


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ListenError: the port is taken, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ListenError(
            f"got {host}, port {port}, where nothing can listen ({error}); expected a free port of this machine; "
            "choose another --port (0 takes any that is free) or --host"
        ) from error


def serve(app: ASGIApp, ending: threading.Event) -> uvicorn.Server:
    """A server; `run(sockets=[listener])` serves until a signal, and answers nothing more after it.

    What is asked is not written down anywhere: there is no log of requests.

    Args:
        app: what answers.
        ending: set when the signal comes.
    """
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        h11_max_incomplete_event_size=1 << 16,  # a subtitle of 2,000 Chinese characters, percent-encoded, and headers
        limit_concurrency=64,
        timeout_graceful_shutdown=3,
    )
    return _Server(settings, ending)


class _Server(uvicorn.Server):
    def __init__(self, settings: uvicorn.Config, ending: threading.Event):
        super().__init__(settings)
        self._ending = ending

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._ending.set()
        # A clip on its way is cut off, which is no fault to show a traceback of.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
        super().handle_exit(sig, frame)
