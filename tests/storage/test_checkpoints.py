"""What checkpoints are held to wherever they lie: every test here runs on a disk and in a bucket."""

import itertools
import json
import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.steps import (
    HOST,
    MANIFEST,
    abstract,
    as_bytes,
    file_of,
    files_of,
    restored_step,
    save_steps,
    small_arrays,
)

from mer_r1_jax.storage.checkpoints import CheckpointError, Checkpoints


def make_arrays(step=1):
    params = {
        "text": {
            "kernel": jax.random.normal(jax.random.key(step), (16, 8)),
            "bias": jnp.full((8,), step, jnp.bfloat16),
        },
        "audio": [jnp.array([np.nan, -0.0, np.inf, 1e-42], jnp.float32), jnp.zeros((0, 3))],
    }
    return {
        "params": params,
        "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params),
        "key": jax.random.key(step),
        "keys": jax.random.split(jax.random.key(step, impl="rbg"), 3),
        "buffer": np.arange(6, dtype=np.int32).reshape(2, 3),
        "flags": jnp.array([True, False]),
    }


def test_checkpoint_round_trip_is_bit_exact_and_typed(place):
    save_steps(place.directory, 3, make=make_arrays)
    arrays = make_arrays(3)
    restored = Checkpoints(place.directory).restore(abstract(arrays))
    assert restored.step == 3 and restored.host == HOST | {"step": 3}
    assert jax.tree.structure(restored.arrays) == jax.tree.structure(arrays)
    assert as_bytes(restored.arrays) == as_bytes(arrays)
    assert isinstance(restored.arrays["buffer"], np.ndarray)
    assert isinstance(restored.arrays["params"]["text"]["kernel"], jax.Array)
    assert jax.random.bits(restored.arrays["key"]) == jax.random.bits(arrays["key"])
    by_function = Checkpoints(place.directory).restore(lambda step, host: abstract(make_arrays(host["step"])))
    assert as_bytes(by_function.arrays) == as_bytes(arrays)


def test_the_layout_is_that_of_every_run_so_far(place):
    save_steps(place.directory, 3)
    manifest = json.loads(place.get("3/manifest.json"))
    inside = "3" if place.files == "files" else f"3/{manifest['save']}"
    described = manifest[place.files]
    assert set(place.names()) == {"3/manifest.json", *(f"{inside}/{name}" for name in described)}
    assert "host.json" in described and all(name == "host.json" or name.startswith("arrays/") for name in described)
    if place.files == "files":
        assert manifest.keys() == {"step", "files", "sha256"} and described["host.json"].keys() == {"bytes", "sha256"}
    else:
        assert manifest.keys() == {"step", "save", "objects", "sha256"}
        assert described["host.json"].keys() == {"bytes", "crc32c", "md5"}
        assert re.fullmatch(r"save-\d{8}T\d{6}-[0-9a-f]{8}", manifest["save"])
    state = json.loads(place.get(f"{inside}/host.json"))
    assert state.keys() == {"layout_version", "arrays", "saved_on", "host"} and state["layout_version"] == 1
    assert state["arrays"]["w"] == {"shape": [64], "dtype": "float32"}


def test_arrays_go_onto_another_mesh(place):
    def mesh(*shape):
        return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    value = jnp.arange(64.0).reshape(8, 8)
    saved = {"kernel": jax.device_put(value, NamedSharding(mesh(4, 2), P("fsdp", "tensor")))}
    Checkpoints(place.directory).save(1, saved, {})
    shardings = [(mesh(4, 2), P("fsdp", "tensor")), (mesh(2, 4), P("tensor", None)), (mesh(8, 1), P())]
    shardings += [(mesh(1, 1), P("fsdp", "tensor")), None]
    for sharding in shardings:
        sharding = sharding and NamedSharding(*sharding)
        target = {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}
        restored = Checkpoints(place.directory).restore(target)
        np.testing.assert_array_equal(restored.arrays["kernel"], value)
        assert getattr(restored.arrays["kernel"], "sharding", None) == sharding
        assert restored.saved_on == {"fsdp": 4, "tensor": 2, "processes": 1}


def test_nothing_saved_restores_nothing(place):
    checkpoints = Checkpoints(place.directory)
    assert checkpoints.restore({"a": jnp.ones(1)}) is None
    assert checkpoints.latest_step() is None and checkpoints.valid_steps() == []
    with pytest.raises(CheckpointError, match="/4 cannot be restored: it does not exist. Valid steps: none"):
        checkpoints.restore({"a": jnp.ones(1)}, step=4)


