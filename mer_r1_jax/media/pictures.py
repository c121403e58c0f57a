"""A still picture as the eye sees it: upright, over white, with 8 bits a colour; or refused by name.

What Pillow would turn into something else in silence is told apart here: it shows 16-bit greys above 255 as white,
ignores how a camera was held, and knows one picture of an animation.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFile, ImageOps

from mer_r1_jax.media.opening import MediaError

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
PHOTOGRAPHS = ("MPO",)  # a camera's JPEG, whose further pictures are its preview, depth or brightness map
_WHITE_IS_ZERO, _PHOTOMETRIC, _BITS_PER_SAMPLE = 0, 262, 258  # of TIFF
_LOW_BITS: dict[object, int] = {
    "L;2": 85,
    "L;4": 17,
}  # what Pillow multiplies the greys of a PNG by, but not its transparent grey


def upright_rgb(path, picture: Image.Image) -> Image.Image:
    """Returns an opened picture in mode RGB, turned as its EXIF orientation says, transparent parts white.

    Raises:
        MediaError: for several pictures in one file, and pixels whose white and black are not known.
    """
    _refuse_several(path, picture)
    clear = _transparent_colour(path, picture)
    picture.load()
    turned = ImageOps.exif_transpose(picture)
    if turned.mode in SIXTEEN_BIT or (turned.mode == "I" and picture.format == "PPM"):
        return _from_sixteen_bits(turned, picture, clear)
    if turned.mode in ("I", "F"):
        kind = "32-bit whole numbers" if turned.mode == "I" else "fractions"
        raise MediaError(
            path,
            "bad_pixels",
            f"a picture of {kind}, which does not say what is white",
            "8 or 16 bits a colour",
            "Save it with 8 bits a colour.",
        )
    if isinstance(clear, int):
        turned.info["transparency"] = clear
    if turned.has_transparency_data or turned.mode in ("La", "RGBa"):
        return _over_white(turned.convert("RGBA"))
    try:
        return turned.convert("RGB")
    except ValueError as error:
        raise MediaError(
            path, "bad_pixels", f"a picture in mode {turned.mode}", "grey, RGB, palette or CMYK", "Save it as RGB."
        ) from error


def _refuse_several(path, picture: Image.Image) -> None:
    if picture.format not in PHOTOGRAPHS and getattr(picture, "is_animated", False):
        count = getattr(picture, "n_frames", "several")
        raise MediaError(
            path,
            "several_pictures",
            f"a {picture.format} file of {count} pictures (an animation, or several pages)",
            "one picture",
            "Save the one that is meant as a PNG, or make an mp4 of them and list it under `videos`.",
        )


def _transparent_colour(path, picture: Image.Image) -> int | None:
    """Returns the grey of a PNG that stands for nothing, in the values its pixels will have."""
    clear = picture.info.get("transparency")
    png = picture if isinstance(picture, ImageFile.ImageFile) and picture.format == "PNG" else None
    rawmode = png.tile[0].args if png and png.tile else None
    if isinstance(clear, int) and picture.mode != "P":
        return clear * _LOW_BITS.get(rawmode, 1)
    if isinstance(clear, tuple) and rawmode == "RGB;16B":
        raise MediaError(
            path,
            "bad_pixels",
            "a 16-bit picture in which one colour stands for transparent",
            "8 bits a colour, or an alpha channel",
            "Save it with 8 bits a colour.",
        )
    return None


def _from_sixteen_bits(turned: Image.Image, opened: Image.Image, clear: int | None) -> Image.Image:
    """Scales greys from 0 to white down to 0 to 255."""
    grey = np.asarray(turned).astype(np.int64)
    tags = getattr(opened, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    white = (1 << bits) - 1
    shown = np.clip(np.rint(grey * (255 / white)), 0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        shown = 255 - shown
    if clear is not None:
        shown[grey == clear] = 255
    return Image.fromarray(shown).convert("RGB")


def _over_white(picture: Image.Image) -> Image.Image:
    """Lays a picture in mode RGBA over white."""
    white = Image.new("RGB", picture.size, (255, 255, 255))
    white.paste(picture, mask=picture.getchannel("A"))
    return white
