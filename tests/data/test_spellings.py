"""One file under several names is one clip: beside its frames, between files, and in what validation says."""

from __future__ import annotations

import json
import os
import unicodedata

import pytest
from support.media_files import numbered_pictures, write_video
from support.prompts import TinyRecord, noise_samples, tiny_thinker

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.data.validation import Checks, DataFile, validate
from mer_r1_jax.media.loader import ClipLoader
from mer_r1_jax.media.opening import file_key

MEDIA = MediaConfig(
    video_min_pixels=784, video_max_pixels=6 * 784, decode_workers=0, use_audio_in_video=True, missing_audio="silence"
)
SPELLINGS = ["./a.mp4", "sub/../a.mp4", "link.mp4", "hard.mp4", "sub//b.mp4", "folder/a.mp4"]


@pytest.fixture
def folder(tmp_path):
    write_video(tmp_path / "a.mp4", numbered_pictures(16), samples=noise_samples(1.0)[None])
    (tmp_path / "sub").mkdir()
    os.symlink(tmp_path / "a.mp4", tmp_path / "link.mp4")
    os.link(tmp_path / "a.mp4", tmp_path / "hard.mp4")
    os.symlink(tmp_path / "a.mp4", tmp_path / "sub" / "b.mp4")
    os.symlink(tmp_path, tmp_path / "folder")
    return tmp_path


def write(folder, name: str, *rows: dict) -> DataFile:
    lines = [json.dumps({"id": f"{name}{n}", "solution": ["happy"]} | row) for n, row in enumerate(rows)]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return DataFile(path=str(folder / name))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_videos_own_sound_is_not_heard_twice(folder, spelling):
    with ClipLoader(MEDIA, tiny_thinker().vision, 128, "", folder) as loader:
        clips = loader.load(TinyRecord((), videos=("a.mp4",), audios=(spelling,)))
    assert clips.audios == (None,) and clips.video_audios[0] is not None


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if ".." not in name])
def test_training_and_held_out_clips_are_compared_as_files(folder, spelling):
    files = [write(folder, "train.jsonl", {"video": "a.mp4"}), write(folder, "eval.jsonl", {"video": spelling})]
    said = [str(problem) for problem in validate(files, folder).warnings if "that were not seen" in str(problem)]
    assert len(said) == 1 and "1 clip(s) that" in said[0] and "train.jsonl has too" in said[0]


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if ".." not in name])
def test_two_names_in_one_file_are_pointed_out(folder, spelling):
    report = validate([write(folder, "train.jsonl", {"video": "a.mp4", "audio": "a.mp4"}, {"video": spelling})], folder)
    (warning,) = [problem for problem in report.warnings if "more than one name" in problem.got]
    assert repr("a.mp4") in warning.got and repr(spelling) in warning.got and warning.mend


def test_one_name_is_not_pointed_out(folder):
    report = validate([write(folder, "train.jsonl", {"video": "a.mp4", "audio": "a.mp4"})], folder)
    assert not [problem for problem in report.warnings if "name" in problem.got]


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        ("Clip.MP4", "clip.mp4"),
        (unicodedata.normalize("NFD", "café.mp4"), unicodedata.normalize("NFC", "café.mp4")),
        (unicodedata.normalize("NFC", "Ärger.mp4"), unicodedata.normalize("NFD", "ärger.mp4")),
    ],
)
def test_a_missing_file_with_a_name_that_looks_alike_is_pointed_out(folder, there, asked):
    os.rename(folder / "hard.mp4", folder / there)
    data = write(folder, "train.jsonl", {"video": asked})
    with ClipLoader(MEDIA, tiny_thinker().vision, 128, "", folder) as loader:
        (problem,) = validate([data], folder, Checks(load=loader.load)).errors
    assert repr(there) in problem.mend and "letter case or Unicode form" in problem.mend


def test_files_on_a_disk_that_does_not_number_them_are_told_apart_by_name(folder, monkeypatch):
    stat = os.stat

    def unnumbered(path, *args, **options):
        status = stat(path, *args, **options)
        return os.stat_result((status.st_mode, 0, *status[2:]))

    monkeypatch.setattr(os, "stat", unnumbered)
    for name in ("a.mp4", "b.mp4"):
        (folder / name).write_bytes(b"x")
    assert file_key(folder / "a.mp4") != file_key(folder / "b.mp4")
    assert file_key(folder / "a.mp4") == file_key(folder / "." / "x" / ".." / "a.mp4")
