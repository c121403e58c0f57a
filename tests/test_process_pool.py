"""The pool of child processes: whatever a job does costs that job, nothing of it is left, and a pause costs nothing."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from support.process_tree import descendants, gone

from mer_r1_jax import process_pool
from mer_r1_jax.faults import StopRequested
from mer_r1_jax.process_guard import SHOWN_BYTES
from mer_r1_jax.process_pool import ChildDiedError, Countdown, ProcessPool

# A job is Python code that says what its answer is; the names it makes stay, as those of a module do.
WORKER = """
import json, os, signal, subprocess, sys, threading, time
from mer_r1_jax.process_pool import serve
names = dict(vars())
def answer(job):
    names.update(value=None, data=b"")
    exec(job["code"], names)
    return {"value": names["value"]}, names["data"]
serve(answer)
"""
COMMAND = (sys.executable, "-c", WORKER)


@pytest.fixture
def pool():
    pool = ProcessPool(COMMAND, 1)
    yield pool
    pool.close()


def ask(pool, code, seconds=20.0, **further):
    """The answer's value, or (value, bytes) where there are bytes."""

    def read(head, data):
        return (head["value"], data) if data else head["value"]

    return pool.ask({"code": code}, seconds, read, **further)


def test_answers_are_those_of_the_jobs_whichever_thread_asks():
    with contextlib.closing(ProcessPool(COMMAND, 2)) as pool:
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            codes = [f"value = {n}; data = b'{n}\\n' * {10 * n}; time.sleep({n % 3} / 50)" for n in range(1, 21)]
            answers = list(threads.map(lambda code: ask(pool, code), codes))
        assert answers == [(n, f"{n}\n".encode() * 10 * n) for n in range(1, 21)]
        assert len(pool._running) == 2


