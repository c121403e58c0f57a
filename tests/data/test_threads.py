"""Calls in threads: in order, bounded, ended by what is raised, and no hindrance to Python's end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from mer_r1_jax.data.threads import AHEAD, DaemonThreads, map_ordered


def test_results_come_in_the_items_order_and_few_items_are_taken_ahead():
    taken, running, most = [], set(), []

    def items():
        for number in range(40):
            taken.append(number)
            yield number

    def double(number):
        running.add(number)
        most.append(len(running))
        time.sleep(0.002 * (number % 4))
        running.discard(number)
        return 2 * number

    for number, result in map_ordered(double, items(), 3):
        assert result == 2 * number
        assert len(taken) <= number + 1 + AHEAD * 3
    assert len(most) == 40 and max(most) <= 3 and not named("ordered")


def test_what_a_call_raises_ends_the_iteration_and_the_others_give_up():
    stop, called = threading.Event(), []

    def work(number):
        called.append(number)
        if number == 2:
            raise ValueError("no")
        return stop.wait(60) if number > 2 else number

    results = map_ordered(work, range(1000), 4, on_stop=stop.set)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="no"):
        list(results)
    assert time.monotonic() - begin < 30 and len(called) < 20 and not named("ordered")


def test_what_waiting_raises_ends_the_iteration():
    stop = threading.Event()

    def waiting():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(map_ordered(lambda _: stop.wait(60), range(3), 1, on_stop=stop.set, waiting=waiting))
    assert not named("ordered")


def test_a_cancelled_call_is_not_made_and_errors_are_handed_over():
    threads, release, made = DaemonThreads(1, "one"), threading.Event(), []
    first = threads.submit(release.wait, 60)
    second, third = threads.submit(made.append, 2), threads.submit(int, "x")
    assert second.cancel()
    release.set()
    assert first.result(10) and isinstance(third.exception(10), ValueError)
    threads.close(wait=True)
    assert not made and not named("one")


def test_a_call_that_stands_still_does_not_keep_python_from_ending():
    program = "import time\nfrom mer_r1_jax.data.threads import DaemonThreads\n"
    program += "DaemonThreads(1, 'x').submit(time.sleep, 1000); time.sleep(0.2)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def named(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(name)]
