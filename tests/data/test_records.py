"""Reading records: every fault is named by file, line and field, with what was expected and how to mend it."""

from __future__ import annotations

import json
import os
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer_r1_jax.config.schema import DataConfig
from mer_r1_jax.data.problems import MAX_LISTED
from mer_r1_jax.data.records import RecordError, dataset_hash, read_records, scan_records

GOOD = {"id": "a", "videos": ["a.mp4"], "solution": ["happy"]}


@pytest.fixture
def write(tmp_path):
    """Writes rows (dicts or raw lines) to a data file and returns its path."""

    def write_rows(*rows, name="data.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write_rows


def fault(path, **options):
    """The single problem of a data file, after checking that the raised message holds all of it."""
    with pytest.raises(RecordError) as caught:
        read_records(path, **options)
    (problem,) = caught.value.problems
    message = str(caught.value)
    for part in (problem.where, problem.field, problem.got, problem.expected, problem.mend):
        assert part in message
    assert "; expected " in message and "; to mend it, " in message
    return problem


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


@pytest.mark.parametrize(
    "path",
    [
        "../a.mp4",
        "x/../../a.mp4",
        "x\\..\\a.mp4",
        "/etc/passwd",
        "~/a.mp4",
        "C:\\a.mp4",
        "C:/a.mp4",
        "HTTPS://host/a.mp4",
        "s3://bucket/a.mp4",
        "data:,AA",
        "\\\\host\\a.mp4",
        "http://host/a.mp4",
        "file:///a.mp4",
        "//host/a.mp4",
        "data:video/mp4;base64,AA",
        "",
        " ",
        ".",
        "a\nb.mp4",
        "a\x00.mp4",
    ],
)
def test_media_paths_stay_inside_the_media_root(write, path):
    problem = fault(write({**GOOD, "videos": [path]}))
    assert problem.field == "videos[0]"
    assert "media root" in problem.expected


def test_a_symbolic_link_may_not_leave_the_media_root(write, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "inner").mkdir(parents=True)
    outside.mkdir()
    (outside / "a.mp4").touch()
    (root / "inner" / "b.mp4").touch()
    os.symlink(outside / "a.mp4", root / "link.mp4")
    os.symlink(outside, root / "folder")
    os.symlink(root / "inner" / "b.mp4", root / "fine.mp4")
    for path in ("link.mp4", "folder/a.mp4"):
        problem = fault(write({**GOOD, "videos": [path]}), media_root=root)
        assert str(outside / "a.mp4") in problem.got
        assert "symbolic link" in problem.mend
    assert read_records(write({**GOOD, "videos": ["fine.mp4"]}), root)[0].videos == ("fine.mp4",)


def test_a_folder_whose_name_begins_like_the_root_is_outside(write, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root2").mkdir()
    os.symlink(tmp_path / "root2", tmp_path / "root" / "x")
    problem = fault(write({**GOOD, "videos": ["x/a.mp4"]}), media_root=tmp_path / "root")
    assert problem.field == "videos[0]" and str(tmp_path / "root2" / "a.mp4") in problem.got


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
    assert "directory" in fault(tmp_path).got
    assert fault(write(name="empty.jsonl")).got == "no records"
    assert "jq -c" in fault(write("[", '{"id": "a"}', "]", name="array.json")).mend


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


@pytest.mark.parametrize(
    ("line", "field", "got"),
    [
        ('{"id": "clip\\ud83d", "subtitle": "hi"}', "id", "half of a surrogate pair"),
        ('{"video": ["a\\udc00.mp4"]}', "video", "half of a surrogate pair"),
        ('{"subtitle": "hi", "solution": ["ha\\ud83d"]}', "solution", "half of a surrogate pair"),
        ('{"subtitle": "hi", "oracle": {"deep": [1, "\\ud83d"]}}', "oracle", "half of a surrogate pair"),
        ('{"subtitle": "hi", "x\\ud83d": 1}', "x\\ud83d", "half of a surrogate pair"),
        ('{"id": ' + "1" * 5000 + ', "subtitle": "hi"}', "", "a whole number of 5000 digits"),
        ('{"subtitle": "hi", "n": -' + "9" * 5000 + "}", "", "a whole number of 5000 digits"),
        ('{"subtitle": "hi", "w": 1e999}', "", "the number 1e999, which is too large"),
        ('{"subtitle": "hi", "w": [-1E+400]}', "", "which is too large"),
        ('{"subtitle": "hi", "w": ' + "[" * 100 + "]" * 100 + "}", "w", "nested more than"),
        ('{"video": "' + "a" * 5000 + '.mp4"}', "videos[0]", "a path of 5004 bytes"),
        ('{"video": "' + "漢" * 90 + '.mp4"}', "videos[0]", "a name of 274"),
        ('{"video": "' + "a/" * 2500 + 'b.mp4"}', "videos[0]", "a path of 5005 bytes"),
        ('{"video": "a\\u0000.mp4"}', "videos[0]", "control characters"),
        ('{"video": "a\\u009b.mp4"}', "videos[0]", "control characters"),
        ('{"id": "\\u001b[2J", "subtitle": "hi"}', "id", "control characters"),
        ('{"subtitle": "hi", "' + "k" * 5000 + '": 1, "' + "k" * 5000 + '": 2}', "", "twice in one object"),
        ('{"video": "data:video/mp4;base64,' + "A" * 100_000 + '"}', "videos[0]", "the URL"),
    ],
)
def test_hostile_lines_are_named_and_the_message_stays_readable(write, line, field, got):
    problem = fault(write(GOOD | {"id": "first"}, line))
    assert (problem.line, problem.field) == (2, field) and got in problem.got
    message = str(problem)
    assert len(message) < 800 and message.isprintable() and message.encode("utf-8")


def test_halves_of_surrogate_pairs_as_bytes_are_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"video": "a.mp4", "subtitle": "x\xed\xa0\xbd"}\n')
    problem = fault(path)
    assert (problem.line, problem.got) == (2, "half of a surrogate pair")


@pytest.mark.parametrize(
    "label",
    [
        "[angry, worried, sad]",
        "['angry', 'worried', 'sad']",
        '["angry", "worried", "sad"].',
        "['angry' 'worried' 'sad']",
        "angry，worried、sad。",
        "【angry；worried；sad】",
        "“angry”, “worried”, “sad”",
        "「angry」「worried」「sad」",
        "angry; worried; sad.",
        "angry/worried|sad",
        "1. angry 2. worried 3. sad",
        "①angry ②worried ③sad",
        "- angry\n- worried\n- sad\n",
        "angry, worried, and sad!",
        "ａｎｇｒｙ，ｗｏｒｒｉｅｄ，ｓａｄ",
        "\u200bangry , worried ,, sad\ufeff",
        "angry 和 worried 与 sad",
        "angry and worried & sad",
        "angry、worried或sad。",
        "angry + worried + sad",
        "angry — worried - sad",
        "• angry • worried • sad",
        "angry · worried → sad",
        "（1）angry（2）worried（3）sad",
        "a) angry b) worried c) sad",
        "一、angry 二、worried 三、sad",
        "angry…worried…sad…",
        "angry\u3000worried\u3000sad",
        "Emotions: angry, worried, or sad",
        "情绪：angry，worried，sad",
        ["angry.", "'worried'", " [sad] "],
        ["angry and worried", "sad"],
    ],
)
def test_a_label_keeps_every_word_however_it_is_written(write, label):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>x</think><answer>{}</answer>"}]
    (record,) = read_records(write({"videos": ["a.mp4"], "solution": label}))
    assert record.solution == ("angry", "worried", "sad")
    if isinstance(label, str):
        turns[1]["content"] = turns[1]["content"].format(label)
        (record,) = read_records(write({"videos": ["a.mp4"], "messages": turns}))
        assert record.solution == ("angry", "worried", "sad")


@pytest.mark.parametrize("label", ["can't cope, very sad", ["can't cope", "very sad"], "[can't cope (a bit), sad]"])
def test_apostrophes_and_brackets_inside_a_phrase_stay(write, label):
    (record,) = read_records(write({"videos": ["a.mp4"], "solution": label}))
    assert record.solution in (("can't cope", "very sad"), ("can't cope (a bit)", "sad"))


@pytest.mark.parametrize("word", ["温和", "well-meaning", "a bit sad", "hand-in-hand"])
def test_a_word_with_a_joining_sign_inside_is_one_word(write, word):
    (record,) = read_records(write({"videos": ["a.mp4"], "solution": f"angry, {word}"}))
    assert record.solution == ("angry", word)


@pytest.mark.parametrize("word", ["happy，sad", "[happy, sad]", "happy; sad", "happy\nsad"])
def test_an_entry_of_a_list_is_one_word(write, word):
    problem = fault(write({**GOOD, "solution": ["angry", word]}))
    assert problem.field == "solution[1]" and "no comma or other separator" in problem.expected


HOSTILE = [
    "\ud83d",
    "a\udc00b",
    "\x1b[2J",
    "\x00",
    "\u202e",
    "a" * 5000 + ".mp4",
    "x/" * 3000,
    "[",
    "['sad' 'x']",
    "1.",
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**4299, max_value=10**4300 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.text(st.characters(categories=("Cs", "Cc", "Cf", "Lo", "Po", "Ps", "Pe")), max_size=8)
    | st.sampled_from(["<video>", "<|x|>", "../a", "user", *HOSTILE]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "videos", "audio", "messages", "conversations", "solution"]
                + ["type", "text", "video", "image_url", "url", "path", "label", "prompt", "system", "\ud83d"]
            )
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
COLUMN = st.sampled_from(
    [
        "id",
        "messages",
        "conversations",
        "question",
        "videos",
        "video",
        "audios",
        "images",
        "subtitle",
        "solution",
        "reasoning",
        "prompt",
        "system",
        "label",
        "meta",
        "\ud83d",
    ]
)


def _dumped(row):
    """JSON with every character outside ASCII escaped; Python does not write out whole numbers of 4300 digits."""
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(row)
    finally:
        sys.set_int_max_str_digits(4300)


@settings(max_examples=100)
@given(st.lists(st.dictionaries(COLUMN, JSON, max_size=5) | JSON, min_size=1, max_size=3))
def test_no_line_whatever_raises_anything_but_named_problems(rows):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        path.write_text("".join(_dumped(row) + "\n" for row in rows))
        records, problems = scan_records(path)
        accounted = {record.line for record in records} | {problem.line for problem in problems}
        whole_file_refused = any(problem.expected.startswith("JSON lines") for problem in problems)
        assert accounted - {0} == set(range(1, len(rows) + 1)) or whole_file_refused
        assert len(dataset_hash(records)) == 64
        assert all(str(problem).isprintable() and len(str(problem)) < 3000 for problem in problems)
        json.dumps([record.content() for record in records], ensure_ascii=False).encode("utf-8")
        assert all(record.messages[-1]["role"] == "user" for record in records)
