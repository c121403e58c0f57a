"""The page's server: three files, what it is about, and answers as they are decoded. One person, one machine.

    GET  /            the page, and /page.css and /page.js
    GET  /about       JSON: the model, its wheels, question, threshold and the limits
    POST /answer?mode=slow|fast|both|auto&name=...&sound=0|1&subtitle=...&question=...&hide=0|1
                      the clip as body; the answer is JSON lines, events of `run.live_answers` and besides them
                      `queued` (how many are before), `error` and `done`

What keeps others out: requests must name a host that is expected, or a page elsewhere whose name is made to lead here
(DNS rebinding) could ask; a clip must come as application/octet-stream and from this page, or a form elsewhere could
send one. The page may load from this server alone (Content-Security-Policy). Nothing is written down, no cookie is set.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import importlib.resources
import json
import logging
import pathlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mer_r1_jax.foreign_text import printable
from mer_r1_jax.serving.uploads import MEGABYTE, Upload, UploadError, too_large
from mer_r1_jax.serving.waiting_line import LineFull, WaitingLine

MODES = ("slow", "fast", "both", "auto")
MOST_CHARACTERS = 2000  # of a subtitle or a question
_CLIP_TYPE = "application/octet-stream"
_LOOK_SECONDS = 0.5  # between two looks whether somebody has closed the page
_ENDED = {"kind": "error", "text": "the program that answers is ended; start it again, and ask again"}
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "media-src blob:; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(self), geolocation=()",
    "Cache-Control": "no-store",
}

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question as it came.

    Attributes:
        clip: the file; it is gone once it is answered.
        name, is_sound: what its owner calls it, and whether it is a voice alone.
        subtitle, text: what is said in it, and what is asked; "" = not known, and the model's own.
        mode: of MODES.
        hide: also with each part hidden.
    """

    clip: pathlib.Path
    name: str
    is_sound: bool
    subtitle: str
    text: str
    mode: str
    hide: bool


class Answering(Protocol):
    """Who answers."""

    about: dict[str, Any]

    def answer(self, asked: Asked, tell: Callable[[dict[str, Any]], None]) -> None:
        """Answers, telling events; what `tell` raises ends it. Called in one thread, one question at a time."""
        ...

    def explain(self, error: Exception, asked: Asked) -> str | None:
        """What was wrong with the question, for its asker; None where the fault is the program's."""
        ...


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one person may ask of the machine.

    Attributes:
        max_mb: megabytes of a clip.
        upload_seconds, answer_seconds: a clip may take to come, and an answer to be given.
        waiting: questions that may wait behind the one that is answered.
    """

    max_mb: float = 200.0
    upload_seconds: float = 120.0
    answer_seconds: float = 600.0
    waiting: int = 4


class AnswerEnded(Exception):
    """Nobody waits for the answer any more, or it takes too long."""


def make_app(
    answering: Answering, limits: Limits, hosts: Sequence[str], folder: pathlib.Path, ending: threading.Event
) -> Starlette:
    """The server's application.

    Args:
        answering: who answers.
        limits: of each question.
        hosts: names and addresses that a request may be for.
        folder: clips lie below it while they are answered; whoever made it deletes it.
        ending: set when the server ends: whoever waits for an answer is told so.
    """
    server = _Server(answering, limits, folder, ending)
    return Starlette(
        routes=[
            *(Route(path, _page_file(path), methods=["GET"]) for path in _FILES),
            Route("/favicon.ico", lambda request: Response(status_code=204), methods=["GET"]),  # browsers ask for it
            Route("/about", server.about, methods=["GET"]),
            Route("/answer", server.answer, methods=["POST"]),
        ],
        middleware=[
            Middleware(_WithHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        ],
    )


class _WithHeaders:
    """Adds the headers to every response, refusals included."""

    def __init__(self, app: ASGIApp):
        self._app = app
        self._headers = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
            await send(message)

        await self._app(scope, receive, with_headers)


def _page_file(path: str) -> Callable[[Request], Response]:
    name, kind = _FILES[path]
    content = (importlib.resources.files("mer_r1_jax.serving") / "page" / name).read_bytes()
    return lambda request: Response(content, media_type=kind)


class _Server:
    def __init__(self, answering: Answering, limits: Limits, folder: pathlib.Path, ending: threading.Event):
        self._answering, self._limits, self._folder, self._ending = answering, limits, folder, ending
        self._line = WaitingLine(limits.waiting)
        # The model's thread: one, whatever becomes of those who asked.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="answers")

    async def about(self, request: Request) -> Response:
        limits = {"max_mb": self._limits.max_mb, "max_characters": MOST_CHARACTERS}
        return JSONResponse({**self._answering.about, **limits})

    async def answer(self, request: Request) -> Response:
        """Takes a clip and gives events; a request that is not taken gets a status and one line that says why."""
        upload = None
        try:
            _refuse_strangers(request)
            asked = _asked(request, self._answering.about)
            max_bytes = int(self._limits.max_mb * MEGABYTE)
            if (size := _stated_size(request)) > max_bytes:
                raise too_large(f"{size / MEGABYTE:.1f} MB", max_bytes)
            with self._line.coming():
                upload = Upload(self._folder, asked.name)
                await upload.receive(request.stream(), max_bytes, self._limits.upload_seconds)
                place = self._line.join()
        except (UploadError, LineFull, ClientDisconnect) as error:
            if upload is not None:
                upload.remove()
            if isinstance(error, ClientDisconnect):
                return Response(status_code=400)
            if isinstance(error, LineFull):
                waiting = self._limits.waiting
                error = UploadError(503, f"got {waiting} questions that wait, expected fewer; ask again later")
            return JSONResponse({"error": str(error)}, status_code=error.status)
        asked = dataclasses.replace(asked, clip=upload.path)
        job = _Job(self._answering, asked, upload, self._limits.answer_seconds)

        async def end() -> None:
            # The model's thread leaves the answer after the chunk it is at, and removes the clip.
            job.give_up()
            await self._line.leave(place)

        return _Told(self._events(request, job, place), end)

    async def _events(self, request: Request, job: _Job, place: object) -> AsyncIterator[bytes]:
        """Waits for the turn, has the question answered in the model's thread, and passes on what is told."""
        async for before in self._line.turn(place, _LOOK_SECONDS):
            if await request.is_disconnected():
                return
            if self._ending.is_set():
                yield _line_of(_ENDED)
                return
            yield _line_of({"kind": "queued", "before": before})
        self._thread.submit(job.run)
        looked = time.monotonic()
        while True:
            event = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    event = await job.events.get()
            if event is not None:
                yield _line_of(event)
                if event["kind"] in ("done", "error"):
                    return
            # Also while events come without a pause: what is sent to a closed page is dropped, and raises nothing.
            if time.monotonic() - looked >= _LOOK_SECONDS:
                looked = time.monotonic()
                if await request.is_disconnected():
                    return
                if self._ending.is_set():
                    yield _line_of(_ENDED)
                    return


