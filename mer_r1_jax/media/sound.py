"""A sound track on the clip's clock: what the file leaves out is silence, so that voice and face stay together.

Qwen's own utilities hand a clip to librosa, which reads it through FFmpeg's command with synchronisation off: there, a
late start and every gap are dropped and the rest of the sound moves ahead of the frames. Here both become silence of
the same length, which is counted; ordinary files have neither and give the same samples either way.
"""

from __future__ import annotations

import dataclasses

import av
import numpy as np

from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.media.tracks import TOLERANCE, Clock

SILENT_PEAK = 2 / 32_768  # two steps of 16 bits: digital silence, dithered or not
CANCELLED = 0.01  # a mean of channels this much quieter than the loudest of them (40 dB) is what cancelling leaves
SAMPLE_RATES = (1_000, 384_000)
MAX_CHANNELS = 64
UNTIMED = ("avi",)  # containers whose packets carry no times: FFmpeg derives them from a rate in the header


@dataclasses.dataclass(frozen=True)
class Sound:
    """Decoded sound at the track's own rate.

    Attributes:
        samples: float32[samples], the mean of the channels.
        rate: Hz.
        filled: seconds of silence put in where the file has none.
        silent: whether every channel is silent throughout.
        cancelled: whether the channels are not, but their mean is.
    """

    samples: np.ndarray
    rate: int
    filled: float
    silent: bool
    cancelled: bool


def seconds_held(container, stream, most: float) -> float:
    """Returns the seconds from a track's first to its last packet, or of all packets if that is more.

    Nothing is decoded, headers are not asked, and counting stops once there are more than `most`.
    """
    clock = Clock()
    first = last = None
    total = 0.0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        total += float((packet.duration or 0) * packet.time_base) if packet.time_base else 0.0
        if (shown := clock.shown(packet)) is not None:
            first = shown[0] if first is None else min(first, shown[0])
            last = shown[1] if last is None else max(last, shown[1])
        if max(total, (last or 0.0) - (first or 0.0)) > most:
            break
    return max(total, (last or 0.0) - (first or 0.0))


def decode_sound(path, container, stream, max_seconds: float, clip_start: float | None) -> Sound:
    """Decodes a track, hardly more than `max_seconds` of it.

    Args:
        path: named in errors.
        container: freshly opened.
        stream: the track.
        max_seconds: from the start of the clip.
        clip_start: the second of the file's clock at which the clip begins; None: where the track does.

    Raises:
        MediaError: for a track without samples, and for rates and channels no one records at.
    """
    mixer: _Mixer | None = None
    to_planar = av.AudioResampler(format="fltp")  # sample format only: its own down-mix is louder than a mean
    timed = container.format.name not in UNTIMED
    for frame in container.decode(stream):
        if mixer is None:
            # A header's rate is half the true one where a codec doubles it (HE-AAC): the decoded frame knows.
            check_rate(path, frame.sample_rate, len(frame.layout.channels))
            mixer = _Mixer(frame.sample_rate, max_seconds, clip_start)
        if timed and frame.pts is not None:
            mixer.go_to(float(frame.pts * frame.time_base))
        for block in to_planar.resample(frame):
            mixer.add(block.to_ndarray())
        if mixer.full:
            break
    if mixer is None or not mixer.heard:
        raise MediaError(
            path, "no_audio", "an audio track without samples", "sound", "Re-encode it, or set media.missing_audio."
        )
    return mixer.sound(_stated_samples(container, stream, mixer))


def check_rate(path, rate: int, channels: int) -> None:
    """Raises MediaError for rates and channels no one records at."""
    if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1] or not 1 <= channels <= MAX_CHANNELS:
        raise MediaError(
            path,
            "bad_rate",
            f"an audio track of {channels} channels at {rate} Hz",
            f"1 to {MAX_CHANNELS} channels at {SAMPLE_RATES[0]} to {SAMPLE_RATES[1]} Hz",
            "Re-encode the audio.",
        )


class _Mixer:
    """Puts decoded blocks on the clip's clock, mixed down, and watches how loud they are.

    Attributes:
        total: samples so far, silence put in included.
        lead: of those, silence before the first block.
        heard: samples that were decoded.
    """

    def __init__(self, rate: int, max_seconds: float, clip_start: float | None):
        self.total = self.lead = self.heard = 0
        self._rate, self._start = rate, clip_start
        self._most = int((max_seconds + 1) * rate)
        self._blocks: list[np.ndarray] = []
        self._filled = 0
        self._shift = 0
        self._peak = 0.0
        self._power: float = 0.0
        self._channel_power: np.ndarray | float = 0.0

    @property
    def full(self) -> bool:
        return self.total >= self._most

    def go_to(self, seconds: float) -> None:
        """Fills up with silence to a second of the file's clock, if that is far enough ahead."""
        if self._start is None:
            self._start = seconds
        gap = round((seconds - self._start) * self._rate) + self._shift - self.total
        if gap < -TOLERANCE * self._rate:
            self._shift -= gap  # a clock that starts anew, or sounds that overlap: what was recorded is kept
        elif gap > TOLERANCE * self._rate:
            gap = min(gap, self._most - self.total)
            self._blocks.append(np.zeros(gap, np.float32))
            self.total += gap
            self._filled += gap
            if not self.heard:
                self.lead = gap

    def add(self, block: np.ndarray) -> None:
        """Adds float32[channels, samples]."""
        mono = block.mean(axis=0)
        self._blocks.append(mono)
        self.total += mono.size
        self.heard += mono.size
        self._peak = max(self._peak, float(np.abs(block).max(initial=0.0)))
        self._power += float(np.square(mono, dtype=np.float64).sum())
        self._channel_power = self._channel_power + np.square(block, dtype=np.float64).sum(axis=1)

    def sound(self, length: int) -> Sound:
        """Returns the first `length` samples."""
        silent = self._peak <= SILENT_PEAK
        cancelled = not silent and self._power < CANCELLED**2 * float(np.max(self._channel_power))
        return Sound(np.concatenate(self._blocks)[:length], self._rate, self._filled / self._rate, silent, cancelled)


def _stated_samples(container, stream, mixer: _Mixer) -> int:
    """Returns how many samples are sound: in an mp4 the last codec block is filled up beyond the duration."""
    if "mp4" not in container.format.name or not stream.duration:
        return mixer.total
    stated = round(stream.duration * stream.time_base * mixer._rate) + mixer.lead
    block = stream.codec_context.frame_size or 0
    return stated if stated < mixer.total < stated + block else mixer.total
