"""Columns that are not ours: what looks like a path, a label or a chat stops the file; the rest is kept and counted."""

from __future__ import annotations

import pytest
from support.record_files import fault

from mer_r1_jax.data.records import read_records
from mer_r1_jax.data.validation import DataFile, validate

GOOD = {"video": "a.mp4", "audio": "a.mp4", "solution": ["happy"]}


@pytest.mark.parametrize(
    ("column", "value", "meant"),
    [
        ("audio_path", "a.wav", "audios"),
        ("videoPath", "a", "videos"),
        ("clip", "0001", "videos"),
        ("path", "clips/1", "videos`, `audios` or `images"),
        ("source", "crawl/a.MKV", "videos`, `audios` or `images"),
        ("img", ["a.png"], "images"),
        ("openset", "[happy]", "solution"),
        ("label", 3, "solution"),
        ("answer", "happy", "solution"),
        ("ground-truth", ["happy"], "solution"),
        ("reward_model", {"style": "rule", "ground_truth": "happy"}, "solution"),
        ("log", [{"role": "user", "content": "hi"}], "messages"),
        ("completion", "happy", "messages"),
        ("transcript", "hello", "subtitle"),
        ("video_caption", "hello", "subtitle"),
        ("text", "hello", "subtitle"),
        ("instruction", "Say it.", "question"),
        ("标签", "高兴", "solution"),
        ("情感标签", "高兴", "solution"),
        ("视频路径", "a", "videos"),
        ("ovlabel", "[happy]", "solution"),
        ("emolabels", ["x"], "solution"),
        ("emotion1", "x", "solution"),
        ("annotation", "x", "solution"),
        ("videopath", "a", "videos"),
        ("audiofile", "a", "audios"),
        ("visual", "a", "videos"),
        ("systemprompt", "Be brief.", "question"),
        ("english", "I am fine.", "subtitle"),
        ("discrete", "happy", "solution"),
        ("tags", ["angry; sad"], "solution"),
        ("mer2024", "【愤怒】", "solution"),
    ],
)
def test_what_looks_like_a_path_or_a_label_is_refused_unless_named(write, column, value, meant):
    path = write(GOOD, GOOD | {column: value}, GOOD | {column: value})
    problem = fault(path)
    assert (problem.line, problem.field) == (2, column)
    assert "(in 2 records)" in problem.got
    assert f"rename it to `{meant}`" in problem.mend and "data.extra_columns" in problem.mend
    records = read_records(path, extra_columns=[column])
    assert [record.extra.get(column) for record in records] == [None, value, value]


@pytest.mark.parametrize(
    "extra",
    [
        {"split": "train", "source": "MELD", "speaker": "f1", "rating": 3, "": 1},
        {"video_id": "x1", "label_confidence": 0.9, "fps": 25, "frames": 120, "text_language": "en"},
        {"question_id": "q1", "dataset": "MELD", "difficulty": "easy", "level": "hard", "Dialogue_ID": 3, "fold": 2},
        {"target_length": 30, "class_weight": 0.5, "emotion_intensity": 3, "question_difficulty": "easy"},
        {"image_quality": "good", "video_title": "Anger Management", "textquality": "good", "gold_standard": True},
        {"annotation_id": "a1", "reference_id": 3, "videoid": "x", "label_version": "v2", "speaker": "Joy"},
        {"style": "neutral", "scene": "a sad day", "data_source": "mer", "extra_info": {"index": 3, "split": "train"}},
        {"label": None, "answer": "", "path": [], "history": []},
    ],
)
def test_other_columns_are_kept_and_counted(write, extra):
    path = write(GOOD, GOOD | extra)
    assert read_records(path)[1].extra == extra
    report = validate([DataFile(path=str(path))])
    assert report.errors == ()
    said = {name: 1 for name, value in extra.items() if value not in (None, "", [])}
    assert report.files[0].unread_columns == said
    assert validate([DataFile(path=str(path))], extra_columns=list(extra)).files[0].unread_columns == {}


def test_a_column_of_ours_cannot_be_declared_further(write):
    problem = fault(write(GOOD), extra_columns=["prompt"])
    assert (problem.field, problem.line) == ("data.extra_columns", 0) and "prompt" in problem.got


def test_a_spelling_like_one_of_ours_is_pointed_out(write):
    problem = fault(write(GOOD | {"conversation": [{"human": "a", "assistant": "b"}]}))
    assert (problem.field, problem.expected) == ("conversation", "`conversations`, which it resembles")
    problem = fault(write({"Video": "a.mp4", "subtitle": "hi", "solution": ["sad"]}))
    assert (problem.field, problem.expected) == ("Video", "`video`, which it resembles")


def test_a_file_without_media_is_refused_where_something_is_not_read(write):
    text = {"subtitle": "hi", "solution": ["happy"]}
    problem = fault(write(text | {"name": "sample_1"}, text))
    assert (problem.line, problem.field) == (0, "videos")
    assert "no record with a clip" in problem.got and "name" in problem.got and "data.extra_columns" in problem.mend
    assert len(read_records(write(text | {"name": "sample_1"}, text), extra_columns=["name"])) == 2
    assert len(read_records(write(text | {"name": "sample_1"}, text | {"image": "a.png"}))) == 2
    assert "nor with a subtitle" in fault(write({"videos": [], "solution": ["happy"]})).got


def test_a_file_of_subtitles_alone_is_read_and_pointed_out(write):
    path = write({"subtitle": "hi", "solution": ["happy"]})
    assert len(read_records(path)) == 1
    (warning,) = validate([DataFile(path=str(path))]).warnings
    assert warning.field == "videos" and "no clip, sound or picture in any of the 1 records" in warning.got
