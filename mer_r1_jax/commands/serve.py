"""Opens a page on this machine that shows what a model answers: mer-r1 serve --model=DIR [--port=8000 ...]

Upload or record a clip, play it, add what is said in it, and ask slow, fast, both or auto. The text appears as it is
written; the words come with their categories and how sure the model is of each on every wheel; and, where that is asked
for, with what becomes of the answer when face, voice or subtitle is hidden.

The page loads nothing from elsewhere and is reached from this machine alone (--host opens it to others; there is no
password). One question is answered at a time. A clip is deleted once it is answered. Needs the extra `[serve]`.

Ctrl-C ends it, with exit code 0; an answer that is under way is not waited for.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import sys
import tempfile
import threading
from typing import Any

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained, left
from mer_r1_jax.config.command_line import named_values
from mer_r1_jax.config.schema import ConfigError

EXTRA = "pip install 'mer-r1-jax[serve]'"
CHUNK_TOKENS = 8  # decoded between two looks at the text so far; --set rl.decode_chunk=N changes it

_MODEL = flags.DEFINE_string("model", None, "a run's folder, its export, or a Hugging Face directory", required=True)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen at; any other than this opens the page to others")
_PORT = flags.DEFINE_integer("port", 8000, "port to listen at; 0 = any that is free", 0, 65535)
_ALLOWED = flags.DEFINE_multi_string(
    "allowed_host", [], "a further name that the page may be called by, such as that of this machine; repeatable"
)
_THRESHOLD = flags.DEFINE_float(
    "threshold", None, "of auto: confidence from which on a fast answer stands; empty = what the run fitted", 0, 1
)
_MAX_MB = flags.DEFINE_float("max_mb", 200.0, "megabytes a clip may have", 0.001)
_UPLOAD_SECONDS = flags.DEFINE_float("upload_seconds", 120.0, "seconds a clip may take to come", 0.1)
_MAX_SECONDS = flags.DEFINE_float("max_seconds", 600.0, "seconds an answer may take, compiling included", 0.1)
_WAITING = flags.DEFINE_integer("waiting", 4, "questions that may wait behind the one that is answered", 0, 1000)
_SET = flags.DEFINE_multi_string("set", [], "a configuration field to change, such as media.max_frames=8; repeatable")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    with explained(), contextlib.ExitStack() as stack:
        code = _serve(stack)
        # A signal may come while an answer is decoded or compiled for, and Python waits for threads, for minutes.
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end it before clips are deleted
        try:
            stack.close()
        except Exception as error:  # nor is that a reason to wait for a thread
            screen.say(f"not everything could be closed ({type(error).__name__}: {error})", error=True)
        finally:
            left(code)


def _clip_folder(stack: contextlib.ExitStack) -> pathlib.Path:
    """A folder for clips, deleted with `stack`; what an answer under way still writes into it is told."""
    folder = tempfile.TemporaryDirectory(prefix="mer-r1-serve-", ignore_cleanup_errors=True)

    def delete() -> None:
        folder.cleanup()
        if os.path.exists(folder.name):
            screen.say(f"{folder.name} could not be deleted, and may hold clips; delete it", error=True)

    stack.callback(delete)
    return pathlib.Path(folder.name)


def _serve(stack: contextlib.ExitStack) -> int:
    """Serves until a signal, and returns the exit code; `stack` gets what there is to close."""
    _require_extra()
    from mer_r1_jax.evaluation.run_title import model_name
    from mer_r1_jax.run.fitted_gate import fitted_gate, threshold_of
    from mer_r1_jax.run.live_answers import LiveAnswers
    from mer_r1_jax.run.policy import open_model
    from mer_r1_jax.run.served_model import ServedModel
    from mer_r1_jax.serving.app import Limits, make_app
    from mer_r1_jax.serving.listening import is_local, listening, names_of, serve

    # What a person would have to wait for in vain comes before the model is loaded.
    hosts = names_of(_HOST.value, _ALLOWED.value)
    listener = stack.enter_context(contextlib.closing(listening(_HOST.value, _PORT.value)))
    threshold = _THRESHOLD.value
    if threshold is not None or fitted_gate(_MODEL.value):
        threshold = threshold_of(_MODEL.value, threshold)
    limits = Limits(_MAX_MB.value, _UPLOAD_SECONDS.value, _MAX_SECONDS.value, _WAITING.value)
    overrides: dict[str, Any] = {"media.missing_audio": "skip", "rl.decode_chunk": CHUNK_TOKENS}
    setup, params = open_model(_MODEL.value, overrides | named_values(_SET.value))
    stack.callback(setup.source.close)
    answers = LiveAnswers(setup, params)  # what decoding holds goes with the process: it may still be decoding
    folder = _clip_folder(stack)
    served = ServedModel(answers, model_name(pathlib.Path(_MODEL.value).resolve()), threshold)
    name = f"[{_HOST.value}]" if ":" in _HOST.value else _HOST.value
    screen.say(f"http://{name}:{listener.getsockname()[1]}/ until Ctrl-C")
    if not is_local(_HOST.value):
        screen.say("others who reach this machine reach the page too: there is no password", error=True)
    # However it ends, clips are deleted: the server would let these signals end the process where it stands.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    ending = threading.Event()
    try:
        serve(make_app(served, limits, hosts, folder, ending), ending).run(sockets=[listener])
    except KeyboardInterrupt:  # as it was told to end
        return 0
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _require_extra() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"mer-r1 serve: got no {error.name}, expected the libraries of its extra; install them: {EXTRA}"
        ) from error
