"""Processor tensors of every kind of prompt, with random media: the cases a port of the Thinker has to get right."""

from __future__ import annotations

import numpy as np
from support.tiny_hf import AUDIO, AUDIO_BOS, AUDIO_EOS, ENDOFTEXT, IMAGE, VIDEO, VISION_BOS, VISION_EOS

from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.parity.processor_inputs import ProcessorInputs

PATCH_VALUES = 1176
MEL_BINS = 128


class PromptMaker:
    """Writes one row of ids, and collects the media it mentions; everything random follows from the seed.

    Ids are laid out with transformers' rule for interleaving, restated here: positions must not test themselves.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.ids: list[int] = []
        self.images: list[tuple] = []
        self.videos: list[tuple] = []
        self.seconds: list[float] = []
        self.frames: list[int] = []

    def text(self, length: int) -> PromptMaker:
        self.ids += self.rng.integers(0, 470, length).tolist()
        return self

    def image(self, height: int, width: int) -> PromptMaker:
        self.images.append((1, height, width))
        self.ids += [VISION_BOS, *[IMAGE] * (height * width // 4), VISION_EOS]
        return self

    def video(self, pairs: int, height: int, width: int, second_per_grid: float) -> PromptMaker:
        self.videos.append((pairs, height, width))
        self.seconds.append(second_per_grid)
        self.ids += [VISION_BOS, *[VIDEO] * (pairs * height * width // 4), VISION_EOS]
        return self

    def audio(self, frames: int) -> PromptMaker:
        self.frames.append(frames)
        self.ids += [AUDIO_BOS, *[AUDIO] * audio_tokens(frames), AUDIO_EOS]
        return self

    def audio_in_video(self, pairs: int, height: int, width: int, second_per_grid: float, frames: int) -> PromptMaker:
        self.videos.append((pairs, height, width))
        self.seconds.append(second_per_grid)
        self.frames.append(frames)
        video = np.repeat(np.arange(pairs) * second_per_grid * 25, height * width // 4)
        pieces = [_chunks(video, VIDEO), _chunks(np.arange(audio_tokens(frames)), AUDIO)]
        self.ids += [VISION_BOS, AUDIO_BOS]
        for number in range(max(map(len, pieces))):
            self.ids += [token for stream in pieces if number < len(stream) for token in stream[number]]
        self.ids += [AUDIO_EOS, VISION_EOS]
        return self


def audio_tokens(frames: int) -> int:
    """Placeholders of an audio clip, as transformers' audio tower counts them."""
    return (((frames - 1) // 2 + 1) - 2) // 2 + 1


def _chunks(times: np.ndarray, token: int) -> list[list[int]]:
    chunks: list[list[int]] = [[]]
    for time in times:
        if time >= 50 * len(chunks):
            chunks.append([])
        chunks[-1].append(token)
    return chunks


def inputs_of(makers: list[PromptMaker], *, left: bool = True, interleaved: bool = False) -> ProcessorInputs:
    """Pads rows (on the left, as the processor does) and draws their media."""
    rng = np.random.default_rng(sum(len(maker.ids) for maker in makers))
    length = max(len(maker.ids) for maker in makers)
    ids = np.full((len(makers), length), ENDOFTEXT)
    mask = np.zeros_like(ids)
    for row, maker in enumerate(makers):
        where = slice(length - len(maker.ids), length) if left else slice(0, len(maker.ids))
        ids[row, where], mask[row, where] = maker.ids, 1
    arrays: dict = {"input_ids": ids, "attention_mask": mask, "use_audio_in_video": interleaved}
    images = [grid for maker in makers for grid in maker.images]
    videos = [grid for maker in makers for grid in maker.videos]
    frames = [count for maker in makers for count in maker.frames]
    if images:
        arrays["image_grid_thw"] = np.array(images)
        arrays["pixel_values"] = _pixels(rng, images)
    if videos:
        arrays["video_grid_thw"] = np.array(videos)
        arrays["pixel_values_videos"] = _pixels(rng, videos)
        arrays["video_second_per_grid"] = np.array([s for maker in makers for s in maker.seconds], np.float32)
    if frames:
        # The processor pads far beyond the longest clip, and with the value of silence, not with zeros.
        arrays["feature_attention_mask"] = (np.arange(max(frames) + 37) < np.array(frames)[:, None]).astype(np.int64)
        mel = rng.normal(size=(len(frames), MEL_BINS, max(frames) + 37)).astype(np.float32) * 0.5
        arrays["input_features"] = np.where(arrays["feature_attention_mask"][:, None] == 1, mel, -1.5).astype(
            np.float32
        )
    return ProcessorInputs.of(arrays)


def _pixels(rng: np.random.Generator, grids: list[tuple]) -> np.ndarray:
    return rng.normal(size=(sum(int(np.prod(grid)) for grid in grids), PATCH_VALUES)).astype(np.float32)


# Holds every case below, so that one compiled program serves them all.
ROOMY = BatchShape(rows=3, tokens=288, vision_clips=2, frame_pairs=6, patches=96, audio_clips=2, audio_units=5)

CASES = {
    "text": lambda: inputs_of([PromptMaker(0).text(23)]),
    "two_images": lambda: inputs_of([PromptMaker(1).text(4).image(8, 12).text(3).image(10, 6).text(5)]),
    "video": lambda: inputs_of([PromptMaker(2).text(4).video(3, 10, 8, 1.0).text(6)]),
    "odd_audio": lambda: inputs_of([PromptMaker(3).text(5).audio(455).text(4)]),
    "two_audios": lambda: inputs_of([PromptMaker(4).text(2).audio(200).text(4).audio(147).text(3)]),
    "video_and_audio": lambda: inputs_of([PromptMaker(5).text(3).video(2, 6, 10, 1.0).audio(399).text(6)]),
    "audio_in_video": lambda: inputs_of(
        [PromptMaker(6).text(4).audio_in_video(6, 6, 4, 1.0, 610).text(5)], interleaved=True
    ),
    "left_padded": lambda: inputs_of(
        [
            PromptMaker(7).text(3).image(6, 8).text(2),
            PromptMaker(8).text(30),
            PromptMaker(9).text(2).audio(130).video(2, 4, 6, 0.8).text(3),
        ]
    ),
    "right_padded": lambda: inputs_of(
        [PromptMaker(10).text(9), PromptMaker(11).text(4).image(4, 4).text(9)], left=False
    ),
    "several_turns": lambda: inputs_of(
        [
            PromptMaker(12).text(3).image(6, 4).text(4).audio_in_video(3, 4, 6, 1.0, 300).text(3).audio(77).text(3),
            PromptMaker(13).text(2).audio_in_video(4, 4, 4, 1.0, 401).text(5).image(4, 8).text(2),
        ],
        interleaved=True,
    ),
    "fractional_rate": lambda: inputs_of([PromptMaker(14).text(3).video(5, 4, 6, 2 / 3).text(4)]),
    # Trap 2 of the numbering: the audio ends long before the video, so the last piece is not the furthest one, or it is
    # the video's; positions go backwards where the audio comes last.
    "av_fractional": lambda: inputs_of(
        [PromptMaker(15).text(3).audio_in_video(5, 6, 4, 0.7, 430).text(6)], interleaved=True
    ),
    "av_backwards": lambda: inputs_of(
        [PromptMaker(16).text(3).audio_in_video(3, 4, 4, 1.9, 330).text(6)], interleaved=True
    ),
    # Trap 1: below one frame pair in two seconds a frame steps over two limits at once.
    "av_slow": lambda: inputs_of([PromptMaker(17).text(3).audio_in_video(3, 4, 4, 5.0, 900).text(5)], interleaved=True),
}
