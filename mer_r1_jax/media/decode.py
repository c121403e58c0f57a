"""Reading video frames, audio samples and images from files with PyAV and Pillow, within bounds set before decoding.

Everything that goes wrong with a file ends in one `MediaError`. Memory is bounded: only sampled frames are kept, and a
clip whose header promises too much (seconds, pixels, frame or sample rate) is refused before a frame is decoded.
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
from mer_r1_jax.media.errors import MediaError
from mer_r1_jax.media.frames import FRAME_FACTOR, frame_count, frame_indices, image_size, video_size
from mer_r1_jax.media.opening import MediaFile, opened_container, opened_picture
from mer_r1_jax.media.resize import resize

MAX_SIDE = 8192  # pixels; a larger picture is a broken header or not a clip of a person
MAX_VIDEO_PIXELS = 8192 * 4608  # of a video's frame: 8K and no more; a decoder keeps a dozen of them at a time
MAX_FRAME_RATE = 1000.0
SAMPLE_RATES = (1_000, 384_000)
MAX_CHANNELS = 64
THREADED_PIXELS = 512 * 512  # pictures above this size are decoded with several threads

MIN_DECODED = 0.5  # fewer frames than this share of the packets means a damaged video

Size = tuple[int, int]


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
    """

    samples: np.ndarray
    cut: bool


@dataclasses.dataclass(frozen=True)
class _VideoHeader:
    """What is known of a video after its packets were counted, without decoding."""

    total: int
    rate: float


def read_video(path: str | Path | MediaFile, media: MediaConfig, factor: int | None = None) -> VideoFrames:
    """Reads the frames of a video that `media` asks for.

    Args:
        path: a file in one of `opening.CONTAINERS`, or one that is open.
        media: sampling and limits.
        factor: when given, frames are resized as they are decoded, to multiples of this many pixels.

    Raises:
        MediaError: for anything wrong with the file.
    """

    def evenly(header: _VideoHeader) -> np.ndarray:
        return frame_indices(header.total, frame_count(header.total, header.rate, media))

    return _read(path, media, factor, evenly)


def read_stills(path: str | Path | MediaFile, media: MediaConfig) -> VideoFrames:
    """Reads single pictures: the first frame and one every `1 / media.fps` seconds, at most `media.max_frames`.

    Unlike `read_video` it keeps the start of a long video rather than spreading over the whole of it, leaves the
    pictures as large as they are, and their number may be odd.

    Raises:
        MediaError: for anything wrong with the file.
    """

    def from_start(header: _VideoHeader) -> np.ndarray:
        every = max(1, int(header.rate / media.fps))
        return np.arange(0, header.total, every)[: media.max_frames]

    return _read(path, media, None, from_start)


def _read(
    path: str | Path, media: MediaConfig, factor: int | None, choose: Callable[[_VideoHeader], np.ndarray]
) -> VideoFrames:
    """Decodes the frames whose indices `choose` gives, in order."""
    header = _count_frames(path, media)
    pictures, decoded = _sample(path, header, choose(header), media, factor)
    if not pictures and decoded >= header.total * MIN_DECODED:
        # Fields, and frames that are never shown, are packets too: what decodes is what the video has.
        header = dataclasses.replace(header, total=decoded)
        pictures, decoded = _sample(path, header, choose(header), media, factor)
    if not pictures:
        found, expected = f"{decoded} frames that decode", f"the {header.total} that are stored"
        raise MediaError(path, "truncated", found, expected, "Encode the video again.")
    return VideoFrames(
        frames=np.stack(pictures),
        sampled_fps=len(pictures) / header.total * header.rate,
        duration=header.total / header.rate,
    )


