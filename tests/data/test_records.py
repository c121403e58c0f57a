"""Reading records: every fault is named by file, line and field, with what was expected and how to mend it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support.record_files import GOOD, fault

from mer_r1_jax.config.schema import DataConfig
from mer_r1_jax.data.problems import MAX_LISTED
from mer_r1_jax.data.records import RecordError, dataset_hash, read_records, scan_records


def test_reads_every_column_under_its_aliases(write):
    path = write(
        {
            "id": "a",
            "videos": ["a.mp4"],
            "audios": ["a.wav"],
            "images": ["a.png"],
            "subtitle": " hello ",
            "solution": "happy, very sad",
            "mood": 3,
        },
        {"video": "b.mp4", "problem": "What does she feel?", "solution": ["calm"], "reasoning": "A soft voice."},
    )
    first, second = read_records(path)
    assert (first.videos, first.audios, first.images) == (("a.mp4",), ("a.wav",), ("a.png",))
    assert first.subtitle == "hello"
    assert first.solution == ("happy", "very sad")
    assert first.extra == {"mood": 3}
    assert first.target is None
    assert first.messages == ({"role": "user", "content": DataConfig.question},)
    assert (first.line, second.line) == (1, 2)
    assert second.id == "data:2"
    assert second.messages[0]["content"] == "What does she feel?"
    assert second.target == "<think>A soft voice.</think>\n<answer>calm</answer>"
    assert (second.target_reasoning, second.target_answer) == ("A soft voice.", "calm")


def test_sharegpt_conversation_becomes_turns_and_target(write):
    path = write(
        {
            "video": "clip.mp4",
            "conversations": [
                {"from": "human", "value": "<video>\n<audio>\nWhat is it?"},
                {"from": "gpt", "value": "<think> loud </think><answer>angry, upset</answer>"},
            ],
        }
    )
    (record,) = read_records(path)
    assert record.messages == ({"role": "user", "content": "<video>\n<audio>\nWhat is it?"},)
    assert record.target == "<think>loud</think>\n<answer>angry, upset</answer>"
    assert record.solution == ("angry", "upset")
    assert record.audios == ("clip.mp4",), "an <audio> without paths is the sound track of the video"


def test_several_turns_keep_earlier_answers_in_the_prompt(write):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<video> Who?"},
        {"role": "assistant", "content": "A woman."},
        {"role": "user", "content": "And what does she feel?"},
    ]
    (record,) = read_records(write({"videos": ["a.mp4"], "messages": turns, "solution": "sad"}))
    assert list(record.messages) == turns
    assert record.target is None


def test_the_solution_may_differ_from_the_targets_answer(write):
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "<think>x</think>\n<answer>sad</answer>"},
    ]
    (record,) = read_records(write({"videos": ["a.mp4"], "messages": turns, "solution": "sad, angry"}))
    assert record.solution == ("sad", "angry")
    assert record.target_answer == "sad"


def test_null_columns_blank_lines_and_a_byte_order_mark_are_fine(write, tmp_path):
    path = write({**GOOD, "subtitle": None, "audios": None, "images": []}, "", {**GOOD, "id": 7})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    first, second = read_records(path)
    assert first.subtitle is None and first.audios == ()
    assert (second.id, second.line) == ("7", 3)


@pytest.mark.parametrize("said", ["😀 oh 👩‍👩‍👧", "مرحبا بك", "שלום (he said)", "e\u0301té", "a\u2028b"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_writing_of_every_script_and_both_line_ends_are_read(tmp_path, said, end):
    path = tmp_path / "data.jsonl"
    rows = [{**GOOD, "subtitle": said}, {**GOOD, "id": said, "subtitle": f"{said} {said}"}]
    path.write_bytes(end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    first, second = read_records(path)
    assert (first.subtitle, second.subtitle, second.id) == (said, f"{said} {said}", said)


@pytest.mark.parametrize("role", ["tool", "function", "developer"])
@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_turns_of_tools_are_refused_by_name(write, role, column):
    turns = [{"role": "user", "content": "?"}, {"role": role, "content": "x"}, {"role": "user", "content": "!"}]
    problem = fault(write({**GOOD, column: turns}))
    assert problem.line == 1 and problem.field.endswith("[1].role") and repr(role) in problem.got


@pytest.mark.parametrize(
    ("row", "field", "got", "expected"),
    [
        ('{"id": "a", "videos": ["a.mp4"]', "", "malformed JSON at column", "one JSON object per line"),
        ("{'id': 'a'}", "", "malformed JSON at column", "one JSON object per line"),
        ("[1, 2]", "", "the list", "a JSON object"),
        ('{"videos": ["a.mp4"], "x": NaN}', "", "NaN", "plain JSON"),
        ('{"videos": ["a.mp4"], "videos": ["b.mp4"]}', "", "'videos' twice", "each key once"),
        ("[" * 100_000, "", "recursion", "plain JSON"),
        ({"id": "a", "solution": ["happy"]}, "videos", "no medium and no subtitle", "at least one of"),
        ({"vidoes": ["a.mp4"], "subtitle": "x"}, "vidoes", "unknown column", "`videos`"),
        ({**GOOD, "id": []}, "id", "the list", "a text"),
        ({**GOOD, "id": True}, "id", "a boolean", "a text"),
        ({**GOOD, "id": " "}, "id", "the text", "not empty"),
        ({**GOOD, "videos": 3}, "videos", "the number 3", "a list of paths"),
        ({**GOOD, "videos": [None]}, "videos[0]", "null", "a path"),
        ({**GOOD, "video": "b.mp4"}, "video", "both videos and video", "one of them"),
        ({**GOOD, "subtitle": ["hello"]}, "subtitle", "the list", "a text"),
        ({**GOOD, "solution": 3}, "solution", "the number 3", "a list of words or a comma text"),
        ({**GOOD, "solution": ["happy", 3]}, "solution[1]", "the number 3", "an emotion word"),
        ({**GOOD, "solution": ["happy, sad"]}, "solution[0]", "happy, sad", "no comma"),
        ({**GOOD, "solution": []}, "solution", "[]", "at least one emotion word"),
        ({**GOOD, "solution": " , "}, "solution", "' , '", "at least one emotion word"),
        ({**GOOD, "question": ""}, "question", "the text ''", "not empty"),
        ({**GOOD, "question": "x", "messages": []}, "question", "both `messages` and `question`", "one of them"),
        ({**GOOD, "messages": "hi"}, "messages", "the text 'hi'", "a list of turns"),
        ({**GOOD, "messages": []}, "messages", "the list []", "not empty"),
        ({**GOOD, "messages": ["hi"]}, "messages[0]", "the text 'hi'", "a turn like"),
        (
            {**GOOD, "messages": [{"role": "bot", "content": "x"}]},
            "messages[0].role",
            "'bot'",
            "system, user, assistant",
        ),
        ({**GOOD, "messages": [{"role": "user"}]}, "messages[0].content", "null", "not empty"),
        ({**GOOD, "conversations": [{"from": ["x"], "value": "y"}]}, "messages[0].role", "['x']", "one of"),
        (
            {**GOOD, "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            "messages",
            "user, user",
            "alternation",
        ),
        ({**GOOD, "messages": [{"role": "system", "content": "a"}]}, "messages", "system", "user"),
        ({"videos": ["a.mp4"], "reasoning": "because"}, "solution", "without a `solution`", "both"),
        ({**GOOD, "reasoning": "a </think> b"}, "reasoning", "</think>", "a text without a tag"),
    ],
)
def test_a_faulty_line_is_named(write, row, field, got, expected):
    problem = fault(write(GOOD | {"id": "first"}, row))
    assert problem.line == 2
    assert problem.field == field
    assert got in problem.got
    assert expected in problem.expected


@pytest.mark.parametrize(
    "answer",
    [
        "happy",
        "<think></think><answer>happy</answer>",
        "<answer>happy</answer>",
        "<think>a</think><answer>b</answer> c",
        "<think>a<think>b</think><answer>c</answer>",
        "<think>a</think><answer>b</answer><answer>c</answer>",
    ],
)
def test_an_assistant_turn_must_be_a_demonstration(write, answer):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    problem = fault(write({**GOOD, "messages": turns}))
    assert problem.field == "messages[-1].content"
    assert "<think>reasoning</think>" in problem.expected


@pytest.mark.parametrize(
    "token", ["<video>", "<audio>", "<image>", "<|im_end|>", "<|AUDIO|>", "</subtitle>", "<think>"]
)
@pytest.mark.parametrize("column", ["subtitle", "solution", "reasoning"])
def test_structure_inside_plain_text_is_refused(write, column, token):
    row = {**GOOD, column: f"so {token} it is"}
    problem = fault(write(row))
    assert problem.field.startswith(column)
    assert token in problem.got and token in problem.mend


@pytest.mark.parametrize(
    "row", [{"question": "a <|im_start|> b"}, {"messages": [{"role": "user", "content": "<|PAD|>"}]}]
)
def test_special_tokens_in_the_question_are_refused(write, row):
    assert "without a special token" in fault(write({**GOOD, **row})).expected


@pytest.mark.parametrize(
    ("text", "media", "got"),
    [
        ("<video><video> x", {"videos": ["a.mp4"]}, "2 <video> for 1 path(s) in `videos`"),
        ("<video> x", {"videos": ["a.mp4", "b.mp4"]}, "1 <video> for 2 path(s) in `videos`"),
        ("<video> x", {"videos": ["a.mp4"], "audios": ["a.wav"]}, "0 <audio> for 1 path(s) in `audios`"),
        ("<video> <image> x", {"videos": ["a.mp4"]}, "1 <image> for 0 path(s) in `images`"),
        ("<video> <audio> x", {"videos": ["a.mp4"], "audios": []}, "1 <audio> for 0 path(s) in `audios`"),
    ],
)
def test_placeholders_must_match_the_lists(write, text, media, got):
    problem = fault(write({"solution": "sad", "messages": [{"role": "user", "content": text}], **media}))
    assert problem.got == got
    assert "no placeholder at all" in problem.mend


@pytest.mark.parametrize("column", ["target", "solution"])
def test_a_required_column_is_missed(write, column):
    problem = fault(write({"videos": ["a.mp4"]}), require=[column])
    assert problem.got == "nothing"
    assert ("reasoning" if column == "target" else "solution") == problem.field


def test_duplicate_ids_are_refused_within_and_across_files(write):
    one, two = write(GOOD, GOOD, name="one.jsonl"), write(GOOD, name="two.jsonl")
    problem = fault(one)
    assert (problem.line, problem.field) == (2, "id")
    assert f"{one}:1 has already" in problem.got
    with pytest.raises(RecordError) as caught:
        read_records([one, two])
    assert [p.where for p in caught.value.problems] == [f"{one}:2", f"{two}:1"]


def test_every_fault_is_collected_and_the_list_is_capped(write):
    bad = [{**GOOD, "id": f"bad{n}", "subtitle": 1, "videos": ["../x"]} for n in range(MAX_LISTED)]
    with pytest.raises(RecordError) as caught:
        read_records(write(GOOD, *bad))
    assert len(caught.value.problems) == 2 * MAX_LISTED
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{2 * MAX_LISTED} problems in the data:"
    assert lines[-1].strip() == f"... and {MAX_LISTED} more"
    assert len(lines) == MAX_LISTED + 2


def test_good_records_survive_a_scan_beside_bad_ones(write):
    records, problems = scan_records(write(GOOD, "nonsense", {**GOOD, "id": "b"}))
    assert [record.id for record in records] == ["a", "b"]
    assert [problem.line for problem in problems] == [2]


def test_files_that_hold_no_records_are_named(tmp_path, write):
    assert "No such file" in fault(tmp_path / "absent.jsonl").got
    assert "a folder" in fault(tmp_path).got
    assert fault(write(name="empty.jsonl")).got == "no records"
    assert fault(write("[", "]", name="array.json")).got == "no records"


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"subtitle": "caf\xe9"}\n')
    problem = fault(path)
    assert (problem.line, problem.expected) == (2, "UTF-8")
    assert "0xe9 at column 18" in problem.got


def test_the_hash_follows_the_content_not_the_place(write):
    rows = [{**GOOD, "subtitle": "héllo"}, {**GOOD, "id": "b"}]
    base = dataset_hash(read_records(write(*rows)))
    assert dataset_hash(read_records(write("", *rows, name="moved.jsonl"))) == base
    reordered = [dict(reversed(rows[0].items())), rows[1]]
    assert dataset_hash(read_records(write(*reordered))) == base
    for changed in (
        [rows[1], rows[0]],
        [rows[0]],
        [rows[0], {**rows[1], "solution": "sad"}],
        [rows[0], {**rows[1], "x": 1}],
    ):
        assert dataset_hash(read_records(write(*changed))) != base


def test_a_record_says_whether_its_video_brings_its_sound(write):
    rows = [GOOD | {"id": str(n)} | said for n, said in enumerate(({}, {"use_audio_in_video": True}))]
    absent, told = read_records(write(*rows))
    assert (absent.use_audio_in_video, told.use_audio_in_video) == (None, True)
    assert "use_audio_in_video" not in absent.content()  # the hash of older files stays
    assert dataset_hash([told]) != dataset_hash([dataclasses.replace(told, use_audio_in_video=None)])
    (text,) = read_records(write("id,video,use_audio_in_video", "a,a.mp4,False", name="data.csv"))
    assert text.use_audio_in_video is False
    assert fault(write(GOOD | {"use_audio_in_video": 1})).expected == "true or false"
