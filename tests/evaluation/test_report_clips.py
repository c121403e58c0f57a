"""Clips in a run's report: they play from the page alone, within a budget, and one script filters them."""

import base64
import hashlib
import json
import re
import sys
import time
import types
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from support.chromium import Browser, needs_chromium
from support.finished_run import write_clip, write_run
from support.report_page import OURS, Page

from mer_r1_jax.evaluation import clip_players
from mer_r1_jax.evaluation.clip_players import LEFT_OUT, Patience, Playable, playable, shown_clips, tell_players
from mer_r1_jax.evaluation.run_clips import ClipSection, clip_section
from mer_r1_jax.evaluation.run_record import RunRecord, read_run, stages_of
from mer_r1_jax.evaluation.run_report import make_report
from mer_r1_jax.evaluation.run_title import model_name, title_of


def encoding(container, video=None, sound=None, pixels="yuv420p"):
    return {"container": container, "video": video, "sound": sound, "pixels": pixels if video else None}


MP4, MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"


@pytest.mark.parametrize(
    ("found", "name", "kind", "media_type", "note"),
    [
        (encoding(MP4, "h264", "aac"), "a.mp4", "video", "video/mp4", ""),
        (encoding(MP4, "h264"), "a.mov", "video", "video/mp4", ""),
        (encoding(MP4, "h264", "ac3"), "a.mp4", "video", "video/mp4", "plays without sound: browsers do not play ac3"),
        (encoding(MP4, "hevc", "aac"), "a.mp4", "video", "video/mp4", "plays only where the machine decodes HEVC"),
        (encoding(MP4, "h264", pixels="yuv444p"), "a.mp4", "", "", "browsers do not play h264 (yuv444p) in mov files"),
        (encoding(MP4, "mpeg4", "aac"), "a.mp4", "", "", "browsers do not play mpeg4 (yuv420p) in mov files"),
        (encoding("avi", "h264", "mp3"), "a.avi", "", "", "browsers do not play avi files"),
        (encoding(MATROSKA, "vp9", "opus"), "a.WebM", "video", "video/webm", ""),
        (encoding(MATROSKA, "vp9", "opus"), "a.mkv", "", "", "browsers do not play matroska files"),
        (encoding(MP4, None, "aac"), "a.m4a", "audio", "audio/mp4", ""),
        (encoding("wav", None, "pcm_s16le"), "a.wav", "audio", "audio/wav", ""),
        (encoding("wav", None, "pcm_alaw"), "a.wav", "", "", "browsers do not play pcm_alaw in wav files"),
    ],
)
def test_what_browsers_play(found, name, kind, media_type, note):
    assert playable(found, name) == Playable(kind, media_type, note)


def write_voice(path, seconds=0.5):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.zeros(round(8000 * seconds), np.int16).tobytes())


