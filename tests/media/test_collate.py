"""Batches: what padding adds, and that it changes nothing."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from support.prompts import (
    ask,
    builder,
    make_clips,
    noise_audio,
    noise_image,
    noise_video,
    simple_prompt,
    tiny_thinker,
)

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.collate import bucket_for, collate, prompt_shape
from mer_r1_jax.media.prompt import PromptError
from mer_r1_jax.omni.batch import BatchShape, FeatureLayout
from mer_r1_jax.omni.thinker import abstract_thinker, bind, init_params

THINKER = tiny_thinker()
LARGE = BatchShape(rows=5, tokens=320, vision_clips=3, frame_pairs=5, patches=48, audio_clips=2, audio_units=3)


def prompts() -> list:
    """Prompts that differ in every size, one of them with audio inside its video."""
    inside = builder(MediaConfig(use_audio_in_video=True)).build(
        dataclasses.replace(ask("And now?"), id="inside"), make_clips([noise_video(6, 56, 84)], own=[noise_audio(2.7)])
    )
    return [
        simple_prompt("text", "Only words."),
        simple_prompt(
            "apart", videos=[noise_video(4, 56, 84), noise_video(2, 28, 56, seed=5)], audios=[noise_audio(1.3)]
        ),
        None,
        inside,
        simple_prompt("heard", audios=[noise_audio(0.4), noise_audio(4.1, 3)], images=[noise_image(56, 112)]),
    ]


def test_shapes_are_the_buckets_whatever_is_inside():
    batch = collate(prompts(), LARGE, THINKER)
    X, M = 3 * 2 * 14 * 14, THINKER.audio.num_mel_bins
    shapes = {name: array.shape for name, array in _leaves(batch).items()}
    assert shapes == {
        "id_BT": (5, 320),
        "segment_BT": (5, 320),
        "position_3BT": (3, 5, 320),
        "source_BT2": (5, 320, 2),
        "patches_BVPSX": (5, 3, 5, 48, X),
        "position_BVS2": (5, 3, 48, 2),
        "window_BVS": (5, 3, 48),
        "pairs_BV": (5, 3),
        "mel_BAUFM": (5, 2, 3, 200, M),
        "frames_BA": (5, 2),
    }
    assert {array.dtype for array in _leaves(batch).values()} == {np.dtype("int32"), np.dtype("float32")}
    empty = collate([None], LARGE, THINKER)
    assert {name: array.shape for name, array in _leaves(empty).items()} == shapes


def _leaves(batch) -> dict[str, np.ndarray]:
    parts = (batch.tokens, batch.vision, batch.audio)
    return {field.name: getattr(part, field.name) for part in parts if part for field in dataclasses.fields(part)}


def test_padding_is_marked_as_such():
    batch = collate(prompts(), LARGE, THINKER)
    for row, prompt in enumerate(prompts()):
        length = 0 if prompt is None else len(prompt.ids)
        assert (batch.tokens.segment_BT[row, :length] == 1).all() and not batch.tokens.segment_BT[row, length:].any()
        assert (batch.tokens.id_BT[row, length:] == THINKER.pad_token_id).all()
        assert (batch.tokens.position_3BT[:, row, length:] == 1).all()
        assert (batch.tokens.source_BT2[row, length:, 0] == -1).all()
    np.testing.assert_array_equal(batch.vision.pairs_BV, [[0, 0, 0], [2, 1, 0], [0, 0, 0], [3, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(batch.audio.frames_BA, [[0, 0], [130, 0], [0, 0], [270, 0], [40, 410]])
    assert (batch.vision.window_BVS[1, 0, 24:] == -1).all() and (batch.vision.window_BVS[1, 0, :24] >= 0).all()
    assert (batch.vision.window_BVS[0] == -1).all()
    assert not batch.audio.mel_BAUFM[1, 0].reshape(-1, THINKER.audio.num_mel_bins)[130:].any()


def test_media_lie_where_they_belong():
    batch = collate(prompts(), LARGE, THINKER)
    prompt = prompts()[1]
    for number, clip in enumerate(prompt.vision):
        pairs, height, width = clip.grid
        np.testing.assert_array_equal(batch.vision.patches_BVPSX[1, number, :pairs, : height * width], clip.patches)
        assert not batch.vision.patches_BVPSX[1, number, pairs:].any()
    flat = batch.audio.mel_BAUFM[4].reshape(2, -1, THINKER.audio.num_mel_bins)
    for number, clip in enumerate(prompts()[4].audio):
        np.testing.assert_array_equal(flat[number, : len(clip.mel)], clip.mel)


@pytest.mark.slow
def test_a_model_sees_the_same_prompt_in_any_bucket():
    """Hidden states in a large, shared bucket equal those of the prompt alone in a smaller one."""
    graphdef, _, _ = abstract_thinker(THINKER)

    @jax.jit
    def make(key):
        # Wide weights: with the usual small ones a token that took a wrong feature would hardly show.
        return jax.tree.map(lambda x: x * 3.0 if x.ndim > 1 else x, init_params(THINKER, key))

    @jax.jit
    def hidden(params, batch):
        thinker = bind(graphdef, params)
        layout = FeatureLayout.of_batch(batch)
        return thinker.hidden(batch.tokens, thinker.encode_media(batch.vision, batch.audio), layout)

    params = make(jax.random.key(0))
    together = np.asarray(hidden(params, collate(prompts(), LARGE, THINKER)))
    assert np.isfinite(together).all()
    shapes = [dataclasses.asdict(prompt_shape(prompt)) for prompt in prompts() if prompt]
    small = BatchShape(**{name: max(shape[name] for shape in shapes) for name in shapes[0]})
    assert small.patches < LARGE.patches and small.vision_clips < LARGE.vision_clips
    for row in (1, 3, 4):
        prompt = prompts()[row]
        alone = np.asarray(hidden(params, collate([prompt], small, THINKER)))[0, : len(prompt.ids)]
        np.testing.assert_allclose(together[row, : len(prompt.ids)], alone, atol=1e-4, rtol=0)


def test_a_bucket_is_the_first_that_holds_all_prompts():
    small, large = simple_prompt("a"), simple_prompt("b", videos=[noise_video()])
    buckets = [dataclasses.replace(prompt_shape(small), rows=4), dataclasses.replace(prompt_shape(large), rows=4)]
    assert bucket_for([small, None], buckets) == buckets[0]
    assert bucket_for([small, large], buckets) == buckets[1]
    assert bucket_for([None, None], buckets) == buckets[0]


def test_a_prompt_no_bucket_holds_is_named():
    prompt = simple_prompt("big-clip", videos=[noise_video(8)])
    bucket = dataclasses.replace(prompt_shape(prompt), frame_pairs=3)
    with pytest.raises(PromptError, match="big-clip: got .*frame_pairs=4.*, expected at most .*frame_pairs=3"):
        bucket_for([prompt], [bucket])
    with pytest.raises(PromptError, match="big-clip: got .*frame_pairs=4"):
        collate([prompt], bucket, THINKER)


def test_more_prompts_than_rows_are_refused():
    prompt = simple_prompt()
    with pytest.raises(PromptError, match="got 2 prompts that fit no single bucket of 1 rows"):
        bucket_for([prompt, prompt], [prompt_shape(prompt)])
    with pytest.raises(PromptError, match="got 2 prompts for a bucket of 1 rows"):
        collate([prompt, prompt], prompt_shape(prompt), THINKER)
