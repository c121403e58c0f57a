"""Checking data before a run: every record, clip, length and answer, by file and line."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.clips import make_clip
from support.commands import run_command
from support.tiny_tokenizer import tiny_tokenizer

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.data.validation import Checks, DataFile, validate
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.media.loader import ClipLoader
from mer_r1_jax.media.prompt import PromptBuilder
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.training.omni_backbone import special_ids

ROOT = Path(__file__).parents[2]
MEDIA = MediaConfig(decode_workers=0, video_min_pixels=4 * 28 * 28, video_max_pixels=8 * 28 * 28)
GOOD = ("a.mp4", "b.mp4", "c.mp4")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of real clips, whole and broken."""
    folder = tmp_path_factory.mktemp("clips")
    for number, name in enumerate(GOOD):
        make_clip(folder / name, 1.0 + number, seed=number)
    make_clip(folder / "mute.mp4", with_audio=False)
    make_clip(folder / "blind.mp4", with_video=False)
    make_clip(folder / "long.mp4", 5.0, fps=2)
    whole = (folder / "a.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a clip")
    return folder


@pytest.fixture
def check(clips, tmp_path):
    """Writes rows to data files and validates them; rows may name clips by one word."""

    def run(*rows, checks=None, media=MEDIA, files=None, require=()):
        media = dataclasses.replace(media)
        with ClipLoader(media, ThinkerConfig.tiny().vision, 128, media_root=clips) as loader:
            checks = dataclasses.replace(checks or Checks(), load=loader.load)
            paths = []
            for number, part in enumerate(files or [rows]):
                path = tmp_path / f"data{number}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in part))
                paths.append(DataFile(path=str(path), require=require))
            return validate(paths, clips, checks)

    return run


def both(name, **columns):
    return {"videos": [name], "audios": [name], "solution": ["happy"], **columns}


@pytest.fixture(scope="module")
def thinker():
    tokenizer = tiny_tokenizer()
    tiny = ThinkerConfig.tiny()
    text = dataclasses.replace(tiny.text, vocab_size=512)
    return dataclasses.replace(tiny, text=text, **special_ids(tokenizer))


def test_a_good_data_set_is_counted_and_measured(check, thinker):
    builder = PromptBuilder(tiny_tokenizer(), MEDIA, thinker, "You are a helpful assistant.", 2048)
    checks = Checks(
        build=builder.build,
        target_length=lambda record: len(record.target),
        max_target_length=100,
        wheels=load_wheels(),
    )
    rows = [both(name, subtitle="hello", reasoning="A smile.") for name in GOOD]
    report = check(*rows, checks=checks)
    assert report.problems == () and report.unchecked == ()
    (file,) = report.files
    assert {name: count for name, count in file.counts.items() if count} == {
        "records": 3, "videos": 3, "audios": 3, "subtitles": 3, "solutions": 3, "targets": 3, "words": 3,
    }  # fmt: skip
    # 1, 2 and 3 s at 2 frames a second, but never fewer than media.min_frames.
    assert file.lengths["frames"] == {"min": 4, "mean": 14 / 3, "max": 6}
    assert file.lengths["audio_seconds"]["max"] == pytest.approx(3, abs=0.01)
    assert file.lengths["prompt_tokens"]["max"] > 100
    assert file.lengths["target_tokens"]["min"] == len("<think>A smile.</think>\n<answer>happy</answer>")
    assert file.lengths["decode_ms"]["min"] > 0
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


@pytest.mark.parametrize(
    ("row", "field", "got", "expected", "reason"),
    [
        ({"videos": ["none.mp4"]}, "videos[0]", "no such file", "a media file", "missing"),
        ({"videos": ["."], "audios": ["a.mp4"]}, "videos[0]", "'.'", "media root", None),
        ({"videos": ["empty.mp4"]}, "videos[0]", "an empty file", "a media file", "empty"),
        ({"videos": ["cut.mp4"]}, "videos[0]", "cut.mp4", "", None),
        ({"videos": ["text.mp4"]}, "videos[0]", "cannot open", "a video or audio file", "not_media"),
        ({"videos": ["a.mp4", "blind.mp4"]}, "videos[1]", "no video track", "one", "no_video"),
        ({"videos": ["mute.mp4"], "audios": ["mute.mp4"]}, "audios[0]", "no audio track", "one", "no_audio"),
        ({"videos": ["long.mp4"]}, "videos[0]", "a clip of 5", "at most 4 s", "too_long"),
        ({"images": ["text.mp4"]}, "images[0]", "not an image", "a PNG", "not_media"),
    ],
)
def test_a_broken_clip_is_named_by_line_and_column(check, row, field, got, expected, reason):
    media = dataclasses.replace(MEDIA, max_clip_seconds=4.0)
    report = check(both("a.mp4"), row, both("b.mp4"), media=media)
    (problem,) = report.errors
    assert (problem.line, problem.field) == (2, field)
    assert got in problem.got and expected in problem.expected and problem.mend
    assert f"data0.jsonl:2: {field}: got " in str(problem)
    if reason:
        assert report.files[0].counts["broken"] == report.files[0].counts[f"broken: {reason}"] == 1


