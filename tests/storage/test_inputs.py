"""Data, clips, weights and wheels at gs:// paths: fetched whole, once, and again when they change."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from support.small_run import small_setup

from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.hf.export import ExportSettings, export_model
from mer_r1_jax.omni.hf.load import load_params
from mer_r1_jax.run.inputs import resolve
from mer_r1_jax.storage.bucket import BucketError, fetch_file, fetch_folder
from mer_r1_jax.training.state import flatten, nest


def put_folder(bucket, name, folder):
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.put(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def reads_of(bucket, name):
    """How often the content of an object was asked for."""
    return bucket.requests.count(("READ", name))


def test_a_file_is_fetched_again_only_when_it_has_changed(bucket, tmp_path):
    bucket.put("data/a.jsonl", b"one")
    file = tmp_path / "copy" / "a.jsonl"
    fetch_file("gs://bucket/data/a.jsonl", file)
    assert file.read_bytes() == b"one"
    fetch_file("gs://bucket/data/a.jsonl", file)
    assert reads_of(bucket, "data/a.jsonl") == 1
    bucket.put("data/a.jsonl", b"two")  # of the same size
    fetch_file("gs://bucket/data/a.jsonl", file)
    assert file.read_bytes() == b"two"
    file.write_bytes(b"TWO")  # somebody wrote over the copy
    fetch_file("gs://bucket/data/a.jsonl", file)
    assert file.read_bytes() == b"two" and [path.name for path in file.parent.iterdir()] == ["a.jsonl"]


def test_a_folder_becomes_what_the_bucket_holds(bucket, tmp_path):
    for name in ("model/config.json", "model/sub/x.bin", "models/other"):
        bucket.put(name, name.encode())
    fetch_folder("gs://bucket/model/", tmp_path / "m")
    del bucket.objects["model/config.json"]
    bucket.put("model/new", b"")
    fetch_folder("gs://bucket/model", tmp_path / "m")
    found = {path.relative_to(tmp_path / "m").as_posix() for path in (tmp_path / "m").rglob("*") if path.is_file()}
    assert found == {"sub/x.bin", "new"}


def test_content_that_breaks_on_its_way_is_no_copy(bucket, tmp_path, monkeypatch):
    bucket.put("a", b"content")
    content = bucket._content
    monkeypatch.setattr(bucket, "_content", lambda name, headers: (*content(name, headers)[:2], b"cOntent"))
    with pytest.raises(BucketError, match=r"gs://bucket/a: got 7 bytes that are not the 7 bytes with CRC32C"):
        fetch_file("gs://bucket/a", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fetch", [fetch_file, fetch_folder])
def test_what_is_not_there_or_may_not_be_read_is_named(bucket, tmp_path, fetch):
    with pytest.raises(BucketError, match=r"gs://bucket/nothing: there is no.*expected a f"):
        fetch("gs://bucket/nothing", tmp_path / "x")
    with pytest.raises(BucketError, match=r"gs://elsewhere/x.*check"):
        fetch("gs://elsewhere/x", tmp_path / "x")
    bucket.refuse = lambda method, name: 403
    with pytest.raises(BucketError, match=r"gs://bucket/a cannot be .*its service account"):
        fetch("gs://bucket/a", tmp_path / "x")


def test_a_run_reads_records_clips_and_tokenizer_from_a_bucket(bucket, small_folder, tmp_path):
    for name in ("clips", "tokenizer"):
        put_folder(bucket, f"world/{name}", small_folder / name)
    for name in ("sft", "rl", "eval"):
        bucket.put(f"world/{name}.jsonl", (small_folder / f"{name}.jsonl").read_bytes())
    bucket.put("world/clips/nobody_names_this.mp4", b"x" * 1000)
    changes = {
        "data": {f"{name}_path": f"gs://bucket/world/{name}.jsonl" for name in ("sft", "rl", "eval")},
        "model": {"tokenizer_path": "gs://bucket/world/tokenizer"},
        "media": {"decode_workers": 0},
        "train": {"local_dir": str(tmp_path)},
    }
    setup, on_disk = small_setup(small_folder, **changes), small_setup(small_folder, media={"decode_workers": 0})
    assert setup.data.fingerprints() == on_disk.data.fingerprints()
    ours, theirs = (s.source.load(s.data.sft[0]).prompt for s in (setup, on_disk))
    assert ours.text == theirs.text
    assert reads_of(bucket, "world/clips/0.mp4") == 1 and reads_of(bucket, "world/clips/nobody_names_this.mp4") == 0
    del bucket.objects["world/clips/0.mp4"]
    again = small_setup(small_folder, **changes)
    assert reads_of(bucket, "world/clips/1.mp4") == 1
    with pytest.raises(MediaError, match="no such file"):  # counted as any clip that is broken
        again.source.load(again.data.sft[0])


def test_media_root_in_a_bucket_serves_records_on_a_disk(bucket, small_folder, tmp_path):
    put_folder(bucket, "media/clips", small_folder / "clips")
    for name in ("sft", "rl", "eval"):
        shutil.copy(small_folder / f"{name}.jsonl", tmp_path)
    paths = {f"{name}_path": str(tmp_path / f"{name}.jsonl") for name in ("sft", "rl", "eval")}
    setup = small_setup(
        small_folder,
        data=paths | {"media_root": "gs://bucket/media"},
        media={"decode_workers": 0},
        train={"local_dir": str(tmp_path / "copies")},
    )
    assert setup.source.load(setup.data.rl[0]).prompt.text


def test_weights_from_a_bucket_are_those_on_the_disk(bucket, small, tmp_path):
    params = nest(small.backbone.init(seed=0))
    export_model(tmp_path / "hf", small.backbone.config, params, ExportSettings(source=small.tokenizer_path))
    put_folder(bucket, "hf", tmp_path / "hf")
    config = dataclasses.replace(
        small.config,
        model=dataclasses.replace(small.config.model, path="gs://bucket/hf"),
        train=dataclasses.replace(small.config.train, local_dir=str(tmp_path / "copies")),
    )
    path = resolve(config).model.path
    assert path.startswith(str(tmp_path / "copies"))
    expected, found = (flatten(load_params(folder, load_config(folder))) for folder in (tmp_path / "hf", path))
    for name, leaf in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(leaf), err_msg=name)
    assert json.loads(bucket.objects["hf/config.json"].data)["model_type"]
