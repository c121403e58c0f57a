"""What cannot be written is said with its place, the room left and what to do; nothing torn is left."""

import ast
import contextlib
import errno
import json
import os
import pathlib

import jax
import numpy as np
import pytest
from support.full_file import largest_file

from mer_r1_jax import faults
from mer_r1_jax.cli import EXIT_ERROR, explained
from mer_r1_jax.data.synthetic.render import write_clip
from mer_r1_jax.evaluation import result_log
from mer_r1_jax.evaluation.benchmarks.pickled_labels import convert
from mer_r1_jax.evaluation.benchmarks.sets import BenchmarkError
from mer_r1_jax.evaluation.judge.answer_cache import AnswerCache
from mer_r1_jax.evaluation.judge.endpoint import JudgeAbortedError
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf.export import export_model
from mer_r1_jax.omni.thinker import init_params
from mer_r1_jax.parity.export_cases import write_cases
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.atomic_files import WriteError, writing
from mer_r1_jax.storage.run_directory import RunDirectory, RunDirectoryError
from mer_r1_jax.training.metrics import MetricsWriter, read_metrics

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
RESULTS = result_log.LogForm(key=("key",), lines="results", error=ValueError, last_counts=True)


@pytest.fixture
def failing(monkeypatch):
    """Lets a place of the code fail with an error of the system."""

    def failing(name, number):
        def here(place, detail=""):
            if place == name:
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr(faults, "here", here)

    return failing


@pytest.fixture
def run(tmp_path):
    with RunDirectory.open(tmp_path / "run", {"name": "x"}) as run:
        yield run


def check_message(error, what, path):
    message = str(error)
    assert message.startswith(f"{what} could not be written: {path}: "), message
    assert "GiB free there" in message and "Make room" in message and "run the same command again" in message


@pytest.mark.parametrize("number", ERRORS)
def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path, failing, number):
    path = tmp_path / "scores.json"
    atomic_files.write_json(path, {"f1": 1})
    failing("file_begins", number)
    with pytest.raises(WriteError) as caught:
        atomic_files.write_json(path, {"f1": 2})
    check_message(caught.value, "scores.json", path)
    assert caught.value.errno == number and os.strerror(number) in str(caught.value)
    assert json.loads(path.read_text()) == {"f1": 1} and os.listdir(tmp_path) == ["scores.json"]


def test_a_file_that_is_cut_while_it_is_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "scores.json"
    atomic_files.write_json(path, {"f1": 1})
    with largest_file(100), pytest.raises(WriteError, match=r"scores.json could not be written: .*GiB free"):
        atomic_files.write_json(path, list(range(1000)))
    assert json.loads(path.read_text()) == {"f1": 1} and os.listdir(tmp_path) == ["scores.json"]


def test_a_line_of_metrics_that_does_not_fit_is_taken_back(run):
    with MetricsWriter(run, report_to=()) as writer:
        writer.write("sft", 1, {"loss": 1.0})
        whole = run.metrics_file.read_bytes()
        with largest_file(len(whole) + 20), pytest.raises(WriteError) as caught:
            writer.write("sft", 2, {"loss": 1.0})
        check_message(caught.value, "metrics.jsonl", run.metrics_file)
        assert run.metrics_file.read_bytes() == whole
        writer.write("sft", 2, {"loss": 0.5})  # with room again
    assert [line["loss"] for line in read_metrics(run.metrics_file)] == [1.0, 0.5]


@pytest.mark.parametrize("number", ERRORS)
def test_a_table_of_completions_that_finds_no_room_stops_the_run(run, failing, number):
    with MetricsWriter(run, report_to=()) as writer:
        failing("file_begins", number)
        with pytest.raises(WriteError, match="completions_00001.parquet could not be written"):
            writer.write_completions(1, {"completion": ["a"]})
        failing("nowhere", number)
        writer.write_completions(1, {"completion": ["a"]})
    assert os.listdir(run.completions) == ["completions_00001.parquet"]


