"""Log-mel spectrograms against transformers' WhisperFeatureExtractor, which really pads to 300 seconds."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from mer_r1_jax.media.mel import log_mel, mel_frames

RATE = 16_000
LONGEST = 300 * RATE
EXTRACTOR = WhisperFeatureExtractor(feature_size=128, sampling_rate=RATE, chunk_length=300)


def speech_like(samples: int, seed: int = 0) -> np.ndarray:
    """Noise that swells towards the end, so that the last frames set the maximum."""
    noise = np.random.default_rng(seed).normal(size=samples)
    return (0.1 * noise * np.linspace(0.01, 1, samples)).astype(np.float32)


def reference(samples: np.ndarray, n_mels: int = 128) -> np.ndarray:
    """transformers' NumPy path on the clip padded to 300 s, cut to the valid frames, [F, M]."""
    padded = np.zeros(LONGEST, np.float32)
    padded[: samples.size] = samples
    extractor = EXTRACTOR if n_mels == 128 else WhisperFeatureExtractor(n_mels, RATE, chunk_length=300)
    return extractor._np_extract_fbank_features(padded[None], "cpu")[0].T[: mel_frames(samples.size)]


@pytest.mark.parametrize("samples", [1, 100, 161, 399, 1000, 16_000, 32_123, LONGEST - 41, LONGEST - 30])
def test_mel_equals_whispers(samples):
    clip = speech_like(samples)
    ours = log_mel(clip, 128, RATE)
    assert ours.dtype == np.float32
    assert ours.shape == (-(-samples // 160), 128)
    np.testing.assert_allclose(ours, reference(clip), atol=2e-6, rtol=0)


def test_mel_equals_whispers_extractor_as_called():
    clip = speech_like(8000)
    # With torch installed this takes its float32 path.
    theirs = EXTRACTOR(clip, sampling_rate=RATE, return_attention_mask=True, return_tensors="np")
    valid = int(theirs["attention_mask"].sum())
    ours = log_mel(clip, 128, RATE)
    assert valid == len(ours)
    np.testing.assert_allclose(ours, theirs["input_features"][0].T[:valid], atol=1e-4, rtol=0)


def test_other_numbers_of_bins():
    clip = speech_like(5000)
    np.testing.assert_allclose(log_mel(clip, 80, RATE), reference(clip, 80), atol=2e-6, rtol=0)


def test_the_end_is_padded_with_zeros_and_not_reflected():
    clip = np.full(1600, 0.5, np.float32)
    reflected = EXTRACTOR._np_extract_fbank_features(clip[None], "cpu")[0].T
    assert np.abs(log_mel(clip, 128, RATE) - reflected)[-1].max() > 0.1


def test_frames_past_the_kept_ones_count_for_the_maximum():
    clip = np.zeros(1600, np.float32)
    clip[-1] = 1.0  # heard best by frame 10, which starts after the clip and is not kept
    np.testing.assert_allclose(log_mel(clip, 128, RATE), reference(clip), atol=2e-6, rtol=0)


def test_silence_is_the_floor():
    assert (log_mel(np.zeros(4000, np.float32), 128, RATE) == -1.5).all()


@pytest.mark.parametrize("shape", [(0,), (LONGEST + 1,), (2, 100)])
def test_impossible_audio_is_refused(shape):
    with pytest.raises(ValueError, match="expected 1 to 4800000 mono samples"):
        log_mel(np.zeros(shape, np.float32), 128, RATE)
