"""Lines made to break their reader: each becomes a problem that can be read, never another error."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.record_files import GOOD, fault

from mer_r1_jax.data.records import dataset_hash, scan_records
from mer_r1_jax.foreign_text import printable


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


@pytest.mark.slow
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
        one_array = isinstance(rows[0], list)  # whose entries are the records
        assert accounted - {0} == set(range(1, len(rows) + 1)) or whole_file_refused or one_array
        assert len(dataset_hash(records)) == 64
        # Letters that this Python does not know yet are shown as they are, though it calls them unprintable.
        assert all(printable(text := str(problem)) == text and len(text) < 3000 for problem in problems)
        json.dumps([record.content() for record in records], ensure_ascii=False).encode("utf-8")
        assert all(record.messages[-1]["role"] == "user" for record in records)
