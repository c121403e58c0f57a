"""TMRoPE numbering against transformers, its odd cases, and token counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.omni_cases import CASES, PromptMaker, audio_tokens, inputs_of
from support.omni_model import mutant, tiny_port
from support.tiny_hf import AUDIO, VIDEO

from mer_r1_jax.omni import positions
from mer_r1_jax.omni.positions import (
    MediaSizes,
    PositionError,
    audio_token_count,
    interleave,
    rope_positions,
    vision_token_count,
)
from mer_r1_jax.parity.transformers_reference import torch_inputs


def theirs(inputs) -> np.ndarray:
    """position_ids as transformers computes them."""
    tensors = torch_inputs(inputs)
    lengths = tensors["feature_attention_mask"].sum(-1) if "feature_attention_mask" in tensors else None
    return (
        tiny_port()
        .reference.model.get_rope_index(
            tensors["input_ids"],
            tensors.get("image_grid_thw"),
            tensors.get("video_grid_thw"),
            tensors["attention_mask"],
            tensors["use_audio_in_video"],
            lengths,
            tensors.get("video_second_per_grid"),
        )[0]
        .numpy()
    )


def ours(maker: PromptMaker, *, interleaved: bool, module=positions) -> tuple[np.ndarray, int]:
    return module.rope_positions(
        np.array(maker.ids),
        tiny_port().config,
        MediaSizes(
            image_grids=maker.images,
            video_grids=maker.videos,
            second_per_grids=maker.seconds,
            audio_lengths=maker.frames,
            use_audio_in_video=interleaved,
        ),
    )


@st.composite
def prompts(draw) -> tuple[PromptMaker, bool]:
    """A random prompt of up to five media and whether its videos are interleaved with their audio."""
    interleaved = draw(st.booleans())
    maker = PromptMaker(0).text(draw(st.integers(1, 4)))
    side, frames = st.sampled_from((2, 4, 6, 10)), st.integers(3, 900)
    seconds = st.sampled_from((0.04, 0.5, 2 / 3, 0.7, 1.0, 1.3, 1.9, 2.0, 2.5, 5.0))
    for kind in draw(st.lists(st.sampled_from(("image", "video", "audio")), max_size=5)):
        if kind == "image":
            maker.image(draw(side), draw(side))
        elif kind == "audio":
            maker.audio(draw(frames))
        elif interleaved:
            maker.audio_in_video(draw(st.integers(1, 7)), draw(side), draw(side), draw(seconds), draw(frames))
        else:
            maker.video(draw(st.integers(1, 7)), draw(side), draw(side), draw(seconds))
        maker.text(draw(st.integers(0, 3)))
    return maker, interleaved


@settings(max_examples=150)
@given(prompts())
def test_positions_are_those_of_transformers(drawn):
    maker, interleaved = drawn
    inputs = inputs_of([maker], interleaved=interleaved)
    expected = theirs(inputs)[:, 0]
    position_3T, next_position = ours(maker, interleaved=interleaved)
    np.testing.assert_array_equal(position_3T, expected)
    assert next_position == expected[:, -1].max() + 1


@settings(max_examples=100)
@given(st.integers(1, 9), st.sampled_from((2, 4, 6)), st.floats(0.03125, 6, width=32), st.integers(3, 1200))
def test_interleaving_covers_both_streams_once_and_in_order(pairs, side, seconds, frames):
    counts = {"video": vision_token_count((pairs, side, side)), "audio": audio_token_count(frames)}
    pieces = interleave((pairs, side, side), seconds, counts["audio"], tiny_port().config)
    for kind, count in counts.items():
        ranges = [(piece.start, piece.stop) for piece in pieces if piece.kind == kind]
        assert ranges[0][0] == 0 and ranges[-1][1] == count
        assert all(before[1] == after[0] for before, after in zip(ranges, ranges[1:], strict=False))
    assert pieces[0].kind == "video"


# One mistake a line: what is planted, and a case whose positions it changes.
MISTAKES = {
    "a cut raises the limit past the frame's time (trap 1)": (
        [("            chunk += 1\n", "            chunk = time // limit + 1\n")],
        "av_slow",
    ),
    "the cursor follows the block's largest position (trap 2)": (
        [("self.cursor = int(piece_3T.max()) + 1", "self.cursor = max(self.cursor, int(piece_3T.max()) + 1)")],
        "av_backwards",
    ),
    "the brackets of interleaved audio count twice": (
        [("self._append(np.full((3, 2), self.cursor))", "self._text(2)")],
        "audio_in_video",
    ),
    "frame times are rounded instead of truncated": (
        [("np.float32(position_id_per_seconds)).astype(", "np.float32(position_id_per_seconds)).round().astype(")],
        "fractional_rate",
    ),
    "seconds per pair pass through bfloat16": (
        [("np.float32(second_per_grid)", "np.float32(__import__('ml_dtypes').bfloat16(second_per_grid))")],
        "av_fractional",
    ),
    "the video comes after the audio": (
        [("for kind, ranges in streams if", "for kind, ranges in streams[::-1] if")],
        "audio_in_video",
    ),
    "rows and columns are swapped": (
        [('columns, indexing="ij")', 'columns, indexing="ij")[::-1]')],
        "two_images",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_numbering_mistakes_are_noticed(mistake):
    changes, case = MISTAKES[mistake]
    wrong = mutant(positions, *changes)
    inputs = CASES[case]()
    expected = theirs(inputs)[:, 0]
    media = MediaSizes(
        image_grids=inputs.image_grid_thw if inputs.image_grid_thw is not None else (),
        video_grids=inputs.video_grid_thw if inputs.video_grid_thw is not None else (),
        second_per_grids=inputs.video_second_per_grid if inputs.video_second_per_grid is not None else (),
        audio_lengths=inputs.feature_attention_mask.sum(1) if inputs.feature_attention_mask is not None else (),
        use_audio_in_video=inputs.use_audio_in_video,
    )
    np.testing.assert_array_equal(rope_positions(inputs.input_ids[0], tiny_port().config, media)[0], expected)
    assert (wrong.rope_positions(inputs.input_ids[0], tiny_port().config, media)[0] != expected).any()


def test_new_tokens_continue_from_the_last_and_not_from_the_largest_position():
    """Trap 3, in a prompt where a clip's audio ends long before its frames: transformers 4 and 5 differ here."""
    maker = PromptMaker(0).text(3).audio_in_video(3, 4, 4, 1.9, 330).text(2)
    position_3T, next_position = ours(maker, interleaved=True)
    assert next_position == position_3T[0, -1] + 1 < position_3T.max() + 1


