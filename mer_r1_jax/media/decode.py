"""Reading video frames, audio samples and images from files with PyAV and Pillow, within bounds set before decoding.

Everything that goes wrong with a file ends in one `MediaError`. Memory is bounded: only sampled frames are kept, and a
clip whose track holds too much (seconds, pixels, frame or sample rate) is refused before a frame is decoded. What a
track holds is told by its packets; headers, which often promise something else, are asked only where packets are mute.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import soxr
from PIL import Image

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.fitting import check_size, fitter
from mer_r1_jax.media.frames import FRAME_FACTOR, frame_count, frame_indices, image_size
from mer_r1_jax.media.opening import MediaError, MediaFile, opened_container, opened_picture
from mer_r1_jax.media.pictures import upright_rgb
from mer_r1_jax.media.sound import check_rate, decode_sound, seconds_held
from mer_r1_jax.media.tracks import Clock, FrameTimes, clip_start, sound_track, times_of, video_track

MAX_VIDEO_PIXELS = 8192 * 4608  # of a video's frame: 8K and no more; a decoder keeps a dozen of them at a time
MAX_FRAME_RATE = 1000.0
THREADED_PIXELS = 512 * 512  # pictures above this size are decoded with several threads
# Streams without a container: FFmpeg gives their packets the times of 25 frames a second, whatever the codec says.
BARE_STREAMS = ("h264", "hevc", "m4v", "mpegvideo", "vc1")

MIN_DECODED = 0.5  # fewer frames than this share of the packets means a damaged video


@dataclasses.dataclass(frozen=True)
class VideoFrames:
    """Sampled frames of a video.

    Attributes:
        frames: uint8[n, h, w, 3] RGB.
        sampled_fps: frames per second after sampling.
        duration: seconds of the whole video.
    """

    frames: np.ndarray
    sampled_fps: float
    duration: float


@dataclasses.dataclass(frozen=True)
class AudioTrack:
    """Decoded audio.

    Attributes:
        samples: float32[samples], mono, at the configured sampling rate.
        cut: whether the track went on after `max_audio_seconds`.
        filled: seconds of silence put in for a late start and for gaps.
        silent: whether the track holds nothing but silence.
        cancelled: whether its channels hold sound that their mean does not: one is the other upside down.
    """

    samples: np.ndarray
    cut: bool
    filled: float = 0.0
    silent: bool = False
    cancelled: bool = False


def read_video(path: str | Path | MediaFile, media: MediaConfig, factor: int | None = None) -> VideoFrames:
    """Reads the frames of a video that `media` asks for.

    Args:
        path: a file in one of `opening.CONTAINERS`, or one that is open.
        media: sampling and limits.
        factor: when given, frames are resized as they are decoded, to multiples of this many pixels.

    Raises:
        MediaError: for anything wrong with the file.
    """

    def evenly(header: FrameTimes) -> np.ndarray:
        return frame_indices(header.total, frame_count(header.total, header.rate, media))

    return _read(path, media, factor, evenly)


def read_stills(path: str | Path | MediaFile, media: MediaConfig) -> VideoFrames:
    """Reads single pictures: the first frame and one every `1 / media.fps` seconds, at most `media.max_frames`.

    Unlike `read_video` it keeps the start of a long video rather than spreading over the whole of it, leaves the
    pictures as large as they are, and their number may be odd.

    Raises:
        MediaError: for anything wrong with the file.
    """

    def from_start(header: FrameTimes) -> np.ndarray:
        every = max(1, int(header.rate / media.fps))
        return np.arange(0, header.total, every)[: media.max_frames]

    return _read(path, media, None, from_start)


def _read(
    path: str | Path | MediaFile, media: MediaConfig, factor: int | None, choose: Callable[[FrameTimes], np.ndarray]
) -> VideoFrames:
    """Decodes the frames whose indices `choose` gives, in order; indices as if frames were evenly spread."""
    header = _count_frames(path, media)
    pictures, decoded = _sample(path, header, choose(header), media, factor)
    if not pictures and decoded.total >= header.total * MIN_DECODED:
        # Fields, and frames that are never shown, are packets too: what decodes is what the video has.
        header = decoded
        pictures, decoded = _sample(path, header, choose(header), media, factor)
    if not pictures:
        found, expected = f"{decoded.total} frames that decode", f"the {header.total} that are stored"
        raise MediaError(path, "truncated", found, expected, "Encode the video again.")
    return VideoFrames(
        frames=np.stack(pictures),
        sampled_fps=float(len(pictures) / header.total * header.rate),
        duration=float(header.duration),
    )


def read_audio_track(path: str | Path | MediaFile, media: MediaConfig) -> AudioTrack:
    """Reads the first audio track of a file: the mean of its channels, resampled by soxr at high quality.

    Raises:
        MediaError: for anything wrong with the file, reason "no_audio" when it has no audio track.
    """
    with opened_container(path) as container:
        stream = sound_track(path, container)
        held = seconds_held(container, stream, media.max_clip_seconds)
        if held > media.max_clip_seconds:
            raise _too_long(path, _length(container, media), media)
    with opened_container(path) as container:
        stream = sound_track(path, container)
        check_rate(path, stream.rate or 0, stream.codec_context.channels)
        sound = decode_sound(path, container, stream, media.max_audio_seconds, clip_start(path, container))
    samples, rate = sound.samples, sound.rate
    if not np.isfinite(samples).all():
        raise MediaError(path, "not_finite", "audio samples that are NaN or infinite", "finite ones", "Re-encode it.")
    if rate != media.sampling_rate:
        wanted = math.ceil(samples.size * media.sampling_rate / rate)
        samples = soxr.resample(samples, rate, media.sampling_rate, quality="HQ")[:wanted]
        samples = np.pad(samples, (0, wanted - samples.size))
    most = int(media.max_audio_seconds * media.sampling_rate)
    return AudioTrack(
        samples[:most].astype(np.float32, copy=False),
        cut=samples.size > most,
        filled=sound.filled,
        silent=sound.silent,
        cancelled=sound.cancelled,
    )


def read_image(path: str | Path | MediaFile, media: MediaConfig, factor: int) -> np.ndarray:
    """Returns uint8[h, w, 3]: an image over white, resized by Pillow's bicubic filter to multiples of `factor` pixels.

    Raises:
        MediaError: for anything wrong with the file.
    """
    try:
        with opened_picture(path) as picture:
            check_size(path, *picture.size)
            picture = upright_rgb(path, picture)
            height, width = image_size(picture.height, picture.width, factor, media)
            return np.asarray(picture.resize((width, height)))
    except MediaError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(
            path, "corrupt", f"an image that fails to decode ({error})", "a whole one", "Make it again."
        ) from error


def _length(container, media: MediaConfig) -> str:
    """Words for the seconds of a clip whose packets are more than allowed: the header's, if it says so too."""
    stated = (container.duration or 0) / av.time_base
    return f"{stated:.1f}" if stated > media.max_clip_seconds else f"more than {media.max_clip_seconds:g}"


