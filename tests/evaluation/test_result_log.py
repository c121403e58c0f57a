"""Logs of results: whole after every kill, never of two things, and plain about damage."""

import pytest

from mer_r1_jax.evaluation.benchmarks.benchmark_folder import ANSWERS, BenchmarkFolder
from mer_r1_jax.evaluation.benchmarks.sets import BenchmarkError
from mer_r1_jax.evaluation.mme.mme_folder import RESULTS
from mer_r1_jax.evaluation.result_log import FAILED, LogForm, ResultLog, read_log

FORMS = pytest.mark.parametrize("form", [ANSWERS, RESULTS], ids=["answers", "results"])
FINGERPRINT = {"benchmark": "meld", "model": {"weights": "abc"}, "media": {"fps": 2.0}, "sides": (84, 84)}


def rows_of(form: LogForm) -> list[dict]:
    """Two lines of a form; a file's name that is no Unicode comes back as it was."""
    keys = [("a", "slow"), ("a", "fast")] if form is ANSWERS else [("slow/a",), ("fast/a",)]
    return [dict(zip(form.key, key, strict=True)) | {"text": "ü\n", "video": "clip\udcff.mp4"} for key in keys]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "meld.jsonl"


def written(path, form: LogForm) -> bytes:
    with ResultLog(path, form, FINGERPRINT) as log:
        log.append(rows_of(form))
    return path.read_bytes()


@FORMS
def test_a_torn_last_line_is_dropped_and_nothing_else_rewritten(path, form):
    whole = written(path, form)
    there = {form.key_of(row): row for row in rows_of(form)}
    for torn in (b'{"id": "b", "mo', b'{"key": "b", "id": "b", "mode": "slow"}', '{"key": "é'.encode()[:-1]):
        path.write_bytes(whole + torn)
        assert read_log(path, form)[1] == there
        with ResultLog(path, form, FINGERPRINT) as log:
            assert log.rows == there and all(map(log.done, there)) and not log.done("b")
        assert path.read_bytes() == whole
    path.write_bytes(b'{"version": 1, "fing')  # torn before the first line was whole
    assert written(path, form) == whole


@FORMS
def test_results_of_something_else_are_refused(path, form):
    before = written(path, form)
    other = FINGERPRINT | {"model": {"weights": "xyz"}, "media": {"fps": 1.0}}
    expected = rf"(?s)holds {form.lines} made.*model.weights: there 'abc', now 'xyz'\n  media.fps: there 2.0, now 1"
    with pytest.raises(form.error, match=expected):
        ResultLog(path, form, other)
    many = {f"setting{number:02}": number for number in range(20)}
    with pytest.raises(form.error, match=r"(?s)setting11.*\.\.\. and 8 more"):
        ResultLog(path, form, FINGERPRINT | many)
    assert path.read_bytes() == before


@FORMS
def test_a_log_has_one_writer_and_a_place(path, form):
    with ResultLog(path, form, FINGERPRINT):
        with pytest.raises(form.error, match="in use by another process"):
            ResultLog(path, form, FINGERPRINT)
    with pytest.raises(form.error, match="cannot be written: .*choose another --out"):
        ResultLog(path / "x", form, FINGERPRINT)


@FORMS
def test_damage_is_named_with_its_line(path, form):
    header, first, second = written(path, form).splitlines(keepends=True)
    for content, problem in (
        (header + b"{]\n" + second, "meld.jsonl:2: damaged"),
        (header + first + b"garbage\n" + second, "meld.jsonl:3: damaged"),
        (header + b"[" * 100_000 + b"\n", "meld.jsonl:2: damaged"),
        (header + b'{"text": "no key"}\n', "meld.jsonl:2: damaged"),
        (first + second, "meld.jsonl:1: damaged"),
        (header.replace(b'"version": 1', b'"version": 9'), "version 9, expected 1"),
    ):
        path.write_bytes(content)
        with pytest.raises(form.error, match=problem):
            ResultLog(path, form, FINGERPRINT)
    path.write_bytes(b"")
    with pytest.raises(form.error, match=f"no {form.lines} to score; run without --rescore first"):
        read_log(path, form)
    with pytest.raises(form.error, match=rf"no {form.lines} to score \(No such file"):
        read_log(path.parent / "nowhere.jsonl", form)


def test_a_clip_is_answered_once_in_a_mode(path):
    header, first, second = written(path, ANSWERS).splitlines(keepends=True)
    with ResultLog(path, ANSWERS, FINGERPRINT) as log:
        with pytest.raises(BenchmarkError, match="answers of a / slow are there already"):
            log.append([{"id": "a", "mode": "slow", "text": "another"}])
    path.write_bytes(header + first + second + first)
    with pytest.raises(BenchmarkError, match="1 answers stand in it twice"):
        read_log(path, ANSWERS)


def test_what_failed_can_be_tried_again_and_its_last_line_counts(path):
    failure, result = {"key": "k", FAILED: "timeout", "message": "slow"}, {"key": "k", "text": "x"}
    with ResultLog(path, RESULTS, FINGERPRINT) as log:
        log.append([failure])
        assert not log.done("k")
        size = path.stat().st_size
        log.append([failure])  # as before: nothing new to note
        assert path.stat().st_size == size
        log.append([result])
        assert log.done("k")
    assert read_log(path, RESULTS)[1] == {"k": result}


def test_another_model_may_not_answer_into_a_folder(tmp_path):
    folder = BenchmarkFolder(tmp_path)
    folder.check_model({"weights": "xyz"})  # nothing there
    folder.open_answers("meld", FINGERPRINT).close()
    folder.check_model({"weights": "abc"})
    with pytest.raises(BenchmarkError, match=r"(?s)meld.jsonl holds answers.*model.weights: there 'abc', now 'xyz'"):
        folder.check_model({"weights": "xyz"})
    folder.answers("meld").write_bytes(b'{"version": 1, "fing')  # torn: dropped when it is opened
    folder.check_model({"weights": "xyz"})
    folder.answers("meld").write_bytes(b'{"version": 1}\n')
    with pytest.raises(BenchmarkError, match="meld.jsonl:1: damaged; remove the file"):
        folder.check_model({"weights": "abc"})
