"""When the frames of a video are shown: the packets' own times, rather than the rate a header promises."""

from __future__ import annotations

import dataclasses

import numpy as np

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
