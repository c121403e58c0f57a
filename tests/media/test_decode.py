"""Decoding real files: which frames, which samples, in which containers and codecs."""

from __future__ import annotations

import math

import av
import numpy as np
import pytest
import soxr
from PIL import Image
from support.media_files import frame_numbers, numbered_pictures, rotate_mp4, tone, write_sound, write_video

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.decode import read_audio_track, read_image, read_stills, read_video
from mer_r1_jax.media.decoded import STILLS, decode_file
from mer_r1_jax.media.resize import resize

MEDIA = MediaConfig()
TINY = MediaConfig(video_min_pixels=28 * 28, video_max_pixels=2 * 28 * 28)


@pytest.mark.parametrize(
    ("ending", "codec"),
    [
        ("mp4", "libx264"),
        ("mkv", "libx264"),
        ("ts", "libx264"),  # starts at 1.4 s and cannot seek exactly
        ("h264", "libx264"),  # no container, no duration
        ("webm", "libvpx"),
        ("webm", "libvpx-vp9"),
        ("avi", "mjpeg"),
        ("mpg", "mpeg2video"),
    ],
)
def test_the_right_frames_are_sampled(tmp_path, ending, codec):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_video(tmp_path / f"clip.{ending}", numbered_pictures(40), fps=25, codec=codec, pix_fmt=pix_fmt)
    video = read_video(path, MEDIA)
    assert video.frames.shape == (4, 48, 64, 3) and video.frames.dtype == np.uint8
    assert frame_numbers(video.frames, 40) == [0, 13, 26, 39]
    assert video.duration == pytest.approx(40 / 25)
    assert video.sampled_fps == pytest.approx(4 / 40 * 25)


