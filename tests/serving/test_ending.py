"""A served page is ended by a real signal, in the middle of an answer, as whoever opened it ends it."""

import json
import os
import shutil
import signal
import subprocess
import sys

import httpx
import pytest
from support.small_fixtures import compiled, small, small_folder, trained  # noqa: F401
from support.small_run import command, environment

from mer_r1_jax.run.policy import write_settings


@pytest.fixture(scope="module")
def exported(small, trained, tmp_path_factory):  # noqa: F811
    """The trained tiny model as a directory of Hugging Face's."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    small.backbone.save(folder, trained, source=small.tokenizer_path, asked=lambda: False)
    write_settings(folder, small.config)
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_signal_ends_the_page_at_once_and_quietly(exported, small_folder, tmp_path, number, code):  # noqa: F811
    clips = tmp_path / "clips"  # while they are answered
    clips.mkdir()
    errors = tmp_path / "errors"
    with errors.open("w") as stderr:
        page = subprocess.Popen(
            command("serve.py", f"--model={exported}", "--port=0", "--set=rl.decode_chunk=1"),
            env=environment() | {"TMPDIR": str(clips)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        address = page.stdout.readline().partition("/ until")[0]
        assert address.startswith("http://127.0.0.1:"), errors.read_text()
        told = []
        with httpx.stream(
            "POST",
            f"{address}/answer?hide=1",
            content=(small_folder / "clips/0.mp4").read_bytes(),
            headers={"content-type": "application/octet-stream"},
            timeout=300,
        ) as answer:
            for line in answer.iter_lines():
                told.append(json.loads(line))
                if told[-1]["kind"] == "begins":
                    os.kill(page.pid, number)
        assert page.wait(60) == code
    finally:
        page.kill()
        page.wait()
        page.stdout.close()
    assert told[-1]["kind"] == "error" and "the program that answers is ended" in told[-1]["text"]
    assert errors.read_text() == ""
    left = [path.name for path in clips.iterdir() if path.name.startswith("mer-r1-serve")]
    shutil.rmtree(clips)
    assert left == []


# The command with nothing served: a thread that answers for longer than the test waits, and what cannot be closed.
ENDING = """
import os, sys, threading, time
from mer_r1_jax.commands import serve

def refuse(*_, **__):
    raise OSError(39, "Directory not empty")  # as where a file has just been written into it

def served(stack):
    threading.Thread(target=time.sleep, args=(600,)).start()
    if sys.argv[1] == "closing":
        stack.callback(lambda: 1 / 0)
    else:
        (serve._clip_folder(stack) / "clip").write_bytes(b"clip")
        os.rmdir = refuse
    return 7

serve._serve = served
serve.main(["serve"])
"""


@pytest.mark.parametrize(
    ("trouble", "told"),
    [("closing", "not everything could be closed (ZeroDivisionError: division by zero)"), ("writing", "delete it")],
)
def test_what_cannot_be_closed_does_not_keep_the_page_from_ending(tmp_path, trouble, told):
    """As where the answer that is under way still writes into the folder of clips."""
    ended = subprocess.run(
        [sys.executable, "-c", ENDING, trouble],
        env=environment() | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 7, ended.stderr
    assert told in ended.stderr and "Traceback" not in ended.stderr
