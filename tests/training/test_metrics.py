"""Metrics: no step twice, nothing lost, valid JSON, and no backend that can stop a run."""

import io
import json
import math
import os
import struct
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from tensorboardX.proto import event_pb2

from mer_r1_jax.storage.run_directory import RunDirectory
from mer_r1_jax.training import progress as progress_module
from mer_r1_jax.training.metrics import MetricsWriter, read_metrics, to_floats
from mer_r1_jax.training.progress import LINES, LOSS_HINT, Compiling, Progress

CONFIG = {"name": "tiny"}


def steps_of(path, phase):
    return [line["step"] for line in read_metrics(path) if line["phase"] == phase]


def write_attempt(folder, resume_at, **steps):
    with RunDirectory.open(folder, CONFIG) as run, MetricsWriter(run, resume_at) as writer:
        for phase, numbers in steps.items():
            for step in numbers:
                writer.write(phase, step, {"loss": step / 10, "attempt": run.attempt})


def test_resume_takes_back_the_steps_that_are_made_again(tmp_path):
    write_attempt(tmp_path, None, sft=range(5), rl=range(8))
    write_attempt(tmp_path, ("rl", 3), rl=range(4, 7))
    write_attempt(tmp_path, ("rl", 3), rl=range(4, 6))  # resumed twice from one checkpoint
    write_attempt(tmp_path, ("rl", 1), rl=range(2, 10))  # and from an older one
    metrics = tmp_path / "metrics.jsonl"
    assert steps_of(metrics, "sft") == list(range(5))
    assert steps_of(metrics, "rl") == list(range(10))
    moved = {n: tmp_path / "logs" / f"attempt_{n}" / "metrics_discarded.jsonl" for n in (1, 2, 3, 4)}
    assert not moved[1].exists()
    assert [steps_of(moved[n], "rl") for n in (2, 3, 4)] == [[4, 5, 6, 7], [4, 5, 6], [2, 3, 4, 5]]
    lines = [line for path in (metrics, moved[2], moved[3], moved[4]) for line in path.read_text().splitlines()]
    assert len(lines) == 5 + 8 + 3 + 2 + 8  # every line ever written is in exactly one place
    assert len(set(lines)) == len(lines)


def test_resume_in_sft_takes_back_rl_too_and_a_fresh_start_takes_back_all(tmp_path):
    write_attempt(tmp_path, None, sft=range(5), rl=range(3))
    write_attempt(tmp_path, ("sft", 2), sft=[3])
    assert steps_of(tmp_path / "metrics.jsonl", "sft") == [0, 1, 2, 3]
    assert steps_of(tmp_path / "metrics.jsonl", "rl") == []
    write_attempt(tmp_path, None, sft=[0])
    assert steps_of(tmp_path / "metrics.jsonl", "sft") == [0]
    assert len(read_metrics(tmp_path / "logs" / "attempt_3" / "metrics_discarded.jsonl")) == 4


def test_line_cut_by_a_kill_is_moved_and_the_file_stays_valid(tmp_path):
    write_attempt(tmp_path, None, rl=range(3))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "phase": "rl", "lo')
    assert steps_of(tmp_path / "metrics.jsonl", "rl") == [0, 1, 2]
    write_attempt(tmp_path, ("rl", 2), rl=[3])
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert steps_of(tmp_path / "metrics.jsonl", "rl") == [0, 1, 2, 3]
    assert '"lo' in (tmp_path / "logs" / "attempt_2" / "metrics_discarded.jsonl").read_text()


