"""The report of a run that goes on: written after an evaluation, not too often, and never in the run's way."""

import types

import pytest

from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.run import train


class Clock:
    """Seconds that pass when told to."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(train, "time", clock)
    return clock


def of(folder, told, clock):
    """What of a run and its log the report needs."""
    stop = types.SimpleNamespace(asked=lambda: False)
    run = types.SimpleNamespace(config=RunConfig(), folder=types.SimpleNamespace(path=folder), stop=stop)
    return run, types.SimpleNamespace(note=told.append, reported=clock.now, report_took=0.0)


def test_it_is_written_after_an_evaluation_but_not_every_few_seconds(tmp_path, clock, monkeypatch):
    written, told = [], []
    monkeypatch.setattr(train, "make_report", lambda path, **about: written.append(about["under_way"]))
    run, steps = of(tmp_path, told, clock)
    clock.now += train.REPORT_SECONDS - 1
    train._report_so_far(run, "after RL step 1 of 9", steps)
    assert written == []
    clock.now += 1
    train._report_so_far(run, "after RL step 2 of 9", steps)
    train._report_so_far(run, "after RL step 3 of 9", steps)
    assert written == ["after RL step 2 of 9"]
    train._write_report(run)  # at the end, whenever the last one was
    assert written == ["after RL step 2 of 9", ""] and told == []


def test_it_waits_where_it_takes_long_and_where_the_run_is_asked_to_end(tmp_path, clock, monkeypatch):
    written = []

    def slowly(path, **about):
        written.append(about["under_way"])
        clock.now += 30

    monkeypatch.setattr(train, "make_report", slowly)
    run, steps = of(tmp_path, [], clock)
    clock.now += train.REPORT_SECONDS
    train._report_so_far(run, "first", steps)
    clock.now += 20 * 30 - 1  # not more than a twentieth of the time
    train._report_so_far(run, "too early", steps)
    clock.now += 1
    run.stop.asked = lambda: True  # the checkpoint comes first
    train._report_so_far(run, "asked to end", steps)
    run.stop.asked = lambda: False
    train._report_so_far(run, "second", steps)
    assert written == ["first", "second"]


def test_it_waits_for_clips_only_so_long_and_not_at_all_where_the_run_is_asked_to_end(tmp_path, clock, monkeypatch):
    patience = []
    monkeypatch.setattr(train, "make_report", lambda path, **about: patience.append(about["patience"]))
    run, steps = of(tmp_path, [], clock)
    clock.now += train.REPORT_SECONDS
    train._report_so_far(run, "after RL step 1 of 9", steps)
    train._write_report(run)
    under_way, at_the_end = patience
    assert under_way.seconds == train.CLIP_SECONDS < train.REPORT_SECONDS and at_the_end is None
    assert under_way.asked is run.stop.asked


def test_a_report_that_cannot_be_written_stops_no_run(tmp_path, clock):
    told = []
    run, steps = of(tmp_path / "nowhere\x1b[2J", told, clock)
    clock.now += train.REPORT_SECONDS
    train._report_so_far(run, "after RL step 1 of 9", steps)
    (said,) = told
    assert said.startswith("report.html could not be written; the run goes on (ReportError: ") and "\x1b" not in said
    train._report_so_far(run, "after RL step 2 of 9", steps)
    assert len(told) == 1  # nor is it tried again at once


def test_an_evaluation_that_is_due_is_followed_by_a_report(monkeypatch):
    asked = []
    monkeypatch.setattr(train, "evaluate", lambda run, params, phase, step: asked.append(step))
    monkeypatch.setattr(train, "_report_so_far", lambda run, under_way, steps: asked.append(under_way))
    config = types.SimpleNamespace(eval=types.SimpleNamespace(eval_steps=2))
    run = types.SimpleNamespace(config=config, data=types.SimpleNamespace(eval=("a clip",)))
    phase, state = types.SimpleNamespace(total_steps=4), types.SimpleNamespace(params=None)
    for step in range(5):
        train._evaluate_when_due(run, phase, state, step, None)
    assert asked == [0, "after RL step 0 of 4", 2, "after RL step 2 of 4"]  # the end has its own