def test_text_after_slow_frames_has_one_token_chunks():
    """Trap 1 by hand: pairs 5 s apart are at 0, 125, 250; limits 50, 100, .. 250, each passed by one cut."""
    pieces = interleave((3, 4, 4), 5.0, 200, tiny_port().config)
    assert [(p.start, p.stop) for p in pieces if p.kind == "video"] == [
        (0, 4),
        (4, 5),
        (5, 8),
        (8, 9),
        (9, 10),
        (10, 12),
    ]
    assert [(p.start, p.stop) for p in pieces if p.kind == "audio"] == [(0, 50), (50, 100), (100, 150), (150, 200)]


def test_audio_token_counts():
    frames = torch.arange(3, 1000)
    counts = tiny_port().reference.model.audio_tower._get_feat_extract_output_lengths(frames)[1]
    assert [audio_token_count(int(count)) for count in frames] == counts.tolist()
    assert [audio_tokens(int(count)) for count in frames] == counts.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(audio_lengths=[400]), "should become 112 placeholders"),
        (dict(audio_lengths=[]), "more audio blocks than the 0"),
        (dict(audio_lengths=[330, 330]), "1 audio blocks but 2 were given"),
        (dict(second_per_grids=[]), "1 videos but 0 values of second_per_grids"),
        (dict(video_grids=[(3, 4, 6)]), "should become"),
        (dict(use_audio_in_video=False), "should become"),
    ],
)
def test_media_that_do_not_match_the_ids_are_named(change, message):
    maker = PromptMaker(0).text(3).audio_in_video(3, 4, 4, 1.0, 330).text(2)
    arguments = dict(
        video_grids=maker.videos, second_per_grids=maker.seconds, audio_lengths=maker.frames, use_audio_in_video=True
    )
    with pytest.raises(PositionError, match=message):
        rope_positions(np.array(maker.ids), tiny_port().config, MediaSizes(**(arguments | change)))


def test_a_video_without_audio_among_interleaved_ones_is_refused():
    maker = PromptMaker(0).video(1, 4, 4, 1.0).text(2)
    with pytest.raises(PositionError, match="a video without audio of its own"):
        ours(maker, interleaved=True)


def test_sources_follow_the_placeholders():
    config = tiny_port().config
    ids = np.array([5, VIDEO, VIDEO, AUDIO, VIDEO, 9])
    source = positions.feature_sources(
        ids, config, videos=[(0, np.array([0, 1])), (1, np.array([4]))], audios=[(2, np.array([7]))]
    )
    np.testing.assert_array_equal(source, [[-1, 0], [0, 0], [0, 1], [2, 7], [1, 4], [-1, 0]])
    with pytest.raises(PositionError, match="3 video placeholders for 2 feature rows"):
        positions.feature_sources(ids, config, videos=[(0, np.array([0, 1]))], audios=[(2, np.array([7]))])
