"""The judge's client against a real server that misbehaves: bounded retries, nothing asked twice, no key anywhere."""

import json
import logging
import time
import traceback

import pytest
from support.judge_server import JudgeServer

from mer_r1_jax.evaluation.judge.client import ChatClient, JudgeAbortedError, JudgeError, image_part, text_part
from mer_r1_jax.evaluation.judge.endpoint import _retry_after

KEY = "sk-planted-0123456789abcdef"


def client_of(server, folder, **settings):
    defaults = {"backoff": 0.01, "max_retries": 3, "timeout": 5.0, "max_failed_frac": 1.0}
    return ChatClient(base_url=server.base_url, model="judge-1", cache_dir=folder, **defaults | settings)


def ask(client, text="How much?", **settings):
    return client.ask([{"role": "user", "content": text}], **{"prompt_version": "v1", "max_tokens": 20} | settings)


def conversations(count):
    return [[{"role": "user", "content": f"question {number}"}] for number in range(count)]


def last_line(body):
    return body["messages"][-1]["content"].upper()


def test_what_is_sent_and_what_comes_back(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    with JudgeServer(last_line) as server, client_of(server, tmp_path) as client:
        assert ask(client) == "HOW MUCH?"
        request = server.requests[0]
    assert request.authorization == f"Bearer {KEY}"
    assert request.body == {
        "model": "judge-1",
        "messages": [{"role": "user", "content": "How much?"}],
        "max_tokens": 20,
        "temperature": 0.0,
    }


def test_local_servers_need_no_key_and_newer_ones_another_field(tmp_path, monkeypatch):
    monkeypatch.delenv("OTHER_KEY", raising=False)
    settings = {"api_key_env": "OTHER_KEY", "max_tokens_field": "max_completion_tokens"}
    with JudgeServer() as server, client_of(server, tmp_path, **settings) as client:
        assert ask(client) == "fine"
        assert server.requests[0].authorization == ""
        assert server.requests[0].body["max_completion_tokens"] == 20 and "max_tokens" not in server.requests[0].body


@pytest.mark.parametrize("fault", ["429", "500", "slow", "drip", "invalid_json", "no_choices", "dropped", "cut_reply"])
def test_failures_that_pass_are_retried(tmp_path, fault):
    with JudgeServer(faults=[fault, fault], slow_seconds=5) as server:
        with client_of(server, tmp_path, timeout=0.5 if fault in ("slow", "drip") else 5) as client:
            assert ask(client) == "fine"
        assert [request.fault for request in server.requests] == [fault, fault, ""]
        assert client.metrics()["judge/failed_frac"] == 0 and client.metrics()["judge/requests"] == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("429", "rate_limited"),
        ("500", "server_error"),
        ("slow", "timeout"),
        ("invalid_json", "bad_reply"),
        ("no_choices", "bad_reply"),
        ("dropped", "connection"),
    ],
)
def test_retries_are_bounded_and_failures_are_not_cached(tmp_path, fault, reason):
    with JudgeServer(faults=[fault] * 3, slow_seconds=5) as server:
        with client_of(server, tmp_path, max_retries=2, timeout=0.5 if fault == "slow" else 5) as client:
            with pytest.raises(JudgeError, match="3 attempts") as caught:
                ask(client)
            assert caught.value.reason == reason and len(server.requests) == 3
            assert client.metrics()[f"judge/failed/{reason}"] == 1 and client.metrics()["judge/failed_frac"] == 1
            assert ask(client) == "fine" and client.metrics()["judge/failed_frac"] == 0.5


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("400", "refused"), ("truncated", "truncated"), ("filtered", "filtered"), ("empty", "no_text")],
)
def test_failures_that_would_come_again_are_not_retried(tmp_path, fault, reason):
    with JudgeServer(faults=[fault]) as server, client_of(server, tmp_path) as client:
        with pytest.raises(JudgeError) as caught:
            ask(client)
        assert caught.value.reason == reason and len(server.requests) == 1
        if fault != "400":  # an answer is an answer, even one of no use
            with pytest.raises(JudgeError):
                ask(client)
            assert len(server.requests) == 1


