"""Clips loaded ahead: in order, bounded, resumed exactly; broken ones set aside; a stalled loader named."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time

import pytest
from support.clips import make_clip

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.data import prefetch
from mer_r1_jax.data.pipeline import PromptStream
from mer_r1_jax.data.prefetch import ClipPrefetcher, LoadThreads, StalledLoadError
from mer_r1_jax.data.quarantine import Quarantine, QuarantineLimitError
from mer_r1_jax.data.records import Record, read_records
from mer_r1_jax.media.decode import read_video
from mer_r1_jax.media.loader import ClipLoader
from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.media.pool import WorkerPool
from mer_r1_jax.media.prompt import PromptError
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.process_pool import START_SECONDS

BROKEN = MediaError("x.mp4", "truncated", "half a file", "a whole one", "Copy it again.")


def make_records(count):
    return [Record(id=f"r{n}", messages=(), file="data.jsonl", line=n + 1, subtitle=str(n)) for n in range(count)]


def records_of(folder, names):
    """The records of a data file that names one clip each."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"id": name, "videos": [f"{name}.mp4"]}) + "\n" for name in names))
    return read_records(data)


def prefetcher(records, load, *, per_step=4, fraction=1.0, ahead=8, threads=2, stall=30.0, processes=(0, 1)):
    stream = PromptStream(records, per_step, 0, *processes)
    quarantine = Quarantine(len(records), fraction)
    return ClipPrefetcher(stream, LoadThreads(load, threads, stall), quarantine, prompts_ahead=ahead)


def test_clips_come_in_the_order_of_the_stream_whichever_is_ready_first():
    records = make_records(10)
    expected = PromptStream(records, 4, 0)

    def load(record):
        time.sleep(0.002 * (int(record.subtitle) % 3))
        return f"clips of {record.id}"

    with prefetcher(records, load, threads=4) as clips:
        for step in range(8):
            loaded = clips.next(step)
            assert [visit.item for visit in loaded] == expected.next()
            assert [visit.clips for visit in loaded] == [f"clips of {visit.record.id}" for visit in loaded]
            assert all(visit.weight == 1 and visit.broken is None for visit in loaded)


def test_loading_ahead_is_bounded_and_really_ahead():
    records = make_records(40)
    loaded = []
    with prefetcher(records, lambda record: loaded.append(record.id) or "clips", ahead=6) as clips:
        clips.next(0)
        deadline = time.monotonic() + 20
        while len(loaded) < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(loaded) == 4 + 6
        assert sorted(loaded) == sorted(clips.stream.item(n).record.id for n in range(10))


def test_a_broken_clip_keeps_its_row_with_weight_zero_and_is_not_loaded_again():
    records = make_records(8)
    attempts = []

    def load(record):
        if record.id == "r3":
            attempts.append(record.id)
            raise BROKEN
        return "clips"

    with prefetcher(records, load, ahead=0) as clips:
        rows = [visit for step in range(6) for visit in clips.next(step)]
        skipped = [visit for visit in rows if visit.weight == 0]
        assert [visit.record.id for visit in skipped] == ["r3"] * 3
        assert all(visit.clips is None and visit.broken.reason == "truncated" for visit in skipped)
        assert len(rows) == 24 and len(attempts) == 1
        (broken,) = clips.quarantine.clips
        assert (broken.id, broken.file, broken.line) == ("r3", "data.jsonl", 4)
        assert broken.step == skipped[0].item.global_index // 4


def test_metrics_count_the_rows_of_the_last_step():
    class Clips:
        silent_audio, audio_cut, audio_filled, mute_audio = 1, 2, 0.5, 1

    def load(record):
        time.sleep(0.005)
        if record.id == "r0":
            raise BROKEN
        return Clips()

    with prefetcher(make_records(4), load) as clips:
        clips.next(0)
        metrics = clips.metrics()
    assert metrics["data/skipped"] == 1 and metrics["data/silent_audio"] == 3
    assert metrics["data/audio_cut"] == 6
    assert metrics["data/audio_filled"] == 1.5 and metrics["data/mute_audio"] == 3
    assert metrics["data/cancelled_audio"] == 0
    assert 5 <= metrics["data/decode_ms"] < 5000


def test_too_many_broken_clips_stop_the_run_without_moving_the_stream():
    def load(record):
        raise BROKEN

    with prefetcher(make_records(8), load, fraction=0.25) as clips:
        with pytest.raises(QuarantineLimitError, match="4 of 8 clips"):
            clips.next(0)
        assert clips.state()["stream"]["next_index"] == 0


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
@pytest.mark.parametrize("processes", [1, 2])
def test_stopping_anywhere_and_resuming_gives_the_same_rows(stop, processes):
    records = make_records(8)

    def load(record):
        if record.id in ("r2", "r5"):
            raise BROKEN
        return f"clips of {record.id}"

    def rows(clips, steps):
        return [(visit.item, visit.clips, visit.weight) for step in steps for visit in clips.next(step)]

    with prefetcher(records, load) as straight:
        expected = rows(straight, range(7))
        end = straight.state()
    with prefetcher(records, load) as first:
        rows(first, range(stop))
        state = json.loads(json.dumps(first.state()))
    assert state["stream"]["next_index"] == 4 * stop, "what was loaded ahead was not consumed"
    resumed = [prefetcher(records, load, processes=(n, processes)) for n in range(processes)]
    got = []
    for clips in resumed:
        clips.restore(state)
    for step in range(stop, 7):
        for clips in resumed:
            got.extend(rows(clips, [step]))
    assert got == expected[4 * stop :]
    assert resumed[0].state()["stream"] == end["stream"]
    both = Quarantine(8, 1.0)
    both.restore(*(clips.state()["quarantine"] for clips in resumed))
    assert {clip.id for clip in both.clips} == {clip["id"] for clip in end["quarantine"]}
    for clips in resumed:
        clips.close()


