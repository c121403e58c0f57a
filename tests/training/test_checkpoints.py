"""Checkpoints under real faults: real files, flipped bits, a full disk, and SIGKILL at every durable operation."""

import contextlib
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mer_r1_jax.storage.checkpoints import MANIFEST, CheckpointError, Checkpoints

HOST = {"iterator": {"next": 7}, "quarantine": ["clip-3"], "counters": {"tokens": 2**40}, "text": "é"}


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


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


def as_bytes(tree):
    def raw(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes(), leaf.shape

    return jax.tree.map(raw, tree)


def small_arrays(step=1):
    """Quick to make where many processes save: nothing to compile."""
    return {"a": np.full((100,), step, np.float32), "b": {"c": np.arange(step, step + 9)}}


def restored_step(directory, make=make_arrays):
    """The step a new process would resume, after checking that it holds exactly what was saved at that step."""
    restored = Checkpoints(directory).restore(abstract(make()))
    if restored is None:
        return None
    assert as_bytes(restored.arrays) == as_bytes(make(restored.step))
    assert restored.host == HOST | {"step": restored.step}
    return restored.step


def save_steps(directory, *steps, keep=5, make=make_arrays):
    checkpoints = Checkpoints(directory, max_to_keep=keep)
    for step in steps:
        checkpoints.save(step, make(step), HOST | {"step": step})
    return checkpoints


def test_checkpoint_round_trip_is_bit_exact_and_typed(tmp_path):
    save_steps(tmp_path, 3)
    arrays = make_arrays(3)
    restored = Checkpoints(tmp_path).restore(abstract(arrays))
    assert restored.step == 3 and restored.host == HOST | {"step": 3}
    assert jax.tree.structure(restored.arrays) == jax.tree.structure(arrays)
    assert as_bytes(restored.arrays) == as_bytes(arrays)
    assert isinstance(restored.arrays["buffer"], np.ndarray)
    assert isinstance(restored.arrays["params"]["text"]["kernel"], jax.Array)
    assert jax.random.bits(restored.arrays["key"]) == jax.random.bits(arrays["key"])
    by_function = Checkpoints(tmp_path).restore(lambda step, host: abstract(make_arrays(host["step"])))
    assert as_bytes(by_function.arrays) == as_bytes(arrays)


def test_checkpoint_restores_onto_another_sharding(tmp_path):
    def mesh(*shape):
        return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    value = jnp.arange(64.0).reshape(8, 8)
    saved = {"kernel": jax.device_put(value, NamedSharding(mesh(4, 2), P("fsdp", "tensor")))}
    Checkpoints(tmp_path).save(1, saved, {})
    for sharding in (NamedSharding(mesh(2, 4), P("tensor", None)), NamedSharding(mesh(8, 1), P()), None):
        target = {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}
        restored = Checkpoints(tmp_path).restore(target).arrays["kernel"]
        np.testing.assert_array_equal(restored, value)
        assert getattr(restored, "sharding", None) == sharding


def test_empty_checkpoint_folder_restores_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.restore({"a": jnp.ones(1)}) is None
    assert checkpoints.latest_step() is None and checkpoints.valid_steps() == []
    with pytest.raises(CheckpointError, match="does not exist.*Valid steps: none"):
        checkpoints.restore({"a": jnp.ones(1)}, step=4)


def test_every_flipped_bit_and_truncated_file_falls_back(tmp_path, caplog):
    save_steps(tmp_path / "good", 10, 20)
    files = sorted(p.relative_to(tmp_path / "good") for p in (tmp_path / "good" / "20").rglob("*") if p.is_file())
    assert len(files) > 5 and any("ocdbt" in str(file) for file in files)
    rng = np.random.default_rng(0)
    for number, file in enumerate(files):
        for fault in ("flip", "truncate", "remove"):
            directory = tmp_path / f"{number}-{fault}"
            shutil.copytree(tmp_path / "good", directory)
            content = bytearray((directory / file).read_bytes())
            if fault == "flip":
                content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
                (directory / file).write_bytes(content)
            elif fault == "truncate":
                (directory / file).write_bytes(content[: len(content) // 2])
            else:
                (directory / file).unlink()
            caplog.clear()
            assert restored_step(directory) == 10, f"{fault} of {file}"
            named = str(Path(*file.parts[1:]))
            assert named in caplog.text and "damaged and ignored" in caplog.text, f"{fault} of {file}"
            with pytest.raises(CheckpointError, match="Valid steps: .*10"):
                Checkpoints(directory).restore(abstract(make_arrays()), step=20)
            shutil.rmtree(directory)


def test_all_checkpoints_damaged_is_refused_by_name_and_never_begun_again(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "1" / MANIFEST).unlink()
    (tmp_path / "2" / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="all 2 are damaged") as caught:
        restored_step(tmp_path)
    assert "2: manifest.json cannot be read as a manifest" in str(caught.value)
    assert "1: it has no manifest.json" in str(caught.value) and "choose another train.run_name" in str(caught.value)
    # What never was a save of ours is no reason to refuse a new run.
    (tmp_path / "other" / "7").mkdir(parents=True)
    assert restored_step(tmp_path / "other") is None


def test_foreign_and_empty_numeric_folders_are_named_and_left_alone(tmp_path, caplog):
    save_steps(tmp_path, 5)
    (tmp_path / "900").mkdir()
    (tmp_path / "901").mkdir()
    (tmp_path / "901" / "weights.bin").write_bytes(b"someone else's")
    (tmp_path / "best").mkdir()
    shutil.copytree(tmp_path / "5", tmp_path / "902")  # a step renamed by hand
    assert restored_step(tmp_path) == 5
    for name in ("900", "901", "902", "best"):
        assert str(tmp_path / name) in caplog.text
    checkpoints = Checkpoints(tmp_path, max_to_keep=1)
    assert checkpoints.latest_step() == 5
    checkpoints.save(6, make_arrays(6), HOST | {"step": 6})
    assert (tmp_path / "901" / "weights.bin").exists() and (tmp_path / "900").exists()
    assert checkpoints.valid_steps() == [6]


def test_save_total_limit_keeps_the_newest_valid_steps(tmp_path):
    checkpoints = save_steps(tmp_path, 1, 2, 3, keep=2)
    assert checkpoints.valid_steps() == [2, 3]
    (tmp_path / "3" / "host.json").write_text("{}")  # a damaged step takes nobody's place
    checkpoints.save(4, make_arrays(4), HOST | {"step": 4})
    assert checkpoints.valid_steps() == [2, 4]
    assert not (tmp_path / "3").exists()
    with pytest.raises(ValueError, match="at least one"):
        Checkpoints(tmp_path, max_to_keep=0)


def test_a_flipped_step_takes_nobodys_place_once_found(tmp_path):
    checkpoints = save_steps(tmp_path, 10, 20, keep=2)
    path = tmp_path / "20" / "host.json"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert checkpoints.restore(abstract(make_arrays())).step == 10
    assert checkpoints.valid_steps() == [10]
    checkpoints.save(30, make_arrays(30), HOST | {"step": 30})
    assert checkpoints.valid_steps() == [10, 30] and not (tmp_path / "20").exists()


def test_saving_after_an_older_step_was_resumed_drops_the_abandoned_future(tmp_path, caplog):
    checkpoints = save_steps(tmp_path, 10, 20, 30)
    assert checkpoints.restore(abstract(make_arrays()), step=10).step == 10
    checkpoints.save(15, make_arrays(15), HOST | {"step": 15})
    assert checkpoints.valid_steps() == [10, 15] and "[30, 20]" in caplog.text
    assert restored_step(tmp_path) == 15


def test_a_step_is_replaced_as_a_whole(tmp_path):
    checkpoints = save_steps(tmp_path, 7)
    checkpoints.save(7, {"other": jnp.ones(3)}, {})
    assert checkpoints.restore({"other": jnp.zeros(3)}).arrays["other"].tolist() == [1, 1, 1]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["7"]


def test_every_mismatch_is_listed_at_once_and_is_no_reason_to_fall_back(tmp_path):
    Checkpoints(tmp_path).save(1, {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2), "old": jnp.ones(1)}, {})
    target = {"a": jnp.ones(3), "b": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(2), "new": jnp.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path).restore(target)
    message = str(caught.value)
    assert "4 mismatches" in message
    assert "a: float32[2] in the checkpoint, float32[3] in the run" in message
    assert "b: float32[2] in the checkpoint, bfloat16[2] in the run" in message
    assert "old: in the checkpoint, not in the run" in message
    assert "new: in the run, not in the checkpoint" in message
    assert "c:" not in message


def test_another_layout_version_is_refused(tmp_path):
    Checkpoints(tmp_path, layout_version=1).save(1, {"a": jnp.ones(2)}, {})
    with pytest.raises(CheckpointError, match="layout version 1, this program writes and reads version 2"):
        Checkpoints(tmp_path, layout_version=2).restore({"a": jnp.ones(2)})


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
def test_what_would_not_come_back_is_refused_before_anything_is_written(tmp_path, arrays, host, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path).save(1, arrays, host)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def largest_file(size):
    """Makes every write beyond `size` bytes of a file fail in the kernel, as a full disk or quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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
from training_checkpoints import Checkpoints, HOST, small_arrays

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
    save_steps(tmp_path / "start", 1, 2, 3, make=small_arrays)
    module = Path(__file__)
    shutil.copy(module, tmp_path / "training_checkpoints.py")
    script = SWEEP.format(tests=str(tmp_path), folder=str(tmp_path / "killed"), start=str(tmp_path / "start"))
    one_device = os.environ | {"XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300, env=one_device)
    killed = sorted((tmp_path / "killed").iterdir(), key=lambda path: int(path.name))
    print(f"{len(killed)} kill points")
    assert len(killed) > 20
    outcomes = [restored_step(directory, small_arrays) for directory in killed]
    assert set(outcomes) == {2, 3} and outcomes[-1] == 2
    assert outcomes == sorted(outcomes, reverse=True)  # once the new step is in place, it stays
    for directory in killed:
        Checkpoints(directory).clear()  # as the run's next start does
        assert all(entry.name.isdigit() for entry in directory.iterdir()), "leftovers of the interrupted save"


def test_sigkill_at_any_moment_of_repeated_saves(tmp_path):
    script = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from training_checkpoints import Checkpoints, HOST, make_arrays
        checkpoints = Checkpoints(sys.argv[1], max_to_keep=2)
        for step in range(1, 10_000):
            checkpoints.save(step, make_arrays(step), HOST | {{"step": step}})
            print(step, flush=True)
    """
    shutil.copy(Path(__file__), tmp_path / "training_checkpoints.py")
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


def test_manifest_covers_every_file(tmp_path):
    save_steps(tmp_path, 1)
    manifest = json.loads((tmp_path / "1" / MANIFEST).read_text())
    on_disk = {p.relative_to(tmp_path / "1").as_posix() for p in (tmp_path / "1").rglob("*") if p.is_file()}
    assert set(manifest["files"]) == on_disk - {MANIFEST}


def test_unwritable_checkpoint_folder_is_a_clear_error(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    checkpoints = save_steps(tmp_path / "checkpoints", 1)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file where the folder was")
    with pytest.raises(CheckpointError, match="step 2 could not be saved"):
        checkpoints.save(2, make_arrays(2), {})
    assert os.listdir(tmp_path) == ["checkpoints"]
