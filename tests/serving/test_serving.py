"""The page's server: who is let in, what is taken, who waits, and what is left of a clip. A stand-in answers."""

import asyncio
import contextlib
import errno
import json
import re
import socket
import threading
from pathlib import Path

import httpx
import pytest
from support.commands import run_command
from support.served_page import StandIn, ask, serving, until

import mer_r1_jax.serving
from mer_r1_jax.serving.app import Limits, make_app
from mer_r1_jax.serving.listening import ListenError, is_local, listening, names_of

PAGE = Path(mer_r1_jax.serving.__file__).parent / "page"


@pytest.fixture
def model():
    return StandIn()


@pytest.fixture
def address(model, tmp_path):
    with serving(model, tmp_path, max_mb=0.01, upload_seconds=0.5, waiting=1) as address:
        yield address


def test_a_clip_is_answered_and_deleted(address, model, tmp_path):
    status, events = ask(address, b"x" * 5000, name="Mine.MP4", subtitle=" Oh, 天. ", mode="fast", hide="1", sound="0")
    assert status == 200
    assert [event["kind"] for event in events] == ["started", "clip", "answer", "done"] and events[1]["bytes"] == 5000
    (asked,) = model.asked
    assert (asked.name, asked.subtitle, asked.text, asked.mode) == ("Mine.MP4", "Oh, 天.", "", "fast")
    assert (asked.hide, asked.is_sound, asked.clip.suffix) == (True, False, ".mp4")
    assert not list(tmp_path.iterdir())


def test_only_requests_for_a_name_of_this_machine_are_let_in(address, model):
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "a@b"):
        for path in ("/", "/about", "/page.js"):
            assert httpx.get(f"{address}{path}", headers={"host": host}).status_code == 400
        assert ask(address, headers={"host": host})[0] == 400 and not model.asked
    for host in ("localhost", "localhost:1234", "127.0.0.1:80", "[::1]:8000"):
        assert httpx.get(f"{address}/about", headers={"host": host}).status_code == 200


def test_a_page_elsewhere_can_send_no_question(address, model):
    strangers = {"origin": "http://evil.example"}, {"origin": "null"}
    for headers in (*strangers, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}):
        status, told = ask(address, headers=headers)
        assert status == 403 and "expected this page's own" in told and not model.asked
    for kind in ("text/plain", "multipart/form-data; boundary=x", ""):  # what a form can send
        assert ask(address, headers={"content-type": kind})[0] == 415 and not model.asked
    assert ask(address, headers={"origin": address, "sec-fetch-site": "same-origin"})[0] == 200


def test_every_response_says_that_nothing_may_be_loaded_from_elsewhere(address):
    for done in (
        *(httpx.get(f"{address}{path}") for path in ("/", "/page.css", "/page.js", "/about", "/none")),
        httpx.get(f"{address}/", headers={"host": "evil.example"}),
        httpx.post(f"{address}/answer", content=b""),
    ):
        policy = done.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "*" not in policy
        assert done.headers["x-content-type-options"] == "nosniff" and done.headers["cache-control"] == "no-store"
        assert "server" not in done.headers and "access-control-allow-origin" not in done.headers


def test_the_pages_files_name_no_other_host_and_hold_no_script_or_style_of_their_own():
    texts = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}
    assert set(texts) == {"index.html", "page.css", "page.js"}
    for name, text in texts.items():
        assert not re.search(r"https?:|//[a-z]|url\(|@import", text.replace("// ", "")), name
    page = texts["index.html"]
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", page), "the policy would forbid them"
    assert "innerHTML" not in texts["page.js"] and "insertAdjacentHTML" not in texts["page.js"]


def test_a_clip_that_is_too_large_is_refused_with_or_without_a_stated_size(address, model, tmp_path):
    for body in (b"x" * 12000, (b"x" * 6000 for _ in range(2))):
        status, told = ask(address, body)
        assert status == 413 and "expected at most 0.01 MB; cut it" in told
        assert not model.asked and not list(tmp_path.iterdir())


