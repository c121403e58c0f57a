"""A step that cannot be read, in whatever way, is named in the log, and the step before it is gone on with."""

import builtins
import errno
import hashlib
import io
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from mer_r1_jax.storage.checkpoints import CheckpointError, Checkpoints
from mer_r1_jax.storage.damage import DamagedStepError

HOST = {"text": "é"}
DEEP = {
    "lists 60000 deep": b"[" * 60_000,
    "closed lists 60000 deep": b"[" * 60_000 + b"]" * 60_000,
    "objects 60000 deep": b'{"a":' * 60_000 + b"1" + b"}" * 60_000,
}
ODD = DEEP | {
    "empty": b"",
    "cut": b'{"step": 2, "fil',
    "a list": b"[1, 2]",
    "null": b"null",
    "a number": b"7",
    "5000 digits": b'{"step": ' + b"9" * 5000 + b"}",
    "UTF-16": '{"step": 2}'.encode("utf-16"),
    "no text at all": bytes(range(128, 256)),
    "Latin-1": '{"step": "é"}'.encode("latin-1"),
    "an object of others": b'{"a": 1}',
}


def arrays_of(step):
    return {"w": np.full((64,), step, np.float32), "b": np.arange(step, step + 3)}


@pytest.fixture
def saved(tmp_path):
    """A folder with steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, arrays_of(step), HOST)
    return tmp_path


def restored_step(folder):
    restored = Checkpoints(folder).restore(arrays_of(0))
    np.testing.assert_array_equal(restored.arrays["w"], arrays_of(restored.step)["w"])
    assert restored.host == HOST
    return restored.step


def sign(folder, **changes):
    """Writes a manifest anew as one of ours would be: every hash in it is right, whatever it says."""
    content = json.loads((folder / "manifest.json").read_text())
    files = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in content["files"]
    }
    content = {"step": content["step"], "files": files} | changes
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content | {"sha256": digest}))


def assert_falls_back(folder, caplog, *words):
    with caplog.at_level(logging.WARNING):
        assert restored_step(folder) == 1
    assert f"{folder}/2 is damaged and ignored" in caplog.text
    for word in words:
        assert word in caplog.text
    with pytest.raises(CheckpointError, match="Valid steps: "):
        Checkpoints(folder).restore(arrays_of(0), step=2)


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_a_manifest_that_is_no_manifest_makes_its_step_damaged(saved, caplog, content):
    (saved / "2" / "manifest.json").write_bytes(content)
    assert_falls_back(saved, caplog, "manifest.json cannot be read as a manifest")
    assert Checkpoints(saved).valid_steps() == [1]


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_a_host_state_that_is_none_makes_its_step_damaged_even_where_its_hash_is_right(saved, caplog, content):
    (saved / "2" / "host.json").write_bytes(content)
    sign(saved / "2")
    assert_falls_back(saved, caplog, "host.json cannot be read as a host state")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layout_version", "1"),
        ("layout_version", True),
        ("arrays", []),
        ("arrays", {"w": [64]}),
        ("arrays", {"w": {"shape": "64", "dtype": "float32"}}),
        ("arrays", {"w": {"shape": [64.0], "dtype": "float32"}}),
        ("arrays", {"w": {"shape": [-64], "dtype": 1}}),
        ("saved_on", 3),
        ("host", None),
        ("host", [1]),
    ],
)
def test_fields_of_another_type_in_the_host_state_make_its_step_damaged(saved, caplog, name, value):
    path = saved / "2" / "host.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    sign(saved / "2")
    assert_falls_back(saved, caplog, f"host.json cannot be read as a host state: {name}")


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": {}},
        {"files": {"host.json": 7}},
        {"files": {"host.json": {"bytes": "7", "sha256": ""}}},
        {"files": {"host.json": {"bytes": True, "sha256": ""}}},
        {"files": {"host.json": {"bytes": 7}}},
        {"files": {"../1/host.json": {"bytes": 7, "sha256": ""}}},
        {"files": {"/etc/passwd": {"bytes": 7, "sha256": ""}}},
        {"files": {"x" * 5000: {"bytes": 7, "sha256": ""}, "host.json": {"bytes": 7, "sha256": ""}}},
        {"files": {"\0": {"bytes": 7, "sha256": ""}, "host.json": {"bytes": 7, "sha256": ""}}},
        {"step": "2"},
        {"step": 2.0},
        {"step": None},
        {"step": int("9" * 4000)},
    ],
    ids=str,
)
def test_a_manifest_with_values_of_another_type_makes_its_step_damaged(saved, caplog, changes):
    sign(saved / "2", **changes)
    assert_falls_back(saved, caplog)
    assert "\0" not in caplog.text


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOENT, errno.ESTALE], ids=errno.errorcode.get)
@pytest.mark.parametrize("part", ["manifest.json", "host.json", "arrays"])
def test_a_file_that_the_system_cannot_read_makes_its_step_damaged(saved, caplog, monkeypatch, code, part):
    broken = next(str(path) for path in sorted((saved / "2").rglob("*")) if part in str(path) and path.is_file())
    real = builtins.open

    def failing(file, *arguments, **options):
        if isinstance(file, (str, os.PathLike)) and os.fspath(file) == broken:
            raise OSError(code, os.strerror(code), broken)
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", failing)
    monkeypatch.setattr(io, "open", failing)
    assert_falls_back(saved, caplog, Path(broken).name, os.strerror(code))


@pytest.mark.parametrize(
    "put",
    [
        lambda path: path.symlink_to("/proc/self/mem"),  # the kernel answers EIO
        lambda path: path.symlink_to(path.name),  # ELOOP
        lambda path: path.mkdir(),
        os.mkfifo,
        lambda path: None,
    ],
    ids=["EIO", "a link to itself", "a folder", "a pipe", "nothing"],
)
@pytest.mark.parametrize("name", ["manifest.json", "host.json"])
def test_something_else_in_place_of_a_file_makes_its_step_damaged(saved, caplog, name, put):
    (saved / "2" / name).unlink()
    put(saved / "2" / name)
    assert_falls_back(saved, caplog, name)


def test_arrays_that_fail_after_their_hashes_were_right_make_the_step_damaged(saved, caplog):
    def tree(step, host):
        if step == 2:  # comes between the hashes and the reading of the arrays
            for path in (saved / "2" / "arrays").rglob("*"):
                if path.is_file():
                    path.write_bytes(b"")
        return arrays_of(0)

    with caplog.at_level(logging.WARNING):
        assert Checkpoints(saved).restore(tree).step == 1
    assert f"{saved}/2 is damaged and ignored: its arrays cannot be read" in caplog.text


def test_a_host_state_that_the_caller_cannot_use_makes_the_step_damaged(saved, caplog):
    def tree(step, host):
        if step == 2:
            raise DamagedStepError("it is of another phase")
        return arrays_of(0)

    with caplog.at_level(logging.WARNING):
        assert Checkpoints(saved).restore(tree).step == 1
    assert "2 is damaged and ignored: it is of another phase" in caplog.text


def test_a_fault_of_the_caller_is_no_damage(saved):
    with pytest.raises(MemoryError):
        Checkpoints(saved).restore(lambda step, host: (_ for _ in ()).throw(MemoryError()))


def test_all_steps_damaged_each_in_its_own_way_are_refused_by_name(saved):
    (saved / "1" / "manifest.json").write_bytes(b"[" * 60_000)
    (saved / "2" / "host.json").unlink()
    before = sorted(saved.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(saved).restore(arrays_of(0))
    told = str(caught.value)
    assert "all 2 are damaged" in told and "2: host.json is missing" in told
    assert "1: manifest.json cannot be read as a manifest: its JSON is nested too deeply" in told
    assert "Nothing was touched" in told and sorted(saved.rglob("*")) == before


def test_a_folder_of_checkpoints_that_cannot_be_listed_is_no_empty_one(tmp_path):
    (tmp_path / "checkpoints").symlink_to("checkpoints")
    with pytest.raises(CheckpointError, match="cannot be read: .*what is saved there is not taken for lost"):
        Checkpoints(tmp_path / "checkpoints").restore(arrays_of(0))
