"""Draws the face of a clip: brows and eyes, mouth, colour and movement, each in its place.

The parts are large and stay where they are (84 x 84 pixels are six by six patches of the vision tower): brows and eyes
in the upper half, the mouth in the lower, the colour behind and on the skin, the movement of the whole head.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from mer_r1_jax.data.synthetic.world import CATEGORIES, NEUTRAL

SIZE = 84  # pixels of a frame's side
SCALE = 4  # the face is drawn this many times larger, then averaged down
SKINS = ((245, 214, 186), (232, 190, 152), (205, 155, 115), (160, 112, 80))
HAIR = ((40, 28, 20), (95, 60, 30), (205, 165, 80), (130, 130, 135))
NEUTRAL_COLOUR = (128, 128, 128)
COLOURS = {
    "joy": (255, 222, 40),
    "sadness": (50, 90, 215),
    "anger": (220, 30, 25),
    "fear": (242, 242, 250),
    "disgust": (70, 150, 45),
    "surprise": (255, 135, 20),
    "love": (255, 130, 195),
    "pride": (105, 40, 160),
    "shame": (60, 38, 25),
}
INK = (25, 20, 25)
WHITE = (255, 255, 255)
TEAR = (70, 160, 255)
LIP = (190, 40, 60)


def draw_frames(cues: tuple[int, ...], rng: np.random.Generator, frames: int, fps: float) -> np.ndarray:
    """Draws a clip's frames.

    Args:
        cues: displays of eyes, mouth and colour.
        rng: decides on skin, hair, small shifts and the movement's phase.
        frames: how many.
        fps: frames per second.

    Returns:
        uint8[frames, 84, 84, 3].
    """
    eyes, mouth, colour = (None if cue == NEUTRAL else CATEGORIES[cue] for cue in cues)
    background = NEUTRAL_COLOUR if colour is None else COLOURS[colour]
    portrait = _draw_portrait(eyes, mouth, background, rng)
    phase, jitter = rng.random(), rng.uniform(-1, 1, 2)
    moved = [
        _move(portrait, background, *_movement(colour, number / fps, number, phase, jitter)) for number in range(frames)
    ]
    return np.stack([np.asarray(frame) for frame in moved])


def _movement(colour: str | None, t: float, number: int, phase: float, jitter) -> tuple[float, float, float, float]:
    """Shift right and down in pixels, turn in degrees, and zoom of the head at time `t` seconds."""
    # Sampled at 2 frames a second these frequencies advance by about a third of a period, never by a half or a whole.
    wave, bounce = (math.sin(2 * math.pi * (frequency * t + phase)) for frequency in (0.5, 2.1))
    flip = 1 if number % 2 else -1
    x, y, turn, zoom = {
        None: (0, 0, 0, 1),
        "joy": (0, 3.5 * bounce, 0, 1),
        "sadness": (0, 4 * t - 2, 4 * t, 1),
        "anger": (4 * flip, 0, 0, 1.04),
        "fear": (1.5 * flip, flip, 0, 1 - 0.11 * min(t, 1.5)),
        "disgust": (-3 * min(t, 1), 0, -12 * min(t, 1), 1),
        "surprise": (0, -3 * (t > 0.5), 0, 1 + 0.14 * (t > 0.5)),
        "love": (3 * wave, 0, 9 * wave, 1),
        "pride": (0, 4 - 4.5 * min(t, 1.7), 0, 1 + 0.03 * t),
        "shame": (0, 5 * min(t, 1.5) - 3, 0, 1 - 0.07 * min(t, 1.5)),
    }[colour]
    return x + jitter[0], y + jitter[1], turn, zoom


def _move(portrait: Image.Image, background, x: float, y: float, turn: float, zoom: float) -> Image.Image:
    """The frame that shows the portrait shifted, turned about its centre and zoomed."""
    scale = portrait.width / SIZE
    centre = SIZE / 2
    cos, sin = math.cos(math.radians(turn)) / zoom, math.sin(math.radians(turn)) / zoom
    # PIL wants the map from the frame's pixels to the portrait's.
    a, b = cos * scale, sin * scale
    c = (centre - cos * (centre + x) - sin * (centre + y)) * scale
    f = (centre + sin * (centre + x) - cos * (centre + y)) * scale
    return portrait.transform(
        (SIZE, SIZE), Image.Transform.AFFINE, (a, b, c, -b, a, f), Image.Resampling.BILINEAR, fillcolor=background
    )


class _Pen:
    """Draws in frame pixels on the enlarged canvas."""

    def __init__(self, background):
        self.image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), background)
        self.draw = ImageDraw.Draw(self.image)

    def disc(self, x, y, rx, ry, fill):
        self.draw.ellipse([v * SCALE for v in (x - rx, y - ry, x + rx, y + ry)], fill=fill)

    def half_disc(self, x, y, rx, ry, fill):
        """The lower half."""
        self.draw.pieslice([v * SCALE for v in (x - rx, y - ry, x + rx, y + ry)], 0, 180, fill=fill)

    def arc(self, x, y, rx, ry, degrees, width):
        """A part of an ellipse's line, between two angles that count clockwise from the right."""
        box = [v * SCALE for v in (x - rx, y - ry, x + rx, y + ry)]
        self.draw.arc(box, *degrees, fill=INK, width=round(width * SCALE))

    def line(self, points, width, fill=INK):
        flat = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(flat, fill=fill, width=round(width * SCALE), joint="curve")

    def shape(self, points, fill):
        self.draw.polygon([(x * SCALE, y * SCALE) for x, y in points], fill=fill)

    def heart(self, x, y, r, fill):
        self.disc(x - r * 0.5, y - r * 0.3, r * 0.55, r * 0.55, fill)
        self.disc(x + r * 0.5, y - r * 0.3, r * 0.55, r * 0.55, fill)
        self.shape([(x - r * 1.02, y - r * 0.1), (x + r * 1.02, y - r * 0.1), (x, y + r)], fill)


