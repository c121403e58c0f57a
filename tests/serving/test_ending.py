"""A served page is ended by a real signal, in the middle of an answer, as whoever opened it ends it."""

import json
import os
import shutil
import signal
import subprocess

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
