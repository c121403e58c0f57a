"""The page's server in a thread of the test process, and a stand-in for the model behind it."""

from __future__ import annotations

import contextlib
import json
import threading
import time

import httpx

from mer_r1_jax.serving.app import Limits, make_app
from mer_r1_jax.serving.listening import listening, names_of, serve


class StandIn:
    """Answers with the clip's size. `hold` keeps it from answering until it is set; `asked` is what it was asked."""

    about = {"model": "stand-in", "wheels": ["one", "two"], "question": "?", "threshold": None}

    def __init__(self):
        self.asked, self.ended = [], []
        self.hold = threading.Event()
        self.hold.set()
        self.error = None

    def answer(self, asked, tell):
        self.asked.append(asked)
        try:  # from here on: whoever asked may be gone already, and then the first word ends it
            tell({"kind": "clip", "bytes": asked.clip.stat().st_size})
            while not self.hold.wait(0.01):
                tell({"kind": "text", "text": "still"})
            if self.error:
                raise self.error
            tell({"kind": "answer", "answer": ["sad"]})
        finally:
            self.ended.append(asked)

    def explain(self, error, asked):
        return f"{asked.name}: {error}" if isinstance(error, ValueError) else None


@contextlib.contextmanager
def serving(answering, folder, **limits):
    """The address of a server that answers with `answering`; its clips lie in `folder`."""
    with contextlib.closing(listening("127.0.0.1", 0)) as listener:
        ending = threading.Event()
        app = make_app(answering, Limits(**limits), names_of("127.0.0.1"), folder, ending)
        server = serve(app, ending)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def ask(address, body=b"clip", headers=(), **query):
    """(status, events or refusal) of a question."""
    headers = {"content-type": "application/octet-stream"} | dict(headers)
    done = httpx.post(f"{address}/answer", params=query, content=body, headers=headers, timeout=30)
    if done.status_code != 200:
        return done.status_code, done.text
    return 200, [json.loads(line) for line in done.text.splitlines()]


def until(condition, seconds=10.0):
    """Waits until something holds, and fails where it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
