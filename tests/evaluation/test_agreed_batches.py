"""Which way an evaluation makes its batches: alone, or agreeing with a process that loads the same rows."""

import types

import pytest

from mer_r1_jax.data.records import Record
from mer_r1_jax.evaluation import evaluate
from mer_r1_jax.evaluation.evaluate import Evaluator
from mer_r1_jax.parallel.rows import RowShare


def records(count):
    return [Record(id=str(n), messages=({"role": "user", "content": "Feel?"},)) for n in range(count)]


@pytest.mark.parametrize(
    ("running", "shares", "expected"),
    [
        (1, 1, [["0", "1"], ["2"]]),
        # Each process has rows of its own: what another cannot use is none of its business.
        (2, 2, [["0", "1"], ["2"]]),
        # Both load the same rows, and the other one could not use clip 1.
        (2, 1, [["0"], ["2"]]),
    ],
)
def test_processes_agree_where_they_load_the_same_rows(monkeypatch, running, shares, expected):
    monkeypatch.setattr(evaluate, "row_share", lambda mesh: RowShare(0, shares, True))
    talk = types.SimpleNamespace(count=lambda: running, exchange=lambda what, own: [own, {"1": "a time-out"}])
    monkeypatch.setattr(evaluate, "processes", talk)
    programs = types.SimpleNamespace(backbone=types.SimpleNamespace(mesh=None))
    evaluator = Evaluator(types.SimpleNamespace(programs=programs), [types.SimpleNamespace(rows=2)])
    skipped = []
    batches = evaluator._batches_of(((record, object()) for record in records(3)), skipped, 0)
    assert [[record.id for record, _ in batch] for batch in batches] == expected
    assert [(record.id, why) for record, why in skipped] == ([("1", "a time-out")] if shares < running else [])
