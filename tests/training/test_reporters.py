"""Weights & Biases (a stand-in module) and a function of the user's beside metrics.jsonl: neither can stop a run."""

import json
import sys
import threading
import types

import pytest

from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.config.schema import ConfigError
from mer_r1_jax.rl.own_function import OwnFunctionError
from mer_r1_jax.storage.run_directory import RunDirectory
from mer_r1_jax.training import reporters
from mer_r1_jax.training.metrics import MetricsWriter, read_metrics
from mer_r1_jax.training.reporters import ReporterError, check_report_to

CONFIG = {"name": "tiny", "train": {"run_name": "mine"}, "rl": {"beta": 0.04}}
CALLS: list = []


def note(phase, step, metrics):
    CALLS.append((phase, step, metrics))


def fail(phase, step, metrics):
    raise SystemExit("the board is gone")


@pytest.fixture(autouse=True)
def as_module(monkeypatch):
    CALLS.clear()
    monkeypatch.setitem(sys.modules, "my_board", types.SimpleNamespace(note=note, fail=fail))


@pytest.fixture
def server(monkeypatch):
    """A stand-in of the package: what was asked of it, and what each call does."""
    asked, does = [], {}

    def call(name, result=None):
        def called(*arguments, **settings):
            asked.append((name, arguments, settings))
            if name in does:
                does[name]()
            return result

        return called

    run = types.SimpleNamespace(**{name: call(name) for name in ("define_metric", "log", "finish")})
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=call("init", run)))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return types.SimpleNamespace(asked=asked, does=does, of=lambda name: [call for call in asked if call[0] == name])


def write(folder, report_to, steps=(1, 2), resume_at=None):
    with RunDirectory.open(folder, CONFIG) as run, MetricsWriter(run, resume_at, report_to) as writer:
        for step in steps:
            writer.write("rl", step, {"reward": step / 2, "rewards/my fn/mean": float("nan")})
    return [line["step"] for line in read_metrics(folder / "metrics.jsonl")]


def test_wandb_is_given_names_settings_and_every_step_on_the_phase_s_own_axis(server, tmp_path):
    assert write(tmp_path, ("tensorboard", "wandb")) == [1, 2]
    ((_, _, settings),) = server.of("init")
    assert (settings["project"], settings["name"], settings["resume"]) == ("mer-r1", "mine", "allow")
    assert settings["config"] == CONFIG and settings["settings"]["login_timeout"] > 0
    lines = [arguments[0] for _, arguments, _ in server.of("log")]
    assert [(line["rl/step"], line["rl/reward"]) for line in lines] == [(1, 0.5), (2, 1.0)]
    assert ("define_metric", ("rl/*",), {"step_metric": "rl/step"}) in server.asked
    assert server.asked[-1][0] == "finish"
    assert any((tmp_path / "tensorboard").iterdir())
    # A run that goes on is the same one there.
    write(tmp_path, ("wandb",), steps=(3,), resume_at=("rl", 2))
    first, second = (settings["id"] for _, _, settings in server.of("init"))
    assert first == second == (tmp_path / "wandb_id").read_text()


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_server_that_fails_is_named_once_and_the_run_goes_on(server, tmp_path, caplog, where):
    def fail():
        raise ConnectionError("no route to host")

    server.does[where] = fail
    assert write(tmp_path, ("wandb",), steps=range(20)) == list(range(20))
    assert caplog.text.count("Weights & Biases cannot be written and is left out") == 1
    assert "ConnectionError: no route to host" in caplog.text


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_server_that_hangs_holds_up_neither_steps_nor_the_end(server, tmp_path, caplog, monkeypatch, where):
    monkeypatch.setattr(reporters, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(reporters, "QUEUED", 8)
    gone_on = threading.Event()
    server.does[where] = gone_on.wait
    try:
        assert write(tmp_path, ("wandb",), steps=range(30)) == list(range(30))
    finally:
        gone_on.set()
    assert caplog.text.count("Weights & Biases cannot be written and is left out") == 1


def test_a_function_of_the_user_s_is_called_with_every_step_and_may_fail(tmp_path, caplog):
    assert write(tmp_path, ("my_board.note", "my_board.fail")) == [1, 2]
    assert [(phase, step, metrics["reward"]) for phase, step, metrics in CALLS] == [("rl", 1, 0.5), ("rl", 2, 1.0)]
    assert "my_board.fail cannot be written and is left out from now on" in caplog.text
    assert "SystemExit: the board is gone" in caplog.text


def test_what_is_not_there_is_refused_before_anything_is_compiled(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ReporterError, match=r"got 'wandb'.*pip install 'mer-r1-jax\[wandb\]'"):
        check_report_to(("tensorboard", "wandb"))
    with pytest.raises(OwnFunctionError, match=r"train.report_to: got 'my_board.nothing'"):
        check_report_to(("my_board.note", "my_board.nothing"))
    with pytest.raises(ConfigError, match="expected one of tensorboard, wandb, or a function of your own"):
        from_mapping({"train": {"report_to": ("mlflow",)}})
    assert from_mapping({"train": {"report_to": ("wandb", "my_board.note")}}).train.report_to[1] == "my_board.note"


def test_the_id_is_not_made_where_nobody_asked(tmp_path):
    write(tmp_path, ("tensorboard",))
    assert not (tmp_path / "wandb_id").exists()
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG
