"""Synthesises the voice of a clip: syllables of a harmonic tone.

Pitch register and its contour, syllable rate and loudness, tremor and timbre are set apart so widely that each shows
plainly in a log-mel picture of 64 bins.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy.signal import butter, lfilter, sosfilt

from mer_r1_jax.data.synthetic.world import CATEGORIES, NEUTRAL

RATE = 16_000  # samples per second
SAMPLES = 30 * 1024  # 1.92 s: a whole number of AAC frames, and with the codec's padding still within 2 s
WAVETABLE = 2048  # samples of one period
RMS = 0.15  # of a loud voice
NOISE_FLOOR = 3e-4
TREMOR_RATE, TREMOR_DEPTH = 10.0, 0.3  # Hz, octaves: so fast and deep that it also blurs the harmonics

REGISTERS = {"low": 180.0, "mid": 290.0, "high": 430.0}  # Hz
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
RATES = {"slow": 1.3, "medium": 4.0, "hasty": 8.0}  # syllables per second
LOUDNESS = {"loud": (0, 0), "medium": (-12, -12), "quiet": (-24, -24), "swelling": (-26, 0), "fading": (0, -26)}  # dB
TEMPOS = {  # rate, and loudness from beginning to end
    None: ("medium", "medium"),
    "joy": ("hasty", "loud"),
    "sadness": ("slow", "fading"),
    "anger": ("medium", "loud"),
    "fear": ("hasty", "quiet"),
    "disgust": ("slow", "loud"),
    "surprise": ("hasty", "swelling"),
    "love": ("slow", "quiet"),
    "pride": ("slow", "swelling"),
    "shame": ("hasty", "fading"),
}
TIMBRES = {  # trembling, timbre
    None: (False, "clear"),
    "joy": (False, "bright"),
    "sadness": (False, "dull"),
    "anger": (False, "harsh"),
    "fear": (True, "clear"),
    "disgust": (False, "hissing"),
    "surprise": (True, "bright"),
    "love": (False, "breathy"),
    "pride": (False, "ringing"),
    "shame": (True, "harsh"),
}
HARMONICS = {  # exponent of their decay, and how many
    "clear": (1.0, 7),
    "bright": (0.0, 10),
    "harsh": (0.3, 10),
    "breathy": (1.6, 7),
    "dull": (2.0, 4),
    "hissing": (1.0, 7),
    "ringing": (1.0, 7),
}
FORMANTS = {  # Hz
    "clear": (700, 1300),
    "bright": (900, 2600),
    "harsh": (800, 1600),
    "breathy": (600, 1200),
    "dull": (350,),
    "hissing": (700, 1300),
    "ringing": (700, 1300),
}
NOISE = {  # share of noise in the voice, and its band in Hz
    "breathy": (0.45, (900, 4000)),
    "hissing": (0.3, (5500, 7900)),
    "harsh": (0.08, (500, 7900)),
    "ringing": (0.3, (3200, 3500)),
}


def synthesise(cues: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
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
    x = time / time[-1]
    tremor = TREMOR_DEPTH * np.sin(2 * np.pi * (TREMOR_RATE * time + rng.random())) if trembling else np.zeros(SAMPLES)
    frequency = REGISTERS[register] * rng.uniform(0.95, 1.05) * 2.0 ** (_contour(contour, x) + tremor)
    phase = np.cumsum(frequency) / RATE + rng.random()
    tone = _wavetable(colour)[(phase * WAVETABLE).astype(np.int64) % WAVETABLE]
    for formant in FORMANTS[colour]:
        tone = tone + 2.0 * _resonate(tone, formant * rng.uniform(0.95, 1.05))
    noise = rng.standard_normal(SAMPLES)
    tone = tone / tone.std()
    if colour in NOISE:
        share, band = NOISE[colour]
        breath = np.asarray(sosfilt(_band_pass(band), noise))
        tone = (1 - share) * tone + share * breath / breath.std()
    voice = tone * _syllables(RATES[rate] * rng.uniform(0.95, 1.05), time, rng.random())
    begin, end = LOUDNESS[loudness]
    level = 10 ** ((begin + (end - begin) * x + rng.uniform(-1.5, 1.5)) / 20)
    voice = np.tanh(RMS * level * voice / voice.std())
    return (voice + NOISE_FLOOR * noise).astype(np.float32)


def _contour(contour: str, x: np.ndarray) -> np.ndarray:
    """Octaves above the register's pitch, at x in [0, 1]."""
    return {
        "level": np.zeros_like(x),
        "falling": 0.55 - 1.1 * x,
        "rising": 1.1 * x - 0.55,
        "lilting": 0.6 * np.abs(np.sin(np.pi * 3 * x)),
    }[contour]


def _syllables(rate: float, time: np.ndarray, phase: float) -> np.ndarray:
    """Loudness envelope: `rate` syllables a second, each a smooth bump, nearly silent between them."""
    bump = 0.5 - 0.5 * np.cos(2 * np.pi * (rate * time + 0.25 * phase))
    return 0.02 + 0.98 * np.clip(1.6 * bump - 0.3, 0, 1)


@functools.cache
def _wavetable(colour: str) -> np.ndarray:
    """One period of a tone whose harmonics fall off as the timbre says."""
    slope, count = HARMONICS[colour]
    harmonics = np.arange(1, count + 1)
    phases = np.random.Generator(np.random.Philox(7)).random(len(harmonics))
    angle = np.arange(WAVETABLE)[:, None] / WAVETABLE * harmonics + phases
    return (np.sin(2 * np.pi * angle) * harmonics**-slope).sum(axis=1)


@functools.cache
def _band_pass(band: tuple[int, int]) -> np.ndarray:
    return np.asarray(butter(2, band, "bandpass", fs=RATE, output="sos"))


def _resonate(tone: np.ndarray, formant: float) -> np.ndarray:
    """Two-pole resonance of 120 Hz width at `formant` Hz, with gain near 1 at its peak."""
    radius = np.exp(-np.pi * 120 / RATE)
    angle = 2 * np.pi * formant / RATE
    resonance = [(1 - radius) * 2 * np.sin(angle)], [1, -2 * radius * np.cos(angle), radius**2]
    return np.asarray(lfilter(*resonance, tone))
