"""Writes a scene as a real clip: H.264 pictures and an AAC track in an mp4 file."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from mer_r1_jax.data.synthetic import face, voice
from mer_r1_jax.data.synthetic.world import SLOTS_PER_MODALITY, Scene, random_stream

FPS = 8
FRAMES = 16
# Without B-frames and lookahead: with them x264 gives different bytes now and then for pictures of this size.
VIDEO_OPTIONS = {"preset": "veryfast", "tune": "zerolatency", "crf": "20", "threads": "1"}
AUDIO_BIT_RATE = 48_000
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
    with av.open(str(partial), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("libx264", rate=FPS, options=VIDEO_OPTIONS)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=voice.RATE, layout="mono")
        audio.bit_rate = AUDIO_BIT_RATE
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(_to_yuv(pixels), format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for start in range(0, len(sound), 1024):
            block = av.AudioFrame.from_ndarray(sound[None, start : start + 1024], format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = voice.RATE, start, Fraction(1, voice.RATE)
            container.mux(audio.encode(block))
        container.mux(audio.encode(None))
    os.replace(partial, path)


def _to_yuv(pixels: np.ndarray) -> np.ndarray:
    """Converts uint8[h, w, 3] RGB to planar 4:2:0 YUV, uint8[3h/2, w] (BT.601, studio range).

    FFmpeg's own conversion depends, in the last bit and at this width, on bytes beyond the picture: the same frames
    would give different files.
    """
    height, width = pixels.shape[:2]
    y, u, v = np.einsum("yxc,pc->pyx", pixels.astype(np.float64), _YUV_MATRIX) + _YUV_OFFSET[:, None, None]
    u, v = (plane.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3)) for plane in (u, v))
    planes = np.concatenate([plane.reshape(-1) for plane in (y, u, v)])
    return np.clip(np.rint(planes), 0, 255).astype(np.uint8).reshape(height * 3 // 2, width)


_YUV_MATRIX = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) / 255
_YUV_OFFSET = np.array([16.0, 128.0, 128.0])