def read_audio_track(path: str | Path | MediaFile, media: MediaConfig) -> AudioTrack:
    """Reads the first audio track of a file: the mean of its channels, resampled by soxr at high quality.

    Raises:
        MediaError: for anything wrong with the file, reason "no_audio" when it has no audio track.
    """
    with opened_container(path) as container:
        if not container.streams.audio:
            raise MediaError(
                path, "no_audio", "no audio track", "one", "Add one, or set media.missing_audio to skip or silence."
            )
        stream = container.streams.audio[0]
        _check_decodable(path, stream, "audio")
        _check_duration(path, container, stream, media)
        rate, channels = stream.rate or 0, stream.codec_context.channels
        if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1] or not 1 <= channels <= MAX_CHANNELS:
            raise MediaError(
                path,
                "bad_rate",
                f"an audio track of {channels} channels at {rate} Hz",
                f"1 to {MAX_CHANNELS} channels at {SAMPLE_RATES[0]} to {SAMPLE_RATES[1]} Hz",
                "Re-encode the audio.",
            )
        samples = _decode_audio(path, container, stream, media.max_audio_seconds)
    if not np.isfinite(samples).all():
        raise MediaError(path, "not_finite", "audio samples that are NaN or infinite", "finite ones", "Re-encode it.")
    if rate != media.sampling_rate:
        wanted = math.ceil(samples.size * media.sampling_rate / rate)
        samples = soxr.resample(samples, rate, media.sampling_rate, quality="HQ")[:wanted]
        samples = np.pad(samples, (0, wanted - samples.size))
    most = int(media.max_audio_seconds * media.sampling_rate)
    return AudioTrack(samples[:most].astype(np.float32, copy=False), cut=samples.size > most)


def read_image(path: str | Path | MediaFile, media: MediaConfig, factor: int) -> np.ndarray:
    """Returns uint8[h, w, 3]: an image over white, resized by Pillow's bicubic filter to multiples of `factor` pixels.

    Raises:
        MediaError: for anything wrong with the file.
    """
    try:
        with opened_picture(path) as picture:
            _check_size(path, *picture.size)
            if picture.mode == "P" and "transparency" in picture.info:
                picture = picture.convert("RGBA")
            if picture.mode == "RGBA":
                white = Image.new("RGB", picture.size, (255, 255, 255))
                white.paste(picture, mask=picture.getchannel("A"))
                picture = white
            picture = picture.convert("RGB")
            height, width = image_size(picture.height, picture.width, factor, media)
            return np.asarray(picture.resize((width, height)))
    except MediaError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(
            path, "corrupt", f"an image that fails to decode ({error})", "a whole one", "Make it again."
        ) from error


def _check_size(path: str | Path, width: int, height: int) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise MediaError(
            path,
            "bad_size",
            f"pictures of {width}x{height} pixels",
            f"1 to {MAX_SIDE} pixels a side",
            "Scale the clip down.",
        )


def _check_decodable(path, stream, kind: str) -> None:
    if stream.codec_context is None:
        raise MediaError(
            path, "unknown_codec", f"a {kind} track in a codec FFmpeg does not know", "a usual one", "Re-encode it."
        )


def _check_duration(path, container, stream, media: MediaConfig) -> None:
    """Refuses a clip whose header says it is too long."""
    seconds = [container.duration / av.time_base] if container.duration else []
    if stream.duration and stream.time_base:
        seconds.append(float(stream.duration * stream.time_base))
    if seconds and max(seconds) > media.max_clip_seconds:
        raise _too_long(path, f"{max(seconds):.1f}", media)


def _too_long(path, seconds: str, media: MediaConfig) -> MediaError:
    return MediaError(
        path,
        "too_long",
        f"a clip of {seconds} s",
        f"at most {media.max_clip_seconds:g} s",
        "Cut it, or raise media.max_clip_seconds.",
    )


def _video_stream(path, container):
    """Returns the first video stream that is not cover art."""
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise MediaError(path, "no_video", "no video track", "one", "List the file under `audios` if it is audio only.")
    stream = streams[0]
    _check_decodable(path, stream, "video")
    width, height = stream.codec_context.width, stream.codec_context.height
    _check_size(path, width, height)
    if width * height > MAX_VIDEO_PIXELS:
        found, expected = f"frames of {width}x{height} pixels", f"at most {MAX_VIDEO_PIXELS} pixels a frame"
        raise MediaError(path, "bad_size", found, expected, "Scale the clip down.")
    return stream