def write_old_clip(path):
    """MPEG-4 Part 2, which cameras of long ago wrote and no browser plays."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 48
        stream.pix_fmt = "yuv420p"
        for number in range(10):
            picture = np.full((48, 48, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def test_clips_files_are_taken_in_order_while_they_fit_and_whatever_is_not_says_why(tmp_path, monkeypatch):
    root = tmp_path / "media"
    write_clip(root / "a.mp4", size=64)
    write_clip(root / "b.mp4", size=64)
    write_voice(root / "a.wav")
    write_old_clip(root / "old.mp4")
    write_voice(tmp_path / "outside.wav")
    size, voice = (root / "a.mp4").stat().st_size, (root / "a.wav").stat().st_size
    # Room for a.mp4, not for b.mp4 after it, and for the voice that comes then.
    monkeypatch.setattr(clip_players, "MEGABYTE", size + voice)
    (root / "b.mp4").write_bytes((root / "b.mp4").read_bytes() + bytes(voice))  # what follows the container is let be
    files = [("a.mp4", "a.mp4"), ("b.mp4", "a.wav"), ("old.mp4", None), ("gone.mp4", "../outside.wav"), (None, None)]
    shown = shown_clips(files, root, 1)
    assert [len(clip.players) for clip in shown] == [1, 2, 1, 2, 0]
    (a,), (b, heard), (old,), (gone, outside), _ = (clip.players for clip in shown)
    assert (a.kind, a.size, a.note) == ("video", size, "")
    assert a.source == f"data:video/mp4;base64,{base64.b64encode((root / 'a.mp4').read_bytes()).decode()}"
    assert (b.kind, b.source, b.size) == ("", "", 0) and "MB are too many for this page" in b.note
    assert (heard.kind, heard.size) == ("audio", voice) and heard.source.startswith("data:audio/wav;base64,UklGR")
    assert old.note == "no player: browsers do not play mpeg4 (yuv420p) in mov files" and not old.source
    assert gone.note == "gone.mp4 is not in the media folder" and "'..' in '../outside.wav'" in outside.note
    assert all(clip.strip.source for clip in shown[:3])  # frames are shown whether it plays or not
    told = tell_players(shown, "the folder", 1)
    assert told.startswith("2 of 6 files of these clips play here: they are in this page, 1.0 MB of at most 1 (")
    assert "The others say why beneath their clip. Files' paths are below the folder." in told
    (none,) = shown_clips(files[:1], root, 0)
    assert [(player.name, player.kind, player.note) for player in none.players] == [("a.mp4", "", "")]
    assert "No clip can be played here (eval.clip_megabytes=0)" in tell_players([none], "x", 0)


def test_a_page_that_cannot_wait_has_the_clips_after_that_without_their_files(tmp_path, monkeypatch):
    """As while a run goes on: after so many seconds, or where the run is asked to end, no further file is read."""
    for name in "abc":
        write_clip(tmp_path / f"{name}.mp4", size=64)
    files = [(f"{name}.mp4", None) for name in "abc"]
    clock, begun, read, limits = [100.0], [], [], []
    monkeypatch.setattr(clip_players, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    pool = clip_players.WorkerPool
    monkeypatch.setattr(
        clip_players, "WorkerPool", lambda n, seconds, **more: limits.append(seconds) or pool(n, 60, **more)
    )

    def slow(function, what):
        """A read that takes eight seconds: of a file for its player, or for its pictures."""

        def slowly(name, *rest):
            begun.append(f"{what} {name}")
            found = function(name, *rest)
            read.append(begun[-1])
            clock[0] += 8
            return found

        return slowly

    monkeypatch.setattr(clip_players, "read_file", slow(clip_players.read_file, "play"))
    monkeypatch.setattr(clip_players, "strip_of", slow(clip_players.strip_of, "see"))
    shown = shown_clips(files, tmp_path, 1, Patience(20))
    assert begun == read == ["play a.mp4", "see a.mp4", "play b.mp4"] and limits == [20], (
        "nor does one file take longer"
    )
    assert [bool(clip.strip.source) for clip in shown] == [True, False, False]
    assert [bool(clip.players[0].source) for clip in shown] == [True, True, False]
    assert shown[1].strip.problem == shown[2].strip.problem == shown[2].players[0].note == LEFT_OUT
    begun.clear()
    read.clear()
    stopped = shown_clips(files, tmp_path, 1, Patience(1e9, asked=lambda: len(read) > 0))
    assert begun == read == ["play a.mp4"] and limits[1] == 120
    assert [bool(clip.players[0].source) for clip in stopped] == [True, False, False]
    assert {clip.strip.problem for clip in stopped} == {LEFT_OUT}
    assert all(clip.strip.source for clip in shown_clips(files, tmp_path, 1)) and len(read) == 7
    voices = shown_clips([("a.mp4", "b.mp4")], tmp_path, 0, Patience(0.0, asked=lambda: True))
    assert voices[0].strip.problem == LEFT_OUT and [player.note for player in voices[0].players] == ["", ""]


# A process that reads a.mp4 and hangs over every other file, as over a disk that has gone away.
HANGING = """
import time
from mer_r1_jax.media.decoded import decode_file
from mer_r1_jax.media.pool import MediaConfig
from mer_r1_jax.process_pool import serve

def answer(job):
    if not job["path"].endswith("a.mp4"):
        time.sleep(600)
    return {}, decode_file(**job | {"media": MediaConfig(**job["media"])}).to_bytes()