def test_every_flipped_bit_and_truncated_file_falls_back(place, caplog):
    save_steps(place.directory, 10, 20)
    good, files = place.state(), files_of(place, 20)
    assert len(files) > 5 and any("ocdbt" in name for name in files)
    rng = np.random.default_rng(0)
    for name in files:
        for fault in ("flip", "truncate", "remove"):
            place.reset(good)
            content = bytearray(place.get(name))
            if fault == "flip":
                content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
                place.put(name, bytes(content))
            elif fault == "truncate":
                place.put(name, bytes(content[: len(content) // 2]))
            else:
                place.remove(name)
            caplog.clear()
            assert restored_step(place.directory) == 10, f"{fault} of {name}"
            gone = fault == "remove" and name == f"20/{MANIFEST}" and place.files == "objects"  # a save never finished
            if not gone:
                named = name.partition("/arrays/")[2] or Path(name).name
                assert named in caplog.text and "20 is damaged and ignored" in caplog.text, f"{fault} of {name}"
            with pytest.raises(CheckpointError, match="Valid steps: .*10"):
                Checkpoints(place.directory).restore(abstract(small_arrays(0)), step=20)


def test_all_checkpoints_damaged_is_refused_by_name_and_never_begun_again(saved):
    saved.put(f"1/{MANIFEST}", b"[" * 60_000)
    saved.remove(file_of(saved, 2, "host.json"))
    before = saved.state()
    with pytest.raises(CheckpointError, match="all 2 are damaged") as caught:
        restored_step(saved.directory)
    told = str(caught.value)
    assert "1: manifest.json cannot be read as a manifest: its JSON is nested too deeply" in told
    assert "2: host.json is missing" in told and "choose another train.run_name" in told
    assert "Nothing was touched" in told and saved.state() == before


def test_foreign_files_and_folders_are_named_and_left_alone(place, caplog):
    save_steps(place.directory, 5)
    foreign = {"notes.txt": b"mine", "901/weights.bin": b"mine", "7/mine/weights.bin": b"mine", "best/x": b"mine"}
    for name, content in foreign.items():
        place.put(name, content)
    for name in files_of(place, 5):
        place.put(f"902/{name.removeprefix('5/')}", place.get(name))  # a step renamed by hand
    assert restored_step(place.directory) == 5
    for name in ("901", "902", "best", "notes.txt"):
        assert f"{place.directory}/{name}" in caplog.text
    checkpoints = Checkpoints(place.directory, max_to_keep=1)
    assert checkpoints.latest_step() == 5
    checkpoints.save(6, small_arrays(6), HOST | {"step": 6})
    assert {name: place.get(name) for name in foreign} == foreign
    assert checkpoints.valid_steps() == [6] and restored_step(place.directory) == 6


def test_save_total_limit_keeps_the_newest_valid_steps(place):
    checkpoints = save_steps(place.directory, 1, 2, 3, keep=2)
    assert checkpoints.valid_steps() == [2, 3] and not files_of(place, 1)
    place.put(file_of(place, 3, "host.json"), b"{}")  # a damaged step takes nobody's place
    checkpoints.save(4, small_arrays(4), HOST | {"step": 4})
    assert checkpoints.valid_steps() == [2, 4] and not files_of(place, 3)
    with pytest.raises(ValueError, match="at least one"):
        Checkpoints(place.directory, max_to_keep=0)


def test_a_flipped_step_takes_nobodys_place_once_found(place):
    checkpoints = save_steps(place.directory, 10, 20, keep=2)
    name = file_of(place, 20, "host.json")
    place.put(name, bytes([place.get(name)[0] ^ 1]) + place.get(name)[1:])
    assert checkpoints.restore(abstract(small_arrays(0))).step == 10
    assert checkpoints.valid_steps() == [10]
    checkpoints.save(30, small_arrays(30), HOST | {"step": 30})
    assert checkpoints.valid_steps() == [10, 30] and not files_of(place, 20)


def test_saving_after_an_older_step_was_resumed_drops_the_abandoned_future(place, caplog):
    checkpoints = save_steps(place.directory, 10, 20, 30)
    assert checkpoints.restore(abstract(small_arrays(0)), step=10).step == 10
    checkpoints.save(15, small_arrays(15), HOST | {"step": 15})
    assert checkpoints.valid_steps() == [10, 15] and "checkpoints [30, 20] lie after step 15" in caplog.text
    assert restored_step(place.directory) == 15 and not files_of(place, 20) and not files_of(place, 30)


def test_a_step_is_replaced_as_a_whole(place):
    checkpoints = save_steps(place.directory, 7)
    checkpoints.save(7, {"other": jnp.ones(3)}, {})
    assert checkpoints.restore({"other": jnp.zeros(3)}).arrays["other"].tolist() == [1, 1, 1]
    checkpoints.save(7, small_arrays(7), HOST | {"step": 7})
    assert restored_step(place.directory) == 7
    # How many files a save has differs: Orbax cuts data as its threads come. Nothing is left of the saves before.
    described = json.loads(place.get(f"7/{MANIFEST}"))
    folder = f"7/{described['save']}" if "save" in described else "7"
    assert set(place.names()) == {f"7/{MANIFEST}"} | {f"{folder}/{name}" for name in described[place.files]}


def test_every_mismatch_is_listed_at_once_and_is_no_reason_to_fall_back(place):
    Checkpoints(place.directory).save(1, {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2), "old": np.ones(1)}, {})
    target = {"a": np.ones(3), "b": jnp.ones(2, jnp.bfloat16), "c": np.ones(2), "new": np.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(place.directory).restore(target)
    message = str(caught.value)
    assert "4 mismatches" in message
    assert "a: float64[2] in the checkpoint, float64[3] in the run" in message
    assert "b: float64[2] in the checkpoint, bfloat16[2] in the run" in message
    assert "old: in the checkpoint, not in the run" in message
    assert "new: in the run, not in the checkpoint" in message
    assert "c:" not in message


def test_another_layout_version_is_refused(place):
    Checkpoints(place.directory, layout_version=1).save(1, {"a": np.ones(2)}, {})
    with pytest.raises(CheckpointError, match="layout version 1, this program writes and reads version 2"):
        Checkpoints(place.directory, layout_version=2).restore({"a": np.ones(2)})


@pytest.mark.parametrize(
    ("arrays", "host", "message"),
    [
        ({"lr": 0.1}, {}, "lr is a float"),
        ({"a": np.ones(1)}, {"order": (1, 2)}, r"\['order'\]: use string keys"),
        ({"a": np.ones(1)}, {"seen": {3: 1}}, r"\['seen'\]: use string keys"),
        ({"a": np.ones(1)}, {"loss": float("nan")}, "cannot be written as JSON"),
        ({"a": np.ones(1)}, {"path": Path("x")}, "cannot be written as JSON"),
        ({"a": {"b": np.ones(1)}, "a.b": np.ones(1)}, {}, "same name"),
    ],
)
def test_what_would_not_come_back_is_refused_before_anything_is_written(place, arrays, host, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(place.directory).save(1, arrays, host)
    with pytest.raises(CheckpointError, match="steps count from 0"):
        Checkpoints(place.directory).save(-1, {"a": np.ones(1)}, {})
    assert place.names() == []


def test_what_is_asked_before_a_step_counts_can_stop_it(saved):
    def taken_over():
        raise RuntimeError("another has taken over")

    with pytest.raises(CheckpointError, match="another has taken over.*Earlier checkpoints are unharmed: \\[1, 2\\]"):
        Checkpoints(saved.directory, before_commit=taken_over).save(3, small_arrays(3), HOST)
    assert restored_step(saved.directory) == 2


def test_a_part_of_the_arrays_is_read_alone(place):
    Checkpoints(place.directory).save(1, {"parameters": small_arrays(1), "moments": small_arrays(5)}, {})
    found = Checkpoints(place.directory).restore({"parameters": small_arrays(0)}, part=True).arrays
    np.testing.assert_array_equal(found["parameters"]["w"], small_arrays(1)["w"])
    with pytest.raises(CheckpointError, match="moments.w: in the checkpoint, not in the run"):
        Checkpoints(place.directory).restore({"parameters": small_arrays(0)})
    with pytest.raises(CheckpointError, match="other: in the run, not in the checkpoint"):
        Checkpoints(place.directory).restore({"parameters": small_arrays(0), "other": np.zeros(1)}, part=True)


def test_a_step_that_the_run_removes_while_it_is_read_gives_way_to_the_newest(place, caplog):
    run = save_steps(place.directory, 1, keep=1)

    def tree(step, host):
        if step == 1:  # comes when the files of step 1 were compared
            run.save(2, small_arrays(2), {})
        return small_arrays(0)

    with caplog.at_level(logging.WARNING):
        restored = Checkpoints(place.directory).restore(tree)
    assert restored.step == 2 and restored.arrays["w"][0] == 2
    assert "was replaced or removed while it was read" in caplog.text and "damaged" not in caplog.text


def test_a_step_that_the_run_replaces_while_it_is_read_is_read_again(place):
    run = Checkpoints(place.directory)
    run.save(7, small_arrays(1), {"save": 1})
    saves = itertools.count(2)

    def tree(step, host):
        if host["save"] < 3:
            run.save(7, small_arrays(next(saves)), {"save": host["save"] + 1})
        return small_arrays(0)

    restored = Checkpoints(place.directory).restore(tree)
    assert restored.host == {"save": 3} and restored.arrays["w"][0] == 3


def test_a_run_that_replaces_its_steps_for_ever_is_given_up_with_a_message(place):
    run = Checkpoints(place.directory)
    run.save(7, small_arrays(1), {"save": 1})
    saves = itertools.count(2)

    def tree(step, host):
        run.save(7, small_arrays(1), {"save": next(saves)})
        return small_arrays(0)

    with pytest.raises(CheckpointError, match="saves too often to be looked at"):
        Checkpoints(place.directory).restore(tree)
