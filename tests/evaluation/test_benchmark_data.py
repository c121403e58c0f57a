"""The nine sets' official layouts, written by the stand-in tool, and labels that come as pickles."""

import io
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
from support.commands import run_command
from support.unibench_standins import CLIPS, OPENSETS, SUBTITLES, VALENCES, clip_name, write_csv, write_sets

from mer_r1_jax.evaluation.benchmarks.benchmark_reader import read_set, truth_of
from mer_r1_jax.evaluation.benchmarks.pickled_labels import UnsafePickle, convert, read_corpora
from mer_r1_jax.evaluation.benchmarks.sets import (
    LAYOUTS,
    PAPER_F1,
    PAPER_F1_MEANS,
    PAPER_MEANS,
    PAPER_ROWS,
    BenchmarkError,
)

TRUTHS = {
    "ovmerd_plus": list(OPENSETS),
    "mer2023": ["happy", "sad", "angry"],
    "mer2024": ["worried", "surprise", "happy"],
    "meld": ["joy", "sadness", "fear"],
    "iemocap": ["happy", "sad", "anger"],
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The official folders as published."""
    return write_sets(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def root(published, tmp_path_factory):
    """The same after conversion of the labels."""
    folder = tmp_path_factory.mktemp("sets") / "root"
    shutil.copytree(published, folder)
    assert run_command("convert_labels", f"--root={folder}") == 0
    return folder


@pytest.fixture
def changed(root, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(root, tmp_path / "root")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read(root, name):
    data = read_set(name, root, question="Feel?")
    layout = LAYOUTS[name]
    assert [record.id for record in data.records] == [clip_name(name, number) for number in range(CLIPS)]
    for record, subtitle in zip(data.records, SUBTITLES, strict=True):
        assert record.subtitle == subtitle and record.messages == ({"role": "user", "content": "Feel?"},)
        assert (data.media_root / record.videos[0]).is_file() and record.videos[0].startswith(f"{layout.video}/")
        assert (data.media_root / record.audios[0]).is_file() and record.audios[0].startswith(f"{layout.audio}/")
    truths = [truth_of(record, data.metric) for record in data.records]
    assert truths == pytest.approx(list(VALENCES)) if layout.metric == "waf" else truths == TRUTHS[name]
    coverage = data.coverage
    assert (coverage.official, coverage.labelled) == (layout.size, CLIPS)
    assert not (coverage.missing_clip or coverage.missing_label or coverage.missing_subtitle or coverage.missing_audio)


def test_the_paper_rows_are_those_of_the_nine_sets():
    assert len(LAYOUTS) == 9 and sum(layout.size for layout in LAYOUTS.values()) == 12_799
    for name, values in PAPER_ROWS.items():
        assert len(values) == 9 and np.mean(values) == pytest.approx(PAPER_MEANS[name], abs=0.01)
    for name, values in PAPER_F1.items():
        assert np.mean(values) == pytest.approx(PAPER_F1_MEANS[name], abs=0.01)


def test_pickled_labels_are_refused_and_the_way_out_is_named(published):
    for name, layout in LAYOUTS.items():
        if layout.labels.endswith(".npz"):
            with pytest.raises(BenchmarkError, match=r"pickle can run code.*mer-r1 convert-labels --labels="):
                read_set(name, published, question="Feel?")


def test_what_is_missing_is_counted_and_named(changed):
    folder = changed / LAYOUTS["mer2023"].folder
    first, second, third = (clip_name("mer2023", number) for number in range(CLIPS))
    (folder / "video" / f"{first}.mp4").unlink()
    (folder / "audio" / f"{second}.wav").unlink()
    write_csv(folder / "transcription-engchi-polish.csv", ["name", "english"], [[second, " "]])
    table = folder / "label-6way.csv"
    table.write_text(table.read_text() + "test1_corpus,nameless,bored,-10\ntest1_corpus,../outside,happy,0\n")
    data = read_set("mer2023", changed, question="Feel?")
    assert [record.id for record in data.records] == [second, third]
    coverage = data.coverage
    assert coverage.labelled == 4 and coverage.missing_label == ("nameless",)
    assert coverage.missing_clip == (first, "../outside") and data.absent == {first: "happy", "../outside": "happy"}
    assert coverage.missing_audio == (second,) and data.records[0].audios == (f"video/{second}.mp4",)
    assert coverage.empty_subtitle == (second,) and coverage.missing_subtitle == (third,)
    assert data.records[0].subtitle is None and data.records[1].subtitle is None
    limited = data.first(1)
    assert limited.limited and len(limited.records) == 1 and data.first(2) is data


def test_open_vocabulary_names_come_from_subtitles_and_empty_labels_are_neutral(changed):
    folder = changed / LAYOUTS["ovmerd_plus"].folder
    names = [clip_name("ovmerd_plus", number) for number in range(CLIPS)]
    write_csv(folder / "ovlabel.csv", ["name", "openset"], [[names[0], "[]"], [names[1], '["Sad", "worried"]']])
    data = read_set("ovmerd_plus", changed, question="Feel?")
    assert [truth_of(record, data.metric) for record in data.records] == [["neutral"], ["Sad", "worried"]]
    assert data.coverage.missing_label == (names[2],)


def test_folders_that_are_not_the_sets_end_in_one_message(changed):
    with pytest.raises(BenchmarkError, match="no folder .*meld-process"):
        read_set("meld", changed / "nowhere", question="Feel?")
    folder = changed / LAYOUTS["meld"].folder
    (folder / "transcription-engchi-polish.csv").write_text("name,chinese\n")
    with pytest.raises(BenchmarkError, match="no column english; found name, chinese"):
        read_set("meld", changed, question="Feel?")
    for path in (folder / "subvideo").iterdir():
        path.unlink()
    shutil.copy(changed / LAYOUTS["cmu_mosi"].folder / "transcription-engchi-polish.csv", folder)
    with pytest.raises(BenchmarkError, match="none of 3 labelled clips has a file"):
        read_set("meld", changed, question="Feel?")
    table = changed / LAYOUTS["cmu_mosi"].folder / "label.csv"
    table.write_text("split,name,val\ntest_corpus,a,1\ntest_corpus,a,2\n")
    with pytest.raises(BenchmarkError, match="label.csv:3: a is labelled twice, 1.0 and 2.0"):
        read_set("cmu_mosi", changed, question="Feel?")


def test_labels_survive_conversion(tmp_path):
    corpus = {"a": {"emo": np.str_("sad"), "val": np.float32(-0.5)}, "b": {"emo": 3, "val": np.array(1.25)}}
    path = tmp_path / "label.npz"
    np.savez(path, train_corpus={}, test_corpus=corpus)
    assert read_corpora(path)["test_corpus"] == {"a": {"emo": "sad", "val": -0.5}, "b": {"emo": 3, "val": 1.25}}
    out, counts = convert(path)
    assert counts == {"train_corpus": 0, "test_corpus": 2}
    assert out.read_text() == "split,name,emo,val\ntest_corpus,a,sad,-0.5\ntest_corpus,b,3,1.25\n"


class Planted:
    """A pickle of it calls a function when it is opened."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def npz_of(path, content: bytes):
    """An npz whose only array is an object array with these bytes as its pickle."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": ()})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("test_corpus.npy", buffer.getvalue() + content)
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "attack",
    [
        lambda marker: Planted(os.system, f"touch {marker}"),
        lambda marker: Planted(eval, f"open({str(marker)!r}, 'w')"),
        lambda marker: Planted(getattr, "text", "upper"),
        lambda marker: Planted(np.save, str(marker), 1),
        lambda marker: Planted(shutil.copy, os.devnull, str(marker)),
        lambda marker: Planted(np.ndarray, (1 << 40,)),
    ],
    ids=["system", "eval", "getattr", "numpy_function", "copy", "huge_array"],
)
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, attack, protocol):
    marker = tmp_path / "was_here"
    for number, planted in enumerate((attack(marker), {"clip": {"emo": attack(marker)}})):
        path = npz_of(tmp_path / f"label{number}.npz", pickle.dumps(planted, protocol=protocol))
        with pytest.raises(BenchmarkError):
            convert(path)
        assert run_command("convert_labels", f"--labels={path}") == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["label0.npz", "label1.npz"]


def test_the_refusal_names_what_the_pickle_wanted(tmp_path):
    path = npz_of(tmp_path / "label.npz", pickle.dumps({"a": {"emo": Planted(os.system, "true")}}))
    with pytest.raises(UnsafePickle, match=r"label\.npz: its pickle names posix\.system"):
        read_corpora(path)


def test_files_that_hold_no_labels_are_named(tmp_path):
    torn = tmp_path / "torn.npz"
    torn.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(BenchmarkError, match="cannot be read as npz"):
        read_corpora(torn)
    with pytest.raises(BenchmarkError, match="got list, expected a dictionary"):
        read_corpora(npz_of(tmp_path / "list.npz", pickle.dumps([1, 2])))
    with pytest.raises(BenchmarkError, match="a, emo: got list, expected text or a number"):
        read_corpora(npz_of(tmp_path / "deep.npz", pickle.dumps({"a": {"emo": [1]}})))
    with pytest.raises(BenchmarkError, match="truncated"):
        read_corpora(npz_of(tmp_path / "cut.npz", pickle.dumps({"a": {"emo": 1}})[:-4]))
