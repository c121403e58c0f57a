"""Still pictures of every kind are shown right, or refused by name."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.decode import read_image, read_video
from mer_r1_jax.media.decoded import IMAGE, decode_file
from mer_r1_jax.media.opening import MediaError

MEDIA = MediaConfig()
SIDE = 56
RAMP = np.tile(np.linspace(0, 255, SIDE), (SIDE, 1))


def shown(path) -> np.ndarray:
    """The picture as the model gets it; those of 56 pixels a side are not resized."""
    return read_image(path, MEDIA, 28).astype(int)


def png(path, width: int, depth: int, colour: int, rows: list[bytes], *chunks: tuple[bytes, bytes]):
    """Writes a PNG of the given bit depth and colour type, with chunks of our own before its pixels."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(data)
    return path


def close(picture: np.ndarray, grey: np.ndarray) -> bool:
    return picture.shape == (SIDE, SIDE, 3) and np.abs(picture - grey[..., None]).max() <= 1


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm", "jp2"])
def test_sixteen_bits_of_grey_are_a_ramp(tmp_path, ending):
    path = tmp_path / f"ramp.{ending}"
    sixteen = np.round(RAMP * 257).astype(np.uint16)
    if ending == "pgm":
        path.write_bytes(b"P5 56 56 65535\n" + sixteen.astype(">u2").tobytes())
    else:
        Image.fromarray(sixteen).save(path)
    assert close(shown(path), RAMP)


def test_a_tiff_whose_zero_is_white(tmp_path):
    Image.fromarray(np.round(RAMP * 257).astype(np.uint16)).save(tmp_path / "ramp.tiff", tiffinfo={262: 0})
    assert close(shown(tmp_path / "ramp.tiff"), 255 - RAMP)


def test_sixteen_bits_of_colour_and_of_grey_with_alpha(tmp_path):
    row = np.round(np.stack([RAMP[0], 255 - RAMP[0], 0 * RAMP[0]], 1) * 257).astype(">u2").tobytes()
    picture = shown(png(tmp_path / "colour.png", SIDE, 16, 2, [row] * SIDE))
    assert np.abs(picture[..., 0] - RAMP).max() <= 1 and np.abs(picture[..., 1] - 255 + RAMP).max() <= 1
    row = np.round(np.stack([0 * RAMP[0], RAMP[0]], 1) * 257).astype(">u2").tobytes()
    assert close(shown(png(tmp_path / "alpha.png", SIDE, 16, 4, [row] * SIDE)), 255 - RAMP)


