"""Sets of clips become data files that validate, with an account of everything that is not in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.commands import run_command
from support.mer2025_standin import clip_name, write_mer2025

from mer_r1_jax.data import mer2025 as mer2025_layout
from mer_r1_jax.data.conversion import Account, ConversionError, Division, Draft, LabelError, divided, words_of
from mer_r1_jax.data.records import read_records


@pytest.fixture(scope="module")
def mer2025(tmp_path_factory):
    return write_mer2025(tmp_path_factory.mktemp("set") / "mer2025")


def counts_of(out, kind):
    counts = json.loads((out / "counts.json").read_text())
    return {reason: (entry["count"], entry["such_as"]) for reason, entry in counts[kind].items()}


def test_the_official_layout_is_converted_counted_and_validates(mer2025, tmp_path, capsys):
    out = tmp_path / "data"
    arguments = ["--from=mer2025", f"--root={mer2025}", f"--out={out}", "--sft=2", "--eval=1", "--seed=3"]
    assert run_command("convert", *arguments) == 0
    said = capsys.readouterr().out
    files = {path.stem: read_records(path, mer2025) for path in out.glob("*.jsonl")}
    written = {name: len(records) for name, records in files.items()}
    assert written == {"sft": 2, "rl": 4, "eval": 1, "test": 1, "candidates": 1}
    names = [record.id for name in ("sft", "rl", "eval") for record in files[name]]
    assert sorted(names) == ["empty", *[clip_name(number) for number in range(6)]]
    by_name = {record.id: record for records in files.values() for record in records}
    second = by_name[clip_name(1)]
    assert (second.videos, second.audios) == ((f"video/{clip_name(1)}.mp4",), (f"audio/{clip_name(1)}.wav",))
    assert (second.solution, second.subtitle) == (("sad",), "Wait a moment, will you?")
    assert by_name[clip_name(0)].audios == (f"video/{clip_name(0)}.mp4",)
    assert by_name["empty"].solution == ("neutral",) and by_name["in_test"].solution == ("calm",)
    assert all(record.target and "so this is" in record.target for record in files["sft"])
    assert counts_of(out, "left_out") == {
        "`openset` holds a label that begins like a list and is none of words": (1, ["broken"]),
        "no video/NAME.mp4": (2, ["absent", "../out"]),
        "training clips that are in track2_test.csv too": (1, ["in_test"]),
    }
    noticed = counts_of(out, "noticed")
    assert noticed["no audio/NAME.wav, so the video's own sound"] == (1, [clip_name(0)])
    assert noticed["no row in track3_*.csv, so for RL or evaluation only"] == (3, [clip_name(4), clip_name(5), "empty"])
    assert noticed["no text in subtitle_chieng.csv"] == (3, [clip_name(2), clip_name(5), "in_test"])
    assert "left out: 2, such as absent: no video/NAME.mp4" in said and "sft.jsonl: 2 records" in said
    data = ",".join(str(out / f"{name}.jsonl") for name in ("sft", "rl", "eval", "test", "candidates"))
    report = tmp_path / "report.json"
    checks = [f"--data={data}", f"--media_root={mer2025}", f"--json={report}", "--extra_columns="]
    assert run_command("validate", *checks) == 0, capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["errors"] == 0 and sum(file["counts"]["records"] for file in found["files"]) == 9
    # Nothing is written over, and the same seed gives the same files.
    assert run_command("convert", *arguments) == 2
    assert "expected a folder without data files" in capsys.readouterr().err
    again = [argument.replace(str(out), str(tmp_path / "again")) for argument in arguments]
    assert run_command("convert", *again) == 0
    assert all((tmp_path / "again" / path.name).read_bytes() == path.read_bytes() for path in out.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sft=5"], "--sft: got 5, expected at most the 4 clips"),
        (["--eval=8"], "--eval: got 8, expected at most the 7 clips"),
        (["--video=x"], "got --video, expected it with --from=table"),
        (["--from=table"], "--data is empty, expected the table"),
        (["--from=table", "--data={root}/track2_test.csv"], "--video is empty, expected the column"),
        (["--from=table", "--data={root}/track2_test.csv", "--video=name"], "--label is empty, expected"),
        (
            ["--from=table", "--data={root}/track2_test.csv", "--video=clip", "--label=openset"],
            "expected the column clip",
        ),
        (["--from=table", "--data={root}/track2_test.csv", "--video=name", "--label=openset"], "no file of that name"),
        (["--from=table", "--data={root}/absent.csv", "--video=name", "--label=openset"], "No such file"),
    ],
)
def test_what_cannot_be_converted_is_named(mer2025, tmp_path, arguments, told, capsys):
    words = [word.format(root=mer2025) for word in arguments]
    assert run_command("convert", f"--root={mer2025}", f"--out={tmp_path / 'data'}", *words) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "data").exists()


def test_a_set_without_its_files_is_refused(mer2025, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    assert run_command("convert", f"--root={tmp_path / 'set'}", f"--out={tmp_path / 'data'}") == 2
    assert "expected a folder with track2_train_mercaptionplus.csv" in capsys.readouterr().err
    (tmp_path / "set/track2_train_mercaptionplus.csv").write_text("name,openset\na,['sad']\n")
    assert run_command("convert", f"--root={tmp_path / 'set'}", f"--out={tmp_path / 'data'}") == 2
    assert "expected the subtitles; put it there, or say --language=none" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["b,\"['sad']\nc,['sad']\n", 'b,["sad"]x"y\nc,"[\'sad\']"z\n'])
def test_a_table_that_cannot_be_read_to_its_end_is_refused(mer2025, tmp_path, broken, capsys):
    """Nobody knows how many clips stand behind a quote that does not close."""
    root = tmp_path / "set"
    shutil.copytree(mer2025, root)
    with open(root / "track2_train_mercaptionplus.csv", "a") as file:
        file.write(broken)
    assert run_command("convert", f"--root={root}", f"--out={tmp_path / 'data'}") == 2
    told = capsys.readouterr().err
    assert "track2_train_mercaptionplus.csv:" in told and "check the quotes" in told
    assert not (tmp_path / "data").exists()


def test_a_map_of_labels_may_be_a_table_with_empty_cells(tmp_path, capsys):
    path = table(tmp_path, [{"clip": "clips/a.mp4", "label": 3.0}, {"clip": "clips/b.mp4", "label": 1}])
    labels = tmp_path / "map.jsonl"
    labels.write_text('{"label": 3.0, "word": "sad"}\n{"label": 1.0, "word": "happy"}\n')
    records = converted(tmp_path, path, "--video=clip", "--label=label", f"--label_map={labels}")
    assert sorted(record.solution for record in records) == [("happy",), ("sad",)]
    labels.write_text('{"label": null, "word": "sad"}\n')
    arguments = [f"--data={path}", f"--root={tmp_path}", f"--out={tmp_path / 'other'}", "--video=clip"]
    assert run_command("convert", "--from=table", *arguments, "--label=label", f"--label_map={labels}") == 2
    assert f"{labels}:1: got no label" in capsys.readouterr().err


def table(root: Path, rows, name="labels.jsonl"):
    for clip in ("a.mp4", "b.mp4", "c.mp4", "d.mp4"):
        (root / "clips").mkdir(exist_ok=True)
        (root / "clips" / clip).write_bytes(b"clip")
    path = root / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def converted(root, path, *arguments):
    code = run_command(
        "convert", "--from=table", f"--data={path}", f"--root={root}", f"--out={root / 'out'}", *arguments
    )
    assert code == 0
    return read_records(root / "out/rl.jsonl", root)


def test_any_table_with_a_map_of_labels(tmp_path):
    rows = [
        {"clip": "a", "emotion": 1, "words": " Oh no. "},
        {"clip": "b", "emotion": 2.0, "words": None},
        {"clip": "c", "emotion": 7, "words": ""},
        {"clip": "x", "emotion": 1, "words": ""},
        {"clip": "a", "emotion": 1, "words": ""},
        {"clip": "d", "emotion": None, "words": ""},
    ]
    path = table(tmp_path, rows)
    (tmp_path / "map.json").write_text('{"1": "sad", "2": ["happy", "calm"]}')
    asked = ["--video=clip", "--video_path=clips/{}.mp4", "--id=clip", "--label=emotion", "--text=words"]
    records = converted(tmp_path, path, *asked, f"--label_map={tmp_path / 'map.json'}")
    assert [(r.id, r.solution, r.subtitle) for r in records] == [
        ("a", ("sad",), "Oh no."),
        ("b", ("happy", "calm"), None),
    ]
    assert records[0].videos == records[0].audios == ("clips/a.mp4",)
    assert {reason: count for reason, (count, _) in counts_of(tmp_path / "out", "left_out").items()} == {
        "a label that is not in --label_map: 7": 1,
        "no file of that name below --root": 1,
        "a name that another clip has already": 1,
        "no label": 1,
    }


def test_absolute_paths_and_answers_in_a_last_turn(tmp_path):
    said = {
        "a": "happy and calm",
        "b": "<think>The voice is low.</think>\n<answer>sad</answer>",
        "c": "I would say that " + "this is a long story, " * 12,
        "d": "3",
    }
    rows = [
        {
            "video": str(tmp_path / f"clips/{name}.mp4"),
            "conversations": [{"from": "human", "value": "<video>\n<audio>\nWhich?"}, {"from": "gpt", "value": answer}],
        }
        for name, answer in said.items()
    ]
    rows.append({"video": "/elsewhere/a.mp4", "conversations": rows[0]["conversations"]})
    first, second = converted(tmp_path, table(tmp_path, rows), "--video=video", "--chat=conversations")
    assert (first.videos, first.audios, first.solution) == (("clips/a.mp4",), ("clips/a.mp4",), ("happy", "calm"))
    assert first.messages[-1]["content"] == "<video>\n<audio>\nWhich?" and first.target is None
    assert second.target == "<think>The voice is low.</think>\n<answer>sad</answer>"
    assert set(counts_of(tmp_path / "out", "left_out")) == {
        "a last turn of more than 200 characters without <answer>",
        "a number for a label, and no --label_map",
        "no file of that name below --root",
    }


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("['happy', \"can't wait\"]", ["happy", "can't wait"]),
        ("[]", []),
        ("", []),
        ("happy, sad; happy", ["happy", "sad"]),
        (["happy", "sad, calm"], ["happy", "sad", "calm"]),
    ],
)
def test_labels_are_read_as_they_are_written(cell, words):
    assert words_of(cell) == words


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ("['happy'", "begins like a list"),
        ("[__import__('os').system('x')]", "begins like a list"),
        ("[" * 3000, "begins like a list"),
        ("[1, 'happy']", "begins like a list"),
        ("['happy' 'sad']", "begins like a list"),
        ([1, "happy"], "an entry that is no word"),
        ("x" * 4001, "more than 4000 characters"),
        (str([f"w{n}" for n in range(65)]), "more than 64 words"),
        (3, "no word and no list"),
    ],
)
def test_labels_beyond_the_limits_are_refused(cell, why):
    with pytest.raises(LabelError, match=why):
        words_of(cell)


def test_the_division_follows_from_names_and_seed():
    drafts = [Draft(name=f"{n:02}", row={"reasoning": "So."} if n % 2 else {}) for n in range(20)]

    def names(order, seed):
        files = divided(order, Division(sft=4, held_out=3, seed=seed))
        return {name: {draft.name for draft in rows} for name, rows in files.items()}

    first = names(drafts, 0)
    assert first == names(drafts[::-1], 0) and first != names(drafts, 1)
    assert {name: len(found) for name, found in first.items()} == {"sft": 4, "rl": 13, "eval": 3}
    assert all(int(name) % 2 for name in first["sft"]) and len(set().union(*first.values())) == 20
    with pytest.raises(ConversionError, match="expected at most the"):
        divided(drafts, Division(sft=11))


def test_subtitles_and_reasons_that_look_like_lists_stay_as_they_were_written(tmp_path):
    (tmp_path / "subtitle_chieng.csv").write_text('name,chinese,english\na,x,[]\nb,x,"[""sighs""]"\nc,x,{}\n')
    (tmp_path / "track3_a.csv").write_text("name,reason\na,['low voice']\n")
    assert mer2025_layout._subtitles(tmp_path, "english", Account()) == {"a": "[]", "b": '["sighs"]', "c": "{}"}
    assert mer2025_layout._reasons(tmp_path, Account()) == {"a": "['low voice']"}
