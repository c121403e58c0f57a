"""Faces stand upright: turned, mirrored and stretched pictures are shown as a player shows them."""

from __future__ import annotations

import base64
import io

import av
import numpy as np
import pytest
from PIL import Image
from support.media_files import numbered_pictures, set_matrix, write_video

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.evaluation.clip_frames import clip_strips
from mer_r1_jax.media.decode import read_image, read_stills, read_video
from mer_r1_jax.media.opening import MediaError

MEDIA = MediaConfig()

EIGHT = {  # display matrix (a, b, c, d) -> what is shown of a picture
    "as it is": ((1, 0, 0, 1), lambda p: p),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda p: p[::-1]),
    "half a turn": ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
    "clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "anticlockwise": ((0, -1, 1, 0), lambda p: np.rot90(p)),
    "transposed": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    "transposed the other way": ((0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1)),
}
ORIENTATIONS = {  # EXIF's number -> what is shown of the stored picture
    1: EIGHT["as it is"][1],
    2: EIGHT["mirrored"][1],
    3: EIGHT["half a turn"][1],
    4: EIGHT["upside down"][1],
    5: EIGHT["transposed"][1],
    6: EIGHT["clockwise"][1],
    7: EIGHT["transposed the other way"][1],
    8: EIGHT["anticlockwise"][1],
}


def corner() -> np.ndarray:
    """uint8[32, 64, 3]: white top left, grey top right, black below: no two of its eight images are alike."""
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32], picture[:16, 32:] = 255, 128
    return picture


def same(seen: np.ndarray, expected: np.ndarray) -> bool:
    return seen.shape == expected.shape and np.abs(seen.astype(float) - expected).mean() < 10


@pytest.fixture
def clip(tmp_path):
    return write_video(tmp_path / "clip.mp4", np.stack([corner()] * 8))


@pytest.mark.parametrize("name", EIGHT)
def test_every_way_to_show_a_video(clip, name):
    matrix, shown = EIGHT[name]
    set_matrix(clip, matrix)
    assert same(read_video(clip, MEDIA).frames[0], shown(corner()))
    assert same(read_stills(clip, MEDIA).frames[0], shown(corner()))


def test_a_turn_off_by_less_than_a_degree_and_a_scale_are_no_odd_turn(clip):
    set_matrix(clip, (-0.01, 1, -1, 0.01))
    assert same(read_video(clip, MEDIA).frames[0], np.rot90(corner(), -1))
    set_matrix(clip, (-2, 0, 0, 2))
    assert same(read_video(clip, MEDIA).frames[0], corner()[:, ::-1])


@pytest.mark.parametrize("matrix", [(0.87, 0.5, -0.5, 0.87), (0.71, -0.71, 0.71, 0.71), (1, 0.5, 0, 1), (1, 0, 0, 0)])
def test_an_odd_turn_is_refused_by_name(clip, matrix):
    set_matrix(clip, matrix)
    with pytest.raises(MediaError, match="no quarter turn.*; expected .*90, 180 or 270.* Encode") as caught:
        read_video(clip, MEDIA)
    assert caught.value.reason == "odd_turn"


@pytest.mark.parametrize(("ratio", "size"), [("16:11", (64, 93)), ("2:1", (64, 128)), ("1:2", (64, 32))])
def test_pixels_that_are_not_square_become_so(tmp_path, ratio, size):
    pictures = np.stack([np.full((64, 64, 3), 99, np.uint8)] * 8)
    path = write_video(tmp_path / "clip.mp4", pictures, options={"aspect": ratio})
    assert read_video(path, MEDIA).frames.shape[1:3] == size
    height, width = read_video(path, MEDIA, 28).frames.shape[1:3]
    assert width / height == pytest.approx(size[1] / size[0], rel=0.25)


def test_stretching_comes_before_turning(tmp_path):
    path = write_video(tmp_path / "clip.mp4", np.stack([corner()] * 8), options={"aspect": "2:1"})
    set_matrix(path, (0, 1, -1, 0))
    assert read_video(path, MEDIA).frames.shape[1:3] == (128, 32)


def test_absurd_pixels_are_refused_before_a_huge_picture_is_made(tmp_path):
    path = write_video(tmp_path / "clip.mp4", numbered_pictures(8, (48, 1000)), options={"aspect": "10:1"})
    with pytest.raises(MediaError, match="10000x48 pixels"):
        read_video(path, MEDIA)


def test_a_report_shows_a_clip_as_the_model_sees_it(clip):
    set_matrix(clip, EIGHT["mirrored"][0])

    (shown,) = clip_strips([clip.name], clip.parent)
    strip = Image.open(io.BytesIO(base64.b64decode(shown.source.split(",")[1])))
    first = np.asarray(strip)[:, : strip.height * 2]  # twice as wide as high
    expected = Image.fromarray(np.ascontiguousarray(corner()[:, ::-1])).resize((first.shape[1], first.shape[0]))
    assert same(first, np.asarray(expected)) and shown.seconds == pytest.approx(0.5)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_way_a_camera_was_held(tmp_path, ending, orientation):
    stored = np.repeat(np.repeat(corner(), 4, 0), 4, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{ending}"
    Image.fromarray(stored).save(path, exif=exif)
    shown = ORIENTATIONS[orientation](stored)
    expected = Image.fromarray(np.ascontiguousarray(shown)).resize((252, 140) if shown.shape[1] > 128 else (140, 252))
    assert same(read_image(path, MEDIA, 28), np.asarray(expected))


def test_the_sensors_turn_in_the_stream_itself_counts_too(tmp_path):
    """A Matroska file and a phone's 90 degrees, written by FFmpeg's own muxer."""
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=16)
        video.height, video.width, video.pix_fmt = 32, 64, "yuv420p"
        video.set_display_rotation(-90)
        for _ in range(8):
            container.mux(video.encode(av.VideoFrame.from_ndarray(corner(), format="rgb24")))
        container.mux(video.encode(None))
    assert same(read_video(path, MEDIA).frames[0], np.rot90(corner(), -1))
