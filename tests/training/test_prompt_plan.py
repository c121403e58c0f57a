"""Shapes planned before the run hold every clip that may come, and a prompt that is too long is named."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.clips import make_clip
from support.small_run import small_config_of

from mer_r1_jax.config.schema import MediaConfig, RunConfig
from mer_r1_jax.data.pipeline import PromptStream
from mer_r1_jax.data.prefetch import ClipPrefetcher
from mer_r1_jax.data.quarantine import Quarantine
from mer_r1_jax.data.records import Record
from mer_r1_jax.media.collate import bucket_for
from mer_r1_jax.media.errors import PromptError
from mer_r1_jax.media.frames import video_size
from mer_r1_jax.media.vision import merge_factor
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.training.prompts import PromptSource, plan_buckets, prompt_rows, uid_of

FACTOR = 28
WIDER = {
    "data": {"max_prompt_length": 160, "prompt_buckets": ()},
    "media": {
        "decode_workers": 0,
        "missing_audio": "silence",
        "max_frames": 6,
        "fps": 4.0,
        "video_max_pixels": 112 * 112,
        "video_total_pixels": 3 * 112 * 112,
        "max_audio_seconds": 2.5,
    },
}
# name, seconds, frames a second, (height, width), sound
CLIPS = (
    ("short.mp4", 0.4, 5, (56, 56), True),  # two frames
    ("long.mp4", 4.0, 12, (112, 112), True),
    ("wide.mp4", 1.0, 25, (90, 320), True),
    ("tall.mkv", 2.6, 8, (240, 64), True),
    ("silent.mp4", 1.5, 10, (200, 200), False),
)


@pytest.fixture(scope="module")
def wide_config(small_folder):
    return small_config_of(small_folder, **WIDER)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("varied")
    for name, seconds, fps, size, sound in CLIPS:
        make_clip(folder / name, seconds=seconds, fps=fps, size=size, with_audio=sound)
    return tuple(
        Record(
            id=name,
            messages=({"role": "user", "content": "Feel?"},),
            videos=(name,),
            audios=(name,),
            subtitle="I never" if number % 2 else None,
            file=str(folder / "data.jsonl"),
            line=number + 1,
        )
        for number, (name, *_) in enumerate(CLIPS)
    )


def test_buckets_hold_clips_of_every_size_length_and_rate(small, wide_config, records):
    thinker = small.backbone.config
    buckets = plan_buckets(wide_config, thinker, records, rows=5)
    assert [bucket.tokens for bucket in buckets] == [40, 80, 120, 160]  # four even steps up to the cap
    source = PromptSource(wide_config, small.tokenizer, thinker)
    prompts = [source.load(record).prompt for record in records]
    assert len({clip.grid for prompt in prompts for clip in prompt.vision}) >= 4
    assert {prompt.stats["frames"] for prompt in prompts} > {2, 6}
    for prompt in prompts:
        alone = bucket_for([prompt], buckets)
        assert alone.tokens >= len(prompt.ids)
        smaller = [bucket for bucket in buckets if bucket.tokens < alone.tokens]
        assert all(bucket.tokens < len(prompt.ids) for bucket in smaller)
    rows = prompt_rows(prompts, buckets, thinker, [uid_of(prompt.id) for prompt in prompts])
    shape = max(bucket_for([prompt], buckets) for prompt in prompts)
    assert rows.batch.tokens.id_BT.shape == (5, shape.tokens)
    np.testing.assert_array_equal(rows.next_position_B, [prompt.next_position for prompt in prompts])
    assert len(set(rows.uid_B.tolist())) == 5


def test_places_of_broken_clips_stay_empty(small, wide_config, records):
    source = PromptSource(wide_config, small.tokenizer, small.backbone.config)
    buckets = plan_buckets(wide_config, small.backbone.config, records, rows=4)
    rows = prompt_rows([source.load(records[0]).prompt, None], buckets, small.backbone.config, [5, 6])
    assert rows.uid_B.tolist() == [5, 0, 0, 0] and rows.next_position_B[1:].tolist() == [0, 0, 0]
    assert not rows.batch.tokens.segment_BT[1:].any() and not rows.batch.vision.pairs_BV[1:].any()


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(28, 4000),
    width=st.integers(28, 4000),
    frames=st.sampled_from([2, 4, 6, 16, 768]),
    max_cells=st.sampled_from([9, 64, 768]),
    total=st.sampled_from([90_316_800, 20 * 28 * 28 * 4]),
)
def test_no_frame_is_larger_than_planned(height, width, frames, max_cells, total):
    """Whatever the picture's size, between the smallest one asked for and three to one."""
    media = MediaConfig(
        video_min_pixels=4 * FACTOR**2, video_max_pixels=max_cells * FACTOR**2, video_total_pixels=total, max_frames=768
    )
    assume(height * width >= media.video_min_pixels and max(height, width) <= 3 * min(height, width))
    thinker = ThinkerConfig.tiny()
    assert merge_factor(thinker.vision) == FACTOR
    record = Record(id="r", messages=(), videos=("v.mp4",), file="f")
    planned = plan_buckets(RunConfig(media=media), thinker, [record], rows=1)[0]
    new_height, new_width = video_size(height, width, frames, FACTOR, media)
    assert (new_height // 14) * (new_width // 14) <= planned.patches
    assert planned.frame_pairs == 384


def test_picture_that_no_planned_shape_holds_is_named_with_the_sizes(small, tmp_path, small_folder):
    # Its smallest size is the largest allowed one, and rounding up to whole blocks passes it.
    config = small_config_of(small_folder, media={"video_min_pixels": 84 * 84, "video_max_pixels": 84 * 84})
    make_clip(tmp_path / "odd.mp4", seconds=0.5, size=(40, 90))
    record = Record(
        id="odd", messages=({"role": "user", "content": "Feel?"},), videos=("odd.mp4",), file=str(tmp_path / "d.jsonl")
    )
    prompt = PromptSource(config, small.tokenizer, small.backbone.config).load(record).prompt
    buckets = plan_buckets(config, small.backbone.config, [record], rows=1)
    with pytest.raises(PromptError, match=r"odd: got .*patches=40.*expected at most .*patches=36"):
        bucket_for([prompt], buckets)


def test_prompt_longer_than_the_cap_is_named_with_file_and_line(small, small_folder):
    config = small_config_of(
        small_folder, data={"max_prompt_length": 40, "prompt_buckets": ()}, media={"decode_workers": 0}
    )
    source = PromptSource(config, small.tokenizer, small.backbone.config)
    records = small.data.rl
    stream = PromptStream(records, 2, seed=0)
    with ClipPrefetcher(
        stream, source.load, Quarantine(len(records), 0.5), prompts_ahead=0, threads=1, stall_seconds=60
    ) as data:
        with pytest.raises(PromptError) as caught:
            data.next(1)
    message = str(caught.value)
    first = PromptStream(records, 2, seed=0).peek()[0].record
    assert message.startswith(f"{small_folder}/rl.jsonl:{first.line}: {first.id}: ")
    assert "data.max_prompt_length=40" in message or "max_prompt_length" in message
    assert any(f"{length} tokens" in message for length in (43, 50))
