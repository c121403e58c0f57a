"""Checkpoints under a disk's own faults: a full disk, odd folders, and SIGKILL at every durable operation."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest
from support.full_file import largest_file
from support.steps import MANIFEST, restored_step, save_steps, small_arrays

from mer_r1_jax.storage.checkpoints import CheckpointError, Checkpoints

TESTS = str(Path(__file__).parents[1])


def test_a_step_without_its_manifest_is_named_and_an_empty_folder_is_none(tmp_path):
    save_steps(tmp_path, 1)
    (tmp_path / "1" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="all 1 are damaged:\n  1: it has no manifest.json"):
        restored_step(tmp_path)
    # What never was a save of ours is no reason to refuse a new run.
    (tmp_path / "other" / "7").mkdir(parents=True)
    assert restored_step(tmp_path / "other") is None


def test_a_folder_of_checkpoints_that_cannot_be_listed_is_no_empty_one(tmp_path):
    (tmp_path / "checkpoints").symlink_to("checkpoints")
    with pytest.raises(CheckpointError, match="cannot be read: .*what is saved there is not taken for lost"):
        Checkpoints(tmp_path / "checkpoints").restore(small_arrays(0))


def test_failing_disk_leaves_earlier_checkpoints_and_says_what_to_do(tmp_path):
    checkpoints = save_steps(tmp_path, 1, 2)
    noise = {"noise": jax.random.bits(jax.random.key(0), (1 << 20,))}  # 4 MiB that do not compress
    with largest_file(1 << 20), pytest.raises(CheckpointError) as caught:
        checkpoints.save(3, noise, {})
    message = str(caught.value)
    assert "step 3 could not be saved" in message and "GiB free" in message
    assert "Earlier checkpoints are unharmed: [1, 2]" in message and "run the same command again" in message
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "2"]
    assert restored_step(tmp_path) == 2
    checkpoints.save(3, noise, {})  # with room again, the same object goes on
    assert checkpoints.valid_steps() == [1, 2, 3]


# Imports once, then forks a child per kill point: the n-th durable operation of a save that replaces or removes others.
SWEEP = """
import os, pathlib, shutil, signal, sys
sys.path.insert(0, {tests!r})
from support.steps import HOST, Checkpoints, small_arrays

def count_down_on(owner, name):
    original = getattr(owner, name)
    def counted(*args, **kwargs):
        global remaining
        remaining -= 1
        if remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, counted)

for kill_at in range(1, 200):
    folder = pathlib.Path({folder!r}) / str(kill_at)
    shutil.copytree({start!r}, folder)
    child = os.fork()
    if child == 0:
        remaining = kill_at
        checkpoints = Checkpoints(folder, max_to_keep=1)
        for owner, name in ((os, "fsync"), (os, "replace"), (pathlib.Path, "rename"), (shutil, "rmtree"),
                            (os, "rmdir"), (pathlib.Path, "mkdir")):
            count_down_on(owner, name)
        checkpoints.save(2, small_arrays(2), HOST | {{"step": 2}})
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        sys.exit(0 if os.WEXITSTATUS(status) == 0 else 1)
sys.exit(2)
"""


def test_sigkill_at_every_durable_operation_leaves_a_valid_checkpoint(tmp_path):
    # Step 1 is old, step 2 is replaced, step 3 is an abandoned future: the save does all that a save can do.
    save_steps(tmp_path / "start", 1, 2, 3)
    script = SWEEP.format(tests=TESTS, folder=str(tmp_path / "killed"), start=str(tmp_path / "start"))
    one_device = os.environ | {"XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300, env=one_device)
    killed = sorted((tmp_path / "killed").iterdir(), key=lambda path: int(path.name))
    print(f"{len(killed)} kill points")
    assert len(killed) > 20
    outcomes = [restored_step(directory) for directory in killed]
    assert set(outcomes) == {2, 3} and outcomes[-1] == 2
    assert outcomes == sorted(outcomes, reverse=True)  # once the new step is in place, it stays
    for directory in killed:
        Checkpoints(directory).clear()  # as the run's next start does
        assert all(entry.name.isdigit() for entry in directory.iterdir()), "leftovers of the interrupted save"


def test_sigkill_at_any_moment_of_repeated_saves(tmp_path):
    script = f"""
        import sys
        sys.path.insert(0, {TESTS!r})
        from support.steps import HOST, Checkpoints, small_arrays
        checkpoints = Checkpoints(sys.argv[1], max_to_keep=2)
        for step in range(1, 10_000):
            checkpoints.save(step, small_arrays(step), HOST | {{"step": step}})
            print(step, flush=True)
    """
    for round_number in range(3):
        directory = tmp_path / f"round-{round_number}"
        command = [sys.executable, "-c", textwrap.dedent(script), str(directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if int(line) == 3 + round_number:
                    break
            process.kill()
            printed = [int(line)] + [int(rest) for rest in process.stdout if rest.endswith("\n")]
        assert restored_step(directory) in (printed[-1], printed[-1] + 1)


def test_unwritable_checkpoint_folder_is_a_clear_error(tmp_path):
    checkpoints = save_steps(tmp_path / "checkpoints", 1)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file where the folder was")
    with pytest.raises(CheckpointError, match="step 2 could not be saved"):
        checkpoints.save(2, small_arrays(2), {})
    assert os.listdir(tmp_path) == ["checkpoints"]
