"""The training command with its output in a bucket: killed, gone on with on another host, the same as left alone."""

import json
import shutil

import jax
import numpy as np
import pytest
from support.killing import train
from support.run_contents import contents, differences

from mer_r1_jax.run.policy import PolicyError, load_policy, saved_config
from mer_r1_jax.storage.bucket import fetch_folder
from mer_r1_jax.storage.checkpoints import HOST_STATE, CheckpointError, Checkpoints

SETTINGS = ("--config.sft.max_steps=0", "--config.rl.max_steps=3", "--config.train.save_steps=1")
NOT_EVALUATED = "--config.data.eval_path="
RUN = "gs://bucket/runs/small"
LAST = 3


@pytest.fixture(scope="module")
def alone(small_folder, compiled, tmp_path_factory):
    """The folder of the same run on a disk, left alone."""
    output = tmp_path_factory.mktemp("alone") / "runs"
    assert train(small_folder, output, compiled, *SETTINGS, NOT_EVALUATED).returncode == 0
    return output / "small"


@pytest.fixture
def start(server, small_folder, compiled, tmp_path):
    """Starts the run on a host, which has a disk of its own."""

    def start(host, *arguments, **interrupt):
        places = ("--config.train.output_dir=gs://bucket/runs", f"--config.train.local_dir={tmp_path / host}")
        flags = (*SETTINGS, NOT_EVALUATED, *places, *arguments)
        return train(small_folder, tmp_path / f"{host}-log", compiled, *flags, **interrupt)

    return start


def test_killed_on_one_host_and_gone_on_with_on_another_ends_as_left_alone(bucket, start, alone, tmp_path):
    killed = start("first", place="checkpoint_commit 3")  # arrays are there, and do not count
    assert killed.returncode == -9, killed.stderr[-3000:]
    assert Checkpoints(f"{RUN}/checkpoints").valid_steps() == [1]  # the first save is the reference
    ended = start("second")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "going on after rl step 1" in ended.stderr

    fetched = tmp_path / "fetched"
    fetch_folder(RUN, fetched)
    assert sorted(int(path.name) for path in (fetched / "checkpoints").iterdir()) == [2, 3]
    shutil.rmtree(fetched / "checkpoints")
    for name in ("checkpoints", "eval"):  # a bucket has no empty folders
        (fetched / name).mkdir(exist_ok=True)
    expected = {name: value for name, value in contents(alone).items() if not name.startswith("checkpoint")}
    assert differences(expected, contents(fetched)) == []
    assert {name.split(":")[0] for name in expected} == {"export", "completions", "metrics"}
    assert_same_state(alone, LAST)
    assert sorted(path.name for path in fetched.glob("logs/*")) == ["attempt_1", "attempt_2"]
    assert (fetched / "report.html").is_file() and not list((tmp_path / "second").rglob("*.partial"))


def test_policy_of_a_run_in_a_bucket_is_that_of_the_same_run_on_a_disk(bucket, alone):
    put_folder(bucket, "runs/small", alone)
    restored = Checkpoints(alone / "checkpoints").restore(shapes_of(alone, LAST), step=LAST)
    Checkpoints(f"{RUN}/checkpoints").save(LAST, restored.arrays, restored.host)
    (_, params, _), (_, expected, _) = load_policy(RUN), load_policy(alone)
    assert saved_config(RUN) == saved_config(alone)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    with pytest.raises(CheckpointError, match=r"gs://bucket/runs/small/checkpoints holds no valid checkpoint"):
        for name in [name for name in bucket.objects if name.endswith("manifest.json")]:
            del bucket.objects[name]
        load_policy(RUN)
    with pytest.raises(PolicyError, match=r"gs://bucket/nothing/config.json: no run's configuration"):
        load_policy("gs://bucket/nothing")


def put_folder(bucket, name, folder):
    for path in folder.rglob("*"):
        if path.is_file() and "checkpoints" not in path.parts:
            bucket.put(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def shapes_of(run, step):
    described = json.loads((run / "checkpoints" / str(step) / HOST_STATE).read_text())["arrays"]
    return {name: jax.ShapeDtypeStruct(spec["shape"], spec["dtype"]) for name, spec in described.items()}


def assert_same_state(alone, step):
    expected = Checkpoints(alone / "checkpoints").restore(shapes_of(alone, step), step=step)
    found = Checkpoints(f"{RUN}/checkpoints").restore(shapes_of(alone, step), step=step)
    assert found.host == expected.host
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(np.asarray(found.arrays[name]), np.asarray(array), err_msg=name)
