"""experiments/evaluate_mme.py as a user meets it: killed in each stage and resumed, asking nobody twice."""

import collections
import functools
import json
import os
import re
import signal
import subprocess
import sys

import jax
import pytest
from support.commands import run_command as run_here
from support.judge_server import JudgeServer
from support.killing import INTERRUPT
from support.mme_standin import COUNT, follow_rule
from support.small_run import command, environment, with_config

from mer_r1_jax.omni.hf.export import ExportSettings, export_model
from mer_r1_jax.run.asking import open_policy
from mer_r1_jax.run.policy import write_settings
from mer_r1_jax.training.signals import EXIT_SAVED
from mer_r1_jax.training.state import nest

KEY = "sk-planted-0123456789abcdef"


@pytest.fixture(scope="module")
def model(small, tmp_path_factory):
    """An export with random weights that remembers settings wide enough for the questions."""
    folder = tmp_path_factory.mktemp("mme_model") / "hf"
    export_model(
        folder, small.backbone.config, nest(small.backbone.init(0)), ExportSettings(source=small.tokenizer_path)
    )
    settings = {
        "data": {"max_prompt_length": 1024, "prompt_buckets": (1024,)},
        "eval": {"prompts_per_batch": 4},
        "rl": {"max_completion_length": 12},
    }
    write_settings(folder, with_config(small, **settings).config)
    return folder


