"""Media files of many kinds for tests of the decoder, all made with PyAV and Pillow."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_video(
    path: Path,
    pictures: np.ndarray,
    fps: int = 16,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    samples: np.ndarray | None = None,
    rate: int = 16_000,
    options: dict | None = None,
    faststart: bool = False,
    audio_codec: str = "aac",
) -> Path:
    """Writes pictures uint8[n, h, w, 3] and, where given, sound float32[channels, samples]."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        video = container.add_stream(codec, rate=fps, options=options or {})
        video.height, video.width, video.pix_fmt = *pictures.shape[1:3], pix_fmt
        audio = None
        if samples is not None:
            audio = container.add_stream(audio_codec, rate=rate)
            audio.layout = "mono" if len(samples) == 1 else "stereo"
        for picture in pictures:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None:
            _encode_sound(container, audio, samples, rate)
    return path


def write_sound(path: Path, samples: np.ndarray, rate: int = 16_000, codec: str = "pcm_f32le") -> Path:
    """Writes sound float32[channels, samples] in the container the path's ending names."""
    with av.open(str(path), "w") as container:
        audio = container.add_stream(codec, rate=rate)
        audio.layout = "mono" if len(samples) == 1 else "stereo"
        _encode_sound(container, audio, samples, rate)
    return path


def _encode_sound(container, stream, samples: np.ndarray, rate: int) -> None:
    layout = "mono" if len(samples) == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32), format="fltp", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    # The container would guess the encoder's own format; its resampler repacks without changing values.
    for block in av.AudioResampler(format=stream.format, layout=layout, rate=rate).resample(frame):
        container.mux(stream.encode(block))
    container.mux(stream.encode(None))


def retimed(
    source: Path,
    path: Path,
    video: Callable[[float], float] = lambda second: second,
    audio: Callable[[float], float] = lambda second: second,
) -> Path:
    """Copies a file's packets into the container `path`'s ending names, each at the second the functions say."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in [packet for packet in old.demux() if packet.size]:
            move = video if packet.stream.type == "video" else audio
            base = Fraction(1, 90_000) if packet.stream.type == "video" else packet.time_base
            pts = round(move(float(packet.pts * packet.time_base)) / base)
            copy = av.Packet(bytes(packet))
            copy.pts = copy.dts = pts
            copy.time_base, copy.is_keyframe, copy.stream = base, packet.is_keyframe, streams[packet.stream.index]
            new.mux(copy)
    return path


def write_tracks(path: Path, sounds: Sequence[tuple[np.ndarray, int]], pictures: Sequence[tuple[np.ndarray, int]] = ()):
    """Writes several sound tracks float32[channels, samples] and videos uint8[n, h, w, 3], with their dispositions."""
    with av.open(str(path), "w") as container:
        videos, audios = [], []
        for shown, disposition in pictures:
            video = container.add_stream("libx264", rate=16, options={"bf": "0"})
            video.height, video.width, video.pix_fmt = *shown.shape[1:3], "yuv420p"
            video.disposition = disposition
            videos.append(video)
        for samples, disposition in sounds:
            audio = container.add_stream("aac", rate=16_000)
            audio.layout, audio.disposition = ("mono" if len(samples) == 1 else "stereo"), disposition
            audios.append(audio)
        for video, (shown, _) in zip(videos, pictures, strict=True):
            for picture in shown:
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(video.encode(None))
        for audio, (samples, _) in zip(audios, sounds, strict=True):
            _encode_sound(container, audio, samples, 16_000)
    return path


def tone(seconds: float, rate: int = 16_000, frequency: float = 440.0, loudness: float = 0.5) -> np.ndarray:
    """float32[samples]: a sine of `loudness`, at `rate` and `frequency` in Hz."""
    return (loudness * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def numbered_pictures(count: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """uint8[count, h, w, 3]: each picture one grey, brighter by a constant step, so that a frame tells its number."""
    greys = np.round(np.linspace(30, 220, count)).astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (count, *size, 3)).copy()


def frame_numbers(frames: np.ndarray, count: int) -> list[int]:
    """The numbers of decoded `numbered_pictures`."""
    greys = frames.reshape(len(frames), -1).mean(axis=1)
    return np.round((greys - 30) / 190 * (count - 1)).astype(int).tolist()


def rotate_mp4(path: Path, quarter_turns: int) -> None:
    """Writes a rotation into the header of an mp4's first track, as a phone does."""
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarter_turns % 4]
    set_matrix(path, (cos, sin, -sin, cos))


def set_matrix(path: Path, matrix: tuple[float, float, float, float]) -> None:
    """Writes a display matrix into the header of an mp4's first track: x' = a x + c y, y' = b x + d y."""
    a, b, c, d = (round(value * (1 << 16)) for value in matrix)
    data = bytearray(path.read_bytes())
    struct.pack_into(">9i", data, data.index(b"tkhd") + 4 + 4 + 20 + 16, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
