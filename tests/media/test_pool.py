"""Decoding processes that hang, die, exit or babble: each costs at most its clip, and a clip costs no memory of others.

What holds of any child process is in tests/test_process_pool.py.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.media_files import numbered_pictures, write_sound, write_video
from support.process_tree import descendants, gone

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.decoded import decode_file
from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.media.pool import WorkerPool

MEDIA = MediaConfig(video_min_pixels=784, video_max_pixels=4 * 784)

# The real worker, told by a clip's name to go wrong in a certain way before decoding it.
TROUBLED = """
import os, signal, sys, time
from mer_r1_jax.media import pool as worker
decode = worker.decode_file
def decode_file(path, **job):
    name = os.path.basename(path)
    if name.startswith("hang"):
        time.sleep(600)
    if name.startswith("exit"):
        os._exit(0)
    if name.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("crash"):
        os.abort()
    if name.startswith("raise"):
        raise RuntimeError("an unforeseen bug")
    if name.startswith("print"):
        os.write(1, b"a codec's remark on standard output\\n")
    if name.startswith("once") and not os.path.exists(path + ".seen"):
        open(path + ".seen", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(path=path, **job)
worker.decode_file = decode_file
worker.main()
"""


def job(path: Path) -> dict:
    return dict(path=str(path), kind="video", media=dataclasses.asdict(MEDIA), factor=28, n_mels=128)


@pytest.fixture
def clip(tmp_path):
    """Makes a clip of a given name."""
    return lambda name: write_video(tmp_path / f"{name}.mp4", numbered_pictures(8))


@pytest.fixture
def pool():
    pool = WorkerPool(1, 5.0, (sys.executable, "-c", TROUBLED))
    yield pool
    pool.close()


def children(pool: WorkerPool) -> list[int]:
    return [process for child in pool._pool._running for process in descendants(child._process.pid)]


def test_a_worker_returns_what_decoding_returns(pool, clip):
    path = clip("good")
    entry = pool.decode(job(path))
    expected = decode_file(str(path), "video", MEDIA, 28, 128)
    np.testing.assert_array_equal(entry.arrays["frames"], expected.arrays["frames"])
    assert entry.facts == expected.facts


@pytest.mark.parametrize(
    ("trouble", "word"), [("exit", "exit status 0"), ("kill", "exit status -9"), ("crash", "exit status -6")]
)
def test_a_worker_that_ends_is_replaced_and_its_clip_named(pool, clip, trouble, word):
    pool.decode(job(clip("good")))
    (first,) = children(pool)
    with pytest.raises(MediaError) as caught:
        pool.decode(job(clip(trouble)))
    assert caught.value.reason == "worker_died"
    assert f"{trouble}.mp4" in str(caught.value) and word in str(caught.value)
    assert gone(first)
    assert pool.decode(job(clip("good"))).arrays["frames"].shape[0] == 4
    assert children(pool) != [first]


def test_a_bug_in_the_worker_is_quoted(pool, clip):
    with pytest.raises(MediaError, match="raise.mp4: .*RuntimeError: an unforeseen bug") as caught:
        pool.decode(job(clip("raise")))
    assert caught.value.reason == "worker_died"


def test_a_worker_killed_for_anothers_sake_costs_nothing(pool, clip):
    assert pool.decode(job(clip("once"))).arrays["frames"].shape[0] == 4


def test_what_codecs_print_does_not_matter(pool, clip):
    assert pool.decode(job(clip("print"))).arrays["frames"].shape[0] == 4


def test_a_hanging_clip_times_out_and_is_named(clip):
    pool = WorkerPool(1, 1.0, (sys.executable, "-c", TROUBLED))
    try:
        pool.decode(job(clip("good")))  # the process has started
        (first,) = children(pool)
        begin = time.monotonic()
        with pytest.raises(MediaError, match="hang.mp4: no end of decoding after 1 s.*media.decode_timeout") as caught:
            pool.decode(job(clip("hang")))
        assert caught.value.reason == "timeout"
        assert 0.9 < time.monotonic() - begin < 8.0
        assert gone(first)
    finally:
        pool.close()


@pytest.mark.parametrize("program", ["print('hello there')", "raise SystemExit('no module named av')"])
def test_a_program_that_is_no_worker_is_an_error_and_not_a_hang(clip, program):
    pool = WorkerPool(1, 5.0, (sys.executable, "-c", program))
    try:
        with pytest.raises(MediaError) as caught:
            pool.decode(job(clip("good")))
        assert caught.value.reason == "worker_died"
    finally:
        pool.close()


# A process that answers with half of what it announced, and then does as it is told.
HALF = """
import json, os, signal, sys, time
os.write(1, b'{"job": "ready"}\\n')
number = json.loads(sys.stdin.buffer.readline())["job"]
os.write(1, json.dumps({"job": number, "size": 1000}).encode() + b'\\n' + bytes(500))
%s
"""


@pytest.mark.parametrize(
    ("then", "reason", "word"),
    [
        ("sys.exit(0)", "worker_died", "exit status 0"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "worker_died", "exit status -9"),
        ("raise MemoryError('in the midst')", "worker_died", "MemoryError: in the midst"),
        ("os.write(1, bytes(500))", "worker_died", "too few|checksum"),
        ("time.sleep(600)", "timeout", "no end of decoding after 2 s"),
    ],
)
def test_half_an_answer_is_no_clip(clip, then, reason, word):
    pool = WorkerPool(1, 2.0, (sys.executable, "-c", HALF % then))
    begin = time.monotonic()
    try:
        with pytest.raises(MediaError, match=f"good.mp4: .*({word})") as caught:
            pool.decode(job(clip("good")))
    finally:
        pool.close()
    assert caught.value.reason == reason
    assert time.monotonic() - begin < 60.0 and not children(pool)


def test_bombs_end_as_refused_clips(tmp_path, clip):
    """What needs more memory than a process may take costs that clip, and not the machine."""
    Image.new("RGB", (8000, 8000)).save(tmp_path / "picture.png", compress_level=1)
    write_video(tmp_path / "video.mkv", np.zeros((2, 4608, 8192, 3), np.uint8), codec="mjpeg", pix_fmt="yuvj420p")
    write_sound(tmp_path / "sound.flac", np.zeros((1, 192_000 * 120), np.float32), rate=192_000, codec="flac")
    small = dataclasses.asdict(dataclasses.replace(MEDIA, decode_memory_mb=128))
    pool = WorkerPool(1, 60.0)
    try:
        for name, kind in (("picture.png", "image"), ("video.mkv", "video"), ("sound.flac", "audio")):
            with pytest.raises(MediaError) as caught:
                pool.decode(job(tmp_path / name) | {"kind": kind, "media": small})
            # Where not even a small object can be made, the interpreter crashes: the process is replaced.
            assert caught.value.reason in (("too_large", "worker_died") if kind == "audio" else ("too_large",))
            assert name in str(caught.value) and "media.decode_memory_mb" in str(caught.value)
        assert pool.decode(job(clip("good")) | {"media": small}).arrays["frames"].shape[0] == 4
        (process,) = children(pool)
        taken = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if "VmHWM" in line)
        assert int(taken.split()[1]) < 500 << 10
        assert (
            pool.decode(job(tmp_path / "picture.png") | {"kind": "image"}).arrays["frames"].size
        )  # by default: enough
    finally:
        pool.close()


def test_a_worker_is_light():
    """It starts often and many at a time: neither jax nor transformers nor torch may come along."""
    program = "import sys, mer_r1_jax.media.pool; print(sorted({'jax', 'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
