"""How long clips last and what is shown when: packets are believed, headers that say something else are not."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from support.media_files import frame_numbers, numbered_pictures, retimed, tone, write_sound, write_tracks, write_video

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.decode import read_audio_track, read_stills, read_video
from mer_r1_jax.media.opening import MediaError

MEDIA = MediaConfig()
DEFAULT = av.stream.Disposition.default
NONE = av.stream.Disposition(0)


@pytest.fixture
def plain(tmp_path):
    """Forty frames at 16 a second whose packets come in the order they are shown in."""
    return write_video(tmp_path / "plain.mp4", numbered_pictures(40), options={"bf": "0"}, samples=tone(2.5)[None])


def stretched(second: float) -> float:
    """Forty frames of 2.5 s become 6 s, at uneven times: every third comes late."""
    number = round(second * 16)
    return number * 0.15 + (0.06 if number % 3 == 2 else 0.0)


@pytest.mark.parametrize("ending", ["webm", "mkv", "mp4", "flv", "ts"])
def test_frames_at_uneven_times(tmp_path, ending):
    source = tmp_path / "plain.mkv"
    codec = "libvpx" if ending == "webm" else "libx264"
    write_video(source, numbered_pictures(40), codec=codec, options={} if ending == "webm" else {"bf": "0"})
    video = read_video(retimed(source, tmp_path / f"clip.{ending}", video=stretched), MEDIA)
    assert video.duration == pytest.approx(6.0, abs=0.1)
    assert len(video.frames) == 12 and video.sampled_fps == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("fps", [1, 3, 5])
@pytest.mark.parametrize("ending", ["mkv", "mp4", "mov"])
def test_few_frames_a_second_that_are_stored_in_another_order_than_shown(tmp_path, ending, fps):
    """Matroska keeps no times of decoding, and FFmpeg gives none to the first packets: no clock starts anew there."""
    options = {"bf": "3", "b-adapt": "0"}
    path = write_video(tmp_path / f"clip.{ending}", numbered_pictures(20), fps=fps, options=options)
    video = read_video(path, MEDIA)
    assert video.duration == pytest.approx(20 / fps, abs=0.01)
    numbers = frame_numbers(video.frames, 20)
    assert numbers[0] == 0 and numbers[-1] == 19 and numbers == sorted(numbers)


@pytest.mark.parametrize(("ending", "codec"), [("h264", "libx264"), ("hevc", "libx265"), ("m2v", "mpeg2video")])
def test_a_stream_without_a_container_runs_at_the_rate_its_codec_says(tmp_path, ending, codec):
    fps = 24 if ending == "m2v" else 5
    options = {"x265-params": "log-level=none"} if ending == "hevc" else {}
    path = write_video(tmp_path / f"clip.{ending}", numbered_pictures(30), fps=fps, codec=codec, options=options)
    assert read_video(path, MEDIA).duration == pytest.approx(30 / fps)


def test_a_clip_that_stands_still_and_then_runs_is_sampled_evenly_in_time(tmp_path, plain):
    """Ten frames one second apart, then thirty within two seconds, as a screen recorder writes them."""
    slow_then_fast = lambda second: second * 16 if second < 10 / 16 else 9 + (second * 16 - 9) / 15  # noqa: E731
    video = read_video(retimed(plain, tmp_path / "clip.mkv", video=slow_then_fast), MediaConfig(fps=1.0))
    seconds = [n if n < 10 else 9 + (n - 9) / 15 for n in frame_numbers(video.frames, 40)]
    assert len(seconds) == 10
    assert np.abs(np.diff(seconds) - 11 / 9).max() < 1.1 and max(np.diff(frame_numbers(video.frames, 40))) > 10
    stills = read_stills(tmp_path / "clip.mkv", MediaConfig(fps=1.0, max_frames=9))
    assert frame_numbers(stills.frames, 40)[0] == 0 and len(stills.frames) == 9


def test_a_header_that_promises_another_rate(tmp_path):
    """A Matroska track whose default duration says 1000 frames a second."""
    path = write_video(tmp_path / "clip.mkv", numbered_pictures(40), fps=25, options={"bf": "0"})
    data = path.read_bytes()
    at = data.index(bytes.fromhex("23e383")) + 3  # DefaultDuration, in nanoseconds
    length = data[at] & 0x7F
    assert int.from_bytes(data[at + 1 : at + 1 + length], "big") == 40_000_000
    path.write_bytes(data[: at + 1] + (1_000_000).to_bytes(length, "big") + data[at + 1 + length :])
    video = read_video(path, MEDIA)
    assert video.duration == pytest.approx(1.6, abs=0.01) and len(video.frames) == 4


def test_an_even_clip_keeps_its_headers_rate_to_the_last_bit(tmp_path):
    path = write_video(tmp_path / "clip.mkv", numbered_pictures(40), fps=30)
    assert read_video(path, MEDIA).duration == 40 / 30  # although Matroska rounds times to milliseconds


def test_a_last_picture_that_stands_counts(tmp_path):
    """An mp4 says how long its last frame is shown; here, two seconds."""
    source = write_video(tmp_path / "plain.mp4", numbered_pictures(40), options={"bf": "0"})
    path = tmp_path / "clip.mp4"
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux() if packet.size]
        for number, packet in enumerate(packets):
            packet.stream = stream
            if number == 39:
                packet.duration *= 32
            new.mux(packet)
    assert read_video(path, MEDIA).duration == pytest.approx(39 / 16 + 2, abs=0.01)


def test_recordings_that_were_joined_last_as_long_as_both(tmp_path):
    parts = [
        write_video(
            tmp_path / f"{n}.ts", numbered_pictures(40), options={"bf": "0"}, samples=tone(2.5)[None]
        ).read_bytes()
        for n in range(2)
    ]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    video = read_video(tmp_path / "both.ts", MEDIA)
    assert video.duration == pytest.approx(5.0, abs=0.2)
    assert read_audio_track(tmp_path / "both.ts", MEDIA).samples.size == pytest.approx(5 * 16_000, rel=0.05)


def test_pictures_that_begin_after_the_sound_wait_for_their_time(tmp_path, plain):
    """One second of sound before the first picture: frame n is seen at 1 + n/16 s, the first one until then."""
    video = read_video(retimed(plain, tmp_path / "clip.mkv", video=lambda second: second + 1.0), MEDIA)
    assert video.duration == pytest.approx(3.5, abs=0.1)
    assert frame_numbers(video.frames, 40)[:2] == [0, 0] and len(video.frames) == 6


@pytest.mark.parametrize("ending", ["mkv", "mp4"])
def test_a_subtitle_or_chapter_far_beyond_the_end_does_not_make_a_clip_long(tmp_path, ending):
    path = tmp_path / f"clip.{ending}"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=16)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        audio = container.add_stream("aac", rate=16_000)
        audio.layout = "mono"
        other = container.add_stream("aac", rate=16_000)  # another track that is long
        other.layout = "mono"
        video.disposition = audio.disposition = DEFAULT
        for picture in numbered_pictures(16):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        for stream, seconds in ((audio, 1.0), (other, 20.0)):
            frame = av.AudioFrame.from_ndarray(tone(seconds)[None], format="fltp", layout="mono")
            frame.sample_rate = 16_000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    media = MediaConfig(max_clip_seconds=5.0)
    assert read_video(path, media).duration == pytest.approx(1.0, abs=0.1)
    assert read_audio_track(path, media).samples.size == pytest.approx(16_000, abs=2048)


@pytest.mark.parametrize(("ending", "words"), [("mkv", "subrip"), ("mkv", "ass"), ("webm", "webvtt")])
def test_a_line_of_subtitles_at_twenty_minutes_does_not_make_a_clip_long(tmp_path, ending, words):
    web = ending == "webm"
    with av.open(str(tmp_path / f"clip.{ending}"), "w") as container:
        video = container.add_stream("libvpx" if web else "libx264", rate=16)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        audio = container.add_stream("libopus" if web else "aac", rate=48_000)
        audio.layout = "mono"
        lines = container.add_mux_stream(words)
        for picture in numbered_pictures(16):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(tone(1.0, 48_000)[None], format="fltp", layout="mono")
        frame.sample_rate = 48_000
        for block in av.AudioResampler(format=audio.format, layout="mono", rate=48_000).resample(frame):
            container.mux(audio.encode(block))
        container.mux(audio.encode(None))
        line = av.Packet(b"the end")
        line.stream, line.time_base, line.duration = lines, Fraction(1, 1000), 2000
        line.pts = line.dts = 1_200_000
        container.mux(line)
    with av.open(str(tmp_path / f"clip.{ending}")) as container:
        assert container.duration / av.time_base > 1200
    assert read_video(tmp_path / f"clip.{ending}", MEDIA).duration == pytest.approx(1.0, abs=0.1)
    assert read_audio_track(tmp_path / f"clip.{ending}", MEDIA).samples.size == pytest.approx(16_000, abs=2048)


def test_a_duration_guessed_from_a_bit_rate_is_not_believed(tmp_path):
    """An mp3 of changing bit rate without the header that tells: FFmpeg guesses from its first frames."""
    data = b""
    for number, (seconds, bit_rate) in enumerate([(1.0, "8000"), (3.0, "128000")]):
        options = {"write_xing": "0", "id3v2_version": "0"}
        with av.open(str(tmp_path / f"{number}.mp3"), "w", options=options) as container:
            audio = container.add_stream("libmp3lame", rate=16_000, options={"b": bit_rate})
            frame = av.AudioFrame.from_ndarray(tone(seconds)[None], format="fltp", layout="mono")
            frame.sample_rate = 16_000
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
        data += (tmp_path / f"{number}.mp3").read_bytes()
    (tmp_path / "clip.mp3").write_bytes(data)
    with av.open(str(tmp_path / "clip.mp3")) as container:
        assert container.duration / av.time_base > 5
    heard = read_audio_track(tmp_path / "clip.mp3", MediaConfig(max_clip_seconds=5.0)).samples
    assert heard.size == pytest.approx(4 * 16_000, rel=0.1)


@pytest.mark.parametrize("ending", ["mp3", "aac", "wav", "opus"])
def test_sound_that_is_too_long_is_refused_without_a_header_to_say_so(tmp_path, ending):
    codec = {"mp3": "libmp3lame", "aac": "aac", "wav": "pcm_s16le", "opus": "libopus"}[ending]
    path = write_sound(tmp_path / f"clip.{ending}", tone(12.0)[None], codec=codec)
    with pytest.raises(MediaError, match="expected at most 8 s") as caught:
        read_audio_track(path, MediaConfig(max_clip_seconds=8.0))
    assert caught.value.reason == "too_long"


QUIET, LOUD = tone(1.0, loudness=0.0)[None], tone(1.0)[None]
STEREO = np.repeat(LOUD, 2, axis=0)


@pytest.mark.parametrize("ending", ["mkv", "mp4"])
@pytest.mark.parametrize(
    ("tracks", "heard"),
    [
        ([(QUIET, NONE), (LOUD, DEFAULT)], True),
        ([(QUIET, DEFAULT), (LOUD, NONE)], False),
        ([(LOUD, DEFAULT), (QUIET, DEFAULT)], True),  # a tie: the first
        ([(QUIET, DEFAULT), (LOUD, DEFAULT)], False),
        ([(QUIET, DEFAULT), (STEREO, DEFAULT)], True),  # but more channels win it
    ],
)
def test_the_default_sound_track_is_heard(tmp_path, ending, tracks, heard):
    path = write_tracks(tmp_path / f"clip.{ending}", tracks)
    with av.open(str(path)) as container:
        written = [bool(stream.disposition & DEFAULT) for stream in container.streams.audio]
    assert written == [bool(disposition & DEFAULT) for _, disposition in tracks]  # the muxer kept the flags
    assert (np.abs(read_audio_track(path, MEDIA).samples).max() > 0.1) == heard


@pytest.mark.parametrize(
    ("order", "number"),
    [([("dark", NONE), ("light", DEFAULT)], 1), ([("dark", DEFAULT), ("light", NONE)], 0)],
)
def test_the_default_video_track_is_watched(tmp_path, order, number):
    grey = {"dark": 40, "light": 200}
    pictures = [(np.full((16, 48, 64, 3), grey[name], np.uint8), disposition) for name, disposition in order]
    path = write_tracks(tmp_path / "clip.mkv", [], pictures)
    assert read_video(path, MEDIA).frames.mean() == pytest.approx(grey[order[number][0]], abs=8)


def test_of_two_plain_videos_the_larger_is_watched_and_of_two_equal_ones_the_first(tmp_path):
    small, large = np.full((8, 48, 64, 3), 40, np.uint8), np.full((8, 96, 128, 3), 200, np.uint8)
    path = write_tracks(tmp_path / "clip.mkv", [], [(small, DEFAULT), (large, DEFAULT)])
    assert read_video(path, MEDIA).frames.shape[1:3] == (96, 128)
    path = write_tracks(tmp_path / "even.mkv", [], [(small, DEFAULT), (small + 160, DEFAULT)])
    assert read_video(path, MEDIA).frames.mean() == pytest.approx(40, abs=8)
