"""Voice and face keep the same clock, and sound that cannot be heard is told."""

from __future__ import annotations

import numpy as np
import pytest
from support.media_files import numbered_pictures, retimed, tone, write_sound, write_video
from support.prompts import TinyRecord, tiny_thinker

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.data.validation import Checks, DataFile, validate
from mer_r1_jax.media.decode import read_audio_track
from mer_r1_jax.media.loader import ClipLoader

MEDIA = MediaConfig(video_min_pixels=784, video_max_pixels=6 * 784, decode_workers=0)
RATE = 16_000


def quiet_seconds(samples: np.ndarray) -> list[tuple[float, float]]:
    """(start, end) of each stretch of exact silence longer than 50 ms."""
    edges = np.flatnonzero(np.diff(np.r_[0, np.abs(samples) < 1e-6, 0]))
    return [(a / RATE, b / RATE) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 0.05 * RATE]


def clip(path, audio, ending: str, codec: str = "aac"):
    """Two seconds of frames and of a tone whose packets are moved by `audio`."""
    web = ending == "webm"
    rate = 48_000 if web else RATE
    source = write_video(
        path / "source.mkv",
        numbered_pictures(32),
        codec="libvpx" if web else "libx264",
        options={} if web else {"bf": "0"},
        samples=np.repeat(tone(2.0), rate // RATE)[None],
        rate=rate,
        audio_codec=codec,
    )
    return retimed(source, path / f"clip.{ending}", audio=audio)


KINDS = [("mkv", "aac"), ("mp4", "aac"), ("ts", "aac"), ("webm", "libopus"), ("mkv", "flac")]


@pytest.mark.parametrize(("ending", "codec"), KINDS)
def test_a_gap_in_the_sound_is_silence_of_its_length(tmp_path, ending, codec):
    path = clip(tmp_path, lambda second: second + (1.5 if second > 1 else 0), ending, codec)
    track = read_audio_track(path, MEDIA)
    assert track.samples.size / RATE == pytest.approx(3.5, abs=0.15)
    assert track.filled == pytest.approx(1.5, abs=0.1)
    ((start, end),) = quiet_seconds(track.samples)
    assert (start, end) == (pytest.approx(1.0, abs=0.15), pytest.approx(2.5, abs=0.15))
    assert not (track.silent or track.cancelled or track.cut)


@pytest.mark.parametrize(("ending", "codec"), KINDS)
def test_sound_that_starts_late_begins_where_it_belongs(tmp_path, ending, codec):
    track = read_audio_track(clip(tmp_path, lambda second: second + 0.8, ending, codec), MEDIA)
    assert track.filled == pytest.approx(0.8, abs=0.1)
    assert track.samples.size / RATE == pytest.approx(2.8, abs=0.15)
    assert quiet_seconds(track.samples)[0] == (0.0, pytest.approx(0.8, abs=0.15))


def test_a_clock_that_creeps_ahead_is_followed(tmp_path):
    """Each packet 20% late: no single gap is long, all together they are."""
    track = read_audio_track(clip(tmp_path, lambda second: second * 1.2, "mkv"), MEDIA)
    assert track.samples.size / RATE == pytest.approx(2.4, abs=0.15)


@pytest.mark.parametrize("ending", ["mkv", "mp4", "ts"])
def test_sound_without_gaps_is_left_as_it_is(tmp_path, ending):
    track = read_audio_track(clip(tmp_path, lambda second: second, ending), MEDIA)
    assert track.filled == 0.0 and track.samples.size / RATE == pytest.approx(2.0, abs=0.15)


def test_a_file_of_sound_alone_begins_with_its_sound(tmp_path):
    source = write_sound(tmp_path / "voice.mka", tone(1.0)[None], codec="aac")
    track = read_audio_track(retimed(source, tmp_path / "late.mka", audio=lambda second: second + 3.0), MEDIA)
    assert track.filled == 0.0 and track.samples.size / RATE == pytest.approx(1.0, abs=0.1)


def test_a_gap_never_makes_more_sound_than_is_allowed(tmp_path):
    path = clip(tmp_path, lambda second: second + (500.0 if second > 1 else 0), "mkv")
    track = read_audio_track(path, MediaConfig(max_audio_seconds=4.0))
    assert track.samples.size == 4 * RATE and track.cut
    with pytest.raises(ValueError, match="expected at most 100 s"):
        read_audio_track(path, MediaConfig(max_clip_seconds=100.0))


DITHER = np.random.default_rng(0).integers(-1, 2, RATE).astype(np.float32) / 32_768
SOUNDS = {  # channels -> (silent, cancelled)
    "zeros": (np.zeros((1, RATE), np.float32), (True, False)),
    "dither": (DITHER[None], (True, False)),
    "two silent channels": (np.zeros((2, RATE), np.float32), (True, False)),
    "one upside down": (np.stack([tone(1.0), -tone(1.0)]), (False, True)),
    "one upside down, nearly": (np.stack([tone(1.0), -0.999 * tone(1.0)]), (False, True)),
    "a quiet voice": (tone(1.0, loudness=0.001)[None], (False, False)),
    "one channel": (np.stack([tone(1.0), 0 * tone(1.0)]), (False, False)),
    "opposed but unlike": (np.stack([tone(1.0), -0.7 * tone(1.0)]), (False, False)),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_sound_that_cannot_be_heard_is_noticed(tmp_path, name):
    channels, expected = SOUNDS[name]
    track = read_audio_track(write_sound(tmp_path / "clip.wav", channels), MEDIA)
    assert (track.silent, track.cancelled) == expected


@pytest.mark.parametrize(("ending", "codec"), [("m4a", "aac"), ("mp3", "libmp3lame"), ("opus", "libopus")])
def test_lossy_codecs_do_not_hide_it(tmp_path, ending, codec):
    for name in ("zeros", "one upside down"):
        channels, expected = SOUNDS[name]
        track = read_audio_track(write_sound(tmp_path / f"clip.{ending}", channels, codec=codec), MEDIA)
        assert (track.silent, track.cancelled) == expected


@pytest.fixture
def folder(tmp_path):
    write_video(tmp_path / "good.mp4", numbered_pictures(32), samples=tone(2.0)[None])
    write_video(tmp_path / "mute.mp4", numbered_pictures(32), samples=0 * tone(2.0)[None])
    write_video(tmp_path / "lost.mp4", numbered_pictures(32), samples=np.stack([tone(2.0), -tone(2.0)]))
    clip(tmp_path, lambda second: second + (1.5 if second > 1 else 0), "mkv")
    lines = [f'{{"id": "{name}", "video": "{name}", "audio": "{name}", "solution": ["happy"]}}' for name in NAMES]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path


NAMES = ("good.mp4", "mute.mp4", "lost.mp4", "clip.mkv")


def test_validation_warns_of_each_and_counts_it(folder):
    with ClipLoader(MEDIA, tiny_thinker().vision, 128, "", folder) as loader:
        report = validate([DataFile(path=str(folder / "data.jsonl"))], folder, Checks(load=loader.load))
    said = {problem.record_id: str(problem) for problem in report.warnings}
    assert not report.errors and set(said) == set(NAMES) - {"good.mp4"}
    assert "nothing but silence" in said["mute.mp4"] and "cancel each other out" in said["lost.mp4"]
    assert "1.5" in said["clip.mkv"] and "silence keep it beside the frames" in said["clip.mkv"]
    counts = report.files[0].counts
    assert counts["mute_audio"] == counts["cancelled_audio"] == counts["audio_filled"] == 1


def test_what_is_said_outlives_the_cache(folder):
    for _ in range(2):
        with ClipLoader(MEDIA, tiny_thinker().vision, 128, folder / "cache", folder) as loader:
            records = [TinyRecord((), videos=(name,), audios=(name,)) for name in NAMES]
            clips = [loader.load(record) for record in records]
    assert loader.cache.misses == 0
    assert [c.mute_audio for c in clips] == [0, 1, 0, 0] and [c.cancelled_audio for c in clips] == [0, 0, 1, 0]
    assert [c.audio_filled for c in clips] == [0, 0, 0, pytest.approx(1.5, abs=0.1)]