def test_results_that_do_not_fit_are_taken_back(tmp_path):
    path = tmp_path / "answers.jsonl"
    with result_log.ResultLog(path, RESULTS, {}) as log:
        log.append([{"key": "a"}])
        whole = path.read_bytes()
        with largest_file(len(whole) + 4), pytest.raises(WriteError) as caught:
            log.append([{"key": "b"}, {"key": "c"}])
        check_message(caught.value, "the file of results", path)
    assert path.read_bytes() == whole
    with result_log.ResultLog(path, RESULTS, {}) as log:
        assert list(log.rows) == ["a"]


def test_a_judges_answer_that_does_not_fit_is_not_kept(tmp_path):
    cache = AnswerCache(tmp_path / "cache")
    with largest_file(10), pytest.raises(JudgeAbortedError, match="0123.json could not be written.*GiB free"):
        cache.put("0123", {"answer": "happy" * 100})
    assert cache.get("0123") is None and not list(tmp_path.rglob("*.json"))


def test_an_export_that_does_not_fit_leaves_nothing(tmp_path):
    config = ThinkerConfig.tiny()
    params = jax.tree.map(np.asarray, init_params(config, jax.random.key(0)))
    with largest_file(1 << 16), pytest.raises(WriteError) as caught:
        export_model(tmp_path / "out", config, params)
    check_message(caught.value, "the export", tmp_path / "out")
    assert os.listdir(tmp_path) == []
    export_model(tmp_path / "out", config, params)  # with room again


def write_labels(path):
    """Official labels as CSV, which stand beside the file they are from."""
    names = {f"clip_{number:04d}": {"emo": "happy", "val": 1.0} for number in range(200)}
    source = path.parent.parent / "label.npz"
    np.savez(source, train_corpus=np.array(names, dtype=object))
    convert(source, path)


def write_moving_picture(path):
    noise = np.random.default_rng(0)
    write_clip(path, noise.integers(0, 255, (30, 64, 64, 3), np.uint8), noise.random(16_000, np.float32))


@pytest.mark.parametrize(
    ("name", "write", "error"),
    [
        ("cases.npz", lambda path: write_cases(path, {"a": np.random.default_rng(0).random(9000)}), WriteError),
        ("page.md", lambda path: atomic_files.write_text(path, "word " * 9000), WriteError),
        ("label.csv", write_labels, BenchmarkError),
        ("clip.mp4", write_moving_picture, WriteError),
    ],
)
def test_what_commands_write_is_whole_or_as_it_was(tmp_path, name, write, error):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).write_bytes(b"before")
    if name == "label.csv":
        with pytest.raises(error), failing_writes():
            write(folder / name)
    else:
        with pytest.raises(error, match="GiB free"), largest_file(700):
            write(folder / name)
    assert os.listdir(folder) == [name] and (folder / name).read_bytes() == b"before"
    write(folder / name)  # with room again
    assert os.listdir(folder) == [name] and len((folder / name).read_bytes()) > 700


@contextlib.contextmanager
def failing_writes():
    """Room for the input, which is made first, and none for what is written from it."""
    with pytest.MonkeyPatch.context() as patch:

        def here(place, detail=""):
            if place == "file_begins":
                raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(faults, "here", here)
        yield