serve(answer)
"""


@pytest.mark.parametrize("by", ["seconds", "signal"])
def test_a_file_that_hangs_is_waited_for_no_longer_than_the_page_can_wait(tmp_path, monkeypatch, by):
    for name in "ab":
        write_clip(tmp_path / f"{name}.mp4", size=64)
    pool, since = clip_players.WorkerPool, []
    command = (sys.executable, "-c", HANGING)
    monkeypatch.setattr(clip_players, "WorkerPool", lambda n, seconds, **more: pool(n, 60, command, **more))
    player = clip_players._player

    def noted(name, *rest):
        since.append(time.monotonic())
        return player(name, *rest)

    monkeypatch.setattr(clip_players, "_player", noted)
    asked = lambda: len(since) > 1 and time.monotonic() - since[1] > 0.5  # noqa: E731
    began = time.monotonic()
    patience = Patience(15.0) if by == "seconds" else Patience(asked=asked)
    a, b = shown_clips([("a.mp4", None), ("b.mp4", None)], tmp_path, 1, patience)
    took = time.monotonic() - (began if by == "seconds" else since[1])
    assert took < (25 if by == "seconds" else 10)
    assert a.strip.source and a.players[0].source
    assert b.strip.problem == b.players[0].note == LEFT_OUT


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Three clips: one whose slow answer RL turned right, one it turned wrong, one it left wrong with the fast one."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "tiny", clips=3, rl_steps=4, sft_steps=6)
    said = {  # step -> words of slow and fast, and F1 of slow, clip by clip
        6: [(["bored"], ["calm"], 0.0), (["sad"], ["sad"], 1.0), (["Bored stiff"], ["calm"], 0.0)],
        10: [(["happy", "surprised"], ["calm"], 1.0), (["bored"], ["sad"], 0.0), (["Bored stiff"], ["calm"], 0.0)],
    }
    for step, answers in said.items():
        path = folder / "eval" / f"synthetic_{step:05d}.samples.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row, (slow, fast, f1) in zip(rows, answers, strict=True):
            row["slow"] |= {"words": slow, "f1": f1, "reasoning": f"thought at {step}"}
            row["slow"]["confidences"] = [[0.25, None, 0.75]] * len(slow)
            row["fast"] |= {"words": fast}
            row["fast"]["confidences"] = [[None, None, None]] * len(fast)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "clips" / "2.mp4").unlink()
    write_old_clip(folder / "clips" / "2.mp4")
    return folder


def test_before_and_after_rl_stand_side_by_side_with_confidences(run_folder):
    run, missing = read_run(run_folder), []
    section = clip_section(run, stages_of(run, "synthetic"), missing=missing)
    assert [clip.by_rl for clip in section.clips] == [("changed", "up"), ("changed", "down"), ("same",)]
    assert [clip.verdict for clip in section.clips] == ["correct", "wrong", "wrong"]
    before, after = section.clips[0].stages
    assert (before.title, after.title) == ("Before RL", "At RL step 4")
    assert (before.reasoning, after.reasoning) == ("thought at 6", "thought at 10")
    assert [(word.text, word.mark, word.confidence) for word in after.slow.words] == [
        ("happy", "right", "50"),  # the mean of the wheels that know it
        ("surprised", "right", "50"),
    ]
    assert [word.confidence for word in after.fast.words] == [""]
    assert section.clips[2].words.splitlines() == ["angry", "disgusted", "bored stiff", "calm"]
    assert (section.total, section.has_before, section.has_confidences, missing) == (3, True, True, [])


def test_a_run_of_an_earlier_version_says_that_confidences_are_missing(run_folder, tmp_path):
    run, missing = read_run(run_folder), []
    for evaluation in run.evaluations["synthetic"]:
        for row in evaluation.samples.values():
            del row["audio"], row["slow"]["confidences"], row["fast"]["confidences"]
    section = clip_section(run, stages_of(run, "synthetic"), count=1, missing=missing)
    assert not section.has_confidences and len(section.clips) == 1 and section.clips[0].players[0].kind == "video"
    assert [line for line in missing if line.startswith("confidence word by word: ")] == missing != []


def test_what_matters_comes_first_and_the_policy_lets_our_script_alone_run(run_folder):
    report = make_report(run_folder, under_way="after RL step 4 of 9")
    page, source = Page(report), report.read_text()
    order = [
        "of this one run, as another seed may differ by more.",
        "The model was trained by",
        "How to read this",
        "Clips, answers and truth",
    ]
    order += ["Scores on held-out clips", "Curves", "Sampled completions", "How it was made"]
    places = [page.text.index(words) for words in order]
    assert places == sorted(places)
    assert "Written while the run went on, after RL step 4 of 9." in page.text
    assert page.scripts == [OURS]
    policy = page.all("meta")[2]["content"].split("; ")
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert policy == [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        "media-src data:",
        f"script-src 'sha256-{digest}'",
    ]
    videos = page.all("video")
    assert len(videos) == 2 and all(video["src"].startswith("data:video/mp4;base64,") for video in videos)
    assert "clips/2.mp4: no player: browsers do not play mpeg4 (yuv420p) in mov files" in page.text
    assert "2 of 3 files of these clips play here" in page.text
    # Without a script everything is there, and the filters, which would do nothing, are not.
    assert next(tag for tag in page.all("section") if tag.get("id") == "filters").keys() >= {"hidden"}
    assert len(page.all("article")) == 3 and not any("hidden" in tag for tag in page.all("article"))
    assert '<span class="word right">happy <small>50</small></span>' in source


def test_a_report_without_clips_has_no_script(run_folder):
    bare = make_report(run_folder, num_examples=0)
    page = Page(bare)
    assert page.scripts == [] and "script-src" not in page.all("meta")[2]["content"] and not page.all("article")


def in_browser(path, script, width=1280):
    """What an async function of this body makes of the page."""
    with Browser(path.parent / "browser", width) as browser:
        browser.open(path.absolute().as_uri())
        return browser.run(f"(async () => {{ {script} }})()")


@needs_chromium
def test_filters_and_players_work_in_a_browser_and_a_phone_shows_it_whole(run_folder, monkeypatch):
    monkeypatch.setattr(ClipSection, "OPEN", 2)
    path = make_report(run_folder)
    # A file that looks as if it played, and does not: the page says so.
    text = path.read_text()
    first = re.search(r'src="(data:video/mp4;base64,[^"]+)"', text)[1]
    path.write_text(text.replace(first, "data:video/mp4;base64,AAAA", 1))
    script = """
        const by = (id) => document.getElementById(id);
        const left = () => [...document.querySelectorAll("article.clip")].flatMap((clip, n) => clip.hidden ? [] : [n]);
        const when = (id, value) => {
            by(id).value = value;
            by(id).dispatchEvent(new Event("input", {bubbles: true}));
            return left();
        };
        await new Promise((done) => setTimeout(done, 1000));
        const videos = [...document.querySelectorAll("video")];
        const said = {
            bar: by("filters").hidden, all: left(), unfolded: [document.querySelector("details.more").open],
            wrong: when("filter-verdict", "wrong"), same: when("filter-rl", "same"),
            told: by("filters-shown").textContent,
            any: when("filter-verdict", "") && when("filter-rl", ""),
            up: when("filter-rl", "up"), down: when("filter-rl", "down"), none: when("filter-rl", ""),
            word: when("filter-word", " SURPR"), phrase: when("filter-word", "bored"), empty: when("filter-word", "x<"),
            title: document.title, width: document.documentElement.scrollWidth,
            seconds: videos.map((video) => video.duration), broken: videos.map((video) => video.error !== null),
            unplayed: [...document.querySelectorAll(".unplayed")].map((note) => !note.hidden),
        };
        said.unfolded.push(document.querySelector("details.more").open);
        return said;
    """
    said = in_browser(path, script, width=400)
    assert said["bar"] is False and said["all"] == said["any"] == said["none"] == [0, 1, 2]
    assert (said["wrong"], said["same"], said["told"]) == ([1, 2], [2], "1 of 3 clips")
    assert said["unfolded"] == [False, True]  # the clip that would not have been seen otherwise
    assert (said["up"], said["down"]) == ([0], [1])
    assert (said["word"], said["phrase"], said["empty"]) == ([0], [0, 1, 2], [])
    assert said["seconds"][1] == pytest.approx(1.0, abs=0.05)
    assert said["broken"] == said["unplayed"] == [True, False]
    assert said["width"] <= 400  # nothing but tables and curves, in boxes of their own, is wider


@needs_chromium
def test_a_script_of_anybody_elses_does_not_run(run_folder):
    """Even if escaping failed, the policy holds."""
    path = make_report(run_folder)
    planted = "<script>document.title = 'planted'</script><img src=x onerror=\"document.title = 'planted'\">"
    path.write_text(path.read_text().replace("</h1>", f"</h1>{planted}", 1))
    said = in_browser(path, "return {title: document.title, bar: document.getElementById('filters').hidden};")
    assert "planted" not in said["title"] and said["bar"] is False


def titled(metrics=("sft", "rl"), **config):
    lines = {phase: [{"step": 1}] for phase in metrics}
    return title_of(RunRecord(Path("runs/mine"), config, {}, lines, {}, None, ()))


def test_a_model_is_called_what_its_run_is_called():
    names = [model_name(Path(path)) for path in ("a/mine", "a/mine/export/hf", "a/hf", "export/hf")]
    assert names == ["mine", "mine", "hf", "hf"]


def test_the_title_says_what_was_trained():
    real = {
        "model": {"path": "/weights/Qwen2.5-Omni-3B", "preset": "7b", "lora": {"rank": 16}},
        "rl": {"arm": "mer_r1"},
        "data": {"rl_path": "/data/mercaptionplus/rl.jsonl"},
    }
    assert titled(**real) == (
        "Qwen2.5-Omni-3B with adapters of rank 16: SFT, then RL with mer_r1, on mercaptionplus/rl.jsonl"
    )
    # An arm begins from the export of a run: "hf" would name them all.
    arm = {"model": {"path": "runs/sft_seed1/export/hf"}, "rl": {"arm": "rd"}}
    assert titled(("rl",), **arm) == "sft_seed1: RL with rd"
    tiny = {"model": {"path": "", "preset": "tiny"}, "data": {"synthetic_dir": "x", "synthetic_world": "U"}}
    assert titled(("sft",), **tiny) == "Tiny model from random weights: SFT, on synthetic clips (world U)"
    assert titled((), **tiny) == "Tiny model from random weights"
    assert titled((), train={"run_name": "b"}) == "b" and titled(()) == "mine"
