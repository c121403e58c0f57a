"""Data files of every kind that is read give the records of the same JSON lines; their faults name file and row."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from support.record_files import fault

from mer_r1_jax.data.records import dataset_hash, read_records, scan_records
from mer_r1_jax.emotion.predictions import read_predictions
from mer_r1_jax.row_files import numbered_rows

ROWS = [
    {"id": "007", "video": "a.mp4", "audio": ["a.mp4", "b.wav"], "subtitle": 'He said, "好"\nso', "solution": "sad"},
    {"id": "008", "video": "b.mp4", "audio": None, "subtitle": None, "solution": "happy, calm"},
]
PARTS = [{"type": "video", "video": "a.mp4"}, {"type": "audio"}, {"type": "text", "text": "What now?"}]
CHAT = [{"role": "user", "content": PARTS}]


def written(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def as_csv(delimiter):
    def write(path):
        quoted = [
            ["id", "video", "audio", "subtitle", "solution"],
            ["007", "a.mp4", '"[""a.mp4"", ""b.wav""]"', '"He said, ""好""\nso"', "sad"],
            ["008", "b.mp4", "", "", '"happy, calm"'],
        ]
        text = "".join(delimiter.join(cells) + "\r\n" for cells in quoted)
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())

    return write


def saved_to_disk(folder, rows):
    """A folder as `datasets.Dataset.save_to_disk` lays it out: a stream for each shard, named by state.json."""
    folder.mkdir()
    names = [f"data-{number:05d}-of-{len(rows):05d}.arrow" for number in range(len(rows))]
    table = pa.Table.from_pylist(rows)
    for number, name in enumerate(names):
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table.slice(number, 1))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


TABLE = pa.Table.from_pylist(ROWS)
KINDS = {
    "array.json": lambda path: path.write_text(json.dumps(ROWS)),
    "pretty.json": lambda path: path.write_text("\n" + json.dumps(ROWS, indent=2)),
    "objects.json": lambda path: path.write_text("".join(json.dumps(row, indent=4) + "\n" for row in ROWS)),
    "commas.csv": as_csv(","),
    "tabs.tsv": as_csv("\t"),
    "semicolons.csv": as_csv(";"),
    "table.parquet": lambda path: pyarrow.parquet.write_table(TABLE, path),
    "feather": lambda path: pyarrow.feather.write_feather(TABLE, str(path)),
    "folder": lambda path: saved_to_disk(path, ROWS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_records_of_the_same_json_lines(tmp_path, kind):
    lines = read_records(written(tmp_path / "data.jsonl", ROWS))
    KINDS[kind](tmp_path / kind)
    records = read_records(tmp_path / kind)
    assert dataset_hash(records) == dataset_hash(lines)
    # A cell of two lines moves the second row of a text table down to the fourth.
    numbers = [2, 4] if kind.endswith("sv") else [1, 2]
    assert [record.where for record in records] == [f"{tmp_path / kind}:{number}" for number in numbers]


def test_a_table_pads_objects_and_keeps_media_as_datasets_do(tmp_path):
    rows = [{"messages": CHAT, "audio": {"bytes": None, "path": "a.wav"}, "score": float("nan"), "solution": ["sad"]}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "chat.parquet")
    (record,) = read_records(tmp_path / "chat.parquet")
    assert (record.videos, record.audios, record.extra) == (("a.mp4",), ("a.wav",), {"score": None})
    assert record.messages == ({"role": "user", "content": "<video><audio>What now?"},)


def bytes_in_table(path):
    rows = [{"video": "a.mp4", "audio": {"bytes": sound, "path": "a.wav"}} for sound in (None, b"RIFF")]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


def twice_in_table(path):
    pyarrow.parquet.write_table(pa.table([["a.mp4"], ["b.mp4"]], names=["video", "video"]), path)


def selection(path):
    saved_to_disk(path, ROWS)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"_indices_files": [{"filename": "indices.arrow"}]}))


def several_sets(path):
    path.mkdir()
    (path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def elsewhere(path):
    saved_to_disk(path, ROWS)
    (path / "state.json").write_text('{"_data_files": [{"filename": "../table.arrow"}]}')


@pytest.mark.parametrize(
    ("write", "line", "got", "mend"),
    [
        (lambda path: path.write_text('[{"video": "a.mp4"}, {"video": "b.mp4", }]'), 2, "line 1, column", "correct"),
        (lambda path: path.write_text('[{"video": "a.mp4"}, 7]'), 2, "the number 7", "write {"),
        (lambda path: path.write_text('[{"video": "a.mp4", "video": "b.mp4"}]'), 1, "'video' twice", "correct"),
        (lambda path: path.write_text('[{"video": "a.mp4"}'), 0, "without an end", "complete"),
        (lambda path: path.write_text('[{"video": "a.mp4"}]\n[]'), 0, "'[]' after entry 1, at line 2", "complete"),
        (lambda path: path.write_bytes('[{"subtitle": "é"}]'.encode("cp1252")), 0, "byte 0xe9 at line 1", "iconv"),
        (lambda path: path.write_text("[" * 100_000), 1, "nested", "flatten"),
        (lambda path: path.write_text("video,solution\na.mp4,sad,happy\n"), 2, "3 cells", "quotes"),
        (lambda path: path.write_text("video,video\na.mp4,sad\n"), 1, "'video' twice", "rename"),
        (lambda path: path.write_text('video,solution\na.mp4,sad\nb.mp4,"sad'), 3, "no CSV", "quotes"),
        (lambda path: path.write_text("video,solution\n\na.mp4,sad\n../b.mp4,sad\n"), 4, "'..'", "media_root"),
        (lambda path: path.write_bytes("video,subtitle\na.mp4,高兴得很\n".encode("gbk")), 2, "GB18030", "iconv"),
        (bytes_in_table, 2, "4 bytes of a file", "media folder"),
        (twice_in_table, 0, "two columns of one name", "rename"),
        (lambda path: path.write_bytes(b"PAR1" + bytes(20)), 0, "cannot be read", "again"),
        (lambda path: path.write_bytes(b"\xff\xff\xff\xff" + bytes(3)), 0, "cannot be read", "again"),
        (lambda path: path.mkdir(), 0, "a folder", "save_to_disk"),
        (selection, 0, "a selection", "flatten_indices"),
        (several_sets, 0, "train, test", "/train"),
        (elsewhere, 0, "a folder", "state.json"),
    ],
)
def test_a_fault_names_its_row(tmp_path, write, line, got, mend):
    path = tmp_path / "data"
    write(path)
    _, problems = scan_records(path)
    assert len(problems) == 1, problems
    assert problems[0].line == line and got in problems[0].got and mend in problems[0].mend
    assert problems[0].expected and str(path) in str(problems[0])


def test_a_text_table_has_names_and_nothing_is_read_past_them(tmp_path):
    path = tmp_path / "challenge.csv"
    path.write_text("name,openset\na,\"['happy']\"\n")
    _, problems = scan_records(path)
    assert any(problem.field == "openset" for problem in problems)


def test_lists_as_python_writes_them_are_lists_and_others_stay_text(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("videos,audio,solution\n\"['a.mp4', \"\"b's.mp4\"\"]\",a.mp4,['sad' 'hurt']\n")
    (record,) = read_records(path)
    assert (record.videos, record.solution) == (("a.mp4", "b's.mp4"), ("sad", "hurt"))


def test_predictions_are_read_from_a_table_too(tmp_path):
    path = tmp_path / "answers.csv"
    path.write_text('id,prediction,truth\na,"happy, sad","[\'happy\']"\nb,,sad\n')
    columns = read_predictions(path, "set_f1")
    assert columns.ids == ["a", "b"] and columns.predictions == [["happy", "sad"], []]


def test_a_line_that_is_no_utf8_is_a_fault_of_the_table(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b"video,subtitle\na.mp4,\xe9\nb.mp4,fine\n")
    problem = fault(path)
    assert (problem.line, problem.expected) == (2, "UTF-8")


def test_a_text_that_looks_like_a_list_is_the_text_of_a_column_of_texts(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('id,video,subtitle,question,solution,scores\n[1],a.mp4,[1],"{""a"": 2}",\'sad\',[2]\n')
    (record,) = read_records(path)
    assert (record.id, record.subtitle, record.solution) == ("[1]", "[1]", ("sad",))
    assert record.messages[-1]["content"] == '{"a": 2}' and record.extra == {"scores": [2]}
    # In JSON whoever wrote it could have written a text.
    written(path, [{"id": "1", "video": "a.mp4", "subtitle": [1]}])
    assert fault(path).field == "subtitle"


@pytest.mark.parametrize(
    "quoted", ['"name"\n"a"\n"b, c"\n', '\ufeff"name"\r\n\r\n"a"\r\n"b, c"\r\n', 'name\na\n"b, c"\n']
)
def test_a_csv_of_one_column_may_have_its_name_in_quotes(tmp_path, quoted):
    path = tmp_path / "candidates.csv"
    path.write_bytes(quoted.encode())
    faults = []
    rows = [json.loads(text) for _, text in numbered_rows(path, faults, one_column=True)]
    assert rows == [{"name": "a"}, {"name": "b, c"}] and faults == []
    # As JSON lines each line is named for what it is.
    assert [json.loads(text) for _, text in numbered_rows(path, [])][:1] != [{"name": "a"}]
