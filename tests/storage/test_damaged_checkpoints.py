"""A step that cannot be read, in whatever way and place, is named in the log, and the one before is gone on with."""

import builtins
import errno
import io
import json
import logging
import os
from pathlib import Path

import pytest
from support.steps import DiskPlace, file_of, files_of, restored_step, save_steps, sign, small_arrays

from mer_r1_jax.storage.checkpoints import CheckpointError, Checkpoints
from mer_r1_jax.storage.step_store import DamagedStepError

DEEP = {
    "lists 60000 deep": b"[" * 60_000,
    "closed lists 60000 deep": b"[" * 60_000 + b"]" * 60_000,
    "objects 60000 deep": b'{"a":' * 60_000 + b"1" + b"}" * 60_000,
}
SIZED = {"bytes": 7, "sha256": "", "crc32c": "", "md5": ""}  # what either place's manifests say of a file
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


def assert_falls_back(place, caplog, *words):
    with caplog.at_level(logging.WARNING):
        assert restored_step(place.directory) == 1
    assert f"{place.directory}/2 is damaged and ignored" in caplog.text
    for word in words:
        assert word in caplog.text
    with pytest.raises(CheckpointError, match="Valid steps: "):
        Checkpoints(place.directory).restore(small_arrays(0), step=2)


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_a_manifest_that_is_no_manifest_makes_its_step_damaged(saved, caplog, content):
    saved.put("2/manifest.json", content)
    assert_falls_back(saved, caplog, "manifest.json cannot be read as a manifest")
    assert Checkpoints(saved.directory).valid_steps() == [1]


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_a_host_state_that_is_none_makes_its_step_damaged_even_where_its_hash_is_right(saved, caplog, content):
    saved.put(file_of(saved, 2, "host.json"), content)
    sign(saved, 2)
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
    file = file_of(saved, 2, "host.json")
    saved.put(file, json.dumps(json.loads(saved.get(file)) | {name: value}).encode())
    sign(saved, 2)
    assert_falls_back(saved, caplog, f"host.json cannot be read as a host state: {name}")


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": {}},
        {"files": {"host.json": 7}},
        {"files": {"host.json": SIZED | {"bytes": "7"}}},
        {"files": {"host.json": SIZED | {"bytes": True}}},
        {"files": {"host.json": {"bytes": 7}}},
        {"files": {"host.json": SIZED | {"sha256": None, "crc32c": 1}}},
        {"files": {"../1/host.json": SIZED}},
        {"files": {"/etc/passwd": SIZED}},
        {"files": {"x" * 5000: SIZED, "host.json": SIZED}},
        {"files": {"\0": SIZED, "host.json": SIZED}},
        {"step": "2"},
        {"step": True},
        {"step": 2.0},
        {"step": None},
        {"step": int("9" * 4000)},
    ],
    ids=str,
)
def test_a_manifest_with_values_of_another_type_makes_its_step_damaged(saved, caplog, changes):
    sign(saved, 2, **changes)
    assert_falls_back(saved, caplog)
    assert "\0" not in caplog.text


@pytest.fixture
def on_disk(tmp_path):
    """A folder with steps 1 and 2."""
    save_steps(tmp_path, 1, 2)
    return DiskPlace(tmp_path)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOENT, errno.ESTALE], ids=errno.errorcode.get)
@pytest.mark.parametrize("part", ["manifest.json", "host.json", "arrays"])
def test_a_file_that_the_system_cannot_read_makes_its_step_damaged(on_disk, caplog, monkeypatch, code, part):
    broken = str(on_disk.folder / file_of(on_disk, 2, part))
    real = builtins.open

    def failing(file, *arguments, **options):
        if isinstance(file, (str, os.PathLike)) and os.fspath(file) == broken:
            raise OSError(code, os.strerror(code), broken)
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", failing)
    monkeypatch.setattr(io, "open", failing)
    assert_falls_back(on_disk, caplog, Path(broken).name, os.strerror(code))


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
def test_something_else_in_place_of_a_file_makes_its_step_damaged(on_disk, caplog, name, put):
    on_disk.remove(f"2/{name}")
    put(on_disk.folder / "2" / name)
    assert_falls_back(on_disk, caplog, name)


def test_arrays_that_fail_after_their_hashes_were_right_make_the_step_damaged(saved, caplog):
    def tree(step, host):
        if step == 2:  # comes between the comparison of the files and the reading of the arrays
            for name in files_of(saved, 2):
                if "arrays" in name:
                    saved.put(name, b"")
        return small_arrays(0)

    with caplog.at_level(logging.WARNING):
        assert Checkpoints(saved.directory).restore(tree).step == 1
    assert f"{saved.directory}/2 is damaged and ignored: its arrays cannot be read" in caplog.text


def test_a_host_state_that_the_caller_cannot_use_makes_the_step_damaged(saved, caplog):
    def tree(step, host):
        if step == 2:
            raise DamagedStepError("it is of another phase")
        return small_arrays(0)

    with caplog.at_level(logging.WARNING):
        assert Checkpoints(saved.directory).restore(tree).step == 1
    assert "2 is damaged and ignored: it is of another phase" in caplog.text


def test_a_fault_of_the_caller_is_no_damage(saved):
    with pytest.raises(MemoryError):
        Checkpoints(saved.directory).restore(lambda step, host: (_ for _ in ()).throw(MemoryError()))
