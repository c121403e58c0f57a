"""Writes a scene as a real clip: H.264 pictures and an AAC track in an mp4 file."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream

from mer_r1_jax.data.synthetic import face, voice
from mer_r1_jax.data.synthetic.world import SLOTS_PER_MODALITY, Scene, random_stream
from mer_r1_jax.storage.atomic_files import writing

FPS = 8
FRAMES = 16
# Without B-frames and lookahead: with them x264 gives different bytes now and then for pictures of this size.
VIDEO_OPTIONS = {"preset": "veryfast", "tune": "zerolatency", "crf": "20", "threads": "1"}
AUDIO_BIT_RATE = 48_000
AUDIO_OPTIONS = {"aac_coder": "fast"}  # the default one takes longer than everything else together
FACE_STREAM, VOICE_STREAM = 2, 3  # random streams of the drawing


def render_scene(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene.

    Returns:
        Frames uint8[16, 84, 84, 3] at 8 per second, and the voice float32[30720] at 16 kHz.
    """
    frames = face.draw_frames(scene.cues[:SLOTS_PER_MODALITY], random_stream(scene.key, FACE_STREAM), FRAMES, FPS)
    sound = voice.synthesise(
        scene.cues[SLOTS_PER_MODALITY : 2 * SLOTS_PER_MODALITY], random_stream(scene.key, VOICE_STREAM)
    )
    return frames, sound


def write_clip(path: str | Path, frames: np.ndarray, sound: np.ndarray) -> None:
    """Encodes frames and sound; the file appears whole or not at all.

    Args:
        path: the mp4 file to write.
        frames: uint8[n, h, w, 3] at FPS frames per second, h and w even.
        sound: float32[samples], mono, 16 kHz.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing("a clip", path):
        try:
            _encode(partial, frames, sound)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _encode(path: Path, frames: np.ndarray, sound: np.ndarray) -> None:
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("libx264", rate=FPS, options=VIDEO_OPTIONS)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=voice.RATE, layout="mono", options=AUDIO_OPTIONS)
        assert isinstance(audio, AudioStream)
        audio.bit_rate = AUDIO_BIT_RATE
        for number, picture in enumerate(_to_yuv(frames)):
            frame = av.VideoFrame.from_ndarray(picture, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for start in range(0, len(sound), 1024):
            block = av.AudioFrame.from_ndarray(sound[None, start : start + 1024], format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = voice.RATE, start, Fraction(1, voice.RATE)
            container.mux(audio.encode(block))
        container.mux(audio.encode(None))


def _to_yuv(frames: np.ndarray) -> np.ndarray:
    """Converts uint8[n, h, w, 3] RGB to planar 4:2:0 YUV, uint8[n, 3h/2, w] (BT.601, studio range), in integers.

    FFmpeg's own conversion depends, in the last bit and at this width, on bytes beyond the picture: the same frames
    would give different files.
    """
    count, height, width = frames.shape[:3]
    red, green, blue = np.moveaxis(frames.astype(np.int32), 3, 0)
    y = (66 * red + 129 * green + 25 * blue + 128 >> 8) + 16
    u = -38 * red - 74 * green + 112 * blue
    v = 112 * red - 94 * green - 18 * blue
    quarters = [plane.reshape(count, height // 2, 2, width // 2, 2).sum(axis=(2, 4)) for plane in (u, v)]
    chroma = [(plane + 512 >> 10) + 128 for plane in quarters]
    planes = [plane.reshape(count, -1) for plane in (y, *chroma)]
    return np.concatenate(planes, axis=1).astype(np.uint8).reshape(count, height * 3 // 2, width)
