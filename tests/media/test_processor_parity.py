"""Whole prompts against transformers' Qwen2_5OmniProcessor: text, ids, patches, mel frames, second per grid."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image
from support.omni_processor import run_processor
from support.prompts import TinyRecord, builder, make_clips, noise_samples, tiny_thinker
from support.tiny_tokenizer import tiny_tokenizer

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.data.synthetic.world_tokenizer import CHAT_TEMPLATE
from mer_r1_jax.media.clips import AudioInput, VisionInput, laid_out
from mer_r1_jax.media.frames import image_size, video_size
from mer_r1_jax.media.mel import log_mel
from mer_r1_jax.media.resize import resize

MEDIA = MediaConfig(
    video_min_pixels=9 * 784, video_max_pixels=40 * 784, image_min_pixels=4 * 784, image_max_pixels=30 * 784
)
MARKS = {"video": "<video>", "audio": "<audio>", "image": "<image>"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A chat: turns of (role, parts), a part being a text or a kind of medium, and its media in reading order."""

    turns: tuple[tuple[str, tuple[str, ...]], ...]
    videos: tuple[np.ndarray, ...] = ()
    audio: tuple[np.ndarray, ...] = ()
    images: tuple[np.ndarray, ...] = ()
    fps: float = 2.0
    interleaved: bool = False

    def messages(self) -> list[dict]:
        """The chat as transformers' template takes it."""
        return [
            {
                "role": role,
                "content": [{"type": part} if part in MARKS else {"type": "text", "text": part} for part in parts],
            }
            for role, parts in self.turns
        ]

    def options(self) -> dict:
        """Arguments of the processor's call: our pixel limits, the rate that was sampled."""
        options = {
            "videos_kwargs": {
                "size": {"shortest_edge": MEDIA.video_min_pixels, "longest_edge": MEDIA.video_max_pixels},
                "fps": self.fps,
            },
            "images_kwargs": {
                "size": {"shortest_edge": MEDIA.image_min_pixels, "longest_edge": MEDIA.image_max_pixels}
            },
        }
        if self.interleaved:
            options |= {"load_audio_from_video": True, "audio_from_video_indices": list(range(len(self.videos)))}
        return options

    def record(self) -> TinyRecord:
        """The chat as our records hold it."""
        return TinyRecord(
            tuple(
                {"role": role, "content": "".join(MARKS.get(part, part) for part in parts)}
                for role, parts in self.turns
            )
        )


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def resized_image(image: np.ndarray) -> np.ndarray:
    """An image as Pillow resizes it; qwen-omni-utils does so before the processor sees it."""
    height, width = image_size(*image.shape[:2], 28, MEDIA)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.BICUBIC))


def resized_video(video: np.ndarray, fps: float) -> VisionInput:
    count, height, width = video.shape[:3]
    return laid_out(resize(video, *video_size(height, width, count, 28, MEDIA)), fps, tiny_thinker().vision)


USER = "user"
CASES = {
    "text": Case(((USER, ("How does a person feel who says this?",)),)),
    "video": Case(((USER, ("video", "What does she feel?")),), videos=(pixels(4, 96, 128, 3),)),
    "upscaled": Case(((USER, ("video", "Hm?")),), videos=(pixels(4, 60, 62, 3),)),
    "audio": Case(((USER, ("audio", "Listen.")),), audio=(noise_samples(1.237),)),
    "image": Case(((USER, ("image", "Look.")),), images=(pixels(112, 84, 3),)),
    "apart": Case(
        ((USER, ("video", "audio", "I'm fine.")),), videos=(pixels(6, 90, 90, 3),), audio=(noise_samples(2.0),)
    ),
    "interleaved": Case(
        ((USER, ("video", "Both at once.")),),
        videos=(pixels(8, 84, 112, 3),),
        audio=(noise_samples(4.3),),
        interleaved=True,
    ),
    "interleaved_slow": Case(  # a frame pair every 5 seconds steps over two limits at once
        ((USER, ("video", "Slow.")),),
        videos=(pixels(6, 56, 84, 3),),
        audio=(noise_samples(6.5),),
        fps=0.4,
        interleaved=True,
    ),
    "interleaved_short_audio": Case(
        ((USER, ("video", "Fast.")),),
        videos=(pixels(18, 56, 56, 3),),
        audio=(noise_samples(1.1),),
        fps=3.0,
        interleaved=True,
    ),
    "turns": Case(
        (
            ("system", ("You read faces.",)),
            (USER, ("image", "Who is it?")),
            ("assistant", ("A friend.",)),
            (USER, ("What now: ", "audio", " and ", "audio", "?\n")),
        ),
        audio=(noise_samples(0.5, 1), noise_samples(0.81, 2)),
        images=(pixels(60, 200, 3),),
    ),
}


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    """What transformers makes of every case."""
    described = {
        name: {
            "messages": case.messages(),
            "videos": case.videos,
            "audio": case.audio,
            "images": [resized_image(image) for image in case.images],
            "options": case.options(),
        }
        for name, case in CASES.items()
    }
    return run_processor(tmp_path_factory.mktemp("processor"), tiny_tokenizer(), CHAT_TEMPLATE, described)


@pytest.fixture(scope="module")
def prompts():
    """What we make of every case."""
    vision, n_mels = tiny_thinker().vision, tiny_thinker().audio.num_mel_bins
    built = {}
    for name, case in CASES.items():
        audio = [AudioInput(log_mel(samples, n_mels), len(samples) / 16_000) for samples in case.audio]
        clips = make_clips(
            videos=[resized_video(video, case.fps) for video in case.videos],
            images=[laid_out(resized_image(image)[None], 0.0, vision) for image in case.images],
            audios=() if case.interleaved else audio,
            own=audio if case.interleaved else (),
        )
        media = dataclasses.replace(MEDIA, use_audio_in_video=case.interleaved)
        built[name] = builder(media).build(case.record(), clips)
    return built


@pytest.mark.parametrize("name", CASES)
def test_prompt_text_is_the_chat_template(name, processed, prompts):
    assert prompts[name].text == str(processed[name]["text"])


@pytest.mark.parametrize("name", CASES)
def test_prompt_ids_are_the_processors(name, processed, prompts):
    np.testing.assert_array_equal(prompts[name].ids, processed[name]["input_ids"][0])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.videos])
def test_video_patches_are_the_processors_bit_for_bit(name, processed, prompts):
    (video,) = prompts[name].vision
    np.testing.assert_array_equal([video.grid], processed[name]["video_grid_thw"])
    np.testing.assert_array_equal(video.patches.reshape(-1, 1176), processed[name]["pixel_values_videos"])
    assert video.second_per_grid == np.float32(processed[name]["video_second_per_grid"][0])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.images])
def test_image_patches_are_the_processors_bit_for_bit(name, processed, prompts):
    (image,) = prompts[name].vision
    np.testing.assert_array_equal([image.grid], processed[name]["image_grid_thw"])
    np.testing.assert_array_equal(image.patches.reshape(-1, 1176), processed[name]["pixel_values"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.audio])
def test_mel_frames_are_the_processors(name, processed, prompts):
    frames = processed[name]["feature_attention_mask"].sum(axis=1)
    assert [len(clip.mel) for clip in prompts[name].audio] == frames.tolist()
    for number, clip in enumerate(prompts[name].audio):
        theirs = processed[name]["input_features"][number, :, : frames[number]].T
        np.testing.assert_allclose(clip.mel, theirs, atol=2e-6, rtol=0)
