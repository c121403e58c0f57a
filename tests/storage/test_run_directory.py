"""The run folder, on a disk and in a bucket: made, taken up again, refused when it is not ours, locked, no secrets."""

import copy
import dataclasses
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from mer_r1_jax.config.build import from_mapping, of_its_time
from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.storage.run_directory import RunDirectory, RunDirectoryError
from mer_r1_jax.storage.run_settings import config_differences, refused_changes, warn_of_changes

CONFIG = {
    "name": "tiny",
    "rl": {"beta": 0.04, "arm": "mer_r1", "max_steps": 10},
    "train": {"seed": 0, "save_steps": 5, "report_to": ("tensorboard",)},
}


class FolderOnDisk:
    """A run's folder, looked at by what lies in it: names below it with their contents."""

    def __init__(self, tmp_path):
        self.path = tmp_path / "run"

    def open(self, config=CONFIG, **options):
        return RunDirectory.open(self.path, config, **options)

    def get(self, name):
        return (self.path / name).read_text()

    def put(self, name, text):
        self.path.mkdir(exist_ok=True)
        (self.path / name).write_text(text)

    def remove(self, name):
        (self.path / name).unlink()

    def files(self):
        paths = [path for path in self.path.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path.relative_to(self.path).as_posix(): path.read_text() for path in paths}


class FolderInBucket:
    """The same in a bucket; every start comes from another host."""

    path = "gs://bucket/runs/run"

    def __init__(self, tmp_path, bucket):
        self.hosts = (tmp_path / f"host_{number}" for number in itertools.count())
        self.bucket = bucket

    def open(self, config=CONFIG, **options):
        return RunDirectory.open(self.path, config, local_dir=next(self.hosts), **options)

    def get(self, name):
        return self.bucket.objects[f"runs/run/{name}"].data.decode()

    def put(self, name, text):
        self.bucket.put(f"runs/run/{name}", text.encode())

    def remove(self, name):
        del self.bucket.objects[f"runs/run/{name}"]

    def files(self):
        return {name.removeprefix("runs/run/"): stored.data.decode() for name, stored in self.bucket.objects.items()}


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    if request.param == "disk":
        return FolderOnDisk(tmp_path)
    return FolderInBucket(tmp_path, request.getfixturevalue("bucket"))


def changed(**fields):
    config = json.loads(json.dumps(CONFIG))
    for dotted, value in fields.items():
        section, name = dotted.split("__")
        config[section][name] = value
    return config


def test_new_run_has_the_documented_layout(folder):
    with folder.open() as run:
        assert not run.resumed and run.attempt == 1
        for name in ("completions", "tensorboard", "checkpoints", "eval", "logs/attempt_1"):
            assert (run.path / name).is_dir()
        assert json.loads(run.config_file.read_text()) == json.loads(json.dumps(CONFIG))
        environment = json.loads(run.env_file.read_text())
        assert environment["program"] == "mer_r1_jax" and environment["libraries"]["jax"]
        assert set(environment) == {
            "program", "started", "python", "platform", "machine", "cpus", "libraries", "commit", "fingerprints",
        }  # fmt: skip


def test_resume_counts_attempts_and_keeps_each_ones_record(folder):
    for attempt in (1, 2, 3):
        with folder.open(changed(train__save_steps=attempt)) as run:
            assert run.attempt == attempt and run.resumed == (attempt > 1)
            logging.getLogger("mer_r1_jax.anything").warning("attempt %d speaks", attempt)
    for attempt in (1, 2, 3):
        assert json.loads(folder.get(f"logs/attempt_{attempt}/config.json"))["train"]["save_steps"] == attempt
        assert f"attempt {attempt} speaks" in folder.get(f"logs/attempt_{attempt}/log.txt")
    assert json.loads(folder.get("config.json"))["train"]["save_steps"] == 3


def test_a_setting_that_a_run_s_version_did_not_have_is_at_its_default(tmp_path):
    now = dataclasses.asdict(RunConfig())
    was = copy.deepcopy(now)
    del was["rl"]["entropy_coef"], was["rl"]["optimizer"]["weight_decay"]
    assert refused_changes(was, now, {}, {}) == []
    now["rl"]["entropy_coef"] = 0.1
    assert refused_changes(was, now, {}, {}) == ["rl.entropy_coef: absent in the run, 0.1 now"]


def test_nor_is_such_a_setting_another_layout(caplog):
    now = dataclasses.asdict(RunConfig())
    was = copy.deepcopy(now)
    del was["mesh"]["sparse_core_collectives"]
    environment = {"libraries": {}, "python": "3", "machine": "m"}
    warn_of_changes(was, now, environment, environment)
    assert not caplog.records
    now["mesh"]["sparse_core_collectives"] = True
    warn_of_changes(was, now, environment, environment)
    assert "mesh.sparse_core_collectives: absent in the run, true now" in caplog.text


def test_a_run_of_before_worlds_had_names_goes_on_in_its_own():
    """The default is another one since; that run's is what it would be called now."""
    now = dataclasses.asdict(RunConfig())
    was = copy.deepcopy(now)
    del was["data"]["synthetic_world"]
    now["data"]["synthetic_world"] = "concluding"
    assert refused_changes(was, now, {}, {}) == []
    now["data"]["synthetic_world"] = "U"
    assert refused_changes(was, now, {}, {}) == ['data.synthetic_world: absent in the run, "U" now']
    assert from_mapping(of_its_time(was)).data.synthetic_world == "concluding"


