"""The training command with its output in a bucket: killed, gone on with on another host, the same as left alone."""

import json

import jax
import numpy as np
import pytest
from support.killing import train
from support.run_contents import contents, differences
from support.small_fixtures import compiled, small_folder  # noqa: F401

from mer_r1_jax.bucket.copies import fetch_folder
from mer_r1_jax.training.bucket_checkpoints import BucketCheckpoints
from mer_r1_jax.training.checkpoints import HOST_STATE, Checkpoints
from mer_r1_jax.training.metrics import read_metrics
from mer_r1_jax.training.signals import EXIT_SAVED

STEPS = ("--config.sft.max_steps=3", "--config.rl.max_steps=2", "--config.train.save_steps=1")
RUN = "gs://bucket/runs/small"
LAST = 5  # steps of both phases
CHECKPOINTS = "mer_r1_jax.training.bucket_checkpoints:BucketCheckpoints"


@pytest.fixture(scope="module")
def alone(small_folder, compiled, tmp_path_factory):  # noqa: F811
    """The folder of the same run on a disk, left alone."""
    output = tmp_path_factory.mktemp("alone") / "runs"
    assert train(small_folder, output, compiled, *STEPS).returncode == 0
    return output / "small"


@pytest.fixture
def start(server, small_folder, compiled, tmp_path):  # noqa: F811
    """Starts the run on a host, which has a disk of its own."""

    def start(host, *arguments, **interrupt):
        places = ("--config.train.output_dir=gs://bucket/runs", f"--config.train.local_dir={tmp_path / host}")
        return train(small_folder, tmp_path / f"{host}-log", compiled, *STEPS, *places, *arguments, **interrupt)

    return start


def test_killed_on_one_host_and_gone_on_with_on_others_ends_as_left_alone(bucket, start, alone, tmp_path):
    killed = [
        start("first", place=f"before {CHECKPOINTS}._commit 2"),  # arrays are there, and do not count
        start("second", place=f"before {CHECKPOINTS}._collect_garbage 3"),
        start("second", place="after mer_r1_jax.training.bucket_checkpoints:save_arrays 1"),
    ]
    assert [ended.returncode for ended in killed] == [-9] * 3, killed[-1].stderr[-3000:]
    stopped = start("third", place="after mer_r1_jax.training.metrics:MetricsWriter.sync 1", signal_name="SIGTERM")
    assert stopped.returncode == EXIT_SAVED, stopped.stderr[-3000:]
    ended = start("fourth")
    assert ended.returncode == 0, ended.stderr[-3000:]

    fetched = tmp_path / "fetched"
    fetch_folder(RUN, fetched)
    (fetched / "env.json").unlink()
    moved = {path.name: path.rename(tmp_path / path.name) for path in (fetched / "checkpoints", fetched / "reference")}
    assert sorted(int(path.name) for path in moved["checkpoints"].iterdir()) == [4, 5]
    (fetched / "checkpoints").mkdir()
    expected = {name: value for name, value in contents(alone).items() if not name.startswith("checkpoint")}
    assert differences(expected, contents(fetched)) == [] and len(expected) > 10
    assert_same_state(alone, LAST)
    assert [path.name for path in sorted(fetched.glob("logs/*"))] == [f"attempt_{number}" for number in range(1, 6)]
    assert (fetched / "report.html").is_file() and not list((tmp_path / "fourth").rglob("*.safetensors.partial"))


def assert_same_state(alone, step):
    described = json.loads((alone / "checkpoints" / str(step) / HOST_STATE).read_text())["arrays"]
    shapes = {name: jax.ShapeDtypeStruct(spec["shape"], spec["dtype"]) for name, spec in described.items()}
    expected = Checkpoints(alone / "checkpoints").restore(shapes, step=step)
    found = BucketCheckpoints(f"{RUN}/checkpoints").restore(shapes, step=step)
    assert found.host == expected.host
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(np.asarray(found.arrays[name]), np.asarray(array), err_msg=name)
