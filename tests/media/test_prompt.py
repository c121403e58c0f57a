"""Prompts: where media and subtitle go, what is refused, what is counted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support.prompts import TinyRecord, ask, builder, make_clips, noise_audio, noise_image, noise_video, tiny_thinker
from support.tiny_tokenizer import SPECIAL_TOKENS, tiny_tokenizer

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.prompt import PromptBuilder, PromptError
from mer_r1_jax.media.tokenizer import TokenizerError

VIDEO = "<|vision_bos|><|VIDEO|><|vision_eos|>"
AUDIO = "<|audio_bos|><|AUDIO|><|audio_eos|>"
IMAGE = "<|vision_bos|><|IMAGE|><|vision_eos|>"
INTERLEAVED = MediaConfig(use_audio_in_video=True)


def user_text(prompt) -> str:
    """What the user says in a prompt of one turn."""
    return prompt.text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]


def test_media_come_first_then_the_subtitle_then_the_question():
    clips = make_clips([noise_video()], [noise_audio()], [noise_image()])
    prompt = builder().build(ask("What does she feel?", subtitle="I never said that."), clips)
    assert user_text(prompt) == (f"{VIDEO}{AUDIO}{IMAGE}<subtitle>I never said that.</subtitle>\nWhat does she feel?")
    assert prompt.text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    assert prompt.text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_placeholders_say_where_media_go():
    clips = make_clips([noise_video()], [noise_audio(0.3, 1), noise_audio(0.5, 2)])
    prompt = builder().build(ask("Her <audio> face <video> and voice <audio>.", subtitle="Oh."), clips)
    assert user_text(prompt) == f"<subtitle>Oh.</subtitle>\nHer {AUDIO} face {VIDEO} and voice {AUDIO}."
    assert [len(clip.mel) for clip in prompt.audio] == [30, 50]


def test_a_subtitle_follows_the_media_a_turn_opens_with():
    prompt = builder().build(
        ask("<video>\n<audio>\nWell?", subtitle="No."), make_clips([noise_video()], [noise_audio()])
    )
    assert user_text(prompt) == f"{VIDEO}\n{AUDIO}\n<subtitle>No.</subtitle>\nWell?"


def test_a_records_own_system_turn_and_history_are_kept():
    turns = (
        {"role": "system", "content": "You read faces."},
        {"role": "user", "content": "Ready?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "<image>Go."},
    )
    prompt = builder().build(TinyRecord(turns), make_clips(images=[noise_image()]))
    assert prompt.text == (
        "<|im_start|>system\nYou read faces.<|im_end|>\n<|im_start|>user\nReady?<|im_end|>\n"
        f"<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\n{IMAGE}Go.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_every_media_token_takes_its_own_feature_row():
    clips = make_clips([noise_video(4, 56, 84), noise_video(2, 28, 56)], [noise_audio(1.0)], [noise_image(56, 28)])
    prompt = builder().build(ask("<image> then <video> and <audio> and <video>"), clips)
    thinker = tiny_thinker()
    kinds = {
        thinker.image_token_id: [(0, row) for row in range(2)],
        thinker.video_token_id: [(1, row) for row in range(12)] + [(2, row) for row in range(2)],
        thinker.audio_token_id: [(3, row) for row in range(25)],
    }
    for token, expected in kinds.items():
        assert [tuple(pair) for pair in prompt.source[prompt.ids == token].tolist()] == expected
    others = ~np.isin(prompt.ids, list(kinds))
    assert (prompt.source[others] == (-1, 0)).all()
    assert [clip.grid for clip in prompt.vision] == [(1, 4, 2), (2, 4, 6), (1, 2, 4)]


def test_interleaved_audio_takes_rows_of_both_clips_in_order():
    clips = make_clips([noise_video(8, 28, 28)], own=[noise_audio(4.3)])
    prompt = builder(INTERLEAVED).build(ask("So?"), clips)
    thinker = tiny_thinker()
    assert user_text(prompt) == f"{VIDEO}So?"
    start = prompt.ids.tolist().index(thinker.vision_start_token_id)
    assert prompt.ids[start + 1] == thinker.audio_start_token_id
    block = prompt.ids[start + 2 :]
    # 25 positions a second in chunks of 2 s: pairs 0 and 1, 50 audio tokens, pairs 2 and 3, 50, then the last 7.
    v, a = thinker.video_token_id, thinker.audio_token_id
    assert block[: 2 + 50 + 2 + 50 + 7].tolist() == [v] * 2 + [a] * 50 + [v] * 2 + [a] * 57
    assert block[111:113].tolist() == [thinker.audio_end_token_id, thinker.vision_end_token_id]
    assert prompt.source[prompt.ids == a].tolist() == [[1, row] for row in range(107)]
    assert prompt.source[prompt.ids == v].tolist() == [[0, row] for row in range(4)]
    assert (prompt.position[:, start] == prompt.position[:, start + 1]).all(), "the two starts share a position"
    assert sum(prompt.stats[part] for part in ("text", "video", "audio")) == len(prompt.ids)
    told = builder().build(dataclasses.replace(ask("So?"), use_audio_in_video=True), clips)
    np.testing.assert_array_equal(told.ids, prompt.ids)
    np.testing.assert_array_equal(told.position, prompt.position)
    apart = builder(INTERLEAVED).build(dataclasses.replace(ask("So?"), use_audio_in_video=False), clips)
    assert a not in apart.ids


def test_a_track_that_is_skipped_or_interleaved_leaves_its_placeholder_empty():
    prompt = builder().build(ask("<video><audio>Well?"), make_clips([noise_video()], [None]))
    assert user_text(prompt) == f"{VIDEO}Well?"
    assert not prompt.audio


def test_positions_go_on_after_the_prompt():
    prompt = builder().build(ask("What?"), make_clips([noise_video()], [noise_audio()]))
    assert prompt.position.shape == (3, len(prompt.ids))
    assert (prompt.position[:, -1] == prompt.next_position - 1).all()


def test_stats_count_what_is_shown():
    clips = dataclasses.replace(
        make_clips([noise_video(6)], [noise_audio(2.0), noise_audio(0.5)], [noise_image()]), audio_cut=1, silent_audio=2
    )
    stats = builder().build(ask("What?"), clips).stats
    assert {key: stats[key] for key in ("video", "image", "audio")} == {"video": 18, "image": 4, "audio": 62}
    assert stats["frames"] == 7 and stats["audio_seconds"] == 2.5
    assert stats["audio_cut"] == 1 and stats["silent_audio"] == 2


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
@pytest.mark.parametrize("where", ["question", "subtitle", "assistant turn"])
def test_special_tokens_in_text_are_refused(token, where):
    text = f"He said {token} again"
    if where == "question":
        record = ask(text)
    elif where == "subtitle":
        record = ask("What?", subtitle=text)
    else:
        turns = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": text},
            {"role": "user", "content": "b"},
        ]
        record = TinyRecord(tuple(turns))
    with pytest.raises(PromptError, match="clip-1: got '.*' in the .*, expected plain text") as caught:
        builder().build(record, make_clips())
    assert token in str(caught.value)


@pytest.mark.parametrize("mark", ["<video>", "<audio>", "<image>", "<subtitle>", "</subtitle>"])
def test_marks_in_a_subtitle_are_refused(mark):
    with pytest.raises(PromptError, match=f"clip-1: got '{mark}' in the subtitle"):
        builder().build(ask("What?", subtitle=f"Look {mark}"), make_clips())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<video><video>Well?", "got more <video> placeholders than video clips"),
        ("<audio>Well?", "got more <audio> placeholders than audio clips"),
        ("Well <image>?", "got more <image> placeholders than image clips"),
    ],
)
def test_more_placeholders_than_clips_are_refused(text, message):
    with pytest.raises(PromptError, match=message):
        builder().build(ask(text), make_clips([noise_video()]))


def test_more_clips_than_placeholders_are_refused():
    with pytest.raises(PromptError, match="clip-1: got 1 more audio clip"):
        builder().build(ask("<video>Well?"), make_clips([noise_video()], [noise_audio()]))


def test_media_outside_user_turns_are_refused():
    turns = ({"role": "system", "content": "<image>"}, {"role": "user", "content": "Hm?"})
    with pytest.raises(PromptError, match="got <image> in a system turn, expected media in user turns only"):
        builder().build(TinyRecord(turns), make_clips(images=[noise_image()]))


def test_a_record_without_a_question_is_refused():
    with pytest.raises(PromptError, match="got no user turn"):
        builder().build(TinyRecord(({"role": "system", "content": "Hm."},)), make_clips())


def test_too_long_a_prompt_names_its_parts_and_what_to_lower():
    clips = make_clips([noise_video(8, 56, 84)], [noise_audio(3.0)])
    whole = builder().build(ask("What?"), clips)
    assert len(builder(max_prompt_length=len(whole.ids)).build(ask("What?"), clips).ids) == len(whole.ids)
    with pytest.raises(PromptError) as caught:
        builder(max_prompt_length=len(whole.ids) - 1).build(ask("What?"), clips)
    message = str(caught.value)
    assert f"clip-1: got a prompt of {len(whole.ids)} tokens" in message
    assert "24 video, 75 audio" in message and f"{whole.stats['text']} text" in message
    assert f"data.max_prompt_length={len(whole.ids) - 1}" in message
    assert message.index("lower media.max_audio_seconds") < message.index("lower media.fps"), "the longest part first"


def test_every_video_is_interleaved_or_none():
    clips = make_clips([noise_video(), noise_video()], own=[noise_audio(), None])
    with pytest.raises(PromptError, match="clip-1: .*interleave every video or none"):
        builder(INTERLEAVED).build(ask("Hm?"), clips)


def test_a_model_with_other_ids_is_refused():
    thinker = dataclasses.replace(tiny_thinker(), video_token_id=7)
    message = r"video_token_id is 7, but <\|VIDEO\|> has id"
    with pytest.raises(TokenizerError, match=message):
        PromptBuilder(tiny_tokenizer(), MediaConfig(), thinker, "", 100)
