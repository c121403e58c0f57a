"""`mer-r1 bench` refuses what it would not look at, and a size that only a card holds where there is no card."""

import subprocess
import sys

import pytest
from support.small_run import REPOSITORY, environment


def bench(*words):
    command = [sys.executable, str(REPOSITORY / "experiments" / "bench.py"), *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--platform=gpu", "--threads=1"], "--threads with --platform=gpu, which does not look at it"),
        (["--size=tiny"], "--size with --platform=cpu, which does not look at it"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(words, said):
    done = bench(*words)
    assert done.returncode == 1 and said in done.stderr + done.stdout


def test_a_side_without_a_card_ends_before_it_makes_anything(tmp_path):
    command = [sys.executable, "-m", "mer_r1_jax.peers.one_side", "ours", "3b", "1", str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "got a cpu for --size=3b, expected a GPU" in done.stderr
    assert not (tmp_path / "ours.json").exists()
