"""Whisper's log-mel spectrogram as Qwen2.5-Omni's processor computes it, without really padding to 300 seconds.

The processor zero-pads every clip to 300 s before the short-time Fourier transform. So the first frames see the clip
reflected at its start, the last frames see zeros instead of a reflection, and the maximum that sets the floor is taken
over a few more frames than are kept. All of that depends on the clip alone, and only that is computed here.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import scipy.sparse

WINDOW = 400  # samples of a frame
HOP = 160  # samples between frames
PADDED_SECONDS = 300  # `chunk_length` of the released processor
DYNAMIC_RANGE = 8.0  # decades below the loudest cell that are kept
SMALLEST_POWER = 1e-10


def mel_frames(samples: int) -> int:
    """Returns the number of mel frames of a clip of `samples` samples."""
    return math.ceil(samples / HOP)


def log_mel(samples: np.ndarray, n_mels: int, sampling_rate: int = 16_000) -> np.ndarray:
    """Returns the log-mel spectrogram, float32[F, M] with F = ceil(samples / 160).

    Args:
        samples: float[n], mono, in [-1, 1].
        n_mels: mel bins M.
        sampling_rate: in Hz.

    Raises:
        ValueError: for an empty clip or one longer than 300 seconds.
    """
    longest = PADDED_SECONDS * sampling_rate
    if samples.ndim != 1 or not 0 < samples.size <= longest:
        raise ValueError(
            f"got audio of shape {list(samples.shape)}, expected 1 to {longest} mono samples "
            f"({PADDED_SECONDS} s at {sampling_rate} Hz); lower media.max_audio_seconds to cut longer clips"
        )
    kept = mel_frames(samples.size)
    # Frames past the kept ones still see the clip's tail and count for the maximum.
    heard = min((samples.size + WINDOW // 2 - 1) // HOP + 1, longest // HOP)
    power = _power(samples, heard, longest)
    mel = np.log10(np.maximum(_mel_filters(n_mels, sampling_rate) @ power.T, SMALLEST_POWER))
    # The silence up to 300 s is log10(1e-10) and never the maximum of anything that matters.
    mel = np.maximum(mel[:, :kept], mel.max() - DYNAMIC_RANGE)
    return np.ascontiguousarray(((mel + 4.0) / 4.0).T, dtype=np.float32)


def _power(samples: np.ndarray, frames: int, longest: int) -> np.ndarray:
    """Returns the power spectra float64[frames, 201] of the clip, reflected at its start and zero after its end."""
    half = WINDOW // 2
    padded = np.zeros(max((frames - 1) * HOP + WINDOW, half + samples.size, WINDOW + 1))
    padded[half : half + samples.size] = samples
    padded[:half] = padded[half + 1 : WINDOW + 1][::-1]
    beyond = padded.size - half - longest
    if beyond > 0:  # a clip of just 300 s: its far end is reflected too
        end = half + longest
        padded[end:] = padded[end - 1 - beyond : end - 1][::-1]
    view = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[: frames * HOP : HOP]
    spectrum = np.fft.rfft(view * _hann(), axis=-1)
    return spectrum.real**2 + spectrum.imag**2


@functools.cache
def _hann() -> np.ndarray:
    """The periodic Hann window, float64[400]."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)


@functools.cache
def _mel_filters(n_mels: int, sampling_rate: int) -> scipy.sparse.csr_matrix:
    """Slaney's triangular filters of unit area from 0 to 8 kHz, float64[n_mels, 201]."""
    highest = 8000.0
    edges = _mel_to_hertz(np.linspace(_hertz_to_mel(0.0), _hertz_to_mel(highest), n_mels + 2))
    bins = np.linspace(0, sampling_rate // 2, 1 + WINDOW // 2)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    filters = np.maximum(0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))[:, None]
    # Sparse for speed, and because the sums then do not depend on how many threads a BLAS happens to use.
    return scipy.sparse.csr_matrix(filters)


LINEAR_UP_TO = 1000.0  # Slaney's scale is linear up to here (15 mel) and logarithmic above
MEL_AT_LINEAR_END = 15.0
MELS_PER_LOG_HERTZ = 27.0 / math.log(6.4)


def _hertz_to_mel(hertz: float) -> float:
    if hertz < LINEAR_UP_TO:
        return 3.0 * hertz / 200.0
    return MEL_AT_LINEAR_END + math.log(hertz / LINEAR_UP_TO) * MELS_PER_LOG_HERTZ


def _mel_to_hertz(mel: np.ndarray) -> np.ndarray:
    above = LINEAR_UP_TO * np.exp((mel - MEL_AT_LINEAR_END) / MELS_PER_LOG_HERTZ)
    return np.where(mel < MEL_AT_LINEAR_END, 200.0 * mel / 3.0, above)