# Where files are written by hand, and why none of them is torn.
BY_HAND = {
    "mer_r1_jax/storage/atomic_files.py": "what all others use",
    "mer_r1_jax/training/metrics.py": "lines that are taken back",
    "mer_r1_jax/storage/run_lock.py": "a lock",
    "mer_r1_jax/evaluation/result_log.py": "lines that are taken back",
    "mer_r1_jax/evaluation/judge/answer_cache.py": "a lock",
    "mer_r1_jax/run/jobs.py": "a lock, and what processes print",
    "mer_r1_jax/run/train.py": "nowhere",
    "mer_r1_jax/media/cache.py": "beside its place, then renamed",
    "mer_r1_jax/omni/hf/companion_files.py": "in a folder that is renamed when it is whole",
    "mer_r1_jax/omni/hf/peft_folder.py": "in a folder that is renamed when it is whole",
    "mer_r1_jax/omni/hf/sums.py": "in a folder that is renamed when it is whole",
    "mer_r1_jax/omni/hf/tensor_files.py": "in a folder that is renamed when it is whole",
    "mer_r1_jax/data/synthetic/make.py": "beside its place, then renamed",
    "mer_r1_jax/data/synthetic/render.py": "beside its place, then renamed",
    "mer_r1_jax/data/synthetic/world_tokenizer.py": "made again unless the list of hashes, written last, is there",
    "mer_r1_jax/serving/uploads.py": "a clip in a folder of its own, which goes with it",
    "mer_r1_jax/process_guard.py": "a setting of the system, which is no file",
    "mer_r1_jax/commands/check_in_transformers.py": "beside its place, then renamed; runs without this package",
    "tools/wheels/lexicon.py": "tables of the repository, made by its keepers",
}


def test_files_are_written_in_one_way():
    root = pathlib.Path(__file__).parents[2]
    found = {
        path.relative_to(root).as_posix()
        for folder in ("mer_r1_jax", "experiments", "tools")
        for path in (root / folder).rglob("*.py")
        if any(map(writes_a_file, ast.walk(ast.parse(path.read_text()))))
    }
    assert found == BY_HAND.keys(), "use storage/atomic_files.py, or say here why nothing is torn"


def writes_a_file(node):
    """Whether a call writes to a path by itself."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name in ("write_text", "write_bytes"):
        return ast.unparse(node.func) != "atomic_files.write_text"
    if name != "open":
        return False
    modes = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
    return any(set(mode) & set("wax+") for mode in texts)


def test_a_run_that_finds_no_room_to_begin_says_so(tmp_path, failing):
    failing("file_begins", errno.ENOSPC)
    with pytest.raises(
        RunDirectoryError, match=r"could not be written: .*No space left on device \(.*GiB free there\)"
    ):
        RunDirectory.open(tmp_path / "run", {"name": "x"})


@pytest.mark.parametrize("number", ERRORS)
def test_every_command_explains_a_disk_that_fails(capsys, tmp_path, number):
    with pytest.raises(SystemExit) as left, explained():
        raise OSError(number, os.strerror(number), str(tmp_path / "some\x1b[31mwhere"))
    assert left.value.code == EXIT_ERROR
    said = capsys.readouterr().err
    assert said.startswith("\nerror: ") and os.strerror(number) in said and "GiB free there" in said
    assert "could not be read or written" in said  # it may have been a file that is not to be read
    assert "\x1b" not in said


def test_other_errors_of_the_system_are_faults_of_the_program(tmp_path):
    with pytest.raises(FileNotFoundError), explained():
        open(tmp_path / "nothing")


def test_an_error_that_is_explained_already_stays_as_it_is(tmp_path):
    with pytest.raises(WriteError) as caught, writing("the export", tmp_path), writing("one part", tmp_path / "part"):
        raise OSError(errno.ENOSPC, "No space left on device")
    check_message(caught.value, "one part", tmp_path / "part")


def test_a_log_file_that_cannot_be_written_is_said_once(run, monkeypatch, capsys):
    import logging

    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self):
            pass

        def close(self):
            pass

    handler = next(h for h in logging.getLogger().handlers if getattr(h, "baseFilename", "") == str(run.log_file))
    monkeypatch.setattr(handler, "stream", Full())
    for _ in range(3):
        logging.getLogger("mer_r1_jax").warning("a warning")
    said = capsys.readouterr().err
    assert said.count("the log could not be written") == 1 and "Traceback" not in said
