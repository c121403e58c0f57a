"""The released layout is read as it is; what is wrong with a file is said with its entry."""

import json
import shutil

import pytest
from support.mme_standin import COUNT, ITEMS

from mer_r1_jax.evaluation.mme.mme_reader import read_benchmark, read_responses, response_files
from mer_r1_jax.evaluation.mme.mme_tasks import TASKS, MmeError


def item_of(benchmark, video_id):
    return next(item for item in benchmark.items if item.video_id == video_id)


def test_all_eight_tasks(standin):
    benchmark = read_benchmark(standin)
    assert len(benchmark.items) == COUNT == 16 and benchmark.absent == () and set(ITEMS) == set(TASKS)
    assert benchmark.clueless == benchmark.clipless == 0
    three = item_of(benchmark, "BOLD/video/a_0.mp4")
    assert (
        three.labels == ("Peace", "Anticipation", "Fear") and three.audio_clue == "A tone of Peace;Anticipation;Fear."
    )
    assert item_of(benchmark, "BOLD/video/b_0.mp4").labels == ("Doubt/Confusion",)
    assert item_of(benchmark, "MAFW/video/00001.mp4").labels == ("anger", "disgust")
    assert three.video == "FG-ER/BOLD/video/a_0.mp4" and three.key == "FG-ER/BOLD/video/a_0.mp4"
    assert len({item.key for item in benchmark.items}) == COUNT


def test_some_tasks_and_few_items(standin, tmp_path):
    assert [item.task for item in read_benchmark(standin, ["SA", "IR"], limit=1).items] == ["SA", "IR"]
    with pytest.raises(MmeError, match="tasks: got SAD; expected some of ER-Lab"):
        read_benchmark(standin, ["SAD"])
    with pytest.raises(MmeError, match="no question file of ER-Lab.*expected ER-Lab/question/ER_Lab.json"):
        read_benchmark(tmp_path)
    shutil.copytree(standin / "IR/question", tmp_path / "IR/question")
    alone = read_benchmark(tmp_path)
    assert len(alone.items) == 2 and alone.absent == tuple(name for name in TASKS if name != "IR")
    assert alone.clipless == alone.clueless == 2
    with pytest.raises(MmeError, match="no question file of SA"):
        read_benchmark(tmp_path, ["SA", "IR"])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("text", "entry 2: got str, expected an object"),
        ({"label": "x", "label_set": ["x"]}, "entry 2: video_id is None"),
        ({"video_id": "a.mp4", "label": 3, "label_set": ["x"]}, "entry 2: label is 3"),
        ({"video_id": "a.mp4", "label": " ", "label_set": ["x"]}, "entry 2: label is empty"),
        ({"video_id": "a.mp4", "label": "x", "label_set": []}, r"entry 2: label_set is \[\]"),
        ({"video_id": "../a.mp4", "label": "x", "label_set": ["x"]}, "entry 2: .*'..' in"),
        ({"video_id": "/etc/passwd", "label": "x", "label_set": ["x"]}, "entry 2: .*expected a path relative"),
        ({"video_id": "ok.mp4", "label": "x", "label_set": ["x"]}, "entry 2: video_id 'ok.mp4' is there already"),
    ],
)
def test_entries_that_cannot_be_used(tmp_path, row, why):
    file = tmp_path / "SA/question/SA.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([{"video_id": "ok.mp4", "label": "x", "label_set": ["x"]}, row]))
    with pytest.raises(MmeError, match=f"(?s)SA.json cannot be used:.*{why}"):
        read_benchmark(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "[" * 100_000])
def test_files_that_cannot_be_used(tmp_path, content):
    file = tmp_path / "SA/question/SA.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(MmeError, match="SA.json.*expected a JSON list"):
        read_benchmark(tmp_path)


def test_responses_in_the_official_form(standin, tmp_path):
    benchmark = read_benchmark(standin)
    responses = read_responses(response_files(standin / "responses"), benchmark.items)
    assert len(responses) == COUNT
    # ER-Lab's file names the clip without .mp4.
    assert responses["ER-Lab/IEMOCAP/video/Ses01_F000.mp4"].endswith("<answer>anger</answer>")
    rows = [
        {"video_id": "CMU-MOSI/video/c_1.mp4", "model_response": None},
        {"video_id": "of another", "model_response": "x"},
    ]
    (tmp_path / "SA.json").write_text(json.dumps(rows))
    assert read_responses(response_files(tmp_path), benchmark.items) == {}
    for rows, why in (
        ([{"video_id": "CMU-MOSI/video/c_1.mp4"}], "entry 1: expected an object with video_id and model_response"),
        ([{"video_id": "CMU-MOSI/video/c_1.mp4", "model_response": 1}], "entry 1: model_response is 1"),
        ([{"video_id": "CMU-MOSI/video/c_1.mp4", "model_response": "x"}] * 2, "entry 2: .*answered twice"),
    ):
        (tmp_path / "SA.json").write_text(json.dumps(rows))
        with pytest.raises(MmeError, match=why):
            read_responses(response_files(tmp_path), benchmark.items)
    with pytest.raises(MmeError, match="no response file; expected some of ER_Lab.json"):
        response_files(standin / "SA")