def test_lines_written_before_sigkill_are_there(tmp_path):
    script = f"""
        import os, signal
        from mer_r1_jax.training.metrics import MetricsWriter
        from mer_r1_jax.storage.run_directory import RunDirectory
        writer = MetricsWriter(RunDirectory.open({str(tmp_path / "run")!r}, {CONFIG!r}))
        for step in range(4):
            writer.write("sft", step, {{"loss": 1.0}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert steps_of(tmp_path / "run" / "metrics.jsonl", "sft") == [0, 1, 2, 3]


def test_numbers_of_every_kind_become_valid_json_and_come_back(tmp_path):
    metrics = {
        "nan": float("nan"),
        "inf": jnp.float32(np.inf),
        "-inf": -np.inf,
        "bf16": jnp.bfloat16(0.5),
        "int": jnp.int32(7),
        "np": np.float64(1e-300),
        "bool": jnp.array(True),
        "shaped": jnp.ones((1, 1)) * 0.25,
    }
    with RunDirectory.open(tmp_path, CONFIG) as run, MetricsWriter(run) as writer:
        values = writer.write("rl", 1, metrics)
    assert list(values) == list(metrics) and all(type(value) is float for value in values.values())

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    (text,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    line = json.loads(text, parse_constant=refuse)
    assert (line["nan"], line["inf"], line["-inf"], line["int"]) == ("NaN", "Infinity", "-Infinity", 7)
    (back,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(back["nan"]) and back["inf"] == math.inf and back["-inf"] == -math.inf
    assert (back["bf16"], back["np"], back["bool"], back["shaped"]) == (0.5, 1e-300, 1, 0.25)
    with pytest.raises(ValueError, match=r"'reward' is float32\[2\]"):
        to_floats({"reward": jnp.ones(2)})
    with pytest.raises(ValueError, match="'arm'"):
        to_floats({"arm": np.array("mer_r1")})


def read_events(path):
    content, events, at = path.read_bytes(), [], 0
    while at < len(content):
        (size,) = struct.unpack("<Q", content[at : at + 8])
        events.append(event_pb2.Event.FromString(content[at + 12 : at + 12 + size]))
        at += 16 + size
    return events


def test_tensorboard_has_one_file_a_phase_and_attempt_and_restarts_at_the_resumed_step(tmp_path):
    write_attempt(tmp_path, None, sft=range(2), rl=range(4))
    write_attempt(tmp_path, ("rl", 1), rl=range(2, 4))
    assert len(list((tmp_path / "tensorboard" / "sft").iterdir())) == 1
    first, second = sorted((tmp_path / "tensorboard" / "rl").iterdir(), key=lambda path: path.name[-1])
    scalars = [(e.step, v.tag, v.simple_value) for e in read_events(first) for v in e.summary.value if v.tag == "loss"]
    assert scalars == [(step, "loss", pytest.approx(step / 10)) for step in range(4)]
    restarts = [e.step for e in read_events(second) if e.session_log.status == event_pb2.SessionLog.START]
    assert restarts == [2]


@pytest.mark.parametrize("resume_at", [("sft", 1), None])
def test_tensorboard_forgets_all_of_rl_when_sft_is_taken_up_again(tmp_path, resume_at):
    write_attempt(tmp_path, None, sft=range(3), rl=range(4))
    write_attempt(tmp_path, resume_at, sft=[2])
    _, second = sorted((tmp_path / "tensorboard" / "rl").iterdir(), key=lambda path: path.name[-1])
    restarts = [e.step for e in read_events(second) if e.session_log.status == event_pb2.SessionLog.START]
    assert restarts == [0]


def test_broken_tensorboard_is_named_once_and_training_goes_on(tmp_path, caplog):
    with RunDirectory.open(tmp_path, CONFIG) as run:
        run.tensorboard.rmdir()
        run.tensorboard.write_text("a file where the folder should be")
        run.completions.rmdir()
        with MetricsWriter(run) as writer:
            for step in range(3):
                writer.write("rl", step, {"reward": step})
                writer.write_completions(step, {"completion": ["a"]})
    assert steps_of(tmp_path / "metrics.jsonl", "rl") == [0, 1, 2]
    assert caplog.text.count("TensorBoard cannot be written") == 1
    assert caplog.text.count("table of completions cannot be written") == 1


def test_tensorboard_can_be_switched_off_and_unknown_phases_are_refused(tmp_path):
    with RunDirectory.open(tmp_path, CONFIG) as run, MetricsWriter(run, report_to=()) as writer:
        writer.write("rl", 1, {"reward": 1})
        with pytest.raises(ValueError, match="expected one of sft, rl"):
            writer.write("warmup", 1, {})
    assert list((tmp_path / "tensorboard").iterdir()) == []


def test_completions_are_a_parquet_table(tmp_path):
    columns = {
        "prompt": ["p1", "p2"],
        "completion": ["<think>ä</think>\n<answer>happy</answer>", ""],
        "reward": np.array([0.5, np.nan], np.float32),
        "advantage": [1.0, None],
    }
    with RunDirectory.open(tmp_path, CONFIG) as run, MetricsWriter(run) as writer:
        writer.write_completions(10, columns)
    table = pq.read_table(tmp_path / "completions" / "completions_00010.parquet").to_pydict()
    assert table["completion"] == columns["completion"] and table["advantage"] == [1.0, None]
    assert os.listdir(tmp_path / "completions") == ["completions_00010.parquet"]


METRICS = {
    "loss": 0.0, "reward": 1.25, "rewards/recall/mean": 0.5, "rewards/precision/mean": 0.75, "confidence/slow": 0.4,
    "confidence/fast": 0.3, "completions/mean_length": 51.6, "perf/throughput": 1234.0, "kl": 0.0,
}  # fmt: skip


def test_progress_is_plain_lines_off_a_terminal_with_the_loss_explained_once():
    stream = io.StringIO()
    with Progress("rl", 10, done=2, stream=stream) as progress:
        progress.update(3, METRICS)
        progress.update(4, METRICS)
    hint, first, second = stream.getvalue().splitlines()
    assert hint == LOSS_HINT
    shown = "reward 1.250  recall 0.500  precision 0.750  conf slow 0.400  fast 0.300  length 52  tok/s 1234"
    assert first.startswith(f"rl 3/10  {shown}") and second.startswith(f"rl 4/10  {shown}")
    stream = io.StringIO()
    with Progress("sft", 10, stream=stream) as progress:
        progress.update(1, {"loss": 2.5})
    assert stream.getvalue().startswith("sft 1/10  loss 2.5000")


def test_a_file_gets_about_fifty_lines_of_a_phase_the_first_and_the_last_among_them():
    stream = io.StringIO()
    with Progress("sft", 2000, stream=stream) as progress:
        for step in range(1, 2001):
            progress.update(step, {"loss": 2.5})
    steps = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert steps[0] == 1 and steps[-1] == 2000 and LINES <= len(steps) <= LINES + 2


def test_the_time_left_is_told_without_what_compiled(monkeypatch):
    """50 steps of 2 s, the first of which took a minute and the third compiled for 60 s: a function traced within
    another counts once."""
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    compiling = Compiling()
    monkeypatch.setattr(progress_module, "_COMPILING", compiling)
    stream = io.StringIO()
    with Progress("sft", 50, stream=stream) as progress:
        now[0] = 1060.0
        progress.update(1, {})
        now[0] = 1062.0
        progress.update(2, {})
        for at, event, seconds in ((92, "jaxpr_trace_duration", 10), (102, "jaxpr_trace_duration", 40),
                                   (122, "backend_compile_duration", 20)):  # fmt: skip
            now[0] = 1000.0 + at
            compiling._heard(f"/jax/core/compile/{event}", seconds)
        compiling._heard("/jax/checkpoint/write/duration", 50)  # none of ours
        now[0] = 1124.0
        progress.update(3, {})
    first, second, third = stream.getvalue().splitlines()
    assert first == "sft 1/50" and second.endswith("1:36 left") and third.endswith("1:34 left")


def test_jax_tells_what_it_compiles():
    compiling, start = Compiling(), time.monotonic()
    jax.jit(lambda x: jnp.sin(x) @ x.T + time.monotonic())(jnp.ones((3, 4)))
    assert 0 < compiling.since(start) <= time.monotonic() - start
    assert compiling.since(time.monotonic()) == 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal():
    stream = Terminal()
    with Progress("rl", 4, stream=stream) as progress:
        progress.update(1, METRICS)
        progress.note("a completion")
        progress.update(4, METRICS)
    text = stream.getvalue()
    assert "100%" in text and "4/4" in text and "recall 0.500" in text and "a completion\n" in text
