"""The list of broken clips: kept, restored, counted and limited."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mer_r1_jax.data.quarantine import Quarantine, QuarantineLimitError
from mer_r1_jax.data.records import Record
from mer_r1_jax.media.opening import MediaError


def record(number, file="train.jsonl"):
    return Record(id=f"r{number}", messages=(), file=file, line=number + 1)


def error(number, reason="truncated"):
    return MediaError(f"clips/{number}.mp4", reason, "half a file", "a whole one", "Copy it again.")


def test_a_broken_clip_is_listed_once_with_the_step_it_was_first_met():
    quarantine = Quarantine(100, 0.5)
    quarantine.add(record(3), error(3), step=7)
    again = quarantine.add(record(3), error(3, "missing"), step=9)
    assert len(quarantine) == 1 and "r3" in quarantine and "r4" not in quarantine
    assert (again.step, again.reason, again.file, again.line) == (7, "truncated", "train.jsonl", 4)
    assert "clips/3.mp4" in again.message
    assert quarantine.fraction == 0.01


def test_the_limit_is_a_share_that_may_be_reached_but_not_passed():
    quarantine = Quarantine(50, 0.04)
    for number in range(2):
        quarantine.add(record(number), error(number), step=0)
        quarantine.check()
    quarantine.add(record(2), error(2), step=1)
    with pytest.raises(QuarantineLimitError):
        quarantine.check()


def test_passing_the_limit_names_the_clips_their_reasons_and_the_worst_files():
    quarantine = Quarantine(100, 0.1)
    for number in range(12):
        reason = "timeout" if number % 4 == 0 else "truncated"
        quarantine.add(record(number, "b.jsonl" if number < 9 else "a.jsonl"), error(number, reason), step=number)
    with pytest.raises(QuarantineLimitError) as caught:
        quarantine.check()
    message = str(caught.value)
    assert "12 of 100 clips (12.0%) are broken; expected at most data.max_quarantined_fraction = 10.0%" in message
    assert "By reason: truncated 9, timeout 3" in message
    assert "By data file: b.jsonl 9, a.jsonl 3" in message
    assert "b.jsonl:1: r0: clips/0.mp4: half a file" in message
    assert "and 2 more" in message and "`mer-r1 validate`" in message


def test_no_broken_clip_is_tolerated_at_limit_zero():
    quarantine = Quarantine(1000, 0.0)
    quarantine.check()
    quarantine.add(record(1), error(1), step=0)
    with pytest.raises(QuarantineLimitError):
        quarantine.check()


def test_the_list_survives_a_checkpoint():
    quarantine = Quarantine(10, 0.5)
    for number in (4, 1):
        quarantine.add(record(number), error(number), step=number)
    restored = Quarantine(10, 0.5)
    restored.add(record(9), error(9), step=0)
    restored.restore(json.loads(json.dumps(quarantine.state())))
    assert restored.clips == quarantine.clips
    assert restored.state() == quarantine.state()


def test_a_few_first_time_outs_have_no_say_in_the_limit_and_many_do():
    quarantine = Quarantine(1000, 0.002)
    for number in range(12):
        assert quarantine.refuse(record(number), error(number, "timeout"), step=3).again
        quarantine.check()
    assert len(quarantine) == 0 and len(quarantine.timed_out) == 12 and "r3" not in quarantine
    quarantine.refuse(record(12), error(12, "timeout"), step=3)
    with pytest.raises(QuarantineLimitError, match=r"13 of 1000 clips \(1.3%\) are broken or timed out; .*timeout 13"):
        quarantine.check()
    quarantine.recovered(f"r{number}" for number in range(1, 13))
    quarantine.check()
    broken = quarantine.refuse(record(0), error(0, "timeout"), step=9)
    assert (broken.step, broken.again) == (9, False) and "r0" in quarantine and not quarantine.timed_out
    quarantine.extend([dataclasses.replace(broken, again=True, step=3)])
    assert not quarantine.timed_out


def test_what_timed_out_once_survives_a_checkpoint_and_a_list_of_before_is_read():
    quarantine = Quarantine(10, 0.5)
    quarantine.add(record(1), error(1), step=1)
    of_before = json.loads(json.dumps(quarantine.state()))
    assert "again" not in of_before[0]
    quarantine.refuse(record(2), error(2, "timeout"), step=2)
    restored = Quarantine(10, 0.5)
    restored.restore(json.loads(json.dumps(quarantine.state())))
    assert restored.timed_out == quarantine.timed_out and restored.clips == quarantine.clips
    restored.restore(of_before)
    assert restored.clips == quarantine.clips and not restored.timed_out


def test_the_lists_of_several_processes_become_one_whatever_their_order():
    first, second = Quarantine(10, 0.5), Quarantine(10, 0.5)
    first.add(record(1), error(1), step=5)
    first.add(record(2), error(2), step=6)
    second.add(record(1), error(1), step=3)
    for states in ((first.state(), second.state()), (second.state(), first.state())):
        both = Quarantine(10, 0.5)
        both.restore(*states)
        assert [(clip.id, clip.step) for clip in both.clips] == [("r1", 3), ("r2", 6)]


def test_a_damaged_list_is_refused():
    with pytest.raises(ValueError, match="quarantine state.*expected entries of id, file"):
        Quarantine(10, 0.5).restore([{"id": "x"}])


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_an_impossible_limit_is_refused(fraction):
    with pytest.raises(ValueError, match="max_quarantined_fraction: got"):
        Quarantine(10, fraction)