@pytest.mark.parametrize(("dtype", "words"), [(np.int32, "32-bit whole numbers"), (np.float32, "fractions")])
def test_pixels_without_a_known_white_are_refused(tmp_path, dtype, words):
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "ramp.tiff")
    with pytest.raises(MediaError, match=f"picture of {words}.*expected 8 or 16 bits.*Save it") as caught:
        shown(tmp_path / "ramp.tiff")
    assert caught.value.reason == "bad_pixels"


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
@pytest.mark.parametrize("ending", ["png", "webp", "tiff"])
def test_transparent_parts_are_white_whatever_their_colour(tmp_path, mode, ending):
    """Left half black and seen, right half black and transparent."""
    alpha = np.zeros((SIDE, SIDE), np.uint8)
    alpha[:, : SIDE // 2] = 255
    black = np.zeros((SIDE, SIDE), np.uint8)
    picture = Image.fromarray(np.stack([black, black, black, alpha], -1))
    path = tmp_path / f"face.{ending}"
    if mode == "P":
        picture = Image.fromarray(alpha // 255).convert("P")
        picture.putpalette([0] * 6)
        picture.info["transparency"] = 0
        if ending != "png":
            picture = picture.convert("RGBA")
    else:
        picture = picture.convert(mode)
    picture.save(path, **({"lossless": True} if ending == "webp" else {}))
    assert close(shown(path), 255.0 - alpha)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_that_stands_for_transparent(tmp_path, depth):
    """Left half in grey 1 of the file, which is to be white; right half black. Darkest but one, at most depths."""
    values = [1] * (SIDE // 2) + [0] * (SIDE // 2)
    if depth == 16:
        row = np.array(values, ">u2").tobytes()
    else:
        bits = "".join(format(value, f"0{depth}b") for value in values)
        row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    path = png(tmp_path / "face.png", SIDE, depth, 0, [row] * SIDE, (b"tRNS", struct.pack(">H", 1)))
    assert close(shown(path), np.tile(np.array(values) * 255.0, (SIDE, 1)))


def test_a_colour_that_stands_for_transparent(tmp_path):
    row = bytes([10, 20, 30] * (SIDE // 2) + [0, 0, 0] * (SIDE // 2))
    path = png(tmp_path / "face.png", SIDE, 8, 2, [row] * SIDE, (b"tRNS", struct.pack(">3H", 10, 20, 30)))
    assert close(shown(path), np.tile(np.r_[[255.0] * 28, [0.0] * 28], (SIDE, 1)))
    row = np.array([10, 20, 30] * SIDE, ">u2").tobytes()
    path = png(tmp_path / "deep.png", SIDE, 16, 2, [row] * SIDE, (b"tRNS", struct.pack(">3H", 10, 20, 30)))
    with pytest.raises(MediaError, match="16-bit picture in which one colour stands for transparent"):
        shown(path)


@pytest.mark.parametrize(("ending", "mode"), [("jpg", "CMYK"), ("tiff", "CMYK"), ("gif", "P"), ("png", "1")])
def test_inks_palettes_and_bitmaps_keep_their_colours(tmp_path, ending, mode):
    picture = Image.new("RGB", (SIDE, SIDE), (0, 0, 0) if mode == "1" else (204, 102, 51)).convert(mode)
    picture.save(tmp_path / f"face.{ending}")
    expected = (0, 0, 0) if mode == "1" else (204, 102, 51)
    assert np.abs(shown(tmp_path / f"face.{ending}") - expected).max() <= 20


@pytest.mark.parametrize(("ending", "kind"), [("webp", "WEBP"), ("gif", "GIF"), ("png", "PNG"), ("tiff", "TIFF")])
def test_several_pictures_in_one_file_are_refused_by_name(tmp_path, ending, kind):
    pictures = [Image.new("RGB", (SIDE, SIDE), (40 * n, 0, 0)) for n in range(3)]
    path = tmp_path / f"wave.{ending}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    with pytest.raises(MediaError, match=f"a {kind} file of 3 pictures.*; expected one picture. Save .* PNG") as caught:
        decode_file(str(path), IMAGE, MEDIA, 28, 128)
    assert caught.value.reason == "several_pictures"


def test_an_animated_webp_among_the_videos_is_refused_by_name_and_a_gif_is_one(tmp_path):
    pictures = [Image.new("RGB", (SIDE, SIDE), (20 * n, 0, 0)) for n in range(8)]
    for ending in ("webp", "gif"):
        pictures[0].save(tmp_path / f"wave.{ending}", save_all=True, append_images=pictures[1:], duration=100)
    with pytest.raises(MediaError, match="an animated WebP.*; expected a clip of its own: .*Make an mp4") as refused:
        read_video(tmp_path / "wave.webp", MEDIA)
    assert refused.value.reason == "several_pictures"
    assert read_video(tmp_path / "wave.gif", MEDIA).duration == pytest.approx(0.8)


def test_a_single_picture_in_those_formats_is_read(tmp_path):
    for ending in ("webp", "gif", "png", "tiff"):
        Image.new("RGB", (SIDE, SIDE), (200, 0, 0)).save(tmp_path / f"face.{ending}", save_all=True)
        assert np.abs(shown(tmp_path / f"face.{ending}") - (200, 0, 0)).max() <= 3


def test_a_cameras_photograph_with_a_preview_beside_it_is_the_photograph(tmp_path):
    first, preview = Image.new("RGB", (SIDE, SIDE), (200, 0, 0)), Image.new("RGB", (28, 28), (0, 0, 200))
    data = io.BytesIO()
    first.save(data, "MPO", save_all=True, append_images=[preview])
    (tmp_path / "phone.jpg").write_bytes(data.getvalue())
    assert np.abs(shown(tmp_path / "phone.jpg") - (200, 0, 0)).max() <= 3
