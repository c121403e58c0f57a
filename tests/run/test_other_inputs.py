"""A run is gone on with only on what it began with: bytes count, wherever they lie by now."""

import json
import os
import shutil
import sys
import types

import pytest
from support.killing import train
from support.small_run import make_data, small_config_of

from mer_r1_jax import faults
from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.emotion import wheels as wheels_module
from mer_r1_jax.media.cache import ClipCache
from mer_r1_jax.media.seen_clips import END_BYTES, ClipChangedError, ClipFingerprints, of_ends
from mer_r1_jax.omni.hf.export import ExportSettings, export_model
from mer_r1_jax.run import fingerprints
from mer_r1_jax.run.fingerprints import clip_label, of_inputs, of_source
from mer_r1_jax.run.setup import make_setup
from mer_r1_jax.run.train import train as run
from mer_r1_jax.storage.run_directory import RunDirectory, RunDirectoryError
from mer_r1_jax.training.state import nest

REWARD = "def warmth(completions, **columns):\n    return [1.0 for _ in completions]\n"


class PulledPlugError(Exception):
    """Ends a run in the middle."""


def config_of(folder, **changes):
    sections = {
        "sft": {"max_steps": 4},
        "rl": {"max_steps": 0, "reward_funcs": ("own_reward_of_the_test.warmth",)},
        "data": {"eval_path": "", "max_quarantined_fraction": 1.0},
        "mesh": {"data": 4, "tensor": 2},
        "train": {"save_steps": 2, "export": False},
    }
    for name, fields in changes.items():
        sections[name] = sections.get(name, {}) | fields
    return small_config_of(folder, **sections)