def test_a_clip_that_broke_once_stays_broken_though_a_later_load_would_succeed():
    """A straight run has the second visit loaded before the first one breaks; a resumed run has not."""
    attempts = []

    def load(record):
        if record.id == "r1":
            attempts.append(None)
            if len(attempts) == 1:
                raise BROKEN
        return "clips"

    with prefetcher(make_records(4), load, ahead=16, threads=1) as clips:
        weights = [visit.weight for step in range(4) for visit in clips.next(step) if visit.record.id == "r1"]
    assert len(attempts) > 1
    assert weights == [0, 0, 0, 0]


def test_a_quarantined_clip_stays_so_in_a_resumed_run_that_could_load_it():
    records = make_records(4)

    def broken(record):
        if record.id == "r1":
            raise BROKEN
        return "clips"

    with prefetcher(records, broken) as first:
        first.next(0)
        state = json.loads(json.dumps(first.state()))
    with prefetcher(records, lambda record: "clips") as resumed:
        resumed.restore(state)
        rows = {visit.record.id: visit for visit in resumed.next(1)}
    assert [name for name, visit in rows.items() if visit.weight == 0] == ["r1"]
    assert rows["r1"].broken.step == 0


def timing_out(visits, name="r1"):
    """A loader for which the clips of one record time out at the visits of these numbers."""
    attempts = []

    def load(record):
        if record.id == name:
            attempts.append(None)
            if len(attempts) - 1 in visits:
                raise MediaError("x.mp4", "timeout", "no end", "an end", "Cut it.")
        return "clips"

    return load


