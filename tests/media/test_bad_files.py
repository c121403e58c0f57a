"""Each kind of unusable file gives one error that names the file, what was found and expected, and how to mend it."""

from __future__ import annotations

import struct

import av
import numpy as np
import pytest
from PIL import Image
from support.media_files import numbered_pictures, write_sound, write_video

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.decoded import decode_file
from mer_r1_jax.media.opening import MediaError

MEDIA = MediaConfig(max_clip_seconds=10.0)
SOUND = np.full((1, 16_000), 0.1, np.float32)


def refusal(path, kind: str, media: MediaConfig = MEDIA) -> MediaError:
    """The error decoding the file ends in."""
    with pytest.raises(MediaError) as caught:
        decode_file(str(path), kind, media, 28, 128)
    assert str(path) in str(caught.value) and "; expected " in str(caught.value)
    assert caught.value.mend and caught.value.mend in str(caught.value)
    assert MediaError(**caught.value.to_json()).args == caught.value.args
    return caught.value


@pytest.mark.parametrize("kind", ["video", "audio", "image"])
def test_missing_and_empty_files(tmp_path, kind):
    assert refusal(tmp_path / "none.mp4", kind).reason == "missing"
    assert refusal(tmp_path, kind).reason == "missing"
    (tmp_path / "empty.mp4").touch()
    assert refusal(tmp_path / "empty.mp4", kind).reason == "empty"


@pytest.mark.parametrize("kind", ["video", "audio", "image"])
def test_a_text_file_is_not_media(tmp_path, kind):
    (tmp_path / "clip.mp4").write_text("I am not a clip.\n" * 200)
    assert refusal(tmp_path / "clip.mp4", kind).reason == "not_media"


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_an_mp4_cut_before_its_header(tmp_path, kind):
    path = write_video(tmp_path / "clip.mp4", numbered_pictures(16), samples=SOUND)
    path.write_bytes(path.read_bytes()[:-200])  # the header comes last
    assert refusal(path, kind).reason == "not_media"


def test_an_mp4_cut_after_its_header(tmp_path):
    path = write_video(tmp_path / "clip.mp4", numbered_pictures(16), samples=SOUND, faststart=True)
    path.write_bytes(path.read_bytes()[:-2500])
    error = refusal(path, "video")
    assert error.reason == "truncated" and "of the 16 frames" in error.found
    assert refusal(path, "audio").reason in ("corrupt", "truncated")


def test_a_cut_image(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "face.jpg")
    whole = (tmp_path / "face.jpg").read_bytes()
    (tmp_path / "face.jpg").write_bytes(whole[: len(whole) // 2])
    assert refusal(tmp_path / "face.jpg", "image").reason == "corrupt"


def test_missing_tracks(tmp_path):
    assert refusal(write_video(tmp_path / "silent.mp4", numbered_pictures(8)), "audio").reason == "no_audio"
    assert refusal(write_sound(tmp_path / "sound.wav", SOUND), "video").reason == "no_video"


def test_cover_art_is_no_video(tmp_path):
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("libmp3lame", rate=16_000)
        art = container.add_stream("png", rate=1)
        art.width = art.height = 32
        art.pix_fmt = "rgb24"
        art.disposition = av.stream.Disposition.attached_pic
        container.mux(art.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        frame = av.AudioFrame.from_ndarray((SOUND * 32_767).astype(np.int16), format="s16p", layout="mono")
        frame.sample_rate = 16_000
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    assert refusal(path, "video").reason == "no_video"
    assert decode_file(str(path), "audio", MEDIA, 28, 128).facts["samples"] == pytest.approx(16_000, abs=2500)


def test_a_video_of_one_frame(tmp_path):
    assert refusal(write_video(tmp_path / "still.mp4", numbered_pictures(1)), "video").reason == "no_frames"


@pytest.mark.parametrize("ending", ["mp4", "h264"])
def test_a_long_clip_is_refused_with_and_without_a_stated_duration(tmp_path, ending):
    path = write_video(tmp_path / f"long.{ending}", numbered_pictures(300, (16, 16)), fps=5 if ending == "mp4" else 25)
    error = refusal(path, "video", MediaConfig(max_clip_seconds=8.0))
    assert error.reason == "too_long" and "at most 8 s" in error.expected


def test_long_audio_is_refused_before_decoding(tmp_path):
    path = write_sound(tmp_path / "long.wav", np.zeros((1, 16_000 * 11), np.float32))
    assert refusal(path, "audio").reason == "too_long"


@pytest.mark.parametrize(("size", "word"), [((16, 8208), "8208x16"), ((16, 4016), "sides at most 200 times apart")])
def test_absurd_picture_sizes(tmp_path, size, word):
    path = write_video(tmp_path / "wide.avi", numbered_pictures(4, size), codec="mjpeg", pix_fmt="yuvj420p")
    error = refusal(path, "video")
    assert error.reason == "bad_size" and word in error.found


def test_absurd_image_sizes(tmp_path):
    Image.new("L", (9000, 3)).save(tmp_path / "wide.png")
    assert refusal(tmp_path / "wide.png", "image").reason == "bad_size"


@pytest.mark.parametrize("rate", [3, 900_000])
def test_absurd_sample_rates(tmp_path, rate):
    path = write_sound(tmp_path / "clip.wav", SOUND[:, :600])
    data = bytearray(path.read_bytes())
    struct.pack_into("<II", data, 24, rate, rate * 4)
    path.write_bytes(data)
    error = refusal(path, "audio", MediaConfig())
    assert error.reason == "bad_rate" and f"{rate} Hz" in error.found


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sound_that_is_not_a_number(tmp_path, value):
    samples = SOUND.copy()
    samples[0, 5000] = value
    assert refusal(write_sound(tmp_path / "clip.wav", samples), "audio").reason == "not_finite"


def test_an_audio_track_without_samples(tmp_path):
    path = write_sound(tmp_path / "clip.wav", SOUND)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    struct.pack_into("<I", data, at, 0)
    path.write_bytes(data[: at + 4])
    assert refusal(path, "audio").reason in ("no_audio", "corrupt", "not_media")


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_damaged_bytes_never_end_in_another_error(tmp_path, kind):
    whole = write_video(tmp_path / "clip.mp4", numbered_pictures(16), samples=SOUND, faststart=True).read_bytes()
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        data = bytearray(whole)
        for at in generator.integers(0, len(data), 40):
            data[at] = int(generator.integers(256))
        (tmp_path / "bad.mp4").write_bytes(data)
        try:
            decode_file(str(tmp_path / "bad.mp4"), kind, MEDIA, 28, 128)
            outcomes.add("decoded")
        except MediaError as error:
            outcomes.add(error.reason)
    assert len(outcomes) > 1, "no damage had any effect"