def _count_frames(path, media: MediaConfig) -> _VideoHeader:
    """Counts the video's packets, which are its frames, without decoding."""
    with opened_container(path) as container:
        stream = _video_stream(path, container)
        _check_duration(path, container, stream, media)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if not 0 < rate <= MAX_FRAME_RATE:
            raise MediaError(
                path,
                "bad_rate",
                f"{rate:g} frames/s",
                f"more than 0, at most {MAX_FRAME_RATE:g}",
                "Re-encode the video.",
            )
        total, end = 0, 0
        for packet in container.demux(stream):
            total += packet.size > 0 and not packet.is_discard
            time = packet.dts if packet.pts is None else packet.pts
            end = end if time is None else max(end, time + packet.duration)
            if total / rate > media.max_clip_seconds:
                raise _too_long(path, f"more than {media.max_clip_seconds:g}", media)
        # Headers also count what is no picture: an AVI's empty chunks, frames that an edit list leaves out.
        if total < stream.frames and not _reaches_end(stream, end, rate):
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
    return _VideoHeader(total=total, rate=rate)


def _reaches_end(stream, end: int, rate: float) -> bool:
    """Whether the last packet ends where the header says the track does; `end` counts the stream's time base."""
    if stream.duration is None or stream.time_base is None:
        return False
    missing = (stream.start_time or 0) + stream.duration - end
    return float(missing * stream.time_base) * rate < 0.5


def _sample(
    path, header: _VideoHeader, indices: np.ndarray, media: MediaConfig, factor: int | None
) -> tuple[list[np.ndarray], int]:
    """Decodes the video once and keeps the frames of the given indices.

    The file is opened anew rather than rewound: not every container seeks exactly to its start.

    Returns:
        the sampled frames, uint8[h, w, 3] each, or none when fewer decode than were counted; and how many decoded.
    """
    wanted = np.bincount(indices, minlength=header.total)
    pictures: list[np.ndarray] = []
    fit = _fitter(path, len(indices), media, factor)
    decoded = 0
    with opened_container(path) as container:
        stream = _video_stream(path, container)
        if stream.codec_context.width * stream.codec_context.height > THREADED_PIXELS:
            stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if decoded < header.total and wanted[decoded]:
                picture = fit(np.rot90(frame.to_ndarray(format="rgb24"), k=frame.rotation // 90))
                pictures.extend([picture] * int(wanted[decoded]))
            decoded += 1
    return (pictures if decoded >= header.total else []), decoded


def _fitter(path, count: int, media: MediaConfig, factor: int | None) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that resizes every frame to the size the first one asks for (`factor` None: leaves it)."""
    size: list[Size] = []

    def fit(picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[:2]
        if not size:
            try:
                size.append(video_size(height, width, count, factor, media) if factor else (height, width))
            except ValueError as error:
                raise MediaError(path, "bad_size", str(error), "a usual picture format", "Crop the clip.") from error
        return resize(picture, *size[0])

    return fit


def _decode_audio(path, container, stream, max_seconds: float) -> np.ndarray:
    """Returns float32[samples] at the stream's own rate: the mean of the channels, hardly more than `max_seconds`."""
    to_planar = av.AudioResampler(format="fltp")  # sample format only: its own down-mix is louder than a mean
    most = int((max_seconds + 1) * stream.rate)
    blocks, total = [], 0
    for frame in container.decode(stream):
        for block in to_planar.resample(frame):
            blocks.append(block.to_ndarray().mean(axis=0))
            total += blocks[-1].size
        if total >= most:
            break
    if not total:
        raise MediaError(
            path, "no_audio", "an audio track without samples", "sound", "Re-encode it, or set media.missing_audio."
        )
    return np.concatenate(blocks)[: _stated_samples(container, stream, total)]


def _stated_samples(container, stream, decoded: int) -> int:
    """Returns how many decoded samples are sound: in an mp4 the last codec block is filled up beyond the duration."""
    if "mp4" not in container.format.name or not stream.duration:
        return decoded
    stated = round(stream.duration * stream.time_base * stream.rate)
    block = stream.codec_context.frame_size or 0
    return stated if stated < decoded < stated + block else decoded
