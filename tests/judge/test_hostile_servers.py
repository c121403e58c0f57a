"""Judges that misbehave at the level of bytes: every question ends in time, in little memory, with a reason."""

import contextlib
import gzip
import http.cookiejar
import json
import logging
import resource
import socket
import threading
import time
import traceback

import pytest
from support.judge_server import INJECTION

from mer_r1_jax.evaluation.judge.client import ChatClient, JudgeAbortedError, JudgeError

KEY = "sk-planted-fedcba9876543210"
TIMEOUT = 1.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def completion(text="fine", **more) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]} | more).encode()


def whole(body: bytes, status=b"200 OK", headers=b"") -> bytes:
    return b"HTTP/1.1 %s\r\n%sContent-Length: %d\r\n\r\n%s" % (status, headers, len(body), body)


@contextlib.contextmanager
def serving(handle, reads=True):
    """A server on 127.0.0.1 that hands each connection and its request's head to `handle`; gives its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    closing = threading.Event()

    def one(connection):
        with connection, contextlib.suppress(OSError):
            request = b""
            while reads and b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            handle(connection, request)

    def loop():
        listener.settimeout(0.1)
        while not closing.is_set():
            with contextlib.suppress(OSError):
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    closing.set()
    thread.join()
    listener.close()


def client_at(port, folder, scheme="http", host="127.0.0.1", **settings):
    defaults = {"timeout": TIMEOUT, "max_retries": 1, "backoff": 0.01, "max_failed_frac": 1.0}
    return ChatClient(base_url=f"{scheme}://{host}:{port}/v1", model="m", cache_dir=folder, **defaults | settings)


def ask(client, text="How much?"):
    return client.ask([{"role": "user", "content": text}], prompt_version="v1", max_tokens=5)


def repeat(first: bytes, piece: bytes, every: float):
    """Sends `first`, then `piece` for longer than any test waits."""

    def handle(connection, _):
        connection.sendall(first)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            connection.sendall(piece)
            time.sleep(every)

    return handle


def send(data: bytes):
    return lambda connection, _: connection.sendall(data)


def bomb(levels: int) -> bytes:
    data = bytes(1 << 26)
    for _ in range(levels):
        data = gzip.compress(data, 9)
    return whole(data, headers=b"Content-Encoding: " + b", ".join([b"gzip"] * levels) + b"\r\n")


@pytest.mark.parametrize(
    ("handle", "reason"),
    [
        (repeat(HEAD + b"Content-Length: 100\r\n\r\n", b"x", 0.2), "timeout"),
        (repeat(b"HTTP/1.1 200 OK\r\nX-A: ", b"a", 0.2), "timeout"),
        (repeat(b"HT", b"T", 0.2), "timeout"),
        (repeat(HEAD, b"X-B: 1\r\n", 0.05), "timeout"),
        (repeat(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.05), "timeout"),
        (repeat(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, 0.0), ("timeout", "bad_reply")),
        (repeat(CHUNKED, b"1\r\n \r\n", 0.05), "timeout"),
        (repeat(CHUNKED + b"1", b";a=b", 0.05), "timeout"),
        (repeat(CHUNKED + b"0\r\n", b"X-T: 1\r\n", 0.05), "timeout"),
        (repeat(CHUNKED, b"1;" + b"a" * 50_000 + b"\r\n \r\n", 0.0), ("timeout", "bad_reply")),
        (repeat(CHUNKED, b"40000\r\n" + b" " * 0x40000 + b"\r\n", 0.0), ("timeout", "bad_reply")),
        (repeat(HEAD, b"X-B: " + b"1" * 10_000 + b"\r\n", 0.0), "connection"),
        (repeat(HEAD + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n", b"", 0.1), "bad_reply"),
        (send(bomb(1)), "bad_reply"),
        (send(bomb(2)), "bad_reply"),
        (send(bomb(3)), "bad_reply"),
        (send(whole(b"no", headers=b"Content-Encoding: br\r\n")), "bad_reply"),
        (send(whole(gzip.compress(b"later"), b"429 Slow", b"Content-Encoding: gzip\r\n")), "rate_limited"),
        (send(whole(b"", b"429 T", b"Retry-After: 1e308\r\n")), "rate_limited"),
        (send(whole(b"", b"503 T", b"Retry-After: Fri, 31 Dec 99999 23:59:59 GMT\r\n")), "server_error"),
        (send(whole(b"[" * 100_000)), "bad_reply"),
        (send(whole(b'{"choices":[{"message":[]}]}')), "bad_reply"),
        (send(HEAD + b"Content-Length: -1\r\n\r\nab"), "connection"),
        (send(CHUNKED + b"ZZ\r\n"), "connection"),
        (send(HEAD + b"Content-Length: 10\r\n\r\nab"), "connection"),
    ],
)
def test_every_question_ends_in_time_and_in_little_memory(tmp_path, handle, reason):
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with serving(handle) as port, client_at(port, tmp_path) as client, pytest.raises(JudgeError) as caught:
        ask(client)
    assert caught.value.reason in ((reason,) if isinstance(reason, str) else reason)
    assert time.monotonic() - start < 2 * TIMEOUT + 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kB; the bombs unpack to 64 MiB


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_accepts_and_is_silent_or_never_reads(tmp_path, scheme):
    with serving(lambda connection, _: time.sleep(10), reads=False) as port:
        with client_at(port, tmp_path, scheme, max_retries=0) as client:
            start = time.monotonic()
            with pytest.raises(JudgeError, match="no whole reply within 1 s"):
                ask(client, "x" * (8 << 20))  # more than the system's buffers take
            assert time.monotonic() - start < TIMEOUT + 5  # making and hashing the request takes a while, too


def test_addresses_that_do_not_come_or_do_not_answer(tmp_path, monkeypatch):
    look_up = socket.getaddrinfo
    full = socket.socket()
    full.bind(("0.0.0.0", 0))
    full.listen(0)
    port = full.getsockname()[1]
    waiting = []
    for _ in range(4):  # fills the queue: whoever connects next waits
        waiting.append(socket.socket())
        waiting[-1].setblocking(False)
        with contextlib.suppress(BlockingIOError):
            waiting[-1].connect(("127.0.0.1", port))

    def many(host, asked, *rest, **named):
        return [entry for last in range(1, 9) for entry in look_up(f"127.0.0.{last}", asked, *rest, **named)]

    def slow(*rest, **named):
        time.sleep(5)
        return look_up(*rest, **named)

    for found in (many, slow):
        monkeypatch.setattr(socket, "getaddrinfo", found)
        with client_at(port, tmp_path, max_retries=0, host="judge.example") as client:
            start = time.monotonic()
            with pytest.raises(JudgeError, match="no whole reply"):
                ask(client)
            assert time.monotonic() - start < TIMEOUT + 1
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for held in (*waiting, full):
        held.close()
    with client_at(port, tmp_path, max_retries=0, host="a" * 64 + ".example") as client:
        with pytest.raises(JudgeError, match="connection failed"):
            ask(client)


def test_an_address_that_does_not_answer_leaves_time_for_the_next(tmp_path, monkeypatch):
    """One of two addresses of the host takes no connection; the other is asked."""
    look_up = socket.getaddrinfo
    with serving(send(whole(completion()))) as port:

        def two(host, asked, *rest, **named):
            return [entry for at in ("127.0.0.9", "127.0.0.1") for entry in look_up(at, asked, *rest, **named)]

        monkeypatch.setattr(socket, "getaddrinfo", two)
        with client_at(port, tmp_path, max_retries=0, host="judge.example") as client:
            assert ask(client) == "fine"


def test_a_connection_serves_many_questions_each_with_its_own_bounds(tmp_path):
    connections = []

    def handle(connection, request):
        connections.append(connection)
        while request:
            time.sleep(0.4)
            connection.sendall(whole(completion(), headers=b"Set-Cookie: a=%d\r\n" % len(connections)))
            assert b"Cookie" not in request
            request = connection.recv(65536)

    with serving(handle) as port, client_at(port, tmp_path) as client:
        assert [ask(client, f"question {number}") for number in range(5)] == ["fine"] * 5
        assert isinstance(client._endpoint._client.cookies.jar, http.cookiejar.CookieJar)
        assert not list(client._endpoint._client.cookies.jar)
    assert len(connections) == 1


def test_a_proxy_of_the_environment_is_bounded_too(tmp_path, monkeypatch):
    asked = []

    def handle(connection, request):
        asked.append(request.split(b"\r\n")[0])
        repeat(b"HTTP/1.1 200 OK\r\nX-A: ", b"a", 0.2)(connection, request)

    with serving(handle) as port:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("NO_PROXY", "")
        with client_at(80, tmp_path, host="judge.example", max_retries=0) as client:
            start = time.monotonic()
            with pytest.raises(JudgeError, match="no whole reply"):
                ask(client)
            assert time.monotonic() - start < TIMEOUT + 1
    assert len(asked) == 1 and b"http://judge.example" in asked[0]


@pytest.mark.parametrize(
    "place", ["file:///etc/passwd", "http://[", "http://a:b/", "//\x7f", "http://" + "a" * 70, "%00", "http://\xff/"]
)
def test_redirects_go_nowhere_whatever_they_say(tmp_path, place):
    data = whole(b"", b"307 T", b"Location: " + place.encode("latin-1") + b"\r\n")
    with serving(send(data)) as port, client_at(port, tmp_path) as client:
        with pytest.raises((JudgeError, JudgeAbortedError)):
            ask(client)


@pytest.mark.parametrize("status", [b"200 OK", b"400 Bad", b"429 Slow", b"500 Broken", b"404 None", b"302 Found"])
def test_instructions_escapes_and_the_key_in_a_reply_reach_nobody(tmp_path, monkeypatch, caplog, capsys, status):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    said = f"{INJECTION} \x1b]0;owned\x07\x1b[2J\u202e [/bold] {KEY} \x00".encode() + b"\xed\xa0\x80\xff"
    phrase = b" \x1b[2J " + KEY.encode()
    data = whole(said, status + phrase, b"X-Key: " + KEY.encode() + b"\r\nRetry-After: \x1b[2J\r\n")
    with serving(send(data)) as port, client_at(port, tmp_path) as client:
        with pytest.raises((JudgeError, JudgeAbortedError)) as caught:
            ask(client)
    shown = [str(caught.value), "".join(traceback.format_exception(caught.value.with_traceback(None))), caplog.text]
    shown += capsys.readouterr()
    for text in shown:
        assert KEY not in text and not set("\x1b\x07\x00\u202e") & set(text)


def test_an_answer_of_escapes_keys_and_huge_counts_is_kept_as_text(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    body = completion(f"\x1b[2J {KEY} \ud83d", usage={"prompt_tokens": 10**4000, "completion_tokens": True})
    body = body.replace(b'"stop"', json.dumps(f"stop {KEY}").encode())
    with serving(send(whole(body))) as port, client_at(port, tmp_path) as client:
        assert ask(client) == "\x1b[2J [key] ?"
        assert client.metrics()["judge/tokens"] < 1000
    assert KEY not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


def test_answers_that_cannot_be_kept_end_with_a_message_and_deep_ones_are_asked_again(tmp_path, caplog):
    with serving(send(whole(completion()))) as port:
        with client_at(port, tmp_path / "answers") as client:
            assert ask(client) == "fine"
            next((tmp_path / "answers").rglob("*.json")).write_text("[" * 100_000)
            assert ask(client) == "fine" and "cannot be read" in caplog.text
        (tmp_path / "file").write_text("")
        with (
            client_at(port, tmp_path / "file") as client,
            pytest.raises(JudgeAbortedError, match="could not be written"),
        ):
            ask(client)
