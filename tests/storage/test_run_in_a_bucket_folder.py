"""A run's folder in a bucket: given back, taken up on another host, and owned by the latest start."""

import json
import logging
import os

import numpy as np
import pytest

from mer_r1_jax.storage.bucket import BucketError
from mer_r1_jax.storage.checkpoints import CheckpointError
from mer_r1_jax.storage.run_directory import RunDirectory, RunDirectoryError
from mer_r1_jax.storage.working_copy import TakenOverError

ADDRESS = "gs://bucket/runs/one"
CONFIG = {"name": "one", "rl": {"beta": 0.04}}


@pytest.fixture
def opened(tmp_path):
    """Opens the run on a host, which has a disk of its own."""
    return lambda host, **changes: RunDirectory.open(ADDRESS, CONFIG | changes, local_dir=tmp_path / host)


def names(bucket):
    return {name.removeprefix("runs/one/") for name in bucket.objects}


def test_another_host_goes_on_with_what_was_given_back(bucket, opened):
    with opened("a") as run:
        assert not run.resumed and run.attempt == 1
        run.metrics_file.write_text("1\n")
        logging.getLogger("mer_r1_jax.anything").warning("attempt 1 speaks")
        run.publish()
        run.metrics_file.write_text("1\n2\n")
    assert {"config.json", "env.json", "metrics.jsonl", "owner.json", "logs/attempt_1/log.txt"} <= names(bucket)
    assert b"attempt 1 speaks" in bucket.objects["runs/one/logs/attempt_1/log.txt"].data
    with opened("b") as run:
        assert run.resumed and run.attempt == 2 and run.metrics_file.read_text() == "1\n2\n"
        assert (run.attempt_logs.parent / "attempt_1/log.txt").is_file()


def test_a_host_keeps_what_it_could_not_give_back_unless_another_was_there_since(bucket, opened, caplog):
    run = opened("a")
    run.metrics_file.write_text("killed before it was given back\n")
    run.close()  # as a kill does, but for the lock
    run = opened("a")
    assert run.attempt == 2 and run.metrics_file.read_text().startswith("killed")
    run.close()
    with opened("b") as run:
        run.metrics_file.write_text("of b\n")
    with caplog.at_level(logging.WARNING), opened("a") as run:
        assert run.attempt == 4 and run.metrics_file.read_text() == "of b\n"
    assert "is replaced by what that holds" in caplog.text


def test_the_latest_start_owns_the_run(bucket, opened):
    first = opened("a")
    checkpoints = first.open_checkpoints("checkpoints", 2)
    checkpoints.save(1, {"a": np.arange(3)}, {})
    second = opened("b")
    before = dict(bucket.objects)
    first.metrics_file.write_text("late\n")
    with pytest.raises(TakenOverError, match=r"gs://bucket/runs/one was taken over by a later start.*attempt 2"):
        first.publish()
    assert bucket.objects == before
    with pytest.raises(CheckpointError, match="taken over by a later start"):
        checkpoints.save(2, {"a": np.arange(3)}, {})
    assert second.open_checkpoints("checkpoints", 2).valid_steps() == [1]
    first.close()
    with second:
        second.publish()


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_bucket(bucket, opened, caplog):
    with pytest.raises(ZeroDivisionError), caplog.at_level(logging.WARNING), opened("a"):
        bucket.refuse = lambda method, name: 403
        raise ZeroDivisionError
    assert "the last files of the run are not in the bucket" in caplog.text
    bucket.refuse = lambda method, name: None
    with pytest.raises(BucketError, match="cannot be"), opened("b"):
        bucket.refuse = lambda method, name: 403


def test_files_are_given_back_oldest_first_and_unfinished_ones_not_at_all(bucket, opened):
    with opened("a") as run:
        for age, name in enumerate(["export/hf/mer_r1.json", "export/hf/model.safetensors", "eval/a.json"]):
            file = run.path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x" * (1 << 24 if name.endswith("safetensors") else 0) + b"y")
            os.utime(file, ns=((1000 - age) * 10**9,) * 2)
        for name in ("export/hf.partial/model", ".config.json.new", "checkpoints/1/x"):
            (run.path / name).parent.mkdir(parents=True, exist_ok=True)
            (run.path / name).write_bytes(b"z")
        bucket.requests.clear()
        run.publish()
        written = [name for method, name in bucket.requests if method == "POST" and name]
        assert list(dict.fromkeys(written)) == [
            f"runs/one/{name}" for name in ("eval/a.json", "export/hf/model.safetensors", "export/hf/mer_r1.json")
        ]
        assert len(bucket.objects["runs/one/export/hf/model.safetensors"].data) == (1 << 24) + 1


def test_other_things_and_other_configurations_are_refused_by_name(bucket, opened, tmp_path):
    bucket.put("runs/one/photo.jpg", b"mine")
    with pytest.raises(RunDirectoryError, match=r"gs://bucket/runs/one is not a run of mer_r1_jax but holds photo.jpg"):
        opened("a")
    assert names(bucket) == {"photo.jpg"}
    bucket.objects.clear()
    opened("a").__exit__(None, None, None)
    with pytest.raises(RunDirectoryError, match=r"gs://bucket/runs/one holds a run with another configuration"):
        opened("b", rl={"beta": 0.1})
    assert json.loads(bucket.objects["runs/one/config.json"].data)["rl"]["beta"] == 0.04
    with opened("a"), pytest.raises(RunDirectoryError, match=r"gs://bucket/runs/one is being written by another"):
        opened("a")
