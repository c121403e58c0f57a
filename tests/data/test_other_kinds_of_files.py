"""Files of kinds that nobody reads: one error a file says what it is and how to convert it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile

import pytest

from mer_r1_jax.data.records import RecordError, read_records, scan_records
from mer_r1_jax.emotion.predictions import PredictionError, read_predictions

ROWS = [{"video": "a.mp4", "subtitle": "好", "solution": ["happy"]}, {"video": "b.mp4", "solution": ["sad"]}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def written(write) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def zipped(name: str) -> bytes:
    def write(stream):
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr(name, LINES)

    return written(write)


@pytest.mark.parametrize(
    ("content", "got", "mend"),
    [
        (gzip.compress(LINES.encode()), "gzip", "gzip -dc"),
        (bz2.compress(LINES.encode()), "bzip2", "bzip2 -dc"),
        (lzma.compress(LINES.encode()), "xz", "xz -dc"),
        (b"\x28\xb5\x2f\xfd" + bytes(20), "zstd", "zstd -dc"),
        (zipped("data.jsonl"), "a zip archive", "unzip -p"),
        (zipped("xl/workbook.xml"), "Excel", "read_excel"),
        (LINES.encode("utf-16"), "UTF-16", "iconv -f UTF-16"),
        (LINES.encode("utf-16-le"), "UTF-16LE", "iconv"),
        (LINES.encode("utf-32"), "UTF-32", "iconv"),
        ("video\tsolution\na.mp4\thappy\n".encode("utf-16"), "UTF-16", "iconv"),
        (json.dumps({"data": ROWS}).encode(), 'a list under "data"', "jq -c '.[\"data\"][]'"),
        (json.dumps({"version": 1, "rows": ROWS}, indent=2).encode(), 'a list under "rows"', "jq -c '.[\"rows\"][]'"),
        (('{"train": [\n' + ",\n".join(LINES.split("\n")[:2]) + "\n]}").encode(), 'under "train"', "jq -c"),
        (json.dumps({"a": ROWS[0], "b": ROWS[1]}).encode(), "holds the others", "jq -c '.[]'"),
        (LINES.replace("\n", "\r").encode(), "carriage returns", "tr "),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git-lfs pointer", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html></html>\n", "a web page", "download"),
        (b"SQLite format 3\x00" + bytes(100), "SQLite", "export"),
        (b"\x80\x04\x95" + bytes(30), "a binary file", "name the JSON-lines file"),
        (b"first line\nsecond line\n", "not JSON", "one JSON object per line"),
    ],
)
def test_one_error_says_what_it_is_and_how_to_convert_it(tmp_path, content, got, mend):
    path = tmp_path / "my data"
    path.write_bytes(content)
    with pytest.raises(RecordError) as caught:
        read_records(path)
    (problem,) = caught.value.problems
    assert problem.line == 0 and got in problem.got and mend in problem.mend
    with pytest.raises(PredictionError) as caught:
        read_predictions(path, "set_f1")
    assert got in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("encoding", ["gb18030", "cp1252"])
def test_another_encoding_is_one_error_at_its_first_line(tmp_path, encoding):
    word = "高兴得很" if encoding == "gb18030" else "café"
    lines = [ROWS[0] | {"subtitle": "plain"}] + [ROWS[1] | {"id": n, "subtitle": f"{word} {n}"} for n in range(3)]
    path = tmp_path / "data.jsonl"
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines).encode(encoding))
    records, (problem,) = scan_records(path)
    assert len(records) == 1 and problem.line == 2
    assert "and 2 further line(s)" in problem.got and problem.expected == "UTF-8"
    assert ("iconv -f GB18030" if encoding == "gb18030" else "iconv -f WINDOWS-1252") in problem.mend


@pytest.mark.parametrize(
    "lines",
    [
        LINES,
        "\ufeff" + LINES.replace("\n", "\r\n"),
        json.dumps(ROWS[0] | {"objects": [{"box": 1}]}) + "\n",
        json.dumps({"messages": [{"role": "user", "content": "x"}], "video": "a.mp4"}),
        json.dumps(ROWS[0] | {"subtitle": "a\u2028b"}, ensure_ascii=False) + "\n",
    ],
)
def test_json_lines_are_never_taken_for_something_else(tmp_path, lines):
    path = tmp_path / "data.csv.gz"  # the name says nothing
    path.write_text(lines, encoding="utf-8", newline="")
    assert len(read_records(path)) == len([line for line in lines.split("\n") if line.strip()])


def test_faults_of_single_lines_stay_with_their_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"video": "a.mp4", \n' + LINES + "{'video': 'a.mp4'}\n", encoding="utf-8")
    records, problems = scan_records(path)
    assert len(records) == 2 and [problem.line for problem in problems] == [1, 4]
