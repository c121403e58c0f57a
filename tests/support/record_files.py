"""Data files of a few lines, and the one fault of each."""

from __future__ import annotations

import json

import pytest

from mer_r1_jax.data.records import RecordError, read_records

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
