"""The order of prompts: shuffled each epoch, complete, one for all processes, and resumed exactly."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer_r1_jax.data.pipeline import PromptStream, ResumeError, batches_for_epochs
from mer_r1_jax.data.records import Record

SETTINGS = "sft.prompts_per_step, or rl.prompts_per_step x rl.steps_per_generation"
EPOCH_0 = ["r6", "r4", "r2", "r0", "r3", "r5", "r7", "r1"]
EPOCH_1 = ["r3", "r0", "r1", "r4", "r7", "r5", "r6", "r2"]


def make_records(count):
    return [Record(id=f"r{n}", messages=({"role": "user", "content": "?"},), subtitle=str(n)) for n in range(count)]


def ids(items):
    return [item.record.id for item in items]


def test_every_epoch_visits_each_record_once_in_an_order_of_its_own():
    stream = PromptStream(make_records(12), 4, seed=3)
    items = [item for _ in range(9) for item in stream.next()]
    assert [item.global_index for item in items] == list(range(36))
    assert [item.epoch for item in items] == [0] * 12 + [1] * 12 + [2] * 12
    epochs = [ids(items[start : start + 12]) for start in (0, 12, 24)]
    assert all(sorted(epoch) == sorted(f"r{n}" for n in range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert stream.epoch == 3


def test_the_order_depends_on_the_seed_alone():
    def order(seed):
        stream = PromptStream(make_records(30), 10, seed)
        return [ids(stream.next()) for _ in range(6)]

    assert order(5) == order(5)
    # grain seeds epoch e with seed + e: neighbouring seeds must not share an epoch.
    assert order(5)[3:] != order(6)[:3]
    assert order(5) != order(6)


def test_the_order_is_the_one_runs_already_made():
    """Checkpoints hold an index into this order: another order would resume silently wrong."""
    stream = PromptStream(make_records(8), 8, seed=0)
    assert ids(stream.next()) == EPOCH_0
    assert ids(stream.next()) == EPOCH_1


@pytest.mark.slow
@settings(max_examples=25)
@given(
    count=st.integers(1, 23),
    data=st.data(),
    seed=st.integers(0, 2**40),
    stop=st.integers(0, 9),
)
def test_resuming_anywhere_with_any_processes_goes_on_with_the_same_order(count, data, seed, stop):
    per_step = data.draw(st.integers(1, count))
    processes = data.draw(st.sampled_from([n for n in range(1, per_step + 1) if per_step % n == 0]))
    records = make_records(count)
    straight = PromptStream(records, per_step, seed)
    expected = [straight.next() for _ in range(stop + 4)]
    stopped = PromptStream(records, per_step, seed)
    for _ in range(stop):
        stopped.next()
    state = json.loads(json.dumps(stopped.state()))
    slices = [PromptStream(records, per_step, seed, n, processes) for n in range(processes)]
    for stream in slices:
        stream.restore(state)
    for want in expected[stop:]:
        parts = [stream.next() for stream in slices]
        assert all(len(part) == per_step // processes for part in parts)
        assert [item for part in parts for item in part] == want
    assert len({json.dumps(stream.state()) for stream in slices}) == 1


def test_a_resumed_stream_may_take_other_steps_of_the_same_order():
    records = make_records(10)
    first = PromptStream(records, 6, seed=1)
    first.next()
    other = PromptStream(records, 3, seed=1)
    other.restore(first.state())
    assert ids(other.next()) + ids(other.next()) == ids(first.next())


def test_peeking_does_not_move_the_stream():
    stream = PromptStream(make_records(9), 2, seed=0)
    ahead = [stream.peek(step) for step in range(7)]
    assert stream.next_index == 0
    assert [stream.next() for _ in range(7)] == ahead


def test_visits_carry_a_number_of_their_own_whatever_the_process():
    records = make_records(6)
    whole = PromptStream(records, 6, seed=2)
    uids = [item.uid for _ in range(3) for item in whole.next()]
    halves = [PromptStream(records, 6, 2, n, 2) for n in range(2)]
    assert [item.uid for _ in range(3) for half in halves for item in half.next()] == uids
    assert len(set(uids)) == len(uids), "a prompt visited twice in a step may not get the same completions twice"
    assert all(0 <= uid < 2**32 for uid in uids)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda records: records[:-1], "num_records: 8 then, 7 now"),
        (lambda records: records[::-1], "dataset_hash"),
        (lambda records: [dataclasses.replace(records[0], subtitle="new"), *records[1:]], "dataset_hash"),
    ],
)
def test_a_state_of_another_data_set_is_refused_with_the_difference(change, name):
    records = make_records(8)
    state = PromptStream(records, 4, seed=0).state()
    with pytest.raises(ResumeError, match="to mend it") as caught:
        PromptStream(change(records), 4, seed=0).restore(state)
    assert name in str(caught.value)


def test_a_state_of_another_seed_or_form_is_refused():
    stream = PromptStream(make_records(8), 4, seed=0)
    with pytest.raises(ResumeError, match="seed: 0 then, 1 now"):
        PromptStream(make_records(8), 4, seed=1).restore(stream.state())
    with pytest.raises(ResumeError, match="got the fields"):
        stream.restore({"next_index": 4})
    for index in (-1, 1.5, True, None):
        with pytest.raises(ResumeError, match="next_index"):
            stream.restore({**stream.state(), "next_index": index})


@pytest.mark.parametrize(
    ("count", "per_step", "index", "processes", "message"),
    [
        (0, 1, 0, 1, "records: got none"),
        (4, 0, 0, 1, f"prompts_at_once: got 0 ({SETTINGS}); expected a positive multiple of the 1"),
        (8, 5, 0, 2, f"prompts_at_once: got 5 ({SETTINGS}); expected a positive multiple of the 2"),
        (4, 8, 0, 1, f"prompts_at_once: got 8 ({SETTINGS}); expected at most the 4 records"),
        (4, 4, 2, 2, "process_index: got 2; expected 0 to process_count - 1 = 1"),
    ],
)
def test_impossible_sizes_are_refused(count, per_step, index, processes, message):
    with pytest.raises(ValueError, match="expected") as caught:
        PromptStream(make_records(count), per_step, 0, index, processes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("records", "per_step", "epochs", "steps"), [(10, 5, 1, 2), (10, 4, 1, 3), (10, 4, 0.5, 2), (8, 4, 2, 4)]
)
def test_batches_for_epochs(records, per_step, epochs, steps):
    assert batches_for_epochs(records, per_step, epochs) == steps
