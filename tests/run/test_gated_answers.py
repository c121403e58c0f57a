"""A folder of gated answers that is gone on with, in another mode or by a later version: what is scored and told."""

import types

import numpy as np
import pytest
from support import benchmark_answers
from support.unibench_standins import write_sets

from mer_r1_jax.data.records import dataset_hash
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.evaluation.benchmarks.benchmark_folder import BenchmarkFolder
from mer_r1_jax.evaluation.benchmarks.benchmark_report import make_benchmark_report
from mer_r1_jax.evaluation.benchmarks.sets import BenchmarkError, Request
from mer_r1_jax.evaluation.benchmarks.word_protocol import wheels_digest
from mer_r1_jax.run import benchmark
from mer_r1_jax.run.asking import Reply

CLIPS = 24
EVERY_OTHER = 0.5  # the threshold: below the confidence of every second clip's fast answer


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Answers MELD's clips into a folder and scores it: `asked(modes, threshold)`; no model is behind it."""
    write_sets(tmp_path / "sets")
    data = benchmark_answers._data("meld", tmp_path / "sets", CLIPS, np.random.default_rng(0))
    folder = BenchmarkFolder(tmp_path / "out")

    def line(reply, outcome, metric):
        number = int(reply.record.id.partition("-")[2])
        kept = benchmark_answers._line(reply.record, reply.mode, metric, np.random.default_rng(number))
        confidence = 0.9 if number % 2 else 0.1
        return kept | {"record": dataset_hash([reply.record]), "confidence": confidence, "silent_audio": False}

    monkeypatch.setattr(benchmark, "make_evaluator", lambda *_: None)
    monkeypatch.setattr(benchmark, "AnswerOf", object)
    monkeypatch.setattr(benchmark, "answer_line", line)
    monkeypatch.setattr(benchmark, "ask", lambda p, e, root, pairs, stop: ([Reply(*pair, None)] for pair in pairs))
    confidence = {"wheels": wheels_digest(load_wheels())}
    monkeypatch.setattr(
        benchmark, "answer_fingerprint", lambda policy, name: {"model": policy.fingerprint, "confidence": confidence}
    )
    emotion = types.SimpleNamespace(wheel_dir="", variant="unibench")
    policy = types.SimpleNamespace(
        fingerprint={"weights": "none"},
        setup=types.SimpleNamespace(config=types.SimpleNamespace(emotion=emotion)),
    )

    def ask_and_score(modes, threshold=None):
        request = Request(benchmarks=("meld",), modes=modes, out=folder.path, threshold=threshold)
        benchmark.answer_benchmarks(policy, request, [data], lambda data: None)
        return folder.score("meld", request)

    ask_and_score.folder = folder
    return ask_and_score


def test_slow_answers_of_a_gate_get_no_score_whatever_is_asked_after_it(asked):
    gated = asked(("fast",), EVERY_OTHER)
    assert list(gated["modes"]) == ["fast", "auto"] and gated["auto"]["n_slow"] == CLIPS // 2
    fast = asked(("fast",))
    assert list(fast["modes"]) == ["fast", "auto"] and fast["auto"] == gated["auto"]
    assert fast["slow_minus_fast"] == {} and "gate" not in fast
    both = asked(("slow", "fast"))
    assert list(both["modes"]) == ["slow", "fast", "auto"] and "gate" in both
    assert both["modes"]["slow"]["n_answered"] == CLIPS
    assert asked(("fast",), 0.95)["auto"] == {"threshold": 0.95, "n_slow": CLIPS}, "a later gate is another"


def test_answers_without_a_gate_have_none_and_a_damaged_coverage_hides_none(asked):
    assert list(asked(("slow",))["modes"]) == ["slow"]
    assert list(asked(("fast",))["modes"]) == ["slow", "fast"]
    asked.folder.coverage("meld").write_text("{")
    with pytest.raises(BenchmarkError, match="meld.coverage.json: cannot be read .* delete it, and where they were"):
        asked(("fast",))


def test_the_report_says_where_gates_compare_confidences_of_two_kinds(asked):
    told = "Fast answers kept by an earlier version, without a confidence of their own: MELD 3 of 24."
    asked(("fast",), EVERY_OTHER)
    assert told not in make_benchmark_report(asked.folder.path, 0).read_text()
    path = asked.folder.answers("meld")
    lines = path.read_text().splitlines()
    old = [line for line in lines if '"mode": "fast"' in line][:3]
    for line in old:
        lines[lines.index(line)] = line.replace('"confidence": 0.9, ', "").replace('"confidence": 0.1, ', "")
    path.write_text("\n".join(lines) + "\n")
    assert asked(("fast",))["n_fast_without_confidence"] == 3
    assert told in make_benchmark_report(asked.folder.path, 0).read_text()