def test_packets_that_are_never_shown_are_no_frames(tmp_path):
    """VP8 has frames that only others refer to: packets that decode to nothing."""
    shown = write_video(tmp_path / "shown.webm", numbered_pictures(40), 16, "libvpx")
    path = tmp_path / "clip.webm"
    with av.open(str(shown)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                data = bytearray(bytes(packet))
                data[0] &= 0xFF if number % 8 != 5 else ~0x10  # the bit that says whether a frame is shown
                hidden = av.Packet(data)
                hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
                hidden.is_keyframe, hidden.stream = packet.is_keyframe, stream
                target.mux(hidden)
    video = read_video(path, MEDIA)
    assert video.duration == pytest.approx(40 / 16, abs=0.05)  # one frame less does not make a clip shorter
    assert frame_numbers(video.frames, 40) == [0, 12, 26, 39]  # what is seen at 0, 0.79, 1.64 and 2.44 s


def test_frames_are_resized_as_they_are_decoded(tmp_path):
    path = write_video(tmp_path / "clip.mp4", numbered_pictures(20, (60, 90)))
    whole, small = read_video(path, TINY), read_video(path, TINY, factor=28)
    assert small.frames.shape[1:3] == (28, 28)
    np.testing.assert_array_equal(small.frames, resize(whole.frames, 28, 28))


@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
def test_a_phones_rotation_is_undone(tmp_path, quarter_turns):
    pictures = np.zeros((8, 32, 64, 3), np.uint8)
    pictures[:, :16, :32] = 255  # top left
    path = write_video(tmp_path / "clip.mp4", pictures)
    rotate_mp4(path, quarter_turns)
    frame = read_video(path, MEDIA).frames[0].astype(float).mean(-1)
    upright = np.rot90(pictures[0].mean(-1), k=-quarter_turns)  # a quarter turn in the header is clockwise
    assert frame.shape == upright.shape
    assert np.abs(frame - upright).mean() < 10


def test_sound_of_an_mp4_lasts_as_long_as_its_header_says(tmp_path):
    """AAC fills its last block of 1024 samples; those are not sound, and would cost a second audio unit."""
    path = write_video(tmp_path / "clip.mp4", numbered_pictures(32), samples=tone(2.0)[None])
    track = read_audio_track(path, MEDIA)
    assert track.samples.shape == (32_000,) and track.samples.dtype == np.float32 and not track.cut
    # AAC is lossy but keeps a tone: the spectrum peaks where the tone was, with its loudness.
    spectrum = np.abs(np.fft.rfft(track.samples)) / 16_000
    assert spectrum.argmax() == 880
    assert spectrum.max() == pytest.approx(0.5, rel=0.05)


def test_channels_are_averaged(tmp_path):
    left, right = tone(0.5), tone(0.5, frequency=700.0, loudness=0.25)
    path = write_sound(tmp_path / "clip.wav", np.stack([left, right]))
    np.testing.assert_allclose(read_audio_track(path, MEDIA).samples, (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_go_through_soxr_at_high_quality(tmp_path, rate):
    samples = tone(0.37, rate)
    path = write_sound(tmp_path / "clip.wav", samples[None], rate)
    heard = read_audio_track(path, MEDIA).samples
    assert heard.size == math.ceil(samples.size * 16_000 / rate)
    expected = soxr.resample(samples, rate, 16_000, quality="HQ")
    length = min(heard.size, expected.size)
    np.testing.assert_allclose(heard[:length], expected[:length], atol=1e-7)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 1 << 30])
def test_a_wav_whose_header_was_never_finished_is_read_to_its_end(tmp_path, size):
    """Recorders that write to a pipe cannot go back to put the size of the sound into the header."""
    path = write_sound(tmp_path / "clip.wav", tone(2.0)[None], codec="pcm_s16le")
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = data[4:8] = size.to_bytes(4, "little")
    path.write_bytes(data)
    assert read_audio_track(path, MEDIA).samples.size == 2 * 16_000


@pytest.mark.parametrize("size", [3_000, 200_000])
def test_a_large_tag_before_an_mp3_is_passed_over(tmp_path, size):
    path = write_sound(tmp_path / "clip.mp3", tone(2.0)[None], codec="libmp3lame")
    sevens = bytes((size >> shift) & 0x7F for shift in (21, 14, 7, 0))
    (tmp_path / "tagged.mp3").write_bytes(b"ID3\x04\x00\x00" + sevens + bytes(size) + path.read_bytes())
    assert read_audio_track(tmp_path / "tagged.mp3", MEDIA).samples.size == pytest.approx(2 * 16_000, abs=2500)


@pytest.mark.parametrize(
    ("ending", "codec"),
    [("wav", "pcm_s16le"), ("flac", "flac"), ("mp3", "libmp3lame"), ("m4a", "aac"), ("opus", "libopus")],
)
def test_audio_files_of_other_kinds(tmp_path, ending, codec):
    rate = 48_000 if codec == "libopus" else 44_100
    path = write_sound(tmp_path / f"clip.{ending}", tone(1.0, rate)[None], rate, codec)
    heard = read_audio_track(path, MEDIA).samples
    assert abs(heard.size - 16_000) <= 16_000 * 1152 / rate
    spectrum = np.abs(np.fft.rfft(heard[:16_000], 16_000))
    assert abs(int(spectrum.argmax()) - 440) <= 1


def test_long_audio_is_cut_and_says_so(tmp_path):
    path = write_sound(tmp_path / "clip.wav", tone(3.0)[None])
    track = read_audio_track(path, MediaConfig(max_audio_seconds=1.5))
    assert track.cut and track.samples.size == 24_000
    whole = read_audio_track(path, MediaConfig(max_audio_seconds=3.0))
    assert not whole.cut
    np.testing.assert_array_equal(track.samples, whole.samples[:24_000])


def test_images_go_over_white_and_through_pillow(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 100, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "face.png")
    picture = read_image(tmp_path / "face.png", MEDIA, 28)
    alpha = pixels[..., 3:] / 255
    over_white = Image.fromarray(np.round(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8))
    expected = np.asarray(over_white.resize((112, 56), Image.BICUBIC)).astype(int)
    assert picture.shape == (56, 112, 3)
    assert np.abs(picture - expected).max() <= 2  # Pillow blends in integers


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGB", "LA"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    ending = "tiff" if mode == "CMYK" else "png"
    Image.new("RGB", (60, 60), (200, 100, 50)).convert(mode).save(tmp_path / f"face.{ending}")
    assert read_image(tmp_path / f"face.{ending}", MEDIA, 28).shape == (56, 56, 3)


def test_stills_are_taken_from_the_start_at_whole_seconds(tmp_path):
    media = MediaConfig(fps=1.0, max_frames=3)
    path = write_video(tmp_path / "clip.mp4", numbered_pictures(41, (48, 66)), fps=8)
    stills = read_stills(path, media)
    assert frame_numbers(stills.frames, 41) == [0, 8, 16]  # of six seconds, the first three
    assert stills.frames.shape == (3, 48, 66, 3)  # as large as they are
    assert frame_numbers(read_stills(path, MediaConfig(fps=1.0, max_frames=99)).frames, 41) == [0, 8, 16, 24, 32, 40]
    entry = decode_file(str(path), STILLS, media, 1, 1)
    np.testing.assert_array_equal(entry.arrays["frames"], stills.frames)