def test_all_broken_files_of_a_record_are_named(check):
    report = check({"videos": ["none.mp4", "a.mp4", "empty.mp4"], "audios": ["mute.mp4"]})
    assert [problem.field for problem in report.errors] == ["videos[0]", "videos[2]", "audios[0]"]
    assert report.files[0].counts["broken"] == 1


@pytest.mark.parametrize("policy", ["silence", "skip"])
def test_a_soundless_clip_is_counted_where_the_policy_lets_it_pass(check, policy):
    report = check(both("a.mp4"), both("mute.mp4"), media=dataclasses.replace(MEDIA, missing_audio=policy))
    assert report.errors == ()
    (warning,) = report.warnings
    assert (warning.line, warning.field) == (2, "audios")
    assert "media.missing_audio" in warning.mend
    assert report.files[0].counts["silent_audio"] == 1


def test_audio_that_will_be_cut_is_counted(check):
    report = check(both("c.mp4"), both("a.mp4"), media=dataclasses.replace(MEDIA, max_audio_seconds=2.0))
    assert report.files[0].counts["audio_cut"] == 1


def test_a_prompt_over_the_cap_is_an_error_with_its_parts(check, thinker):
    builder = PromptBuilder(tiny_tokenizer(), MEDIA, thinker, "Help.", 150)
    report = check(
        both("a.mp4", question="Hm?"), both("a.mp4", question="what " * 200), checks=Checks(build=builder.build)
    )
    (problem,) = report.errors
    assert problem.line == 2
    assert re.search(r"got a prompt of \d+ tokens .*expected at most data.max_prompt_length=150", str(problem))
    assert report.files[0].counts["bad_prompt"] == 1


def test_a_special_token_only_the_tokenizer_knows_is_found(check, thinker):
    builder = PromptBuilder(tiny_tokenizer(), MEDIA, thinker, "Help.", 2048)
    (problem,) = check(both("a.mp4", subtitle="a <tool_call> b"), checks=Checks(build=builder.build)).errors
    assert problem.line == 1 and "'<tool_call>' in the subtitle" in problem.got


def test_a_target_over_the_cap_or_unusable_is_an_error(check):
    def length(record):
        if "odd" in record.target:
            raise ValueError("the reasoning of a target holds something odd: remove it")
        return len(record.target)

    rows = [both("a.mp4", reasoning=text) for text in ("short", "long " * 30, "odd")]
    report = check(*rows, checks=Checks(target_length=length, max_target_length=60))
    assert [problem.line for problem in report.errors] == [2, 3]
    first, second = map(str, report.errors)
    assert "target: got a target of 187 tokens; expected at most sft.max_completion_length = 60; to mend it" in first
    assert second.endswith("target: the reasoning of a target holds something odd: remove it")
    assert report.files[0].counts["bad_target"] == 2


def test_an_answer_on_no_wheel_is_counted_and_pointed_out(check):
    wheels = Checks(wheels=load_wheels())
    report = check(
        both("a.mp4"), both("b.mp4", solution=["happy", "flurgh"]), both("c.mp4", solution="neutral"), checks=wheels
    )
    assert report.errors == ()
    (warning,) = report.warnings
    assert (warning.line, warning.field, warning.got) == (3, "solution", "neutral")
    counts = report.files[0].counts
    assert (counts["words"], counts["unknown_words"], counts["unscorable"]) == (4, 2, 1)


def test_a_file_without_any_scorable_answer_is_an_error(check):
    rows = [both("a.mp4", solution="glücklich"), both("b.mp4", solution="traurig")]
    (problem,) = check(*rows, checks=Checks(wheels=load_wheels())).errors
    assert (problem.line, problem.field, problem.got) == (0, "solution", "2 unscorable answers of 2")


def test_videos_whose_sound_nobody_listed_are_pointed_out(check):
    (warning,) = check({"videos": ["a.mp4"]}, {"videos": ["b.mp4"]}).warnings
    assert (warning.line, warning.field) == (0, "audios")
    assert "only then is the sound heard" in warning.mend
    assert check({"videos": ["a.mp4"]}, both("b.mp4")).warnings == ()


def test_clips_in_two_files_are_pointed_out(check):
    (warning,) = check(files=[[both("a.mp4"), both("b.mp4")], [both("b.mp4", id="held out"), both("c.mp4")]]).warnings
    assert warning.file.endswith("data1.jsonl")
    assert "1 clip(s) that" in warning.got and "data0.jsonl has too, e.g." in warning.got and "b.mp4" in warning.got


def test_bad_lines_do_not_keep_the_others_from_being_checked(check, tmp_path):
    rows = [both("a.mp4"), {"videos": 3, "subtitle": 4}, both("none.mp4"), {"videos": ["../x.mp4"]}]
    report = check(*rows, require=("solution",))
    assert [(problem.line, problem.field) for problem in report.errors] == [
        (2, "videos"), (2, "subtitle"), (3, "videos[0]"), (3, "audios[0]"), (4, "videos[0]"),
    ]  # fmt: skip
    assert (report.files[0].counts["records"], report.files[0].counts["bad_lines"]) == (2, 2)


