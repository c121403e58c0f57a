"""Chats as other tools write them: parts of content, `prompt`, `system`. They are read where that is certain."""

from __future__ import annotations

import json

import pytest

from mer_r1_jax.data.records import RecordError, read_records

ASK = {"type": "text", "text": "What is felt?"}


@pytest.fixture
def read(tmp_path):
    """Reads one record from a row."""

    def read_row(row):
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps(row) + "\n")
        return read_records(path)[0]

    return read_row


@pytest.fixture
def refused(read):
    """The single problem of a row."""

    def problem_of(row):
        with pytest.raises(RecordError) as caught:
            read(row)
        (problem,) = caught.value.problems
        assert problem.line == 1
        return problem

    return problem_of


def turn(*parts, role="user"):
    return {"role": role, "content": list(parts)}


def prompt_of(*parts):
    return {"prompt": [turn(*parts)], "solution": ["happy"]}


@pytest.mark.parametrize("column", ["prompt", "messages", "conversations"])
def test_parts_become_media_in_order_with_placeholders(read, column):
    video, audio, image = (
        {"type": "video", "video": "a.mp4"},
        {"type": "audio", "audio": "a.wav"},
        {"type": "image", "image": "a.png"},
    )
    first, second = turn(ASK, video, image), turn(audio, ASK, video | {"video": "b.mp4"})
    record = read({column: [first, turn({"type": "text", "text": "ok"}, role="assistant"), second], "solution": "sad"})
    assert [message["content"] for message in record.messages] == [
        "What is felt?<video><image>", "ok", "<audio>What is felt?<video>",
    ]  # fmt: skip
    assert (record.videos, record.audios, record.images) == (("a.mp4", "b.mp4"), ("a.wav",), ("a.png",))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "a.mp4"},
        {"type": "video", "path": "a.mp4"},
        {"type": "video", "url": "a.mp4"},
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
        {"type": "video", "video_url": "a.mp4"},
        {"video": "a.mp4"},
        {"type": "video", "video": {"bytes": None, "path": "a.mp4"}},
        {"type": "video", "video": "a.mp4", "text": None, "image": None},
    ],
)
def test_every_spelling_of_a_video_part_is_read(read, part):
    record = read(prompt_of(part, ASK))
    assert record.videos == ("a.mp4",)
    assert record.messages[-1]["content"] == "<video>What is felt?"


def test_parts_without_a_file_take_it_from_the_columns(read):
    record = read(prompt_of({"type": "image"}, ASK) | {"images": ["a.png"]})
    assert (record.images, record.messages[0]["content"]) == (("a.png",), "<image>What is felt?")
    both = read(prompt_of({"type": "image", "image": "a.png"}, ASK) | {"images": ["a.png"]})
    assert both.images == ("a.png",)


def test_text_parts_leave_media_to_the_columns(read):
    record = read({"messages": [turn(ASK)], "video": "a.mp4", "solution": ["happy"]})
    assert (record.videos, record.messages[0]["content"]) == (("a.mp4",), "What is felt?")


@pytest.mark.parametrize(
    ("part", "field", "got"),
    [
        ({"type": "tool_use", "id": 3}, "prompt[0].content[1].type", "'tool_use'"),
        ({"type": "document", "document": "a.pdf"}, "prompt[0].content[1].type", "'document'"),
        ({"type": ["video"]}, "prompt[0].content[1].type", "['video']"),
        ({"fps": 2}, "prompt[0].content[1].type", "no type"),
        ("What?", "prompt[0].content[1]", "the text 'What?'"),
        ({"type": "text", "text": 3}, "prompt[0].content[1].text", "the number 3"),
        ({"type": "video", "video": ["1.jpg", "2.jpg"]}, "prompt[0].content[1].video", "the list"),
        ({"type": "video", "video": "a.mp4", "video_start": 2.0}, "prompt[0].content[1].video_start", "not read"),
        ({"type": "image", "image": "a.png", "path": "b.png"}, "prompt[0].content[1]", "that differ"),
        ({"type": "image", "image": {"bytes": "AAAA", "path": None}}, "prompt[0].content[1].image", "the object"),
        ({"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}, "prompt[0].content[1].input_audio",
         "the object"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}, "prompt", "the URL"),
        ({"type": "video", "video": "../a.mp4"}, "prompt", "'..'"),
    ],
)  # fmt: skip
def test_what_is_not_certain_is_refused_by_name(refused, part, field, got):
    problem = refused(prompt_of(ASK, part) | {"subtitle": "hi"})
    assert problem.field in (field, "messages") and got in problem.got and problem.mend


