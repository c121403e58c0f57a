"""Shapes planned before the run hold every clip that may come, and a prompt that is too long is named."""

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support.clips import make_clip
from support.small_run import small_config_of

from mer_r1_jax.config.schema import MediaConfig, RunConfig
from mer_r1_jax.data.pipeline import PromptStream
from mer_r1_jax.data.prefetch import ClipPrefetcher, LoadThreads
from mer_r1_jax.data.quarantine import Quarantine
from mer_r1_jax.data.records import Record
from mer_r1_jax.media.clips import merge_factor
from mer_r1_jax.media.collate import bucket_for
from mer_r1_jax.media.frames import video_size
from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.media.prompt import PromptError
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
    assert rows.tokens.id_BT.shape == (5, shape.tokens)
    np.testing.assert_array_equal(rows.next_position_B, [prompt.next_position for prompt in prompts])
    assert len(set(rows.uid_B.tolist())) == 5


def test_places_of_broken_clips_stay_empty(small, wide_config, records):
    source = PromptSource(wide_config, small.tokenizer, small.backbone.config)
    buckets = plan_buckets(wide_config, small.backbone.config, records, rows=4)
    rows = prompt_rows([source.load(records[0]).prompt, None], buckets, small.backbone.config, [5, 6])
    assert rows.uid_B.tolist() == [5, 0, 0, 0] and rows.next_position_B[1:].tolist() == [0, 0, 0]
    assert not rows.tokens.segment_BT[1:].any() and not rows.vision.pairs_BV[1:].any()


@settings(max_examples=300)
@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    frames=st.sampled_from([2, 4, 6, 16, 768]),
    min_cells=st.sampled_from([1, 4, 9]),
    max_cells=st.sampled_from([9, 64, 768]),
    total=st.sampled_from([90_316_800, 20 * 28 * 28 * 4]),
    ratio=st.sampled_from([1.0, 3.0, 20.0, 200.0]),
)
@example(height=19, width=19, frames=2, min_cells=9, max_cells=9, total=90_316_800, ratio=1.0)  # rounding: 4 x 4 cells
@example(height=20, width=3980, frames=2, min_cells=9, max_cells=9, total=90_316_800, ratio=200.0)
def test_no_frame_is_larger_than_planned(height, width, frames, min_cells, max_cells, total, ratio):
    media = MediaConfig(
        video_min_pixels=min_cells * FACTOR**2,
        video_max_pixels=max_cells * FACTOR**2,
        video_total_pixels=total,
        max_frames=768,
        max_aspect_ratio=ratio,
    )
    assume(max(height, width) <= ratio * min(height, width))
    thinker = ThinkerConfig.tiny()
    assert merge_factor(thinker.vision) == FACTOR
    record = Record(id="r", messages=(), videos=("v.mp4",), file="f")
    planned = plan_buckets(RunConfig(media=media), thinker, [record], rows=1)[0]
    new_height, new_width = video_size(height, width, frames, FACTOR, media)
    assert (new_height // 14) * (new_width // 14) <= planned.patches
    assert planned.frame_pairs == 384


@pytest.mark.parametrize("size", [(4, 80), (80, 4), (2, 398), (398, 2), (40, 90), (38, 38)])
def test_strips_are_planned_for_or_refused_by_name(small, tmp_path, small_folder, size):
    """Where the smallest size is the largest allowed one, rounding up passes it; a side of one block passes it too."""
    height, width = size
    make_clip(tmp_path / "strip.mp4", seconds=0.5, size=size)
    record = Record(
        id="strip", messages=({"role": "user", "content": "?"},), videos=("strip.mp4",), file=str(tmp_path / "d.jsonl")
    )
    pixels = {"video_min_pixels": 84 * 84, "video_max_pixels": 84 * 84, "decode_workers": 0}
    config = small_config_of(
        small_folder,
        media=pixels | {"max_aspect_ratio": 200.0},
        data={"max_prompt_length": 256, "prompt_buckets": (256,)},
    )
    prompt = PromptSource(config, small.tokenizer, small.backbone.config).load(record).prompt
    (_, rows, columns) = prompt.vision[0].grid
    assert rows * columns > 36  # more than the nine blocks of the largest size
    (bucket,) = plan_buckets(config, small.backbone.config, [record], rows=1)
    assert bucket_for([prompt], [bucket]) == bucket and bucket.patches == 4 * 43
    narrow = small_config_of(small_folder, media=pixels | {"max_aspect_ratio": 2.0})
    if max(size) > 2 * min(size):
        with pytest.raises(MediaError, match=f"{width}x{height} pixels, expected sides at most 2 times apart") as error:
            PromptSource(narrow, small.tokenizer, small.backbone.config).load(record)
        assert error.value.reason == "bad_size"
    assert plan_buckets(narrow, small.backbone.config, [record], rows=1)[0].patches == 4 * 16


def test_prompt_that_no_planned_shape_holds_is_named_with_the_sizes(small, tmp_path, small_folder):
    record = Record(
        id="odd", messages=({"role": "user", "content": "Feel?"},), videos=("odd.mp4",), file=str(tmp_path / "d.jsonl")
    )
    make_clip(tmp_path / "odd.mp4", seconds=0.5, size=(84, 84))
    larger = small_config_of(small_folder, media={"video_max_pixels": 84 * 84, "decode_workers": 0})
    prompt = PromptSource(larger, small.tokenizer, small.backbone.config).load(record).prompt
    buckets = plan_buckets(small.config, small.backbone.config, [record], rows=1)
    with pytest.raises(PromptError, match=r"odd: got .*patches=36.*expected at most .*patches=16"):
        bucket_for([prompt], buckets)


def test_prompt_longer_than_the_cap_is_named_with_file_and_line(small, small_folder):
    config = small_config_of(
        small_folder, data={"max_prompt_length": 40, "prompt_buckets": ()}, media={"decode_workers": 0}
    )
    source = PromptSource(config, small.tokenizer, small.backbone.config)
    records = small.data.rl
    stream = PromptStream(records, 2, seed=0)
    loads = LoadThreads(source.load, 1, stall_seconds=60)
    with ClipPrefetcher(stream, loads, Quarantine(len(records), 0.5), prompts_ahead=0) as data:
        with pytest.raises(PromptError) as caught:
            data.next(1)
    message = str(caught.value)
    first = PromptStream(records, 2, seed=0).peek()[0].record
    assert message.startswith(f"{small_folder}/rl.jsonl:{first.line}: {first.id}: ")
    assert "data.max_prompt_length=40" in message or "max_prompt_length" in message
    assert any(f"{length} tokens" in message for length in (43, 50))


def test_odd_sound_is_told_in_the_log_once(small, wide_config, tmp_path, caplog):
    make_clip(tmp_path / "mute.mp4", loudness=0.0, size=(56, 56))
    make_clip(tmp_path / "good.mp4", size=(56, 56))
    source = PromptSource(wide_config, small.tokenizer, small.backbone.config)
    for name in ("mute.mp4", "good.mp4", "mute.mp4"):
        record = Record(
            id=name,
            messages=({"role": "user", "content": "Feel?"},),
            videos=(name,),
            audios=(name,),
            file=str(tmp_path / "data.jsonl"),
            line=1,
        )
        loaded = source.load(record)
        assert loaded.mute_audio == (name == "mute.mp4") and loaded.prompt.stats["mute_audio"] == loaded.mute_audio
    source.close()
    assert caplog.text.count("nothing but silence") == 1 and "mute.mp4: 1 sound track" in caplog.text
