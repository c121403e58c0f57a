"""Checkpoints in a bucket that are damaged, or read while their run goes on."""

import hashlib
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mer_r1_jax.storage.checkpoints import CheckpointError, Checkpoints
from mer_r1_jax.storage.run_lock import liveness

RUN = "gs://bucket/runs/one"
ADDRESS = f"{RUN}/checkpoints"
MANIFEST = "runs/one/checkpoints/2/manifest.json"
ODD = {
    "empty": b"",
    "lists 60000 deep": b"[" * 60_000,
    "objects 60000 deep": b'{"a":' * 60_000 + b"1" + b"}" * 60_000,
    "a list": b"[1]",
    "5000 digits": b'{"step": ' + b"9" * 5000 + b"}",
    "UTF-16": '{"step": 2}'.encode("utf-16"),
}


def arrays_of(step):
    return {"w": np.full((64,), step, np.float32)}


@pytest.fixture
def saved(bucket):
    """The bucket with steps 1 and 2."""
    checkpoints = Checkpoints(ADDRESS)
    for step in (1, 2):
        checkpoints.save(step, arrays_of(step), {"step": step})
    return bucket


def restored_step():
    restored = Checkpoints(ADDRESS).restore(arrays_of(0))
    np.testing.assert_array_equal(restored.arrays["w"], arrays_of(restored.step)["w"])
    return restored.step


def sign(bucket, **changes):
    """Puts step 2's manifest anew, its hash right whatever it says."""
    content = json.loads(bucket.objects[MANIFEST].data) | changes
    content = {name: content[name] for name in ("step", "save", "objects")}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    bucket.put(MANIFEST, json.dumps(content | {"sha256": digest}).encode())


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_a_manifest_that_is_none_makes_its_step_damaged(saved, caplog, content):
    saved.put(MANIFEST, content)
    with caplog.at_level(logging.WARNING):
        assert restored_step() == 1
    assert "2 is damaged and ignored: manifest.json cannot be read as a manifest" in caplog.text
    before = dict(saved.objects)
    Checkpoints(ADDRESS).clear()
    assert saved.objects == before  # nobody knows what is left over


@pytest.mark.parametrize(
    "changes",
    [{"save": "../1"}, {"save": 3}, {"objects": []}, {"objects": {"host.json": 3}}, {"step": "2"}, {"step": True}],
    ids=str,
)
def test_a_manifest_with_values_of_another_type_makes_its_step_damaged(saved, caplog, changes):
    sign(saved, **changes)
    with caplog.at_level(logging.WARNING):
        assert restored_step() == 1
    assert "2 is damaged and ignored: manifest.json" in caplog.text


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_a_host_state_that_is_none_makes_its_step_damaged(saved, caplog, content):
    name = next(name for name in saved.objects if name.startswith("runs/one/checkpoints/2/") and "host.json" in name)
    saved.put(name, content)
    described = json.loads(saved.objects[MANIFEST].data)["objects"]
    # As the bucket itself would state it of such an object.
    stated = {"bytes": len(content), "crc32c": None, "md5": None}
    sign(saved, objects=described | {"host.json": stated})
    with caplog.at_level(logging.WARNING):
        assert restored_step() == 1
    assert "2 is damaged and ignored: host.json cannot be read as a host state" in caplog.text


@pytest.mark.parametrize("part", ["manifest.json", "host.json", "/d/"])
def test_an_object_that_may_not_be_read_makes_its_step_damaged(saved, caplog, part):
    saved.refuse = lambda method, name: 403 if method == "GET" and "checkpoints/2/" in name and part in name else None
    with caplog.at_level(logging.WARNING):
        assert restored_step() == 1
    assert "checkpoints/2 is damaged and ignored" in caplog.text and "cannot be read" in caplog.text


def test_all_steps_damaged_are_refused_by_name(saved):
    saved.put(MANIFEST, b"[" * 60_000)
    gone = next(name for name in saved.objects if "checkpoints/1/" in name and "host.json" in name)
    del saved.objects[gone]
    with pytest.raises(CheckpointError, match="all 2 are damaged") as caught:
        restored_step()
    assert "1: host.json is missing" in str(caught.value) and "2: manifest.json" in str(caught.value)


def test_a_reader_writes_nothing_and_says_who_owns_the_run(saved):
    saved.put("runs/one/checkpoints/3/save-20260101T000000-00000000/host.json", b"half saved")
    saved.put("runs/one/owner.json", b'{"attempt": 4, "since": "2026-01-01", "token": "x"}')
    before = dict(saved.objects)
    saved.requests.clear()
    assert restored_step() == 2
    assert liveness(RUN) == "may be live: attempt 4 has written it since 2026-01-01"
    assert {method for method, _ in saved.requests} <= {"GET", "READ"} and saved.objects == before
    for content in (b"[" * 60_000, b"[]", b""):
        saved.put("runs/one/owner.json", content)
        assert liveness(RUN) is None


def test_a_step_that_the_run_removes_while_it_is_read_gives_way_to_the_newest(saved, caplog):
    run = Checkpoints(ADDRESS, max_to_keep=1)

    def tree(step, host):
        if step == 2:
            run.save(3, arrays_of(3), {})
        return arrays_of(0)

    with caplog.at_level(logging.WARNING):
        restored = Checkpoints(ADDRESS).restore(tree)
    assert restored.step == 3 and restored.arrays["w"][0] == 3
    assert "replaced or removed while it was read" in caplog.text and "damaged" not in caplog.text


def test_arrays_go_onto_another_mesh(bucket):
    def on(*shape):
        mesh = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
        return NamedSharding(mesh, P("fsdp", "tensor"))

    value = jnp.arange(64.0).reshape(8, 8)
    Checkpoints(ADDRESS).save(1, {"w": jax.device_put(value, on(2, 2))}, {})
    for shape in ((4, 2), (1, 8), (1, 1)):
        restored = Checkpoints(ADDRESS).restore({"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=on(*shape))})
        assert restored.arrays["w"].sharding == on(*shape)
        assert restored.saved_on == {"fsdp": 2, "tensor": 2, "processes": 1}
        np.testing.assert_array_equal(restored.arrays["w"], value)