@pytest.mark.parametrize(
    ("visits", "weights"),
    [
        ((0,), [0, 1, 1, 1, 1]),
        ((0, 1), [0, 0, 0, 0, 0]),
        ((0, 2), [0, 1, 0, 1, 1]),  # two accidents and not two in a row
        ((1, 2), [1, 0, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize(("ahead", "resumed"), [(0, False), (16, False), (0, True)])
def test_a_time_out_is_tried_again_at_the_next_visit_before_it_counts(visits, weights, ahead, resumed):
    found, state = [], None
    load = timing_out(visits)
    with contextlib.ExitStack() as stack:
        clips = stack.enter_context(prefetcher(make_records(4), load, ahead=ahead, threads=1))
        for step in range(5):
            if resumed:
                clips = stack.enter_context(prefetcher(make_records(4), load, ahead=ahead, threads=1))
                clips.restore(state or clips.state())
            found += [visit for visit in clips.next(step) if visit.record.id == "r1"]
            state = json.loads(json.dumps(clips.state()))
        counts = clips.quarantine
    assert [visit.weight for visit in found] == weights
    assert [visit.broken is None for visit in found] == [bool(weight) for weight in weights]
    assert ("r1" in counts) == (weights[-1] == 0) and not counts.timed_out
    if counts.clips:
        assert (counts.clips[0].reason, counts.clips[0].step, counts.clips[0].again) == ("timeout", max(visits), False)


def test_processes_agree_on_what_timed_out(monkeypatch):
    """Two processes load the same rows: what timed out in one is left out in both, and forgotten in both."""
    both = [prefetcher(make_records(4), timing_out(visits), threads=1) for visits in ((0, 2), (2, 3))]
    gate, said = threading.Barrier(2), {}

    def exchange(what, own):
        said[threading.current_thread().name] = own
        gate.wait(30)
        heard = [said["0"], said["1"]]
        gate.wait(30)
        return heard

    monkeypatch.setattr(prefetch.processes, "exchange", exchange)
    weights = {}

    def go(number):
        with both[number] as clips:
            weights[number] = [v.weight for step in range(5) for v in clips.next(step) if v.record.id == "r1"]

    threads = [threading.Thread(target=go, args=(number,), name=str(number)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert weights == {0: [0, 1, 0, 0, 0], 1: [0, 1, 0, 0, 0]}
    assert both[0].state() == both[1].state() and "r1" in both[0].quarantine


def test_restoring_throws_away_what_was_loaded_ahead():
    records = make_records(8)
    version = ["before"]
    with prefetcher(records, lambda record: version[0], ahead=4) as clips:
        start = clips.state()
        clips.next(0)
        clips.restore(start)
        version[0] = "after"
        assert [visit.clips for step in range(2) for visit in clips.next(step)] == ["after"] * 8


def test_a_stalled_loader_is_named_within_the_time_limit():
    release = threading.Event()

    def load(record):
        if record.id == "r2":
            release.wait(60)
        return "clips"

    clips = prefetcher(make_records(4), load, stall=0.5)
    began = time.monotonic()
    try:
        with pytest.raises(StalledLoadError, match=r"data.jsonl:3: r2: its load has not ended after 0.5 s") as caught:
            clips.next(0)
    finally:
        release.set()
        clips.close()
    assert time.monotonic() - began < 10
    assert "expected" in str(caught.value) and "To mend it" in str(caught.value)


def test_a_fault_of_the_loader_itself_is_raised_with_the_record():
    def load(record):
        raise ZeroDivisionError("a bug")

    with prefetcher(make_records(4), load) as clips:
        with pytest.raises(ZeroDivisionError) as caught:
            clips.next(0)
    first = clips.stream.item(0).record
    assert caught.value.__notes__ == [f"while loading the clips of {first.id} ({first.where})"]


def test_a_record_that_cannot_become_a_prompt_stops_the_run_by_file_and_line():
    def load(record):
        raise PromptError(f"{record.id}: got a prompt of 3000 tokens, expected at most 2048")

    with prefetcher(make_records(4), load) as clips:
        first = clips.stream.item(0).record
        with pytest.raises(PromptError) as caught:
            clips.next(0)
    assert str(caught.value) == f"{first.where}: {first.id}: got a prompt of 3000 tokens, expected at most 2048"


def test_threads_end_when_the_prefetcher_is_closed():
    with prefetcher(make_records(4), lambda record: "clips", threads=3) as clips:
        clips.next(0)
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("clip-load") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a thread is left"
        time.sleep(0.01)


@pytest.mark.parametrize("options", [{"ahead": -1}, {"threads": 0}, {"stall": 0}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match="expected at least"):
        prefetcher(make_records(4), lambda record: "clips", **options)


def test_real_clips_break_by_name(tmp_path):
    """Whole, cut-off, empty, missing and frameless files, decoded for real."""
    make_clip(tmp_path / "good.mp4")
    whole = make_clip(tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").touch()
    make_clip(tmp_path / "sound.mp4", with_video=False)
    names = ["good", "cut", "empty", "missing", "sound"]
    records, media = records_of(tmp_path, names), MediaConfig()
    load = lambda record: read_video(os.path.join(tmp_path, record.videos[0]), media)  # noqa: E731
    with prefetcher(records, load, per_step=5) as clips:
        rows = {visit.record.id: visit for visit in clips.next(0)}
    assert rows["good"].clips.frames.dtype == "uint8"
    for name in names[1:]:
        assert rows[name].weight == 0
        assert f"{name}.mp4" in rows[name].broken.message
    reasons = [rows[name].broken.reason for name in ("empty", "missing", "sound")]
    assert reasons == ["empty", "missing", "no_video"]


WORKER = """
import os, sys, time
from mer_r1_jax.media import pool as worker
decode = worker.decode_file
def decode_file(path, **job):
    if "hangs" in path:
        time.sleep(600)
    if "exits" in path:
        os._exit(0)
    return decode(path=path, **job)
worker.decode_file = decode_file
worker.main()
"""


@pytest.mark.slow
def test_processes_that_hang_or_exit_cost_their_clip_only(tmp_path):
    """Real decoding processes; two clips make theirs hang, or end as if all were well."""
    names = ("fine", "hangs", "exits")
    for name in names:
        make_clip(tmp_path / f"{name}.mp4")
    records, media = records_of(tmp_path, names), MediaConfig(decode_workers=1, decode_timeout=4.0)
    with ClipLoader(media, ThinkerConfig.tiny().vision, 128) as loader:
        loader._pool = WorkerPool(1, media.decode_timeout, (sys.executable, "-c", WORKER))
        with prefetcher(records, loader.load, per_step=3, threads=1, stall=loader.longest_load(records)) as clips:
            rows = {visit.record.id: visit for visit in clips.next(0)}
        loader._pool.close()
    assert rows["fine"].weight == 1 and len(rows["fine"].clips.videos) == 1
    for name, reason in (("hangs", "timeout"), ("exits", "worker_died")):
        broken = rows[name].broken
        assert rows[name].weight == 0 and broken.reason == reason
        assert f"{name}.mp4" in broken.message and "expected a clip that decodes" in broken.message


def test_the_watchdog_waits_longer_than_the_loader_may_take():
    media = MediaConfig(decode_timeout=30.0)
    one = [Record(id="a", messages=(), videos=("a.mp4",))]
    many = [*one, Record(id="b", messages=(), videos=("a.mp4",), audios=("a.mp4", "b.mp4"), images=("c.png",))]
    # Every file may cost two attempts of a process start and a decode each.
    with ClipLoader(media, ThinkerConfig.tiny().vision, 128) as loader:
        assert loader.longest_load(one) > 2 * (START_SECONDS + 30.0)
        assert loader.longest_load(many) > 4 * 2 * (START_SECONDS + 30.0)