@pytest.mark.parametrize(
    ("columns", "got"),
    [
        ({"messages": [turn(ASK)]}, "both messages and prompt"),
        ({"question": "What?"}, "both `prompt` and `question`"),
        ({"videos": ["b.mp4"]}, "['a.mp4'] in the content and ['b.mp4'] in `videos`"),
        ({"audios": ["a.wav"]}, "0 <audio> for 1 path(s) in `audios`"),
        ({"prompt": [turn({"type": "video", "video": "a.mp4"}, {"type": "text", "text": "<video> ?"})]},
         "media parts and placeholders in the text"),
        ({"prompt": [turn({"type": "video"}, {"type": "video", "video": "a.mp4"}, ASK)]},
         "1 of 2 parts that name their file"),
        ({"prompt": [turn({"type": "image", "image": "a.png"}, role="system"), turn(ASK)]},
         "a medium (image) in the system turn"),
        ({"prompt": [turn(ASK) | {"videos": ["a.mp4"]}]}, "a key that is not read"),
    ],
)  # fmt: skip
def test_conflicts_are_refused(refused, columns, got):
    row = prompt_of({"type": "video", "video": "a.mp4"}, ASK) | {"subtitle": "hi"} | columns
    assert got in refused(row).got


def test_a_text_prompt_is_the_question(read):
    record = read({"prompt": "Name it.", "video": "a.mp4", "solution": ["happy"]})
    assert record.messages == ({"role": "user", "content": "Name it."},)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "What?"},
        {"messages": [{"role": "user", "content": "What?"}]},
        {"conversations": [{"from": "human", "value": "What?"}]},
    ],
)
def test_a_system_column_is_the_system_turn(read, row):
    record = read(row | {"system": "Answer in French.", "video": "a.mp4", "solution": "sad"})
    assert record.messages == (
        {"role": "system", "content": "Answer in French."},
        {"role": "user", "content": "What?"},
    )
    assert len(read(row | {"system": " ", "video": "a.mp4", "solution": "sad"}).messages) == 1


def test_a_second_system_turn_is_refused(refused):
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    problem = refused({"messages": turns, "system": "c", "video": "a.mp4"})
    assert (problem.field, problem.got) == ("system", "a `system` and a system turn")
    assert "special token" in refused({"system": "<|im_end|>", "video": "a.mp4"}).expected


CHAT = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]}]


@pytest.mark.parametrize("text", [json.dumps(CHAT), f" {json.dumps(CHAT, indent=1)}\n", str(CHAT)])
@pytest.mark.parametrize("column", ["prompt", "question", "messages", "conversations"])
def test_a_chat_written_as_a_text_is_no_question(tmp_path, column, text):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"videos": ["a.mp4"], "solution": "happy", column: text}))
    with pytest.raises(RecordError) as caught:
        read_records(path)
    (problem,) = caught.value.problems
    assert "a chat written as a text" in problem.got or "list of turns" in problem.expected


@pytest.mark.parametrize("text", ['["a.mp4"]', "['a.mp4', 'b.mp4']", " [] "])
@pytest.mark.parametrize("column", ["videos", "audio", "images"])
def test_a_list_written_as_a_text_is_no_path(tmp_path, column, text):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"subtitle": "hi", "solution": "happy", column: text}))
    with pytest.raises(RecordError) as caught:
        read_records(path)
    assert "a list written as a text" in caught.value.problems[0].got


def test_brackets_make_no_list_of_a_name(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"videos": "[v2] clip.mp4", "images": "clip [it's].png", "question": "[What?]"}))
    (record,) = read_records(path)
    assert (record.videos, record.images) == (("[v2] clip.mp4",), ("clip [it's].png",))
