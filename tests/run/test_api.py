"""The public face: load, answer, score, on a tiny model, and light until it is used."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import pytest
from support.small_fixtures import compiled, small, small_folder, trained  # noqa: F401

import mer_r1_jax
from mer_r1_jax.api import Answer, ArgumentError
from mer_r1_jax.data.records import read_records
from mer_r1_jax.emotion.predictions import PredictionError
from mer_r1_jax.evaluation.gate import confidence_of
from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.omni.hf.export import ExportSettings, export_model
from mer_r1_jax.run import asking, policy
from mer_r1_jax.run.answer_file import answer_records
from mer_r1_jax.run.fitted_gate import GateError
from mer_r1_jax.run.inference import answer, clip_record
from mer_r1_jax.training.state import nest


@pytest.fixture(scope="module")
def export(small, trained, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("model") / "export"
    export_model(
        folder, small.backbone.config, nest(trained), ExportSettings(source=small.tokenizer_path, overwrite=True)
    )
    # Trained with a board that is not installed where the model is asked: nothing below may need it.
    reported = dataclasses.replace(small.config.train, report_to=("wandb",))
    policy.write_settings(folder, dataclasses.replace(small.config, train=reported))
    return folder


@pytest.fixture
def model(export, monkeypatch):
    monkeypatch.setattr(policy, "open_model", functools.partial(policy.open_model, devices=jax.devices()[:1]))
    with mer_r1_jax.load(export, media__decode_workers=0) as model:
        yield model


def test_importing_the_package_imports_nothing_else():
    check = "import sys, mer_r1_jax; print([name for name in ('jax', 'numpy', 'absl') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = mer_r1_jax.lod


def test_answers_are_those_of_the_command(model, small_folder):  # noqa: F811
    clip = small_folder / "clips/1.mp4"
    record = clip_record(clip, "Feel?", "I never", frames=True, audio=True)
    _, expected = answer(model._setup, model._params, record)
    for mode, reading in zip(("slow", "fast"), expected, strict=True):
        got = model.answer(video=clip, subtitle="I never", question="Feel?", mode=mode)
        assert (got.mode, got.text, got.truncated) == (mode, reading.text, reading.truncated)
        assert (got.words, got.categories) == (reading.words, reading.categories)
        assert got.reasoning == (reading.reasoning or None) and (mode == "slow" or got.reasoning is None)
        assert got.probabilities == reading.probabilities
    assert any(reading.words for reading in expected), "there has to be something to compare"
    assert model.answer(video=clip, show="video", mode="fast").text != "", "one part alone is answered too"


def test_a_gated_answer_is_one_of_the_two_and_says_why(model, small_folder):  # noqa: F811
    clips = [small_folder / f"clips/{number}.mp4" for number in range(6)]
    fast = {clip: model.answer(video=clip, mode="fast") for clip in clips}
    confidence = {clip: confidence_of(answer.probabilities) for clip, answer in fast.items()}
    clip = next(clip for clip in clips if confidence[clip])
    assert fast[clip].why == ""
    sure = model.answer(video=clip, mode=mer_r1_jax.Auto(confidence[clip] / 2))
    assert dataclasses.replace(sure, why="") == fast[clip] and "not below" in sure.why
    unsure = model.answer(video=clip, mode=mer_r1_jax.Auto((1 + confidence[clip]) / 2))
    slow = model.answer(video=clip, mode="slow")
    assert dataclasses.replace(unsure, why="") == slow and "is below the threshold" in unsure.why
    with pytest.raises(GateError, match="without a fitted threshold"):
        model.answer(video=clip, mode="auto")
    with pytest.raises(GateError, match="threshold: got 2"):
        model.answer(video=clip, mode=mer_r1_jax.Auto(2))


def test_wrong_arguments_are_named_with_what_is_expected(model, small_folder, tmp_path):  # noqa: F811
    clip = small_folder / "clips/1.mp4"
    with pytest.raises(ArgumentError, match="mode: got 'both', expected one of slow, fast, auto"):
        model.answer(video=clip, mode="both")
    with pytest.raises(ArgumentError, match="show: got 'frames', expected one of both, video, audio"):
        model.answer(video=clip, show="frames")
    with pytest.raises(ArgumentError, match="video: got None, expected the clip"):
        model.answer(audio=clip, show="video")
    with pytest.raises(MediaError, match="none.mp4"):
        model.answer(video=tmp_path / "none.mp4")
    with pytest.raises(policy.PolicyError, match="expected a run's folder"):
        mer_r1_jax.load(tmp_path)


def test_a_file_of_records_gets_the_answers_of_its_clips(model, export, small_folder, tmp_path):  # noqa: F811
    records = read_records(small_folder / "eval.jsonl")[:3]
    opened = asking.open_policy(export, devices=jax.devices()[:1], changes={"media.decode_workers": 0})
    try:
        counts = answer_records(opened, [(record, "fast") for record in records], tmp_path / "answers.jsonl")
    finally:
        opened.setup.source.close()
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == counts.answered + len(counts.failed) == 3
    _, (reading,) = answer(model._setup, model._params, records[0], ("fast",))
    (line,) = (line for line in lines if line["id"] == records[0].id)
    assert (line["text"], line["prediction"]) == (reading.text, [*reading.words])
    assert line["confidences"] == pytest.approx({word: reading.probabilities.get(word) for word in reading.words})


def said(*words):
    return Answer("slow", "r", words, {}, {}, False, "t")


def test_scores_are_those_of_the_command(tmp_path):
    rows = [("a", "happy, sad, xyzzy", ["happy"]), ("b", ["angry", "xyzzy"], ["angry", "sad"])]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"id": i, "prediction": p, "truth": t}) + "\n" for i, p, t in rows))
    expected = mer_r1_jax.score(file)
    assert expected["n_unknown_words"] == 2 and 0 < expected["score"] < 1
    truths = {name: truth for name, _, truth in rows}
    assert mer_r1_jax.score({name: answer for name, answer, _ in rows}, truths) == expected
    answers = {"a": said("happy", "sad", "xyzzy"), "b": said("angry", "xyzzy")}
    assert mer_r1_jax.score(answers, truths) == expected


def test_predictions_are_scored_against_the_records_of_a_data_file(small_folder):  # noqa: F811
    truths = {row["id"]: row["solution"] for row in map(json.loads, open(small_folder / "rl.jsonl"))}
    scores = mer_r1_jax.score({name: ", ".join(words) for name, words in truths.items()}, small_folder / "rl.jsonl")
    assert scores["score"] == 1 and scores["n"] == len(truths)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (({"a": "sad"},), ArgumentError, "truths: got None, expected id -> truth"),
        (("p.jsonl", {"a": "sad"}), ArgumentError, "which has its own; leave them out"),
        (({"a": "sad", "b": "sad"}, {"a": "sad"}), PredictionError, "b: no truth; expected one of each"),
        (({"a": "sad"}, {"a": "sad", "c": "sad"}), PredictionError, "c: no prediction"),
        (({"a": 3}, {"a": "sad"}), PredictionError, "a: .*expected"),
        (({}, {}), PredictionError, "no predictions"),
    ],
)
def test_predictions_without_a_partner_are_refused_by_name(arguments, error, said):
    with pytest.raises(error, match=said):
        mer_r1_jax.score(*arguments)