HARMLESS = {
    "prints": "print('{\"value\": 7}'); os.write(1, b'x' * (8 << 20)); os.write(2, b'y' * (8 << 20))",
    "writes_everywhere": """for fd in range(3, 30):
        try: os.write(fd, b'half a line {"value": 7}\\n{"job": 1, "value": 7}\\n' + b'[' * 100_000 + b'\\n7\\nno end')
        except OSError: pass""",
    "forks_and_returns_twice": "value = 1 if os.fork() else 7",
    "leaves_threads": "for _ in range(50): threading.Thread(target=time.sleep, args=(1000,)).start()",
    "answers_again_later": """def later():
        time.sleep(0.3)
        for fd in range(3, 30):
            try: os.write(fd, b'\\n{"value": 7}\\n')
            except OSError: pass
threading.Thread(target=later).start()""",
    "reads_standard_input": "assert sys.stdin.read() == ''",
    "closes_the_standard_streams": "os.closerange(0, 3)",
    "replaces_json": "json.dumps = lambda *a, **k: '{\"value\": 7}'",
    "signals_its_parent": """for number in (1, 2, 3, 10, 12, 13, 14, 15, 17, 18, 20, 21, 22):
        os.kill(os.getppid(), number)""",
    "leaves_a_child": "subprocess.Popen(['sleep', '1000'], start_new_session=True)",
}
DEADLY = {
    "exits": ("os._exit(0)", "exit status 0"),
    "leaves": ("sys.exit(3)", "exit status 3"),
    "raises": ("raise RuntimeError('an unforeseen bug')", "exit status 1, RuntimeError: an unforeseen bug"),
    "aborts": ("os.abort()", "exit status -6"),
    "is_killed": ("os.kill(os.getpid(), 9)", "exit status -9"),
    "kills_its_parent": ("os.kill(os.getppid(), 9); time.sleep(1000)", "exit status -9"),
    "kills_its_group": ("os.kill(0, 9)", "exit status -9"),
    "closes_everything": ("os.closerange(0, 100)", "exit status 1"),
    "goes_on_as_a_daemon": ("if os.fork(): os._exit(0)\nos.setsid(); value = 7", "exit status 0"),
    "prints_a_flood_and_dies": ("os.write(2, b'z' * (4 << 20) + b'\\nlast words\\n'); os._exit(5)", "5, last words"),
    "floods_the_answers": (
        """for fd in range(3, 30):
    try:
        while True: os.write(fd, b'x' * (1 << 20))
    except OSError: pass""",
        "64 MiB that are no answer",
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_a_job_does_beside_its_answer_changes_no_answer(pool, name):
    assert ask(pool, f"{HARMLESS[name]}\nif value is None: value = 1") == 1
    assert [ask(pool, f"time.sleep(0.2); value = {n}") for n in (2, 3, 4)] == [2, 3, 4]
    (child,) = pool._running
    tree = descendants(child._process.pid)
    assert tree
    pool.close()
    assert all(gone(process) for process in [child._process.pid, *tree])


@pytest.mark.parametrize("name", DEADLY)
def test_a_job_that_ends_its_process_is_told_how_and_costs_no_other(pool, name):
    code, words = DEADLY[name]
    assert ask(pool, "value = 1") == 1
    (child,) = pool._running
    with pytest.raises(ChildDiedError, match=words):
        ask(pool, code)
    assert gone(child._process.pid) and not pool._running
    assert ask(pool, "value = 2") == 2
    assert pool._running.isdisjoint({child})


# Ways to leave a process behind: plain, in a session of its own, without a parent, and of a process that is dead.
LEFT_BEHIND = {
    "child": "subprocess.Popen(['sleep', '1000'])",
    "session": "subprocess.Popen(['sleep', '1000'], start_new_session=True, env={})",
    "daemon": "subprocess.Popen(['sh', '-c', 'setsid sh -c \"sleep 1000 & sleep 1000\" & exit 0']); time.sleep(0.5)",
}


@pytest.mark.parametrize("name", LEFT_BEHIND)
@pytest.mark.parametrize("end", ["time-out", "exit", "close", "the run is killed"])
def test_nothing_that_a_job_started_outlives_its_process(tmp_path, name, end):
    listed = tmp_path / "processes"
    code = f"{LEFT_BEHIND[name]}\ntime.sleep(0.2)\nopen({str(listed)!r}, 'w').close()\n"
    code += {"exit": "time.sleep(1); os._exit(0)", "close": "time.sleep(1); value = 1"}.get(end, "time.sleep(1000)")
    program = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_process_pool import *
pool = ProcessPool(COMMAND, 1)
try:
    ask(pool, {code!r}, {3.0 if end == "time-out" else 1000.0})
except (TimeoutError, ChildDiedError) as error:
    print(type(error).__name__, flush=True)
else:
    pool.close()
    print("closed", flush=True)
time.sleep(1000)
"""
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        seen: set[int] = set()
        while not listed.exists():
            seen |= set(descendants(run.pid))
            time.sleep(0.02)
        seen |= set(descendants(run.pid))
        if end == "the run is killed":
            run.kill()
        else:
            said = {"time-out": "TimeoutError", "exit": "ChildDiedError", "close": "closed"}[end]
            assert run.stdout.readline().strip() == said
        assert len(seen) > 2 and all(gone(process) for process in seen)
    finally:
        run.kill()
        run.wait()
        run.stdout.close()


def test_a_job_that_hangs_ends_in_time_though_it_is_deaf_and_the_next_one_is_answered(pool):
    ask(pool, "value = 1")
    deaf = "for number in set(signal.valid_signals()) - {9, 19, 32, 33}: signal.signal(number, signal.SIG_IGN)\n"
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        ask(pool, deaf + "time.sleep(1000)", 1.0)
    assert 0.9 < time.monotonic() - begin < 10.0
    assert ask(pool, "value = 2") == 2


def test_a_guard_that_was_stopped_is_ended_all_the_same(pool):
    ask(pool, "os.kill(os.getppid(), signal.SIGSTOP); value = 1")
    (child,) = pool._running
    tree = descendants(child._process.pid)
    pool.close()
    assert tree and all(gone(process) for process in [child._process.pid, *tree])


def test_a_guard_that_was_killed_is_told_and_its_group_ended(pool, tmp_path):
    fork = tmp_path / "fork"
    code = f"""if fork := os.fork():
    open({str(fork)!r}, "w").write(str(fork))
    os.kill(os.getppid(), 9)
time.sleep(1000)"""
    begin = time.monotonic()
    with pytest.raises(ChildDiedError, match="exit status -9"):
        ask(pool, code, 1000.0)
    assert time.monotonic() - begin < 60 and gone(int(fork.read_text()))


def test_handing_over_a_large_job_ends_in_time_too(pool):
    """A child that stands still reads nothing, and a pipe holds 64 KiB."""
    ask(pool, "threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGSTOP)).start()")
    time.sleep(1.0)
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        ask(pool, "value = 1 #" + "x" * (1 << 20), 1.0)
    assert time.monotonic() - begin < 10.0
    assert ask(pool, "value = 2 #" + "x" * (1 << 20)) == 2


def test_an_answer_that_trickles_ends_in_time(pool):
    slow = """while True:
    for fd in range(3, 30):
        try: os.write(fd, b"x")
        except OSError: pass
    time.sleep(0.05)"""
    with pytest.raises(TimeoutError):
        ask(pool, slow, 1.0)


def test_other_jobs_go_on_while_one_hangs():
    pool, outcome = ProcessPool(COMMAND, 2), []

    def hang():
        try:
            ask(pool, "time.sleep(1000)", 4.0)
        except TimeoutError:
            outcome.append("timeout")

    thread = threading.Thread(target=hang)
    try:
        thread.start()
        for number in range(5):
            assert ask(pool, f"value = {number}") == number
        assert not outcome, "the hanging job ended before the others were done"
        thread.join()
        assert outcome == ["timeout"]
    finally:
        pool.close()


def test_a_stop_request_ends_the_wait_and_the_process(pool):
    ask(pool, "value = 1")
    (child,) = pool._running
    begin = time.monotonic()
    with pytest.raises(StopRequested):
        ask(pool, "time.sleep(1000)", 1000.0, asked=lambda: time.monotonic() > begin + 0.5)
    assert time.monotonic() - begin < 10.0 and gone(child._process.pid)


def test_a_stop_request_is_heard_while_a_process_starts():
    begin = time.monotonic()
    with contextlib.closing(ProcessPool((sys.executable, "-c", "import time; time.sleep(1000)"), 1)) as pool:
        with pytest.raises(StopRequested):
            ask(pool, "value = 1", 1000.0, asked=lambda: time.monotonic() > begin + 0.5)
        assert time.monotonic() - begin < 10.0 and not pool._running


def test_starting_a_process_does_not_count_against_its_first_job():
    with contextlib.closing(ProcessPool((sys.executable, "-c", "import time; time.sleep(1.5)\n" + WORKER), 1)) as pool:
        assert ask(pool, "value = 1", 1.0) == 1


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("print('hello there')", "exit status 0"),
        ("raise SystemExit('no module named av')", "exit status 1, no module named av"),
        ("import time; time.sleep(1000)", "it did not start within 1 s"),
    ],
)
def test_a_program_that_is_no_worker_is_an_error_and_not_a_hang(monkeypatch, program, words):
    monkeypatch.setattr(process_pool, "START_SECONDS", 1.0 if "1000" in program else 60.0)
    with contextlib.closing(ProcessPool((sys.executable, "-c", program), 1)) as pool:
        with pytest.raises(ChildDiedError, match=words):
            pool.start()
        assert not pool._running


def test_a_process_is_prepared_each_time_it_is_started_and_refused_where_that_fails():
    prepared = []

    def prepare(ask):
        prepared.append(ask({"code": "known = 3; value = 'prepared'"}, 20.0)["value"])
        if len(prepared) == 3:
            raise ChildDiedError("no use any more")

    with contextlib.closing(ProcessPool(COMMAND, 1, prepare=prepare)) as pool:
        pool.start()
        pool.start()
        assert prepared == ["prepared"] and ask(pool, "value = known") == 3
        for _ in range(2):
            with pytest.raises(ChildDiedError):
                ask(pool, "os._exit(0)")
        with pytest.raises(ChildDiedError, match="no use any more"):
            ask(pool, "value = known")
        assert len(prepared) == 3


@pytest.mark.parametrize("quotes", [True, False])
def test_of_a_flood_of_output_a_bounded_part_is_kept_or_shown(capfd, quotes):
    with contextlib.closing(ProcessPool(COMMAND, 1, quotes_output=quotes)) as pool:
        ask(pool, "os.write(1, b'shown\\n'); os.write(2, b'x' * (32 << 20))")
        (child,) = pool._running
        kept = os.fstat(child._messages.fileno()).st_size if quotes else 0
    shown = capfd.readouterr().err
    assert max(kept, len(shown)) < 2 * SHOWN_BYTES
    assert quotes or shown.startswith("shown\n")


def test_closing_while_a_job_hangs_ends_it_and_takes_no_further_job():
    pool, outcome = ProcessPool(COMMAND, 1), []

    def hang():
        for _ in range(2):
            try:
                ask(pool, "time.sleep(1000)", 1000.0)
            except (ChildDiedError, ValueError, RuntimeError) as error:
                outcome.append(error)

    thread = threading.Thread(target=hang)
    thread.start()
    while not pool._running:
        time.sleep(0.01)
    time.sleep(1.0)
    (child,) = pool._running
    tree = descendants(child._process.pid)
    pool.close()
    thread.join(20)
    assert not thread.is_alive() and not pool._running
    assert "was closed" in str(outcome[-1]) and all(gone(process) for process in [child._process.pid, *tree])


def test_an_end_leaves_no_descriptor_open(pool):
    ask(pool, "value = 1")
    pool.close()
    before = len(os.listdir("/proc/self/fd"))
    again = ProcessPool(COMMAND, 1)
    for code in ("value = 1", "os._exit(1)", "value = 1"):
        try:
            ask(again, code)
        except ChildDiedError:
            pass
    again.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("looks", "left"),
    [
        ([0.2, 0.4, 0.6], 9.4),
        ([0.01, 0.02, 0.35], 9.65),
        ([0.2, 1000.2, 1000.4], 9.2),  # a pause counts as two looks
        ([1.0, 2.0, 3.0], 8.8),
        ([0.1 * n for n in range(1, 200)], 0.0),
    ],
)
def test_a_countdown_counts_only_while_it_is_looked_at(monkeypatch, looks, left):
    clock = iter([0.0, *looks])
    monkeypatch.setattr(process_pool.time, "monotonic", lambda: next(clock))
    countdown = Countdown(10.0)
    assert [countdown.left() for _ in looks][-1] == pytest.approx(left)


PAUSED = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_process_pool import *
pool = ProcessPool(COMMAND, 1)
ask(pool, "value = 1")
print("ready", flush=True)
print(ask(pool, "time.sleep(1.5); value = 2", 3.0), flush=True)
"""


@pytest.mark.parametrize("whole", [False, True])
def test_a_pause_is_not_held_against_a_job(whole):
    """The run stands still for longer than a job may take, alone or with its children (a machine, a container)."""
    run = subprocess.Popen([sys.executable, "-c", PAUSED], stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout.readline() == "ready\n"
        time.sleep(0.4)
        paused = [run.pid, *(descendants(run.pid) if whole else ())]
        for sign, seconds in ((signal.SIGSTOP, 4.0), (signal.SIGCONT, 0.0)):
            for process in paused:
                os.kill(process, sign)
            time.sleep(seconds)
        assert run.stdout.readline() == "2\n"
    finally:
        run.kill()
        run.wait()
        run.stdout.close()