def _too_long(path, seconds: str, media: MediaConfig) -> MediaError:
    return MediaError(
        path,
        "too_long",
        f"a clip of {seconds} s",
        f"at most {media.max_clip_seconds:g} s",
        "Cut it, or raise media.max_clip_seconds.",
    )


def _video_stream(path, container):
    """Returns the video track to read, whose pictures are of a size that can be."""
    stream = video_track(path, container)
    width, height = stream.codec_context.width, stream.codec_context.height
    check_size(path, width, height)
    if width * height > MAX_VIDEO_PIXELS:
        found, expected = f"frames of {width}x{height} pixels", f"at most {MAX_VIDEO_PIXELS} pixels a frame"
        raise MediaError(path, "bad_size", found, expected, "Scale the clip down.")
    return stream


def _count_frames(path, media: MediaConfig) -> FrameTimes:
    """Counts the video's packets, which are its frames, and notes their times, without decoding."""
    with opened_container(path) as container:
        stream = _video_stream(path, container)
        begin = clip_start(path, container)
        packets, total, end = _packet_times(path, container, stream, media)
        stated = float(stream.average_rate or stream.guessed_rate or 0)
        if container.format.name in BARE_STREAMS and stream.codec_context.framerate:
            packets, stated = [], float(stream.codec_context.framerate)
        times = times_of(packets, total, stated, begin)
        if times is None or not 0 < times.rate <= MAX_FRAME_RATE:
            raise MediaError(
                path,
                "bad_rate" if total >= FRAME_FACTOR else "no_frames",
                f"{total} video frame(s) at {stated if times is None else times.rate:g} frames/s",
                f"at least {FRAME_FACTOR}, at more than 0 and at most {MAX_FRAME_RATE:g} frames/s",
                "Re-encode the video; list stills under `images`.",
            )
        if times.duration > media.max_clip_seconds:
            raise _too_long(path, f"{times.duration:.1f}", media)
        # Headers also count what is no picture: an AVI's empty chunks, frames that an edit list leaves out.
        if total < stream.frames and not _reaches_end(stream, end, times.rate):
            raise MediaError(
                path,
                "truncated",
                f"{total} of the {stream.frames} frames its header announces",
                "all of them",
                "The file is cut short: copy or encode it again.",
            )
    if total < FRAME_FACTOR:
        raise MediaError(
            path, "no_frames", f"{total} video frame(s)", f"at least {FRAME_FACTOR}", "List stills under `images`."
        )
    return times


