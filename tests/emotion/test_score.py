"""experiments/score.py: what it writes, what it refuses, and that it is quick."""

import gzip
import json
import pathlib
import subprocess
import sys
import time

import pytest
from support.commands import run_command

from mer_r1_jax.emotion import predictions
from mer_r1_jax.emotion.wheels import load_wheels

ROOT = pathlib.Path(__file__).resolve().parents[2]


def write_lines(path: pathlib.Path, records: list) -> pathlib.Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def run_score(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "experiments" / "score.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_score_command_writes_the_documented_fields(tmp_path):
    lines = [
        {"id": "a", "prediction": "happy, sad, xyzzy", "truth": "happy"},
        {"id": "b", "prediction": ["angry", "xyzzy"], "truth": ["angry", "sad"]},
        {"id": "c", "prediction": "[", "truth": "neutral"},
    ]
    out = tmp_path / "scores" / "out.json"
    done = run_score(f"--predictions={write_lines(tmp_path / 'p.jsonl', lines)}", "--metric=set_f1", f"--out={out}")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert (result["score"], result["precision"], result["recall"]) == (0.75, 0.75, 0.75)
    assert (result["n"], result["n_scored"], result["n_unknown_words"]) == (3, 2, 2)
    assert result["unknown_words"] == {"xyzzy": 2}
    assert [wheel["wheel"] for wheel in result["per_wheel"]] == [f"wheel{k}" for k in range(1, 6)]
    assert all(wheel["n_scored"] == 2 for wheel in result["per_wheel"])


def test_score_command_ends_with_a_message_not_a_traceback(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"id": "a", "prediction": "happy"}])
    done = run_score(f"--predictions={path}", "--metric=hit", f"--out={tmp_path / 'o.json'}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "p.jsonl:1: no truth" in done.stderr


def test_a_byte_order_mark_and_line_ends_of_windows_are_read(tmp_path):
    path = tmp_path / "p.jsonl"
    row = json.dumps({"id": "a", "prediction": "happy, sad", "truth": "高兴"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n")
    assert predictions.read_predictions(path, "set_f1").truths == [["高兴"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "a", "prediction": "高兴极了", "truth": "sad"}\n'.encode("gbk"), "p.jsonl:1: got byte"),
        ('{"id": "a", "prediction": "café", "truth": "sad"}\n'.encode("latin-1"), "iconv -f WINDOWS-1252"),
        ('{"id": "a", "prediction": "sad", "truth": "sad"}\n'.encode("utf-16"), "a text in UTF-16"),
        (gzip.compress(b'{"id": "a", "prediction": "sad", "truth": "sad"}\n'), "a gzip-compressed file"),
        (b'{"id": "a\\ud83d", "prediction": "sad", "truth": "sad"}\n', "p.jsonl:1: id: got half of a surrogate pair"),
        (b'{"id": "a", "prediction": ["\\udc00"], "truth": "sad"}\n', "p.jsonl:1: prediction: got half of a surrogate"),
        (b'{"id": ' + b"1" * 5000 + b', "prediction": "sad", "truth": "sad"}\n', "p.jsonl:1: not JSON: got a whole"),
        (b'{"id": "a", "prediction": ' + b"[" * 99_999 + b"\n", "p.jsonl:1: not JSON"),
        (
            b'{"id": "a", "id": "b", "prediction": "sad", "truth": "sad"}\n',
            "got the key 'id' twice",
        ),
    ],
)
def test_files_that_cannot_be_read_end_with_file_line_and_mend(tmp_path, capsys, content, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    out = tmp_path / "o.json"
    assert run_command("score", f"--predictions={path}", "--metric=set_f1", f"--out={out}") == 2
    told = capsys.readouterr().err
    assert message in told and told.count("p.jsonl") <= 2 and "Traceback" not in told and len(told) < 1000
    assert not out.exists()


def test_scores_that_cannot_be_written_end_with_a_message(tmp_path, capsys):
    path = write_lines(tmp_path / "p.jsonl", [{"id": "a", "prediction": "happy", "truth": "sad"}])
    assert run_command("score", f"--predictions={path}", "--metric=hit", f"--out={path}/o.json") == 2
    assert "the scores could not be written" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["set_f1", "hit", "waf"])
def test_ten_thousand_lines_within_five_seconds(tmp_path, metric):
    wheels = load_wheels()
    forms = sorted(wheels.levels[0][0])
    truth = 1.5 if metric == "waf" else "happy"
    lines = [
        {"id": i, "prediction": ", ".join(forms[(i * 7 + j) % len(forms)] for j in range(6)), "truth": truth}
        for i in range(10_000)
    ]
    path = write_lines(tmp_path / "p.jsonl", lines)
    start = time.process_time()  # of this process: the machine may be busy
    columns = predictions.read_predictions(path, metric)
    result = predictions.score_predictions(columns, metric, load_wheels())
    assert time.process_time() - start < 5
    assert result["n"] == 10_000


def test_hit_and_waf_lines(tmp_path):
    wheels = load_wheels()
    lines = [{"id": 1, "prediction": "sad, joyful", "truth": "Happy"}, {"id": 2, "prediction": None, "truth": "happy"}]
    columns = predictions.read_predictions(write_lines(tmp_path / "p", lines), "hit")
    assert predictions.score_predictions(columns, "hit", wheels)["score"] == 0.5
    lines = [{"id": 1, "prediction": "mixed", "truth": -1}, {"id": 2, "prediction": "positive", "truth": 0.5}]
    columns = predictions.read_predictions(write_lines(tmp_path / "p", lines), "waf")
    result = predictions.score_predictions(columns, "waf", wheels)
    assert (result["score"], result["unknown_words"], result["precision"]) == (1.0, {"mixed": 1}, None)


def test_undefined_scores_become_null(tmp_path):
    columns = predictions.read_predictions(
        write_lines(tmp_path / "p", [{"id": 1, "prediction": "happy", "truth": "neutral"}]), "set_f1"
    )
    result = predictions.score_predictions(columns, "set_f1", load_wheels())
    assert result["score"] is None and result["per_wheel"][0]["score"] is None and result["n_scored"] == 0
    json.dumps(result, allow_nan=False)


def test_clean_up_is_for_extractor_text(tmp_path):
    path = write_lines(tmp_path / "p", [{"id": 1, "prediction": "Output: [happy]\n", "truth": "happy"}])
    assert predictions.read_predictions(path, "set_f1", clean_up=True).predictions == [["happy"]]
    assert predictions.read_predictions(path, "set_f1").predictions == [["Output: [happy]"]]


@pytest.mark.parametrize(
    ("metric", "line", "message"),
    [
        ("set_f1", "{", "p.jsonl:2: not JSON"),
        ("set_f1", "[1]", "got a list"),
        ("set_f1", {"id": "b", "prediction": 3, "truth": "sad"}, "got 3; expected text"),
        ("set_f1", {"id": "b", "prediction": "sad", "truth": [1]}, "expected text"),
        ("set_f1", {"prediction": "sad", "truth": "sad"}, "no id; found prediction, truth"),
        ("set_f1", {"id": "a", "prediction": "sad", "truth": "sad"}, "id 'a' is on line 1 already"),
        ("hit", {"id": "b", "prediction": "sad", "truth": ["sad"]}, "expected one emotion word"),
        ("hit", {"id": "b", "prediction": "sad", "truth": 1}, "expected one emotion word"),
    ],
)
def test_bad_lines_are_named(tmp_path, metric, line, message):
    path = write_lines(tmp_path / "p.jsonl", [{"id": "a", "prediction": "sad", "truth": "sad"}, line])
    with pytest.raises(predictions.PredictionError, match="p.jsonl:2: ") as error:
        predictions.read_predictions(path, metric)
    assert message in str(error.value)


@pytest.mark.parametrize("truth", ["1.0", None, True, float("nan")])
def test_waf_needs_numbers(tmp_path, truth):
    path = write_lines(tmp_path / "p.jsonl", [{"id": "a", "prediction": "positive", "truth": truth}])
    with pytest.raises(predictions.PredictionError, match="expected a finite number"):
        predictions.read_predictions(path, "waf")


def test_missing_empty_and_unknown(tmp_path):
    with pytest.raises(predictions.PredictionError, match="no such file"):
        predictions.read_predictions(tmp_path / "none", "hit")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(predictions.PredictionError, match="no predictions"):
        predictions.read_predictions(tmp_path / "empty", "hit")
    with pytest.raises(predictions.PredictionError, match="expected one of set_f1, hit, waf"):
        predictions.read_predictions(tmp_path / "empty", "f1")
