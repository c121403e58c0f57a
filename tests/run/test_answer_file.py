"""A file of answers: it goes on after a kill, refuses what is not its own, and has the challenge's columns."""

import ast
import csv
import dataclasses
import json

import pytest
from support.commands import run_command

from mer_r1_jax.data.records import Record
from mer_r1_jax.emotion.answer_form import Answer
from mer_r1_jax.emotion.predictions import read_predictions
from mer_r1_jax.evaluation.gate import Auto
from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.run import answer_file
from mer_r1_jax.run.answer_file import AnswerFileError, answer_records, check_out, log_of
from mer_r1_jax.run.asking import Reply
from mer_r1_jax.run.inference import clip_record

RECORDS = [
    Record(id=name, messages=({"role": "user", "content": "?"},), videos=(f"{name}.mp4",), solution=("sad",))
    for name in ("a", "b", "c", "d")
]


def pairs(records, *modes):
    return [(record, mode) for record in records for mode in modes]


def said(record, mode):
    """The answer to a record; that to `c` has no words, and that to `d` cannot be given."""
    if record.id == "d":
        return MediaError("d.mp4", "missing", "no file", "a clip", "Put it there.")
    words = () if record.id == "c" else ("happy", f"can't {record.id}")
    known = {word: ("joy", None) for word in words}
    return Answer(mode, "The brows rise.", words, dict.fromkeys(words[:1], 0.5), known, False, "text")


@pytest.fixture
def asked(monkeypatch):
    """The keys a policy was asked, one batch each; `asked.kill` ends it before the batch of that number."""

    class Asked(list):
        kill = None
        settings = "these"
        sure = {}  # id -> confidence of its fast answer

    keys = Asked()

    def ask(policy, reader, media_root, wanted, stop):
        for record, mode in wanted:
            if len(keys) == keys.kill:
                raise KeyboardInterrupt
            keys.append((record.id, mode))
            answer = said(record, mode)
            if mode == "fast" and record.id in keys.sure:
                probabilities = dict.fromkeys(answer.words[:1], keys.sure[record.id])
                answer = dataclasses.replace(answer, probabilities=probabilities)
            yield [Reply(record, mode, answer)]

    monkeypatch.setattr(answer_file, "ask", ask)
    monkeypatch.setattr(answer_file, "_reader", lambda policy, records: object())
    monkeypatch.setattr(answer_file, "answer_fingerprint", lambda policy, name: {"settings": keys.settings})
    return keys


def test_a_killed_run_goes_on_with_the_rest(tmp_path, asked):
    out = tmp_path / "answers.jsonl"
    asked.kill = 3
    with pytest.raises(KeyboardInterrupt):
        answer_records(None, pairs(RECORDS, "slow", "fast"), out)
    assert not out.exists() and len(log_of(out).read_text().splitlines()) == 1 + 3
    asked.kill = None
    check_out(out, ("slow", "fast"))
    counts = answer_records(None, pairs(RECORDS, "slow", "fast"), out)
    assert len(asked) == len(set(asked)) == 2 * len(RECORDS)
    assert (counts.answered, counts.wordless, list(counts.failed)) == (6, 2, ["d"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["id"], line["mode"]) for line in lines] == [(r.id, m) for r in RECORDS for m in ("slow", "fast")]
    assert lines[0]["confidences"] == {"happy": 0.5, "can't a": None} and lines[0]["truth"] == ["sad"]
    assert "no file" in lines[-1]["failed"] and not any("record" in line for line in lines)
    answer_records(None, pairs(RECORDS, "slow", "fast"), out)
    assert asked[2 * len(RECORDS) :] == [("d", "slow"), ("d", "fast")], "only what failed is tried again"


def test_the_table_is_the_challenges_and_the_lines_can_be_scored(tmp_path, asked):
    out = tmp_path / "answers.csv"
    answer_records(None, pairs(RECORDS, "slow"), out)
    answer_records(None, pairs(RECORDS[:3], "slow"), tmp_path / "answers.jsonl")
    assert [key for key in asked if key[0] != "d"] == [("a", "slow"), ("b", "slow"), ("c", "slow")], "one log for both"
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["name", "openset"] and [row["name"] for row in rows] == ["a", "b", "c", "d"]
    assert [ast.literal_eval(row["openset"]) for row in rows] == [["happy", "can't a"], ["happy", "can't b"], [], []]
    columns = read_predictions(tmp_path / "answers.jsonl", "set_f1")
    assert columns.predictions[0] == ["happy", "can't a"] and columns.truths == [["sad"]] * 3


def test_another_models_answers_are_refused_by_name(tmp_path, asked):
    out = tmp_path / "answers.jsonl"
    answer_records(None, pairs(RECORDS, "slow"), out)
    changed = [dataclasses.replace(RECORDS[0], subtitle="Oh."), *RECORDS[1:]]
    with pytest.raises(AnswerFileError, match=r"answers.answers.jsonl: got 1 answers to other .* of 'a'; expected"):
        answer_records(None, pairs(changed, "slow"), out)
    asked.settings = "others"
    with pytest.raises(AnswerFileError, match=r"(?s)answers.answers.jsonl .*settings: there 'these', now 'others'"):
        answer_records(None, pairs(RECORDS, "slow"), out)
    log_of(out).unlink()
    with pytest.raises(AnswerFileError, match=r"answers.jsonl', which is there without answers.answers.jsonl"):
        check_out(out, ("slow",))


