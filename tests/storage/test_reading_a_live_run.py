"""Reading the checkpoints of a run that goes on changes nothing there, and copes with what the run does meanwhile."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mer_r1_jax.storage.checkpoints import CheckpointError, Checkpoints
from mer_r1_jax.storage.run_directory import RunDirectory
from mer_r1_jax.storage.run_lock import holder_of, liveness

OPENED = """
import sys
from mer_r1_jax.storage.run_directory import RunDirectory
with RunDirectory.open(sys.argv[1], {"a": 1}) as run:
    print("open", flush=True)
    sys.stdin.read()
"""


def arrays_of(step):
    return {"w": np.full((64,), step, np.float32)}


def tree_of(folder):
    """Everything that a write of whatever kind would change."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return [
        (str(path), os.lstat(path).st_size, os.lstat(path).st_mtime_ns, os.lstat(path).st_ctime_ns) for path in paths
    ]


@pytest.fixture
def live(tmp_path):
    """The folder of a run that another process has open, with step 1 saved and step 2 half saved."""
    folder = tmp_path / "run"
    words = [sys.executable, "-c", OPENED, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        Checkpoints(folder / "checkpoints").save(1, arrays_of(1), {})
        for name in (".saving-2", ".deleting-0", ".replaced-1"):
            shutil.copytree(folder / "checkpoints" / "1", folder / "checkpoints" / name)
        yield folder
        process.communicate("")


def test_a_reader_of_a_live_run_changes_nothing_in_its_folder(live):
    before = tree_of(live)
    checkpoints = Checkpoints(live / "checkpoints")
    assert checkpoints.restore(arrays_of(0)).step == 1
    assert checkpoints.latest_step() == 1 and checkpoints.valid_steps() == [1]
    with pytest.raises(CheckpointError):
        checkpoints.restore(arrays_of(0), step=2)
    assert Checkpoints(live / "no folder").restore(arrays_of(0)) is None
    assert liveness(live) and tree_of(live) == before


def test_whoever_writes_a_run_is_found_without_taking_its_lock(live, tmp_path):
    told = liveness(live)
    assert told.startswith("is live: process ") and told.endswith("attempt 1")
    assert holder_of(tmp_path) is None and liveness(tmp_path / "nowhere") is None
    (tmp_path / "other").mkdir()
    shutil.copy(live / ".lock", tmp_path / "other")  # left by a run that has ended
    assert holder_of(tmp_path / "other") is None
    with RunDirectory.open(tmp_path / "mine", {"a": 1}):
        assert str(os.getpid()) in holder_of(tmp_path / "mine")
        words = [sys.executable, "-c", OPENED, str(tmp_path / "mine")]
        second = subprocess.run(words, input="", capture_output=True, text=True)
        assert "is being written by process" in second.stderr  # looking has not let the lock go
    assert holder_of(tmp_path / "mine") is None


def test_the_next_start_clears_what_an_interrupted_save_has_left(tmp_path):
    with RunDirectory.open(tmp_path / "run", {"a": 1}) as run:
        run.open_checkpoints("checkpoints", 2).save(1, arrays_of(1), {})
    steps = tmp_path / "run" / "checkpoints"
    for name in (".saving-2", ".deleting-0", ".replaced-3"):
        shutil.copytree(steps / "1", steps / name)
    Checkpoints(steps).restore(arrays_of(0))
    assert len(list(steps.iterdir())) == 4
    with RunDirectory.open(tmp_path / "run", {"a": 1}) as run:
        run.open_checkpoints("checkpoints", 2)
    assert sorted(path.name for path in steps.iterdir()) == ["1", "3"]


def test_a_first_save_clears_too_where_nobody_opened_a_run(tmp_path):
    Checkpoints(tmp_path).save(1, arrays_of(1), {})
    shutil.copytree(tmp_path / "1", tmp_path / ".replaced-1")
    Checkpoints(tmp_path).save(1, arrays_of(2), {})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


SAVING = """
import sys
import numpy as np
from mer_r1_jax import faults
from mer_r1_jax.storage.run_directory import RunDirectory

def here(place, detail=""):
    if place == "checkpoint_manifest" and "saving-2" in str(detail):
        print("saving", flush=True)
        sys.stdin.readline()

with RunDirectory.open(sys.argv[1], {"a": 1}) as run:
    checkpoints = run.open_checkpoints("checkpoints", 2)
    checkpoints.save(1, {"w": np.full((64,), 1, np.float32)}, {})
    faults.here = here
    checkpoints.save(2, {"w": np.full((64,), 2, np.float32)}, {})
    print(checkpoints.valid_steps())
"""


def test_a_save_goes_on_while_its_run_is_read(tmp_path):
    words = [sys.executable, "-c", SAVING, str(tmp_path / "run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "saving\n"
        assert Checkpoints(tmp_path / "run/checkpoints").restore(arrays_of(0)).step == 1
        assert liveness(tmp_path / "run")
        assert run.communicate("\n")[0] == "[1, 2]\n"
    assert Checkpoints(tmp_path / "run/checkpoints").restore(arrays_of(0)).step == 2
