"""Synthesises the voice of a clip: syllables of a harmonic tone.

Pitch register and its contour, syllable rate and loudness, tremor and timbre are set apart so widely that each shows
plainly in a log-mel picture of 64 bins.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy.signal import lfilter

from mer_r1_jax.data.synthetic.world import CATEGORIES, NEUTRAL

RATE = 16_000  # samples per second
SAMPLES = 30 * 1024  # 1.92 s: a whole number of AAC frames, and with the codec's padding still within 2 s
WAVETABLE = 2048  # samples of one period

REGISTERS = {"low": 120.0, "mid": 210.0, "high": 370.0}  # Hz
PITCHES = {  # register and contour
    None: ("mid", "level"),
    "joy": ("high", "lilting"),
    "sadness": ("low", "falling"),
    "anger": ("low", "rising"),
    "fear": ("high", "falling"),
    "disgust": ("mid", "falling"),
    "surprise": ("high", "rising"),
    "love": ("mid", "lilting"),
    "pride": ("mid", "rising"),
    "shame": ("low", "lilting"),
}
TEMPOS = {  # syllables per second, loudness in decibels
    None: (3.0, -12.0),
    "joy": (5.0, 0.0),
    "sadness": (1.5, -24.0),
    "anger": (3.0, 0.0),
    "fear": (8.0, -24.0),
    "disgust": (1.5, -12.0),
    "surprise": (8.0, 0.0),
    "love": (5.0, -24.0),
    "pride": (1.5, 0.0),
    "shame": (3.0, -24.0),
}
TIMBRES = {  # trembling, timbre
    None: (False, "clear"),
    "joy": (False, "bright"),
    "sadness": (True, "dull"),
    "anger": (False, "harsh"),
    "fear": (True, "breathy"),
    "disgust": (True, "harsh"),
    "surprise": (True, "bright"),
    "love": (False, "breathy"),
    "pride": (True, "clear"),
    "shame": (False, "dull"),
}
FORMANTS = {"clear": (700, 1300), "bright": (900, 2600), "harsh": (800, 1600), "breathy": (600, 1200), "dull": (350,)}
BREATH = {"breathy": 0.6, "harsh": 0.08}  # share of noise


def synthesise(cues: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Synthesises a clip's voice.

    Args:
        cues: displays of pitch, tempo and timbre.
        rng: decides on the small differences between speakers, and the noise.

    Returns:
        float32[30720] in [-1, 1], mono, 16 kHz.
    """
    pitch, tempo, timbre = (None if cue == NEUTRAL else CATEGORIES[cue] for cue in cues)
    register, contour = PITCHES[pitch]
    rate, loudness = TEMPOS[tempo]
    trembling, colour = TIMBRES[timbre]
    time = np.arange(SAMPLES) / RATE
    frequency = REGISTERS[register] * rng.uniform(0.95, 1.05) * 2.0 ** _contour(contour, time / time[-1])
    if trembling:
        frequency = frequency * (1 + 0.09 * np.sin(2 * np.pi * (9 * time + rng.random())))
    phase = np.cumsum(frequency) / RATE + rng.random()
    tone = _wavetable(colour)[(phase * WAVETABLE).astype(np.int64) % WAVETABLE]
    for formant in FORMANTS[colour]:
        tone = tone + 2.0 * _resonate(tone, formant * rng.uniform(0.95, 1.05))
    noise = rng.standard_normal(SAMPLES)
    share = BREATH.get(colour, 0.0)
    tone = (1 - share) * tone / tone.std() + share * lfilter([1, -0.95], [1], noise)
    if trembling:
        tone = tone * (1 + 0.6 * np.sin(2 * np.pi * (9 * time + rng.random())))
    voice = tone * _syllables(rate * rng.uniform(0.95, 1.05), time, rng.random())
    voice = voice / np.abs(voice).max() * 0.9 * 10 ** ((loudness + rng.uniform(-1.5, 1.5) - 1.5) / 20)
    return (voice + 3e-4 * noise).astype(np.float32)


def _contour(contour: str, x: np.ndarray) -> np.ndarray:
    """Octaves above the register's pitch, at x in [0, 1]."""
    return {
        "level": np.zeros_like(x),
        "falling": 0.5 - x,
        "rising": x - 0.5,
        "lilting": 0.45 * np.sin(2 * np.pi * 2 * x),
    }[contour]


def _syllables(rate: float, time: np.ndarray, phase: float) -> np.ndarray:
    """Loudness envelope: `rate` syllables a second, each a smooth bump, nearly silent between them."""
    bump = 0.5 - 0.5 * np.cos(2 * np.pi * (rate * time + 0.25 * phase))
    return 0.02 + 0.98 * np.clip(1.6 * bump - 0.3, 0, 1)


@functools.cache
def _wavetable(colour: str) -> np.ndarray:
    """One period of a tone whose harmonics fall off as the timbre says; full up to the Nyquist limit of the registers."""
    slope = {"clear": 1.0, "bright": 0.5, "harsh": 0.3, "breathy": 1.6, "dull": 2.4}[colour]
    harmonics = np.arange(1, 13 if colour != "dull" else 5)
    phases = np.random.Generator(np.random.Philox(7)).random(len(harmonics))
    angle = np.arange(WAVETABLE)[:, None] / WAVETABLE * harmonics + phases
    return (np.sin(2 * np.pi * angle) * harmonics**-slope).sum(axis=1)


def _resonate(tone: np.ndarray, formant: float) -> np.ndarray:
    """Two-pole resonance of 120 Hz width at `formant` Hz, with gain near 1 at its peak."""
    radius = np.exp(-np.pi * 120 / RATE)
    angle = 2 * np.pi * formant / RATE
    return lfilter([(1 - radius) * 2 * np.sin(angle)], [1, -2 * radius * np.cos(angle), radius**2], tone)