def test_retry_after_goes_before_back_off(tmp_path):
    with JudgeServer(faults=["429"], retry_after=0.3) as server, client_of(server, tmp_path) as client:
        start = time.monotonic()
        ask(client)
        assert time.monotonic() - start > 0.3
    assert _retry_after("2") == 2 and _retry_after("soon") is None and _retry_after("nan") is None
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0 and _retry_after(None) is None
    assert 3e8 < _retry_after("Fri, 01 Jan 2100 00:00:00 GMT") < 3e9


def test_answers_are_cached_by_model_version_and_input(tmp_path):
    with JudgeServer(last_line) as server:
        for _ in range(2):
            with client_of(server, tmp_path) as client:
                ask(client), ask(client, "other"), ask(client, prompt_version="v2"), ask(client, temperature=0.5)
                ask(client, max_tokens=21)
                client.model = "judge-2"
                ask(client)
        assert len(server.requests) == 6 and set(server.asked.values()) == {1, 2}  # the version is not sent
        assert client.metrics()["judge/cached"] == 6 and client.metrics()["judge/latency"] == 0
    with JudgeServer(last_line) as elsewhere, client_of(elsewhere, tmp_path) as client:
        assert ask(client) == "HOW MUCH?" and not elsewhere.requests


def test_damaged_cache_entries_are_asked_again(tmp_path, caplog):
    with JudgeServer() as server, client_of(server, tmp_path) as client:
        ask(client)
        entry = next(tmp_path.rglob("*.json"))
        for content in (b'{"answer": "fi', b"[]", b'{"answer": "other", "key": "of another"}', b"\xff"):
            entry.write_bytes(content)
            assert ask(client) == "fine" and caplog.records
            caplog.clear()
        assert len(server.requests) == 5 and json.loads(entry.read_text())["answer"] == "fine"
    assert not list(tmp_path.rglob(".*.new"))


def test_many_answers_come_in_order_with_bounded_concurrency(tmp_path):
    with JudgeServer(last_line, fault_of=lambda body: "400" if "7" in last_line(body) else "") as server:
        server.on_request = lambda count: time.sleep(0.03 if count % 3 else 0.0)
        with client_of(server, tmp_path, concurrency=3) as client:
            answers = client.ask_many(conversations(12), prompt_version="v1", max_tokens=5)
        assert server.most_at_once == 3
    assert [a if isinstance(a, str) else a.reason for a in answers] == [
        "refused" if number == 7 else f"QUESTION {number}" for number in range(12)
    ]


def test_the_same_question_at_once_is_asked_once(tmp_path):
    with JudgeServer() as server, client_of(server, tmp_path, concurrency=6) as client:
        server.on_request = lambda count: time.sleep(0.05)
        assert client.ask_many(conversations(1) * 6, prompt_version="v1", max_tokens=5) == ["fine"] * 6
        assert len(server.requests) == 1


def test_too_many_failures_abort_the_rest(tmp_path):
    with JudgeServer(fault_of=lambda body: "500") as server:
        with client_of(server, tmp_path, max_retries=0, max_failed_frac=0.2, concurrency=2) as client:
            with pytest.raises(
                JudgeAbortedError, match=r"([34]) of \1 questions .*\(\1 server_error\).*max_failed_frac = 0.2"
            ):
                client.ask_many(conversations(100), prompt_version="v1", max_tokens=5)
        # The third failure is one too many; the fourth question may have been on its way.
        assert len(server.requests) <= 4


def test_few_failures_are_borne(tmp_path):
    with JudgeServer(faults=["500", "", "500"]) as server:
        with client_of(server, tmp_path, max_retries=0, max_failed_frac=0.2, concurrency=1) as client:
            answers = client.ask_many(conversations(20), prompt_version="v1", max_tokens=5)
    assert [isinstance(answer, JudgeError) for answer in answers] == [True, False, True] + [False] * 17


