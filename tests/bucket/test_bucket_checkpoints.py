"""Checkpoints in a bucket, written by Orbax, TensorStore and gcsfs over HTTP: faults, rotation, what counts."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mer_r1_jax.storage.bucket import BucketError
from mer_r1_jax.storage.checkpoints import CheckpointError, Checkpoints

ADDRESS = "gs://bucket/runs/one/checkpoints"
HOST = {"iterator": {"next": 7}, "text": "é"}


def arrays_of(step):
    return {
        "w": jnp.full((8, 4), step, jnp.bfloat16),
        "odd": np.array([np.nan, -0.0, np.inf, 1e-42], np.float32),
        "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(step),
    }


def abstract():
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), arrays_of(0)
    )


def raw(leaf):
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


def save_steps(*steps, keep=5):
    checkpoints = Checkpoints(ADDRESS, max_to_keep=keep)
    for step in steps:
        checkpoints.save(step, arrays_of(step), HOST | {"step": step})
    return checkpoints


def restored_step():
    """The step that a new process goes on from, with exactly what was saved at it."""
    restored = Checkpoints(ADDRESS).restore(abstract())
    if restored is None:
        return None
    assert jax.tree.map(raw, restored.arrays) == jax.tree.map(raw, arrays_of(restored.step))
    assert restored.host == HOST | {"step": restored.step}
    return restored.step


def names_below(bucket, step):
    return [name for name in bucket.objects if name.startswith(f"runs/one/checkpoints/{step}/")]


def test_round_trip_is_bit_exact_and_the_manifest_is_written_last(bucket):
    save_steps(3)
    assert restored_step() == 3
    written = [name for method, name in bucket.requests if method == "POST"]
    assert written[-1] == "runs/one/checkpoints/3/manifest.json" and len(written) > 8


def test_nothing_saved_restores_nothing(bucket):
    assert Checkpoints(ADDRESS).restore(abstract()) is None
    assert Checkpoints(ADDRESS).latest_step() is None


def test_sharded_arrays_come_back_on_their_devices(bucket):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("fsdp", "tensor"))
    array = jax.device_put(jnp.arange(64.0).reshape(8, 8), sharding)
    checkpoints = Checkpoints(ADDRESS)
    checkpoints.save(1, {"w": array}, {})
    found = checkpoints.restore({"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}).arrays["w"]
    assert found.sharding == sharding
    np.testing.assert_array_equal(found, array)


def test_only_the_newest_are_kept_and_steps_of_a_given_up_future_go(bucket, caplog):
    checkpoints = save_steps(1, 2, 3, keep=2)
    assert checkpoints.valid_steps() == [2, 3] and not names_below(bucket, 1)
    with caplog.at_level(logging.WARNING):
        checkpoints.save(2, arrays_of(2), HOST | {"step": 2})
    assert checkpoints.valid_steps() == [2] and restored_step() == 2 and not names_below(bucket, 3)
    assert "checkpoints [3] lie after step 2" in caplog.text
    saves = {name.split("/")[4] for name in names_below(bucket, 2)}
    assert len(saves) == 2  # the manifest and one save


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda bucket, name: bucket.objects.pop(name), "is missing"),
        (lambda bucket, name: bucket.put(name, bucket.objects[name].data[:-1]), "bytes instead of"),
        (lambda bucket, name: bucket.put(name, bytes(len(bucket.objects[name].data))), "does not match its checksum"),
    ],
    ids=["missing", "cut", "changed"],
)
@pytest.mark.parametrize("part", ["host.json", "/d/"])
def test_a_damaged_step_is_named_and_the_one_before_counts(bucket, caplog, part, damage, told):
    save_steps(1, 2)
    damage(bucket, next(name for name in names_below(bucket, 2) if part in name))
    with caplog.at_level(logging.WARNING):
        assert restored_step() == 1
    assert "checkpoints/2 is damaged and ignored" in caplog.text and told in caplog.text
    with pytest.raises(CheckpointError, match=rf"checkpoints/2 cannot be restored.*{told}.*Valid steps: \[1\]"):
        Checkpoints(ADDRESS).restore(abstract(), step=2)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"step": 2, "save": "x", "objects": {}, "sha256": ""}'])
def test_a_manifest_that_is_none_makes_no_checkpoint(bucket, text):
    save_steps(1, 2)
    bucket.put("runs/one/checkpoints/2/manifest.json", text)
    before = dict(bucket.objects)
    assert restored_step() == 1
    Checkpoints(ADDRESS).clear()
    assert bucket.objects == before  # nobody knows what is left over


def test_a_save_that_is_refused_half_way_leaves_what_was_there(bucket):
    checkpoints = save_steps(1)
    before = dict(bucket.objects)
    bucket.refuse = lambda method, name: 403 if method == "POST" and name.endswith(("host.json",)) else None
    with pytest.raises(CheckpointError, match=r"step 2 could not be saved in gs://bucket.*host.json cannot be written"):
        checkpoints.save(2, arrays_of(2), HOST)
    with pytest.raises(CheckpointError, match="step 1 could not be saved"):
        checkpoints.save(1, arrays_of(9), HOST)
    bucket.refuse = lambda method, name: None
    assert restored_step() == 1 and bucket.objects != before
    checkpoints.clear()
    assert bucket.objects == before and restored_step() == 1


def test_arrays_that_are_refused_are_an_error_of_the_save(bucket):
    bucket.refuse = lambda method, name: 403 if method == "POST" and "ocdbt" in name else None
    with pytest.raises(CheckpointError, match="step 1 could not be saved"):
        save_steps(1)


def test_what_is_asked_before_a_step_counts_can_stop_it(bucket):
    def taken_over():
        raise BucketError("another has taken over")

    checkpoints = save_steps(1)
    with pytest.raises(CheckpointError, match="another has taken over"):
        Checkpoints(ADDRESS, before_commit=taken_over).save(2, arrays_of(2), HOST)
    assert checkpoints.valid_steps() == [1]


def test_foreign_objects_are_left_alone(bucket):
    bucket.put("runs/one/checkpoints/notes.txt", b"mine")
    bucket.put("runs/one/checkpoints/7/mine/weights.bin", b"mine")
    save_steps(1, 2, keep=1)
    assert {"runs/one/checkpoints/notes.txt", "runs/one/checkpoints/7/mine/weights.bin"} <= bucket.objects.keys()
    assert restored_step() == 2