def pulled_plug(config):
    """Starts a run that ends as its first clip is decoded: everything before that was accepted."""

    def here(place, detail=""):
        if place == "decode":
            raise PulledPlugError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(faults, "here", here)
        with pytest.raises(PulledPlugError):
            run(config)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The data of a run that ended in its beginning, with the run's folder."""
    folder = make_data(tmp_path_factory.mktemp("begun"))
    (folder / "own_reward_of_the_test.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(folder))
        pulled_plug(config_of(folder))
    return folder


@pytest.fixture
def moved(begun, tmp_path, monkeypatch):
    """All of it at another place, the first one gone as far as the run can tell."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(begun, folder)
    monkeypatch.setattr(sys, "path", [str(folder), *(path for path in sys.path if path != str(begun))])
    return folder


def shipped_wheels(folder):
    """A copy of the wheels that come with the package."""
    source = os.path.join(os.path.dirname(wheels_module.__file__), "wheels")
    shutil.copytree(source, folder)
    return folder


def test_moved_folders_and_copies_of_the_same_bytes_go_on(moved, tmp_path):
    wheels = shipped_wheels(tmp_path / "wheels")
    pulled_plug(config_of(moved, emotion={"wheel_dir": str(wheels)}, data={"media_root": str(moved)}))
    assert (moved / "runs/small/logs/attempt_2").is_dir()


def test_another_tokenizer_is_refused_by_name(moved, refusal):
    file = moved / "tokenizer/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 77}))
    told = refusal(config_of(moved))
    assert "fingerprint.tokenizer: " in told and "train.run_name" in told and "put the files back" in told


def test_other_wheels_are_refused_by_name(moved, tmp_path, refusal):
    wheels = shipped_wheels(tmp_path / "wheels")
    table = wheels / "format.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:-1]) + "\n")
    told = refusal(config_of(moved, emotion={"wheel_dir": str(wheels)}))
    assert "fingerprint.wheels: " in told


def test_another_reward_function_under_the_same_name_is_refused_by_name(moved, refusal):
    (moved / "own_reward_of_the_test.py").write_text(REWARD.replace("1.0", "2.0"))
    told = refusal(config_of(moved))
    assert "fingerprint.reward_funcs.own_reward_of_the_test.warmth: " in told


@pytest.mark.parametrize(("section", "name", "value"), [("train", "seed", 1), ("rl", "beta", 0.5)])
def test_another_seed_or_setting_is_refused_with_both_values(section, name, value, moved, refusal):
    told = refusal(config_of(moved, **{section: {name: value}}))
    assert f"{section}.{name}: " in told and f"in the run, {value} now" in told


def test_other_records_under_the_same_name_are_refused_by_name(moved, refusal):
    text = (moved / "sft.jsonl").read_text()
    (moved / "sft.jsonl").write_text(text.replace("The voice", "The brows", 1))
    assert "fingerprint.sft: " in refusal(config_of(moved))


def swap(path, at=-1):
    """Puts other bytes of the same number into a file, whose time of modification is set back."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(bytes(content))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


@pytest.mark.parametrize("held_out", [False, True])
def test_other_bytes_of_a_clip_under_the_same_name_size_and_time_are_refused_by_name(held_out, moved, refusal):
    clip = moved / ("clips/6.mp4" if held_out else "clips/0.mp4")
    name = str(clip.relative_to(moved))
    # What an earlier start has seen; that a run writes it, the test with commands below shows.
    (moved / "runs/small/clips.json").write_text(json.dumps({name: of_ends(clip), f"sft:{name}": of_ends(clip)}))
    setup = make_setup(config_of(moved, data={"eval_path": str(moved / "eval.jsonl")}))
    setup.source.clips = ClipFingerprints(clip_label(setup.config))
    setup.source.clips.restore(json.loads((moved / "runs/small/clips.json").read_text()))
    record = (setup.data.eval if held_out else setup.data.sft)[0]
    try:
        setup.source.load(record)
        swap(clip)
        with pytest.raises(ClipChangedError, match=f"{name} is not the clip that this run saw"):
            setup.source.load(record)
    finally:
        setup.close()
    if not held_out:
        told = refusal(config_of(moved))
        assert f"{name} is not the clip that this run saw under that name before" in told
        assert "Put the earlier file" in told and "sft.jsonl:1" in told


def test_commands_keep_what_clips_were_and_go_on_only_with_those(tmp_path, compiled):
    data, output = make_data(tmp_path / "data"), tmp_path / "runs"
    short = ("--config.sft.max_steps=4", "--config.rl.max_steps=0", "--config.data.eval_path=")
    short += ("--config.train.save_steps=2", "--config.train.export=false")
    train(data, output, compiled, *short, place="update_dispatched 3")
    seen = json.loads((output / "small/clips.json").read_text())
    assert seen and all(value == of_ends(data / name.removeprefix("sft:")) for name, value in seen.items())
    kept = {name: (data / name.removeprefix("sft:")).read_bytes() for name in seen}
    for name in seen:
        swap(data / name.removeprefix("sft:"))
    ended = train(data, output, compiled, *short)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "is not the clip that this run saw under that name before" in " ".join(ended.stderr.split())
    for name, content in kept.items():
        (data / name.removeprefix("sft:")).write_bytes(content)
    assert train(data, output, compiled, *short).returncode == 0


def test_a_damaged_list_of_clips_is_named(moved, refusal):
    (moved / "runs/small/clips.json").write_text('{"clips/0.mp4": 3')
    assert "clips.json: cannot be read" in refusal(config_of(moved))


def test_a_run_of_an_older_version_goes_on_and_says_what_is_not_checked(tmp_path, caplog):
    config = {"rl": {"beta": 0.04}, "model": {"path": "a"}}
    RunDirectory.open(tmp_path / "run", config, fingerprints={"rl": "aa"}).close()
    now = {"rl": "aa", "tokenizer": "bb", "model": "cc"}
    with RunDirectory.open(tmp_path / "run", config, fingerprints=now) as folder:
        assert folder.resumed
    assert "kept no fingerprint of model, tokenizer" in caplog.text
    with pytest.raises(RunDirectoryError, match='model.path: "a" in the run, "b" now'):  # nothing says it is the same
        RunDirectory.open(tmp_path / "run", config | {"model": {"path": "b"}}, fingerprints=now)


def test_where_something_lies_may_change_only_with_the_same_fingerprint(tmp_path):
    config, kept = {"model": {"path": "a"}}, {"model": "aa"}
    RunDirectory.open(tmp_path / "run", config, fingerprints=kept).close()
    RunDirectory.open(tmp_path / "run", {"model": {"path": "b"}}, fingerprints=kept).close()
    with pytest.raises(RunDirectoryError, match='fingerprint.model: "aa" in the run, "bb" now'):
        RunDirectory.open(tmp_path / "run", {"model": {"path": "c"}}, fingerprints={"model": "bb"})


NO_SIZES = {
    f"{part}_{name}": 0
    for part in ("text", "vision", "audio")
    for name in ("hidden_size", "layers", "heads", "mlp_size")
} | {"text_kv_heads": 0}


def test_a_models_weights_and_settings_are_told_apart_and_its_place_is_not(small, small_folder, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    export_model(
        first, small.backbone.config, nest(small.backbone.init(0)), ExportSettings(source=small.tokenizer_path)
    )
    shutil.copytree(first, second)

    def model_of(folder):
        model = NO_SIZES | {"path": str(folder), "tokenizer_path": ""}
        setup = make_setup(small_config_of(small_folder, model=model, mesh={"data": 4, "tensor": 2}))
        setup.close()
        return of_inputs(setup)["model"]

    kept = model_of(first)
    assert model_of(second) == kept != "random weights"
    swap(second / "model.safetensors")
    assert model_of(second) != kept


@pytest.mark.parametrize("at", [0, END_BYTES - 1, -1])
def test_both_ends_of_a_large_file_count(at, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(3 * END_BYTES + 7))
    before = of_ends(path)
    swap(path, at)
    assert of_ends(path) != before and of_ends(path).startswith(f"{3 * END_BYTES + 7}-")


def test_files_shorter_than_both_ends_count_whole(tmp_path):
    for size in (0, 1, END_BYTES, END_BYTES + 1, 2 * END_BYTES - 1):
        path = tmp_path / str(size)
        path.write_bytes(bytes(size))
        before = of_ends(path)
        if size:
            swap(path, size // 2)
            assert of_ends(path) != before


def test_a_clip_swapped_while_the_run_goes_on_is_noticed(small, tmp_path):
    record = small.data.rl[0]
    (tmp_path / "clips").mkdir()
    path = tmp_path / record.videos[0]
    path.write_bytes(b"first" * 100)
    clips = ClipFingerprints()
    clips.add(clips.check(record, tmp_path))
    clips.add(clips.check(record, tmp_path))
    assert list(clips.take_new()) == [record.videos[0]] and clips.take_new() == {}
    swap(path)
    with pytest.raises(ClipChangedError, match="not the clip that this run saw"):
        clips.check(record, tmp_path)


def test_a_link_out_of_the_media_root_is_left_to_the_loader_and_never_hashed(small, tmp_path):
    record = small.data.rl[0]
    root = tmp_path / "root"
    (root / record.videos[0]).parent.mkdir(parents=True)
    (tmp_path / "private").write_bytes(b"secret")
    (root / record.videos[0]).write_bytes(b"a clip")
    clips = ClipFingerprints()
    clips.add(clips.check(record, root))
    (root / record.videos[0]).unlink()
    (root / record.videos[0]).symlink_to(tmp_path / "private")
    assert clips.check(record, root) == {}


def test_equal_names_in_two_data_sets_with_folders_of_their_own_are_two_clips(small, tmp_path):
    record = small.data.rl[0]
    clips = ClipFingerprints(lambda file: f"{file}:")
    for name in ("sft", "eval"):
        (tmp_path / name / "clips").mkdir(parents=True)
        (tmp_path / name / record.videos[0]).write_bytes(name.encode())
        clips.add(clips.check(type(record)(**{**vars(record), "file": name}), tmp_path / name))
    assert set(clips.take_new()) == {f"sft:{record.videos[0]}", f"eval:{record.videos[0]}"}


def test_decoded_clips_are_not_taken_from_a_file_whose_bytes_were_swapped(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"first" * 100)
    cache = ClipCache(tmp_path / "cache", MediaConfig(), 28, 128)
    before = cache.key(str(path), "video")
    assert cache.key(str(path), "video") == before
    swap(path)
    assert cache.key(str(path), "video") != before


def test_the_source_of_a_reward_function_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "own_package_of_the_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "kind.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = of_source("own_package_of_the_test.kind.warmth")
    assert before == of_source("own_package_of_the_test.kind.other") != "no source file"
    (package / "kind.py").write_text(REWARD + "#\n")
    assert of_source("own_package_of_the_test.kind.warmth") != before
    assert of_source("no_such_package_of_the_test.kind.warmth") == "no source file"


def test_hosts_with_other_bytes_under_one_name_are_refused(tmp_path, monkeypatch):
    """What the second of two processes has seen, first in the same step and then in a later one."""
    setup = types.SimpleNamespace(source=types.SimpleNamespace(clips=ClipFingerprints()))
    folder = types.SimpleNamespace(path=tmp_path)

    def seen(*of_processes):
        monkeypatch.setattr(fingerprints.processes, "gather", lambda what, value: list(of_processes))
        fingerprints.write_clips(setup, folder)

    with pytest.raises(ClipChangedError, match="a.mp4: process 1 has another clip"):
        seen({"a.mp4": "3-aa"}, {"a.mp4": "3-bb"})
    seen({"a.mp4": "3-aa"}, {"a.mp4": "3-aa", "b.mp4": "4-cc"})
    assert json.loads((tmp_path / "clips.json").read_text()) == {"a.mp4": "3-aa", "b.mp4": "4-cc"}
    with pytest.raises(ClipChangedError, match="got 3 bytes with hash bb, expected 3 bytes with hash aa"):
        seen({}, {"a.mp4": "3-bb"})