def test_abort_does_not_wait_for_others_back_off(tmp_path):
    with JudgeServer(fault_of=lambda body: "401" if "3" in last_line(body) else "500") as server:
        with client_of(server, tmp_path, backoff=20.0) as client:
            start = time.monotonic()
            with pytest.raises(JudgeAbortedError, match=r"401.*check the key in \$JUDGE_API_KEY"):
                client.ask_many(conversations(4), prompt_version="v1", max_tokens=5)
            assert time.monotonic() - start < 5


@pytest.mark.parametrize("usage", [True, False])
def test_token_budget(tmp_path, usage):
    with JudgeServer(usage=usage, answer=lambda body: "x" * 20) as server:
        with client_of(server, tmp_path, token_budget=25, concurrency=1) as client:
            with pytest.raises(JudgeAbortedError, match="budget is spent: 3"):
                client.ask_many(conversations(9), prompt_version="v1", max_tokens=5)
            spent = len(server.requests)
        with client_of(server, tmp_path, token_budget=1000) as client:
            assert len(client.ask_many(conversations(9), prompt_version="v1", max_tokens=5)) == 9
        assert (spent, len(server.requests)) == (3, 9)


def test_pictures_and_half_characters_can_be_sent(tmp_path):
    content = [text_part("look \ud800"), image_part(b"\xff\xd8jpeg")]
    with JudgeServer(answer=lambda body: "a \udfff b") as server, client_of(server, tmp_path) as client:
        answer = client.ask([{"role": "user", "content": content}], prompt_version="v1", max_tokens=5)
        assert answer == "a ? b"
        assert server.requests[0].images == ["data:image/jpeg;base64,/9hqcGVn"]
        assert server.requests[0].text.strip() == "look \ud800"


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{KEY}@host/v1",
        f"https://host/v1?key={KEY}",
        "host/v1",
        "ftp://host/v1",
        "http://",
        "http://h:p/v1",
        "",
    ],
)
def test_addresses_that_cannot_be_used_or_hold_a_key(tmp_path, url):
    with pytest.raises(JudgeAbortedError, match="expected http") as caught:
        ChatClient(base_url=url, model="m", cache_dir=tmp_path)
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_settings_are_checked(tmp_path):
    settings = {"model": "", "concurrency": 0, "timeout": 0, "max_retries": -1}
    with pytest.raises(JudgeAbortedError, match="model is empty.*concurrency is 0.*timeout is 0.*max_retries is -1"):
        ChatClient(base_url="http://host/v1", cache_dir=tmp_path, **settings)


@pytest.mark.parametrize("key", [KEY, KEY + "\nX-Header: 1", KEY + "é", f"  {KEY}\n"])
def test_the_key_is_nowhere(tmp_path, monkeypatch, caplog, key):
    monkeypatch.setenv("JUDGE_API_KEY", key)
    caplog.set_level(logging.DEBUG)
    seen = []
    with JudgeServer(last_line, faults=["echo_key", "400", "500", "invalid_json", "dropped", "", "401"]) as server:
        with client_of(server, tmp_path, max_retries=0) as client:
            for number in range(7):
                try:
                    seen.append(ask(client, f"question {number}"))
                except (JudgeError, JudgeAbortedError) as error:
                    ours = error.__traceback__.tb_next  # this test's own frame holds the key
                    shown = traceback.TracebackException(type(error), error, ours, capture_locals=True)
                    seen.append("".join(shown.format()))
        seen += [repr(vars(client)), repr(client.metrics()), repr(vars(client._endpoint)), caplog.text]
        seen += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
        sendable = key.strip() == KEY
        assert len(server.requests) == (7 if sendable else 0)
        assert "[key]" in "".join(seen) if sendable else "export it again" in seen[0]
    assert KEY not in "".join(seen)