def start(standin, out, *arguments, cache=None, place=None):
    words = command("evaluate_mme.py", f"--benchmark_root={standin}", f"--out={out}", *arguments)
    if place is not None:
        words = [words[0], str(INTERRUPT), place, "SIGKILL", *words[1:]]
    values = environment(cache) | {"JUDGE_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}
    return subprocess.Popen(words, env=values, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    try:
        out, err = process.communicate(timeout=500)
    finally:
        process.kill()  # nothing is left where the test itself is stopped
    return process.returncode, out, err


def judge_flags(server):
    return f"--judge_url={server.base_url}", "--judge_model=judge-1", "--concurrency=1", "--max_failed_frac=1"


def keys_of(path):
    return [json.loads(line)["key"] for line in path.read_bytes().splitlines()[1:]]


def test_a_policy_killed_while_it_answers_goes_on_with_the_rest(standin, tmp_path, model, compiled):
    flags = (f"--model={model}", "--mode=both", "--tasks=SA,ML-ER")
    out = tmp_path / "out"
    code, _, err = ended(start(standin, out, *flags, cache=compiled, place="answer_row 6"))
    assert code == -signal.SIGKILL, err
    answered = (out / "predictions.jsonl").read_bytes()
    assert len(keys_of(out / "predictions.jsonl")) == 5  # of eight, in batches of four items and two modes
    with JudgeServer(follow_rule) as server:
        code, said, err = ended(start(standin, out, *flags, *judge_flags(server), cache=compiled))
        assert code == 0, err
        assert set(server.asked.values()) == {1}
    assert (out / "predictions.jsonl").read_bytes().startswith(answered)
    keys = keys_of(out / "predictions.jsonl")
    assert len(keys) == len(set(keys)) == 8
    assert {key.split("/")[0] for key in keys} == {"slow", "fast"}
    (scores,) = [json.loads(path.read_text()) for path in out.glob("scores.*.json")]
    assert {mode: table["pooled"]["rated"] for mode, table in scores["modes"].items()} == {"slow": 4, "fast": 4}
    assert scores["slow_minus_fast"]["items"] == 4
    assert "slow, pooled: recognition" in said and "4 of 4 items rated" in said
    assert KEY not in said + err and not any(KEY.encode() in p.read_bytes() for p in out.rglob("*") if p.is_file())


def test_evaluate_takes_it_as_one_of_the_benchmarks(standin, tmp_path, model, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/MME-Emotion").symlink_to(standin)
    out = tmp_path / "out"
    flags = ("--benchmark=mme_emotion", "--mode=fast", f"--out={out}")
    on_one_device = {"open_policy": functools.partial(open_policy, devices=jax.devices()[:1])}
    asking = (f"--model={model}", f"--benchmark_root={tmp_path / 'data'}", "--limit=1")
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    with JudgeServer(follow_rule) as server:
        judge = (f"--judge_url={server.base_url}", "--judge_model=judge-1")
        assert run_here("evaluate", *flags, *asking, *judge, **on_one_device) == 0
        asked = sum(server.asked.values())
        said = capsys.readouterr().out
        assert "fast, pooled: recognition" in said and "8 of 8 items rated" in said
        assert str(out / "mme_emotion/report.html") in said.replace("\n", "")
        assert run_here("evaluate", *flags, *asking, *judge, **on_one_device) == 0
        assert sum(server.asked.values()) == asked
    again = capsys.readouterr().out
    assert run_here("evaluate", *flags, "--rescore") == 0
    assert capsys.readouterr().out == again == said


@pytest.mark.parametrize("at", [5, COUNT + 7])  # among the steps, among the ratings
def test_killed_while_the_judge_is_asked_and_resumed(standin, tmp_path, at):
    flags = (f"--responses={standin / 'responses'}",)
    out = tmp_path / "out"
    with JudgeServer(follow_rule) as server:
        process = start(standin, out, *flags, *judge_flags(server))
        server.on_request = lambda count: os.kill(process.pid, signal.SIGKILL) if count == at else None
        assert ended(process)[0] == -signal.SIGKILL
        assert len(server.requests) == at
        code, said, err = ended(start(standin, out, *flags, *judge_flags(server)))
        assert code == 0, err
        # The one whose answer the killed process never got is asked again; nothing else is.
        assert collections.Counter(server.asked.values()) == {1: 2 * COUNT - 1, 2: 1}
        assert server.asked[server.requests[at - 1].question] == 2
    assert "pooled: recognition" in said and "16 of 16 items rated" in said and KEY not in said + err
    assert not list(out.rglob(".*.new"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("at", [5, COUNT + 7])  # among the steps, among the ratings
def test_a_signal_while_the_judge_is_asked_ends_with_the_documented_status(standin, tmp_path, at, name):
    flags = (f"--responses={standin / 'responses'}",)
    out = tmp_path / "out"
    with JudgeServer(follow_rule) as server:
        process = start(standin, out, *flags, *judge_flags(server))
        server.on_request = lambda count: process.send_signal(signal.Signals[name]) if count == at else None
        code, _, err = ended(process)
        assert code == EXIT_SAVED, err
        assert f"{name} received" in err and "the same command goes on" in err and "Traceback" not in err
        asked = len(server.requests)
        assert at <= asked < 2 * COUNT
        code, said, err = ended(start(standin, out, *flags, *judge_flags(server)))
        assert code == 0, err
        assert len(server.requests) <= 2 * COUNT + 1  # at most the one that was left is asked again
    assert "16 of 16 items rated" in said


def test_mistakes_end_in_one_message(standin, tmp_path, capsys):
    responses = f"--responses={standin / 'responses'}"
    root, out = f"--benchmark_root={standin}", f"--out={tmp_path / 'out'}"
    for flags, said in (
        ((out,), "--benchmark_root is empty.*expected one of --model and --responses"),
        ((root, out, responses, "--judge_url=http://127.0.0.1:1/v1"), "--judge_url and --judge_model go together"),
        ((root, out, responses, "--judge_url=nowhere", "--judge_model=m"), "base URL does not begin with http"),
        ((f"--benchmark_root={tmp_path}", out, responses), "no question file of ER-Lab"),
        ((out, "--rescore"), "evaluate something into this folder first"),
        ((root, out, f"--responses={tmp_path}"), "no response file"),
        ((root, out, f"--model={tmp_path}"), "expected a run's folder, or a Hugging Face directory"),
    ):
        assert run_here("evaluate_mme", *flags) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error and re.search(said, error), error


def test_a_dead_judge_ends_in_one_message_and_keeps_the_answers(standin, tmp_path, capsys):
    flags = (f"--responses={standin / 'responses'}", f"--benchmark_root={standin}", f"--out={tmp_path / 'out'}")
    judge = ("--judge_url=http://127.0.0.1:9/v1", "--judge_model=m", "--max_retries=0")
    assert run_here("evaluate_mme", *flags, *judge) == 2
    error = capsys.readouterr().err
    assert "questions have no answer of the judge" in error and "connection" in error and "Traceback" not in error
    metrics = json.loads((tmp_path / "out/judge_metrics.json").read_text())
    assert metrics["judge"]["judge/failed_frac"] == 1 and "judge/latency" in metrics["judge"]
    assert run_here("evaluate_mme", *flags) == 0
    assert "add --judge_url and --judge_model to rate them" in capsys.readouterr().out.replace("\n", " ")


def test_rating_responses_needs_no_jax(standin, tmp_path):
    check = (
        "import sys; sys.modules['jax'] = None; sys.argv[0] = 'x';"
        "import runpy; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    script = command("evaluate_mme.py")[1]
    words = [sys.executable, "-c", check, script, f"--benchmark_root={standin}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(
        [*words, f"--responses={standin / 'responses'}"], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
