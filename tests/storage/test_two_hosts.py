"""Two processes with disks of their own save one checkpoint in a bucket, each its part, and read it back."""

import json

import jax
import numpy as np
import pytest
from support.bucket_processes import WHOLE
from support.several import end_of, start_processes
from support.small_run import REPOSITORY

from mer_r1_jax.storage.checkpoints import Checkpoints

LIMIT = 400  # seconds, on a busy machine


@pytest.fixture
def ended(bucket, tmp_path):
    script = str(REPOSITORY / "tests/support/bucket_processes.py")
    pair = start_processes([script, "gs://bucket/runs/pair", str(tmp_path)], count=2, devices=2)
    return [end_of(process, LIMIT) for process in pair]


def test_two_hosts_save_their_parts_and_another_number_of_devices_reads_them(ended, bucket):
    assert [status for status, _, _ in ended] == [0, 0], "".join(told[-4000:] for _, _, told in ended)
    for _, output, _ in ended:
        assert json.loads(output.strip().splitlines()[-1]) == {"step": 2, "host": {"step": 2}, "same": [True, True]}
    written = {name for method, name in bucket.requests if method == "POST"}
    for process in (0, 1):
        assert any(f"/arrays/ocdbt.process_{process}/" in name for name in written)
    checkpoints = Checkpoints("gs://bucket/runs/pair/checkpoints")
    assert checkpoints.valid_steps() == [2]
    restored = checkpoints.restore({"w": jax.ShapeDtypeStruct(WHOLE.shape, WHOLE.dtype)})
    np.testing.assert_array_equal(restored.arrays["w"], 2 * WHOLE)
    logs = {name: bucket.objects[f"runs/pair/logs/attempt_1/{name}"].data for name in ("log.txt", "log_1.txt")}
    assert b"process 0 speaks" in logs["log.txt"] and b"process 1 speaks" in logs["log_1.txt"]