def _packet_times(path, container, stream, media: MediaConfig) -> tuple[list[tuple[float, float]], int, int]:
    """Returns (start, end) in seconds of each frame whose packet has a time, all frames, and where the last one ends
    in the track's time base. Counting stops at a clip that is too long."""
    clock = Clock()
    packets: list[tuple[float, float]] = []
    total, end = 0, 0
    for packet in container.demux(stream):
        shown = clock.shown(packet)
        time = packet.dts if packet.pts is None else packet.pts
        end = end if time is None else max(end, time + packet.duration)
        if not packet.size or packet.is_discard:
            continue
        total += 1
        if shown is not None:
            packets.append(shown)
        if total > media.max_clip_seconds * MAX_FRAME_RATE or (
            packets and packets[-1][0] - packets[0][0] > media.max_clip_seconds
        ):
            raise _too_long(path, _length(container, media), media)
    return packets, total, end


def _reaches_end(stream, end: int, rate: float) -> bool:
    """Whether the last packet ends where the header says the track does; `end` counts the stream's time base."""
    if stream.duration is None or stream.time_base is None:
        return False
    missing = (stream.start_time or 0) + stream.duration - end
    return float(missing * stream.time_base) * rate < 0.5


def _sample(
    path, times: FrameTimes, indices: np.ndarray, media: MediaConfig, factor: int | None
) -> tuple[list[np.ndarray], FrameTimes]:
    """Decodes the video once and keeps the frames to be seen at the times of the given indices.

    The file is opened anew rather than rewound: not every container seeks exactly to its start.

    Returns:
        the sampled frames, uint8[h, w, 3] each, or none when fewer decode than were counted; and what decoded.
    """
    wanted = np.bincount(times.at_even_times(indices), minlength=times.total)
    pictures: list[np.ndarray] = []
    starts: list[float] = []
    decoded = 0
    with opened_container(path) as container:
        stream = _video_stream(path, container)
        begin = clip_start(path, container)
        fit = fitter(path, stream, len(indices), media, factor)
        if stream.codec_context.width * stream.codec_context.height > THREADED_PIXELS:
            stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if decoded < times.total and wanted[decoded]:
                pictures.extend([fit(frame)] * int(wanted[decoded]))
            if frame.time is not None:
                starts.append(frame.time)
            decoded += 1
    if decoded >= times.total:
        return pictures, times
    shown = [(start, start) for start in starts] if starts == sorted(starts) else []
    return [], times_of(shown, decoded, times.rate, begin) or dataclasses.replace(times, total=decoded, shown=None)