def test_what_is_not_checked_is_said(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(both("nowhere.mp4")) + "\n")
    report = validate([DataFile(path=str(path))])
    assert report.unchecked == ("clips", "prompt lengths", "target lengths", "emotion words")
    assert report.problems == ()


def command(*arguments, cwd):
    """Runs experiments/validate.py as a user would."""
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "validate.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"COLUMNS": "200"},
    )


@pytest.fixture
def folder(clips, tmp_path):
    """A working folder with data, a tokenizer and a configuration."""
    (tmp_path / "clips").symlink_to(clips)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [both(name, id=name, reasoning="A smile.") for name in GOOD]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bad.jsonl").write_text(json.dumps(both("cut.mp4")) + "\nnonsense\n")
    (tmp_path / "config.py").write_text(
        "from mer_r1_jax.config.build import config_dict\n\n\n"
        "def get_config():\n    config = config_dict()\n"
        "    config.model.preset, config.model.tokenizer_path = 'tiny', 'tokenizer'\n"
        "    config.data.sft_path = config.data.rl_path = 'good.jsonl'\n    config.data.media_root = 'clips'\n"
        "    config.media.video_min_pixels, config.media.video_max_pixels = 3136, 6272\n    return config\n"
    )
    return tmp_path


@pytest.mark.slow
def test_the_command_passes_good_data_with_status_zero(folder):
    done = command("--config=config.py", "--json=report.json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok: 0 error(s)" in done.stdout
    assert "not checked" not in done.stdout
    assert "prompt_tokens" in done.stdout and "target_tokens" in done.stdout
    report = json.loads((folder / "report.json").read_text())
    assert report["ok"] and [file["counts"]["records"] for file in report["files"]] == [3, 3]


@pytest.mark.slow
def test_the_command_lists_faults_with_status_one(folder):
    done = command("--data=bad.jsonl", "--media_root=clips", "--json=report.json", cwd=folder)
    assert done.returncode == 1
    assert "bad.jsonl:1: videos[0]: got clips/cut.mp4: " in done.stdout
    assert "bad.jsonl:2: got malformed JSON at column 1" in done.stdout
    assert "not usable: 3 error(s)" in done.stdout
    assert "Traceback" not in done.stderr
    assert json.loads((folder / "report.json").read_text())["errors"] == 3


@pytest.mark.slow
def test_the_command_names_further_columns_and_words_on_no_wheel(folder):
    rows = [both(name, id=name, split="train", answer="happy", solution="[happy; flurgh]") for name in GOOD]
    (folder / "further.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused = command("--data=further.jsonl", "--media_root=clips", "--nodecode", cwd=folder)
    assert refused.returncode == 1
    assert "further.jsonl:1: answer: got a column that is not read" in refused.stdout
    assert "columns not read in further.jsonl: split (3), answer (3)" in refused.stdout
    assert "words on no wheel in further.jsonl: flurgh (3)" in refused.stdout
    named = command(
        "--data=further.jsonl",
        "--media_root=clips",
        "--nodecode",
        "--extra_columns=answer",
        "--json=r.json",
        cwd=folder,
    )
    assert named.returncode == 0, named.stdout + named.stderr
    (report,) = json.loads((folder / "r.json").read_text())["files"]
    assert report["unread_columns"] == {"split": 3} and report["unknown_words"] == {"flurgh": 3}


def test_a_fault_of_the_checker_is_no_error_of_the_data(folder, monkeypatch, capsys):
    def broken(*_, **__):
        raise KeyError("something nobody thought of")

    monkeypatch.chdir(folder)
    monkeypatch.setattr("mer_r1_jax.data.validation.scan_files", broken)
    assert run_command("validate", "--data=good.jsonl", "--nodecode") == 2
    told = capsys.readouterr().err
    assert "something nobody thought of" in told and "a fault of this program" in told


def test_a_record_that_breaks_the_checker_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(both("a.mp4")) + "\n")

    def load(record):
        raise KeyError("something nobody thought of")

    with pytest.raises(KeyError) as caught:
        validate([DataFile(path=str(path))], checks=Checks(load=load))
    assert caught.value.__notes__ == [f"while checking {path}:1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no data to check"),
        (["--data=good.jsonl", "further.jsonl"], "unexpected arguments ['further.jsonl']"),
        (
            ["--data=good.jsonl", "--media_root=clips", "--nodecode", "--json=absent/r.json"],
            "r.json could not be written: absent/r.json: ",
        ),
        (["--data=good.jsonl", "--model=absent"], "absent: no such folder"),
    ],
)
def test_the_command_says_why_it_cannot_check_with_status_two(folder, arguments, message):
    done = command(*arguments, cwd=folder)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
