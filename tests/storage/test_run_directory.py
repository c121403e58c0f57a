"""The run folder, on a disk and in a bucket: made, taken up again, refused when it is not ours, locked, no secrets."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from mer_r1_jax.storage.run_directory import RunDirectory, RunDirectoryError
from mer_r1_jax.storage.run_settings import config_differences

CONFIG = {
    "name": "tiny",
    "rl": {"beta": 0.04, "arm": "mer_r1", "max_steps": 10},
    "train": {"seed": 0, "save_steps": 5, "report_to": ("tensorboard",)},
}


def changed(**fields):
    config = json.loads(json.dumps(CONFIG))
    for dotted, value in fields.items():
        section, name = dotted.split("__")
        config[section][name] = value
    return config


def test_new_run_has_the_documented_layout(tmp_path):
    with RunDirectory.open(tmp_path / "runs" / "tiny", CONFIG) as run:
        assert not run.resumed and run.attempt == 1
        for name in ("completions", "tensorboard", "checkpoints", "eval", "logs/attempt_1"):
            assert (run.path / name).is_dir()
        assert json.loads(run.config_file.read_text()) == json.loads(json.dumps(CONFIG))
        environment = json.loads(run.env_file.read_text())
        assert environment["program"] == "mer_r1_jax" and environment["libraries"]["jax"]
        assert set(environment) == {
            "program", "started", "python", "platform", "machine", "cpus", "libraries", "commit", "fingerprints",
        }  # fmt: skip


def test_resume_counts_attempts_and_keeps_each_ones_record(tmp_path):
    for attempt in (1, 2, 3):
        with RunDirectory.open(tmp_path / "run", changed(train__save_steps=attempt)) as run:
            assert run.attempt == attempt and run.resumed == (attempt > 1)
            logging.getLogger("mer_r1_jax.anything").warning("attempt %d speaks", attempt)
    for attempt in (1, 2, 3):
        folder = tmp_path / "run" / "logs" / f"attempt_{attempt}"
        assert json.loads((folder / "config.json").read_text())["train"]["save_steps"] == attempt
        assert f"attempt {attempt} speaks" in (folder / "log.txt").read_text()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["save_steps"] == 3


def test_resume_with_a_changed_config_is_refused_field_by_field(tmp_path):
    RunDirectory.open(tmp_path / "run", CONFIG).close()
    other = changed(rl__beta=0.1, train__seed=1, train__save_steps=7)
    other["rl"]["new_field"] = True
    del other["rl"]["arm"]
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.open(tmp_path / "run", other)
    message = str(caught.value)
    assert "rl.beta: 0.04 in the run, 0.1 now" in message
    assert "train.seed: 0 in the run, 1 now" in message
    assert 'rl.arm: "mer_r1" in the run, absent now' in message
    assert "rl.new_field: absent in the run, true now" in message
    assert "save_steps" not in message and "train.run_name" in message
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == json.loads(json.dumps(CONFIG))
    assert sorted(os.listdir(tmp_path / "run" / "logs")) == ["attempt_1"]
    with RunDirectory.open(tmp_path / "run", changed(rl__beta=0.1), may_change=["rl.beta"]) as run:
        assert run.resumed


def test_what_a_decoding_worker_may_use_may_change(tmp_path):
    media = {"decode_timeout": 30.0, "decode_memory_mb": 4096, "decode_workers": 2, "max_frames": 8}
    RunDirectory.open(tmp_path / "run", CONFIG | {"media": media}).close()
    wider = media | {"decode_timeout": 90.0, "decode_memory_mb": 8192, "decode_workers": 1}
    RunDirectory.open(tmp_path / "run", CONFIG | {"media": wider}).close()
    with pytest.raises(RunDirectoryError, match="media.max_frames: 8 in the run, 9 now"):
        RunDirectory.open(tmp_path / "run", CONFIG | {"media": wider | {"max_frames": 9}})


def test_resume_with_other_data_is_refused(tmp_path):
    RunDirectory.open(tmp_path / "run", CONFIG, fingerprints={"data.rl_path": "aa"}).close()
    with pytest.raises(RunDirectoryError, match='fingerprint.data.rl_path: "aa" in the run, "bb" now'):
        RunDirectory.open(tmp_path / "run", CONFIG, fingerprints={"data.rl_path": "bb"})
    with RunDirectory.open(tmp_path / "run", CONFIG, fingerprints={"data.rl_path": "aa"}) as run:
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
def test_folder_of_something_else_is_refused_and_left_alone(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.open(tmp_path, CONFIG)
    assert next(iter(files)) in str(caught.value) and "train.run_name" in str(caught.value)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == files


def test_a_start_killed_before_the_config_was_written_can_be_repeated(tmp_path):
    RunDirectory.open(tmp_path / "run", CONFIG).close()
    (tmp_path / "run" / "config.json").unlink()
    with RunDirectory.open(tmp_path / "run", changed(rl__beta=9)) as run:
        assert not run.resumed and run.attempt == 2
    (tmp_path / "run" / "env.json").unlink()
    (tmp_path / "run" / "config.json").unlink()
    with RunDirectory.open(tmp_path / "run", CONFIG) as run:
        assert not run.resumed


def test_never_resume_refuses_a_used_name(tmp_path):
    RunDirectory.open(tmp_path / "run", CONFIG, resume=False).close()
    with pytest.raises(RunDirectoryError, match="holds a run already"):
        RunDirectory.open(tmp_path / "run", CONFIG, resume=False)


def test_damaged_config_of_the_earlier_attempt_is_a_clear_error(tmp_path):
    RunDirectory.open(tmp_path / "run", CONFIG).close()
    (tmp_path / "run" / "config.json").write_text('{"name": ')
    with pytest.raises(RunDirectoryError, match="config.json of the earlier attempt cannot be read"):
        RunDirectory.open(tmp_path / "run", CONFIG)


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


def test_secrets_and_variables_of_the_environment_are_in_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-planted-secret")
    monkeypatch.setenv("HOME", str(tmp_path / "planted-home"))
    with RunDirectory.open(tmp_path / "run", CONFIG):
        logging.getLogger().warning("something")
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert "planted" not in path.read_text(), path
            assert "JUDGE_API_KEY" not in path.read_text(), path


def test_other_library_versions_are_named_on_resume(tmp_path, caplog):
    RunDirectory.open(tmp_path / "run", CONFIG).close()
    environment = json.loads((tmp_path / "run" / "env.json").read_text())
    environment["libraries"]["jax"] = "0.0.1"
    (tmp_path / "run" / "env.json").write_text(json.dumps(environment))
    RunDirectory.open(tmp_path / "run", CONFIG).close()
    assert 'jax: "0.0.1" in the run' in caplog.text
