"""Which of a file's tracks is watched and heard, when the clip begins on the file's clock, and when frames are shown.

Frames are shown at the packets' own times, rather than at the rate a header promises.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from av.stream import Disposition

from mer_r1_jax.media.opening import MediaError, opened_container

DEFAULT_WEIGHT = 5_000_000  # what FFmpeg's command adds to a default track's pixels or channels
_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails  # cover art and previews are no video


def video_track(path, container):
    """Returns the video track to watch: the one FFmpeg's command would take.

    Raises:
        MediaError: the file has none (cover art is none), or the chosen one is in a codec FFmpeg does not know.
    """
    tracks = [track for track in container.streams.video if not track.disposition & _PICTURES]
    if not tracks:
        raise MediaError(path, "no_video", "no video track", "one", "List the file under `audios` if it is audio only.")
    return _checked(path, max(tracks, key=_video_score), "video")


def sound_track(path, container):
    """Returns the sound track to hear: the one FFmpeg's command, and through it librosa, would take.

    Raises:
        MediaError: reason "no_audio" when the file has none; or the chosen one is in a codec FFmpeg does not know.
    """
    tracks = list(container.streams.audio)
    if not tracks:
        raise MediaError(
            path, "no_audio", "no audio track", "one", "Add one, or set media.missing_audio to skip or silence."
        )
    return _checked(path, max(tracks, key=_sound_score), "audio")


def clip_start(path, container) -> float | None:
    """Returns the second of the file's clock at which the clip begins: where the first of its two tracks does.

    Other tracks do not count. None where neither says when it begins.
    """
    starts = []
    for choose in (video_track, sound_track):
        try:
            track = choose(path, container)
        except MediaError:
            continue
        if track.start_time is not None and track.time_base is not None:
            starts.append(float(track.start_time * track.time_base))
    return min(starts, default=None)


def _video_score(track) -> tuple[bool, bool, int]:
    context = track.codec_context
    size = context.width * context.height if context is not None else 0
    return _score(track, size)


def _sound_score(track) -> tuple[bool, bool, int]:
    context = track.codec_context
    return _score(track, context.channels if context is not None else 0)


def _score(track, size: int) -> tuple[bool, bool, int]:
    """FFmpeg's order: tracks that hold something, then the sum of size and default flag. `max` keeps the first."""
    return track.codec_context is not None, track.start_time is not None, size + DEFAULT_WEIGHT * is_default(track)


def is_default(track) -> bool:
    """Whether the file marks a track as the one to play."""
    return bool(track.disposition & Disposition.default)


def encoding_of(path) -> dict[str, str | None]:
    """Returns how a file is encoded, in FFmpeg's names; nothing is decoded.

    Returns:
        "container" (with its other names, such as "mov,mp4,m4a,3gp,3g2,mj2"), "video" and "sound" (codecs of the tracks
        that are watched and heard; None without one) and "pixels" (of the video, such as "yuv420p"; None without one).

    Raises:
        MediaError: it is no such file, or one of the two tracks is in a codec FFmpeg does not know.
    """
    with opened_container(path) as container:
        found: dict[str, str | None] = {"container": container.format.name}
        for kind, choose, absent in (("video", video_track, "no_video"), ("sound", sound_track, "no_audio")):
            try:
                context = choose(path, container).codec_context
            except MediaError as error:
                if error.reason != absent:
                    raise
                context = None
            found[kind] = context and context.codec.canonical_name
            if kind == "video":
                found["pixels"] = context and context.pix_fmt
    return found


def _checked(path, track, kind: str):
    if track.codec_context is None:
        raise MediaError(
            path, "unknown_codec", f"a {kind} track in a codec FFmpeg does not know", "a usual one", "Re-encode it."
        )
    return track


TOLERANCE = 0.1  # seconds two tracks may be apart before it is made good; FFmpeg's own threshold for drifting sound
RESTART = 0.5  # seconds a clock must fall back to count as one that starts anew, as in recordings that were joined
RESTART_UNORDERED = 10.0  # likewise where only times of display are known, which go back and forth a little