def test_a_name_that_a_spreadsheet_would_run_is_refused_before_anything_is_asked(tmp_path, asked):
    with pytest.raises(AnswerFileError, match="id: got =cmd.*rename it"):
        answer_records(None, pairs([dataclasses.replace(RECORDS[0], id="=cmd|x")], "slow"), tmp_path / "answers.csv")
    assert not asked


def test_records_that_could_not_be_asked_are_counted_where_answers_are_scored(tmp_path, asked):
    out = tmp_path / "answers.jsonl"
    answer_records(None, pairs(RECORDS, "slow"), out)
    found = read_predictions(out, "set_f1")
    assert found.ids == ["a", "b", "c"] and found.n_failed == 1


def test_a_file_without_any_answer_is_refused(tmp_path, asked):
    with pytest.raises(AnswerFileError, match="none of the 1 records can be asked, the first for: .*no file"):
        answer_records(None, pairs(RECORDS[3:], "slow"), tmp_path / "answers.csv")
    assert not (tmp_path / "answers.csv").exists()


def test_a_voice_alone_or_in_place_of_the_clips_own(tmp_path):
    clip, voice = tmp_path / "clips/a.mp4", tmp_path / "voices/a.wav"
    alone = clip_record(None, "?", None, voice=voice)
    assert (alone.videos, alone.audios, alone.id) == ((), ("a.wav",), "a.wav")
    both = clip_record(clip, "?", None, voice=voice)
    assert (both.videos, both.audios) == (("clips/a.mp4",), ("voices/a.wav",)) and both.use_audio_in_video is False
    heard = clip_record(clip, "?", None, frames=False)
    assert (heard.videos, heard.audios, heard.use_audio_in_video) == ((), ("a.mp4",), None)
    assert clip_record(clip, "?", None, audio=False).use_audio_in_video is False


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "got neither, expected --data=FILE"),
        (["--data=d.jsonl", "--video=a.mp4"], "got both, expected --data=FILE"),
        (["--data=d.jsonl"], "--out is empty, expected FILE.jsonl"),
        (["--data=d.jsonl", "--out=o.csv", "--show=audio"], "expected them with one clip"),
        (["--audio=a.wav", "--show=video"], "nothing to show"),
        (["--audio=a.wav", "--mode=slow", "--threshold=0.5"], "--threshold: got it beside --mode=slow, expected"),
        (["--audio=a.wav", "--mode=auto"], "expected a run's folder"),
        (["--audio=a.wav", "--out=o.txt"], "expected a name that ends in .jsonl or .csv"),
        (["--data=d.jsonl", "--out=o.csv", "--mode=both"], "the CSV has one answer to a clip"),
        (["--data=absent.jsonl", "--out=o.csv"], "No such file"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_first(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command("infer", "--model=nowhere", *arguments) == 2
    assert told in capsys.readouterr().err


def test_only_the_unsure_are_asked_slowly_and_the_file_says_which_and_why(tmp_path, asked):
    out = tmp_path / "answers.jsonl"
    asked.sure = {"a": 0.4, "b": 0.6}
    counts = answer_records(None, pairs(RECORDS, Auto(0.5)), out)
    assert asked == [*((name, "fast") for name in "abcd"), ("a", "slow"), ("c", "slow")]
    assert (counts.answered, counts.gated, list(counts.failed)) == (3, {"slow": 2, "fast": 1}, ["d"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["id"], line["mode"], line.get("why")) for line in lines] == [
        ("a", "slow", "fast confidence 0.40 is below the threshold 0.50"),
        ("b", "fast", "fast confidence 0.60 is not below the threshold 0.50"),
        ("c", "slow", "no word of the fast answer has a confidence"),
        ("d", "auto", None),
    ]
    assert len(read_predictions(out, "set_f1").ids) == 3, "such a file can be scored"
    del asked[:]
    answer_records(None, pairs(RECORDS[:3], Auto(0.7)), out)
    assert asked == [("b", "slow")], "another threshold asks only what is not there"
    assert [json.loads(line)["mode"] for line in out.read_text().splitlines()] == ["slow"] * 3


def test_a_gated_run_that_was_killed_goes_on_with_the_rest(tmp_path, asked):
    out, asked.sure, asked.kill = tmp_path / "answers.csv", {"a": 0.4, "b": 0.4}, 5
    with pytest.raises(KeyboardInterrupt):
        answer_records(None, pairs(RECORDS, Auto(0.5)), out)
    asked.kill = None
    check_out(out, (Auto(0.5),))
    answer_records(None, pairs(RECORDS, Auto(0.5)), out)
    assert asked[:5] == [*((name, "fast") for name in "abcd"), ("a", "slow")]
    assert asked[5:] == [("d", "fast"), ("b", "slow"), ("c", "slow")]
