"""Two processes that find each other, compare themselves, stop together, and do not outlive each other."""

import json
import time

import pytest
from support.several import end_of, start_processes
from support.small_run import REPOSITORY

from mer_r1_jax.parallel import processes
from mer_r1_jax.parallel.processes import EXIT_PEER_LOST, ProcessError, start

SCRIPT = str(REPOSITORY / "tests/support/process_talk.py")
LIMIT = 400  # seconds, on a busy machine


@pytest.fixture(scope="module")
def lost():
    """How two processes end of which the second one is gone without a word, and seconds until the first one ended."""
    pair = start_processes([SCRIPT, "lost"], count=2, devices=1)
    second = end_of(pair[1], LIMIT)
    gone = time.monotonic()
    return end_of(pair[0], LIMIT), second, time.monotonic() - gone


def said(ended):
    return json.loads(ended[1].strip().splitlines()[-1])


def test_values_arrive_in_the_order_of_the_processes(lost):
    first, second, _ = lost
    for ended in (first, second):
        assert said(ended)["exchange"] == [[0, 10], [1, 11], [2, 12]]
        assert said(ended)["from_first"] == "made by 0"
    assert said(first)["gather"] == [[0], [1]] and said(second)["gather"] is None


def test_all_processes_take_the_largest_bucket_that_one_of_them_needs(lost):
    assert [said(ended)["bucket"] for ended in lost[:2]] == [8, 8]


def test_processes_with_the_same_rows_put_the_same_clips_into_them(lost):
    """A clip that one process cannot use, and another could, is in no batch; all ask each other equally often."""
    expected = {
        "batches": [["0"], ["2"], [], []],
        "skipped": [
            ["1", "no such file"],
            ["3", "decoding took too long"],
            ["4", "decoding took too long"],
        ],
    }
    assert [said(ended)["batches"] for ended in lost[:2]] == [expected, expected]


def test_another_configuration_is_refused_by_the_name_of_its_field_on_every_process(lost):
    for ended in lost[:2]:
        told = said(ended)["config"]
        assert "rl.beta: 0.04 on process 0, 1.04 on process 1" in told
        assert "decode_workers" not in told and told.count(" on process 1") == 1


def test_another_data_set_is_refused_by_its_name_on_every_process(lost):
    for ended in lost[:2]:
        told = said(ended)["data"]
        assert "data.rl: " in told and "data.sft" not in told and "Start the same command, on the same files" in told


def test_a_longer_data_set_on_one_process_is_refused_with_both_numbers_on_every_process(lost):
    for ended in lost[:2]:
        assert "records.rl: 1 on process 0, 2 on process 1" in said(ended)["length"]


def test_other_code_of_the_same_version_on_one_process_is_refused_on_every_process(lost):
    for ended in lost[:2]:
        for part in ("code", "kernels"):
            told = said(ended)[part]
            assert "versions.code: " in told and told.count(" on process 1") == 1


def test_a_signal_to_one_process_stops_both_at_the_same_step(lost):
    assert all(said(ended)["announced"] for ended in lost[:2])  # what each waits for alone is left then
    steps = [said(ended)["stopped"] for ended in lost[:2]]
    assert steps[0] == steps[1] and 5 <= steps[0] < 1000


def test_a_process_that_is_gone_without_a_word_ends_the_other_within_a_minute_with_the_reason(lost):
    (status, _, told), (gone, _, _), seconds = lost
    assert gone == 9 and status == EXIT_PEER_LOST
    assert "process 0 ends, because process 1 has given no sign of life for 30 s" in told
    assert seconds < 60


def test_a_process_that_ends_with_an_error_takes_the_other_along_with_its_reason():
    pair = start_processes([SCRIPT, "refused"], count=2, devices=1)
    first, second = (end_of(process, LIMIT) for process in pair)
    assert second[0] == 2 and "error: this one cannot go on" in second[2]
    assert first[0] == EXIT_PEER_LOST
    assert "process 0 ends, because process 1 ended: ConfigError: this one cannot go on" in first[2]


def test_one_process_needs_no_settings_and_talks_to_itself(monkeypatch):
    for name in processes.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert not start()
    assert (processes.index(), processes.count()) == (0, 1)
    assert processes.exchange("x", 3) == processes.gather("x", 3) == [3]


@pytest.mark.parametrize(
    "values", [("host:1", "2", ""), ("host", "2", "0"), ("host:1", "2", "2"), ("host:1", "two", "0"), ("", "2", "0")]
)
def test_settings_that_name_no_process_are_refused_with_what_was_got(monkeypatch, values):
    for name, value in zip(processes.SETTINGS, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match="expected host:port of process 0") as caught:
        start()
    assert f"JAX_NUM_PROCESSES={values[1]}" in str(caught.value)