class Clock:
    """Follows the times of a track's packets and makes one rising clock of them where they start anew."""

    def __init__(self) -> None:
        self._shift = 0.0
        self._last: float | None = None
        self._last_decoded: float | None = None
        self._end: float | None = None

    def shown(self, packet) -> tuple[float, float] | None:
        """Returns the (start, end) in seconds of what a packet holds, None where it has no time."""
        time = packet.dts if packet.pts is None else packet.pts
        if time is None or packet.time_base is None:
            return None
        length = float((packet.duration or 0) * packet.time_base)
        display = float(time * packet.time_base)
        self._follow(display, None if packet.dts is None else float(packet.dts * packet.time_base))
        start = display + self._shift
        self._end = start + length if self._end is None else max(self._end, start + length)
        return start, start + length

    def _follow(self, display: float, decoded: float | None) -> None:
        """Notices a clock that starts anew. Times of decoding rise from packet to packet and tell it best, but are
        compared among themselves: Matroska's first packets have none, and may be shown long after the next ones."""
        order, last, restart = decoded, self._last_decoded, RESTART
        if order is None or last is None:
            order, last, restart = display, self._last, RESTART_UNORDERED
        if last is not None and self._end is not None and order + restart < last:
            self._shift = self._end - order
        self._last, self._last_decoded = display, self._last_decoded if decoded is None else decoded


@dataclasses.dataclass(frozen=True)
class FrameTimes:
    """What is known of a video's frames in time.

    Attributes:
        total: frames.
        rate: frames a second on the mean, over the whole clip.
        shown: float64[total], the second of the clip at which each is shown; None where they are evenly spread.
    """

    total: int
    rate: float
    shown: np.ndarray | None = None

    @property
    def duration(self) -> float:
        """Seconds of the clip."""
        return self.total / self.rate

    def at_even_times(self, indices: np.ndarray) -> np.ndarray:
        """Returns the frames to be seen where frames of these indices would be if they were evenly spread.

        Of frames at uneven times, as browsers and screen recorders write them, an even choice by number would be an
        uneven choice in time, and the model is told that its frames are evenly spread.
        """
        if self.shown is None:
            return indices
        seconds = indices / self.rate
        return np.clip(np.searchsorted(self.shown, seconds + 1e-6, side="right") - 1, 0, self.total - 1)


def frame_times(starts: list[float], last_seconds: float, stated_rate: float, clip_start: float) -> FrameTimes | None:
    """Returns the frames in time; None where their times say nothing.

    Args:
        starts: seconds at which each frame is shown, in any order.
        last_seconds: how long the last one is shown, 0 if that is not known.
        stated_rate: the header's rate, believed only where the times agree with it; 0 if there is none.
        clip_start: the second of the same clock at which the clip begins.
    """
    times = np.sort(np.asarray(starts, np.float64))
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    lead = times[0] - clip_start
    lead = lead if lead > TOLERANCE else 0.0  # the first picture stands until the second: nothing is shown before it
    span = times[-1] - times[0]
    seconds = lead + span + max(span / (len(times) - 1), last_seconds)
    if stated_rate and abs(len(times) / stated_rate - seconds) <= 0.5 / stated_rate:
        rate = stated_rate
    else:
        rate = len(times) / seconds
    shown = times - times[0] + lead
    uneven = np.abs(shown - np.arange(len(times)) / rate).max() > 0.5 / rate
    return FrameTimes(len(times), rate, shown if uneven else None)


def last_frame_seconds(starts: list[float], ends: list[float]) -> float:
    """Returns how long the last frame is shown according to its packet, 0 where packets do not know.

    Lengths that were made up from a header's rate do not add up to the times between the frames.
    """
    order = np.argsort(starts)
    if len(order) < 2:
        return 0.0
    lengths = np.asarray(ends)[order] - np.asarray(starts)[order]
    span = starts[order[-1]] - starts[order[0]]
    return float(lengths[-1]) if abs(lengths[:-1].sum() - span) <= 0.05 * span else 0.0


def times_of(packets: list[tuple[float, float]], total: int, stated: float, begin: float | None) -> FrameTimes | None:
    """Returns the frames in time from those of their packets, or from the header's rate where packets have none."""
    if packets and len(packets) == total:
        starts, ends = map(list, zip(*packets, strict=True))
        last = last_frame_seconds(starts, ends)
        times = frame_times(starts, last, stated, min(starts) if begin is None else begin)
        if times is not None:
            return times
    return FrameTimes(total, stated) if stated else None