class _Told(StreamingResponse):
    """Events as they come. `end` is called when all is told, and as well where it never begins: the asker may be gone.

    Args:
        events: lines.
        end: gives back what the question took.
    """

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], Awaitable[None]]):
        super().__init__(events, media_type="application/x-ndjson")
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._end()


class _Job:
    """One question in the model's thread.

    Attributes:
        events: what is told; the last one is done or error.
    """

    def __init__(self, answering: Answering, asked: Asked, upload: Upload, seconds: float):
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._given_up = threading.Event()
        self._begun = threading.Lock()  # held by whoever removes the clip: the thread, or who gives up before it
        self._loop = asyncio.get_running_loop()
        self._answering, self._asked, self._upload, self._seconds = answering, asked, upload, seconds
        self._until = 0.0

    def give_up(self) -> None:
        """Says that nobody waits any more. The clip is removed now, or by the thread that reads it."""
        self._given_up.set()
        if self._begun.acquire(blocking=False):
            self._upload.remove()

    def run(self) -> None:
        """Answers; runs in the model's thread, and raises nothing."""
        if not self._begun.acquire(blocking=False):
            return  # given up before its turn
        self._until = time.monotonic() + self._seconds
        try:
            self._tell({"kind": "started"})
            self._answering.answer(self._asked, self._tell)
            last = {"kind": "done"}
        except AnswerEnded as error:
            last = {"kind": "error", "text": str(error)}
        except Exception as error:  # nothing that a clip does may end the server
            told = self._answering.explain(error, self._asked)
            if told is None:
                log.exception("a question could not be answered")
                told = "the program failed; the terminal it was started in says where. The next question can be asked"
            last = {"kind": "error", "text": told}
        finally:
            self._upload.remove()
        self._put(last)

    def _tell(self, event: dict[str, Any]) -> None:
        if self._given_up.is_set():
            raise AnswerEnded("nobody waits for the answer")
        if time.monotonic() > self._until:
            raise AnswerEnded(
                f"the answer: got none in {self._seconds:g} s, expected one by then; ask about a shorter clip or for a "
                "fast answer, or start the page with a larger --max_seconds"
            )
        self._put(event)

    def _put(self, event: dict[str, Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


def _line_of(event: dict[str, Any]) -> bytes:
    return (json.dumps(event) + "\n").encode()


def _refuse_strangers(request: Request) -> None:
    """Refuses what a page elsewhere could send by a browser of somebody who has this one open."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
    if site not in ("same-origin", "none") or (origin and urlsplit(origin).netloc != request.headers.get("host")):
        raise UploadError(
            403, f"the request: got one from {printable(origin or site, 80)}, expected this page's own; open the page"
        )
    kind = request.headers.get("content-type", "")
    if kind != _CLIP_TYPE:
        named = printable(kind, 80) or "nothing"
        raise UploadError(415, f"the clip: got it as {named}, expected {_CLIP_TYPE}; send it so")


def _stated_size(request: Request) -> int:
    length = request.headers.get("content-length", "0")
    return int(length) if length.isascii() and length.isdigit() else 0


def _asked(request: Request, about: dict[str, Any]) -> Asked:
    """The question, but for the clip."""
    given = request.query_params
    mode = given.get("mode", "both")
    if mode not in MODES:
        raise UploadError(400, f"mode: got {printable(mode, 80)}, expected one of {', '.join(MODES)}; choose one")
    if mode == "auto" and about.get("threshold") is None:
        raise UploadError(
            400, "mode: got auto, expected a threshold for it; start the page with --threshold, or choose another mode"
        )
    for name in ("subtitle", "question", "name"):
        if len(given.get(name, "")) > MOST_CHARACTERS:
            raise UploadError(
                400, f"{name}: got {len(given[name])} characters, expected at most {MOST_CHARACTERS}; shorten it"
            )
    return Asked(
        clip=pathlib.Path(),
        name=printable(given.get("name") or "the clip"),
        is_sound=given.get("sound") == "1",
        subtitle=given.get("subtitle", "").strip(),
        text=given.get("question", "").strip(),
        mode=mode,
        hide=given.get("hide") == "1",
    )