def _draw_portrait(eyes, mouth, background, rng: np.random.Generator) -> Image.Image:
    """The still face on its background, twice as large as a frame."""
    pen = _Pen(background)
    skin = SKINS[rng.integers(len(SKINS))]
    hair = HAIR[rng.integers(len(HAIR))]
    tint = tuple(round(0.7 * s + 0.3 * b) for s, b in zip(skin, background, strict=True))
    pen.disc(42, 40, 37, 38, hair)
    pen.disc(42, 46, 34, 37, tint)
    (_EYES[eyes])(pen)
    (_MOUTHS[mouth])(pen)
    return pen.image.reduce(SCALE // 2)


def _brows(pen: _Pen, inner: float, outer: float, width: float = 3.5):
    """Straight brows; `inner` and `outer` are the heights of their ends, downwards."""
    pen.line([(14, outer), (36, inner)], width)
    pen.line([(70, outer), (48, inner)], width)


def _pupils(pen: _Pen, r: float, white_x: float, white_y: float, y: float = 34, white=WHITE):
    for x in (26, 58):
        pen.disc(x, y, white_x, white_y, white)
        pen.disc(x, y, r, r, INK)


def _eyes_neutral(pen):
    _brows(pen, 21, 21)
    _pupils(pen, 3.5, 8, 5.5)


def _eyes_joy(pen):
    for x in (26, 58):
        pen.arc(x, 39, 10, 12, (180, 360), 4.5)


def _eyes_sadness(pen):
    _brows(pen, 17, 26)
    _pupils(pen, 3, 8, 4, 33)
    for x in (23, 61):
        pen.shape([(x, 36), (x - 5, 46), (x + 5, 46)], TEAR)
        pen.disc(x, 48, 5, 5, TEAR)


def _eyes_anger(pen):
    _brows(pen, 31, 16, 6)
    _pupils(pen, 3, 9, 4.5, 37, (255, 80, 70))


def _eyes_fear(pen):
    _brows(pen, 14, 20, 2.5)
    _pupils(pen, 2, 11, 11, 34)


def _eyes_disgust(pen):
    pen.line([(15, 27), (34, 34), (15, 41)], 4.5)
    pen.line([(69, 27), (50, 34), (69, 41)], 4.5)


def _eyes_surprise(pen):
    for x in (26, 58):
        pen.arc(x, 22, 11, 10, (190, 350), 3.5)
        pen.disc(x, 35, 9.5, 9.5, INK)
        pen.disc(x + 3, 32, 2.5, 2.5, WHITE)


def _eyes_love(pen):
    for x in (26, 58):
        pen.heart(x, 33, 11, (225, 20, 60))


def _eyes_pride(pen):
    pen.line([(14, 28), (36, 28)], 5)
    pen.arc(58, 24, 12, 12, (190, 350), 5)
    for x in (26, 58):
        pen.disc(x, 35, 10, 9, (115, 75, 190))
        pen.half_disc(x, 35, 9, 8, WHITE)
        pen.half_disc(x, 35, 4, 6, INK)


def _eyes_shame(pen):
    for x in (26, 58):
        pen.arc(x, 27, 10, 10, (15, 165), 3.5)
    for x in (19, 65):
        pen.disc(x, 48, 8, 5, (245, 70, 90))


def _mouth_neutral(pen):
    pen.line([(33, 65), (51, 65)], 2.5, (130, 70, 60))


def _mouth_joy(pen):
    pen.half_disc(42, 58, 19, 18, (150, 20, 35))
    pen.shape([(24, 58), (60, 58), (57, 64), (27, 64)], WHITE)


def _mouth_sadness(pen):
    pen.arc(42, 75, 16, 14, (195, 345), 4.5)


def _mouth_anger(pen):
    pen.shape([(23, 58), (61, 58), (61, 73), (23, 73)], INK)
    pen.shape([(25, 60), (59, 60), (59, 71), (25, 71)], WHITE)
    for x in (33, 42, 51):
        pen.line([(x, 59), (x, 72)], 1.5)
    pen.line([(24, 65.5), (60, 65.5)], 1.5)


def _mouth_fear(pen):
    pen.line([(21, 70), (28, 60), (35, 70), (42, 60), (49, 70), (56, 60), (63, 70)], 6, (205, 205, 255))
    pen.line([(21, 70), (28, 60), (35, 70), (42, 60), (49, 70), (56, 60), (63, 70)], 1.5)


def _mouth_disgust(pen):
    pen.line([(26, 60), (58, 60)], 3.5)
    pen.shape([(35, 61), (51, 61), (51, 72), (35, 72)], (240, 90, 130))
    pen.disc(43, 72, 8, 7, (240, 90, 130))


def _mouth_surprise(pen):
    pen.disc(42, 66, 10, 13, (70, 10, 20))


def _mouth_love(pen):
    pen.heart(42, 64, 10, LIP)


def _mouth_pride(pen):
    pen.line([(26, 68), (40, 68), (52, 64), (61, 55)], 4.5)


def _mouth_shame(pen):
    pen.disc(42, 69, 15, 6, LIP)
    pen.shape([(34, 60), (50, 60), (50, 69), (34, 69)], WHITE)
    pen.line([(42, 60), (42, 69)], 1.5)
    pen.line([(28, 60), (56, 60)], 2.5)


_EYES = {
    None: _eyes_neutral,
    "joy": _eyes_joy,
    "sadness": _eyes_sadness,
    "anger": _eyes_anger,
    "fear": _eyes_fear,
    "disgust": _eyes_disgust,
    "surprise": _eyes_surprise,
    "love": _eyes_love,
    "pride": _eyes_pride,
    "shame": _eyes_shame,
}
_MOUTHS = {
    None: _mouth_neutral,
    "joy": _mouth_joy,
    "sadness": _mouth_sadness,
    "anger": _mouth_anger,
    "fear": _mouth_fear,
    "disgust": _mouth_disgust,
    "surprise": _mouth_surprise,
    "love": _mouth_love,
    "pride": _mouth_pride,
    "shame": _mouth_shame,
}