def test_an_empty_clip_and_one_that_never_comes_are_refused(address, model, tmp_path):
    assert ask(address, b"")[0] == 400
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(
            f"POST /answer HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/octet-stream\r\n"
            "Content-Length: 100\r\n\r\nabc".encode()
        )
        assert ask(address)[0] == 200, "nobody waits for a clip that is on its way"
        told = slow.recv(4096).decode()
    assert told.startswith("HTTP/1.1 408 ") and len(model.asked) == 1 and not list(tmp_path.iterdir())
    about = httpx.get(f"{address}/about").json()
    assert about["wheels"] == ["one", "two"] and about["max_mb"] == 0.01
    assert [ask(address)[0] for _ in range(3)] == [200] * 3, "no place is kept any more"


def test_a_full_disk_is_told_and_nobody_is_left_in_the_line(address, model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for place in ("tempfile.TemporaryDirectory", "builtins.open"):
        with monkeypatch.context() as patch:
            if place == "builtins.open":
                patch.setattr("mer_r1_jax.serving.uploads.open", full, raising=False)
            else:
                patch.setattr(f"mer_r1_jax.serving.uploads.{place}", full)
            status, told = ask(address)
        assert status == 507 and "No space left on device" in told and "TMPDIR" in told
        assert not model.asked and not list(tmp_path.iterdir())
    assert ask(address)[0] == 200


def test_what_cannot_be_asked_is_refused_with_what_is_expected(address, model):
    for query, said in (
        ({"mode": "loud"}, "mode: got loud, expected one of slow, fast, both, auto"),
        ({"mode": "auto"}, "mode: got auto, expected a threshold for it"),
        ({"subtitle": "x" * 2001}, "subtitle: got 2001 characters, expected at most 2000"),
    ):
        status, told = ask(address, **query)
        assert status == 400 and said in told and not model.asked


def test_a_question_waits_for_its_turn_is_told_so_and_a_third_is_turned_away(address, model, tmp_path):
    model.hold.clear()
    found = {}

    def asked_as(name):
        found[name] = ask(address, name=name)

    threads = [threading.Thread(target=asked_as, args=(name,)) for name in ("first", "second")]
    threads[0].start()
    until(lambda: len(model.asked) == 1)
    threads[1].start()
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    status, told = ask(address, name="third")
    assert status == 503 and "got 1 questions that wait" in told
    assert [asked.name for asked in model.asked] == ["first"], "one at a time"
    model.hold.set()
    for thread in threads:
        thread.join(20)
    (_, first), (_, second) = found["first"], found["second"]
    assert second[0] == {"kind": "queued", "before": 1} and first[0]["kind"] == "started"
    assert first[-1] == second[-1] == {"kind": "done"} and not list(tmp_path.iterdir())


def test_whoever_closes_the_page_is_not_waited_for(address, model, tmp_path):
    model.hold.clear()
    with httpx.stream(
        "POST", f"{address}/answer", content=b"x", headers={"content-type": "application/octet-stream"}
    ) as one:
        next(one.iter_lines())
        until(lambda: model.asked)
    until(lambda: model.ended)
    until(lambda: not list(tmp_path.iterdir()))
    model.hold.set()
    assert ask(address)[1][-1] == {"kind": "done"}


async def asked(app, receive, send):
    """A question put to the application as a server that knows ASGI 2.4 does: to it, sending to nobody may raise."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/octet-stream")]
    scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": "POST", "path": "/answer", "headers": headers}
    body = iter([{"type": "http.request", "body": b"x", "more_body": False}])

    async def received():
        return next(body, None) or await receive()

    await app(scope | {"query_string": b""}, received, send)


def test_whoever_is_gone_before_the_first_word_leaves_nothing_behind(model, tmp_path):
    app = make_app(model, Limits(waiting=0), ("localhost",), tmp_path, threading.Event())
    told = []

    async def waits():
        await asyncio.sleep(60)

    async def gone(message):
        raise OSError("the connection is closed")

    async def here(message):
        told.append(message)

    async def both():
        with contextlib.suppress(Exception):
            await asked(app, waits, gone)
        assert not list(tmp_path.iterdir())
        await asked(app, waits, here)

    asyncio.run(both())
    assert told[0]["status"] == 200 and b'"done"' in b"".join(message.get("body", b"") for message in told)


def test_a_closed_page_is_noticed_while_events_come_without_a_pause(model, tmp_path):
    """A server that drops what is sent to a closed page raises nothing: somebody has to look."""
    model.hold.clear()  # it tells an event every 10 ms, and would go on for ever
    app = make_app(model, Limits(), ("localhost",), tmp_path, threading.Event())

    async def closed():
        return {"type": "http.disconnect"}

    async def dropped(message):
        pass

    async def ends():
        async with asyncio.timeout(20):
            await asked(app, closed, dropped)

    try:
        asyncio.run(ends())
        until(lambda: model.ended)
        until(lambda: not list(tmp_path.iterdir()))
    finally:
        model.hold.set()


def test_whoever_waits_when_the_program_is_ended_is_told_so(model, tmp_path):
    model.hold.clear()
    ending, told = threading.Event(), {"first": [], "second": []}
    app = make_app(model, Limits(waiting=1), ("localhost",), tmp_path, ending)

    async def waits():
        await asyncio.sleep(60)

    async def both():
        def send_to(name):
            async def send(message):
                told[name].append(message.get("body", b""))
                if b'"queued"' in told[name][-1]:
                    ending.set()  # one is answered, and the other waits behind it

            return send

        async with asyncio.timeout(20):
            await asyncio.gather(*(asked(app, waits, send_to(name)) for name in told))

    asyncio.run(both())
    for messages in told.values():
        last = json.loads(b"".join(messages).splitlines()[-1])
        assert last["kind"] == "error" and "the program that answers is ended" in last["text"]
    until(lambda: not list(tmp_path.iterdir()))


def test_an_answer_that_takes_too_long_is_ended(model, tmp_path):
    model.hold.clear()
    with serving(model, tmp_path, answer_seconds=0.3) as address:
        _, events = ask(address)
        assert events[-1]["kind"] == "error" and "got none in 0.3 s, expected one by then" in events[-1]["text"]
        until(lambda: not list(tmp_path.iterdir()))


def test_a_fault_is_told_to_who_can_mend_it_and_no_other_says_what_it_is(address, model, tmp_path, caplog):
    model.error = ValueError("got a picture, expected a clip")
    assert ask(address, name="a.gif")[1][-1] == {"kind": "error", "text": "a.gif: got a picture, expected a clip"}
    model.error = KeyError("secret")
    last = ask(address)[1][-1]
    assert last["kind"] == "error" and "secret" not in last["text"] and "secret" in caplog.text
    model.error = None
    assert ask(address)[1][-1] == {"kind": "done"} and not list(tmp_path.iterdir())


def test_where_it_listens_and_under_which_names(tmp_path):
    assert is_local("127.0.0.1") and is_local("::1") and is_local("localhost") and not is_local("0.0.0.0")
    assert names_of("192.168.0.7", ["lab"])[-2:] == ("192.168.0.7", "lab") and "*" not in names_of("::1")
    with pytest.raises(ListenError, match="without a name; expected .*--allowed_host"):
        names_of("0.0.0.0")
    for host in ("", "0"):  # which mean the same
        with pytest.raises(ListenError, match="without a name; expected .*--allowed_host"):
            names_of(host)
    for name in ("*", "*lab", "lab:8000", ""):
        with pytest.raises(ListenError, match="--allowed_host: got .*expected one name"):
            names_of("127.0.0.1", [name])
    with contextlib.closing(listening("127.0.0.1", 0)) as taken:
        with pytest.raises(ListenError, match="where nothing can listen .*choose another --port"):
            listening("127.0.0.1", taken.getsockname()[1])


def test_the_command_says_what_is_missing_before_it_loads_a_model(capsys, tmp_path):
    assert run_command("serve", f"--model={tmp_path}", "--port=0") == 2
    assert "expected a run's folder" in capsys.readouterr().err
    assert run_command("serve", f"--model={tmp_path}", "--host=0.0.0.0") == 2
    assert "--allowed_host" in capsys.readouterr().err