def test_resume_with_a_changed_config_is_refused_field_by_field(folder):
    folder.open().close()
    other = changed(rl__beta=0.1, train__seed=1, train__save_steps=7)
    other["rl"]["new_field"] = True
    del other["rl"]["arm"]
    with pytest.raises(RunDirectoryError) as caught:
        folder.open(other)
    message = str(caught.value)
    assert "rl.beta: 0.04 in the run, 0.1 now" in message
    assert "train.seed: 0 in the run, 1 now" in message
    assert 'rl.arm: "mer_r1" in the run, absent now' in message
    assert "rl.new_field: absent in the run, true now" in message
    assert "save_steps" not in message and "train.run_name" in message
    assert json.loads(folder.get("config.json")) == json.loads(json.dumps(CONFIG))
    assert {name.split("/")[1] for name in folder.files() if name.startswith("logs/")} == {"attempt_1"}
    with folder.open(changed(rl__beta=0.1), may_change=["rl.beta"]) as run:
        assert run.resumed


def test_what_a_decoding_worker_may_use_may_change(folder):
    media = {"decode_timeout": 30.0, "decode_memory_mb": 4096, "decode_workers": 2, "max_frames": 8}
    folder.open(CONFIG | {"media": media}).close()
    wider = media | {"decode_timeout": 90.0, "decode_memory_mb": 8192, "decode_workers": 1}
    folder.open(CONFIG | {"media": wider}).close()
    with pytest.raises(RunDirectoryError, match="media.max_frames: 8 in the run, 9 now"):
        folder.open(CONFIG | {"media": wider | {"max_frames": 9}})


def test_resume_with_other_data_is_refused(folder):
    folder.open(fingerprints={"data.rl_path": "aa"}).close()
    with pytest.raises(RunDirectoryError, match='fingerprint.data.rl_path: "aa" in the run, "bb" now'):
        folder.open(fingerprints={"data.rl_path": "bb"})
    with folder.open(fingerprints={"data.rl_path": "aa"}) as run:
        assert run.resumed


def test_differences_tell_types_apart_but_not_spellings_of_a_number():
    assert config_differences({"a": 1, "b": [1, 2], "c": {}}, {"a": 1.0, "b": (1, 2), "c": {}}) == []
    assert config_differences({"a": 1}, {"a": True}) == ["a: 1 in the run, true now"]
    assert config_differences({"a": {"x": 1}}, {"a": {"x": 2}}, ["a"]) == []
    assert config_differences({"ab": 1}, {"ab": 2}, ["a"]) == ["ab: 1 in the run, 2 now"]


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "mine"},
        {"config.json": '{"model_type": "qwen2_5_omni"}', "model.safetensors": ""},
        {"config.json": "{}", "env.json": '{"program": "other"}'},
        {"config.json": "{}", "env.json": "[]"},
    ],
)
def test_folder_of_something_else_is_refused_and_left_alone(folder, files):
    for name, content in files.items():
        folder.put(name, content)
    with pytest.raises(RunDirectoryError) as caught:
        folder.open()
    assert next(iter(files)) in str(caught.value) and "train.run_name" in str(caught.value)
    assert str(caught.value).startswith(str(folder.path)) and folder.files() == files


def test_a_start_killed_before_the_config_was_written_can_be_repeated(folder):
    folder.open().close()
    folder.remove("config.json")
    with folder.open(changed(rl__beta=9)) as run:
        assert not run.resumed and run.attempt == 2
    folder.remove("env.json")
    folder.remove("config.json")
    with folder.open() as run:
        assert not run.resumed


def test_never_resume_refuses_a_used_name(folder):
    folder.open(resume=False).close()
    with pytest.raises(RunDirectoryError, match="holds a run already"):
        folder.open(resume=False)


def test_damaged_config_of_the_earlier_attempt_is_a_clear_error(folder):
    folder.open().close()
    folder.put("config.json", '{"name": ')
    with pytest.raises(RunDirectoryError, match="config.json of the earlier attempt cannot be read"):
        folder.open()


def test_unusable_output_folder_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be made.*train.output_dir"):
        RunDirectory.open(tmp_path / "file" / "run", CONFIG)


def test_two_processes_never_write_one_run_and_a_dead_one_holds_nothing(tmp_path):
    script = f"""
        import os, time
        from mer_r1_jax.storage.run_directory import RunDirectory
        run = RunDirectory.open({str(tmp_path / "run")!r}, {CONFIG!r})
        if os.fork() == 0:
            time.sleep(30)  # a worker that outlives its parent must not keep the lock
            os._exit(0)
        print("open", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as holder:
        try:
            assert holder.stdout.readline() == "open\n"
            with pytest.raises(RunDirectoryError, match=f"being written by process {holder.pid} "):
                RunDirectory.open(tmp_path / "run", CONFIG)
            holder.kill()
            holder.wait()
            with RunDirectory.open(tmp_path / "run", CONFIG) as run:
                assert run.attempt == 2
                with pytest.raises(RunDirectoryError, match="already open in this process"):
                    RunDirectory.open(tmp_path / "run", CONFIG)
            RunDirectory.open(tmp_path / "run", CONFIG).close()
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_secrets_and_variables_of_the_environment_are_in_no_file(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-planted-secret")
    monkeypatch.setenv("HOME", str(tmp_path / "planted-home"))
    with folder.open():
        logging.getLogger().warning("something")
    assert len(folder.files()) > 4
    for name, text in folder.files().items():
        assert "planted" not in text and "JUDGE_API_KEY" not in text, name


def test_other_library_versions_are_named_on_resume(folder, caplog):
    folder.open().close()
    environment = json.loads(folder.get("env.json"))
    environment["libraries"]["jax"] = "0.0.1"
    folder.put("env.json", json.dumps(environment))
    folder.open().close()
    assert 'jax: "0.0.1" in the run' in caplog.text
