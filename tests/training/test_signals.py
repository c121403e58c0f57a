"""Signals sent to real processes: one asks for a save, two end it, a forked worker is on its own."""

import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from mer_r1_jax.training.signals import EXIT_SAVED, StopRequested, StopSignals


class Child:
    """A Python process that prints what it does, line by line."""

    def __init__(self, script):
        command = [sys.executable, "-u", "-c", textwrap.dedent(script)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_for(self, word):
        for line in self.process.stdout:
            if line.strip() == word:
                return
        pytest.fail(f"the child ended before {word!r}: {self.process.stderr.read()}")

    def end(self):
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def test_exit_code_of_a_saved_stop_is_documented():
    assert EXIT_SAVED == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_finishes_the_step_and_saves(number):
    child = Child("""
        import sys, time
        from mer_r1_jax.training.signals import EXIT_SAVED, StopSignals
        with StopSignals() as stop:
            for step in range(100):
                print("step", flush=True)
                time.sleep(0.2)
                print("step done")
                if stop.should_stop():
                    print("saved", stop.signal_name)
                    sys.exit(EXIT_SAVED)
    """)
    child.wait_for("step")
    child.process.send_signal(number)
    code, out, err = child.end()
    assert code == EXIT_SAVED
    assert out.splitlines() == ["step done", f"saved {number.name}"]
    assert f"{number.name} received" in err and "exit code 75" in err


# The compiled program runs for minutes: the main thread never gets to a Python handler.
LONG_PROGRAM = """
    import jax
    from mer_r1_jax.training.signals import StopSignals
    @jax.jit
    def long_program(x):
        return jax.lax.fori_loop(0, 10**9, lambda _, y: (y @ y) * 1e-3, x)
    with StopSignals() as stop:
        x = jax.numpy.ones((200, 200))
        compiled = long_program.lower(x).compile()
        print("inside", flush=True)
        compiled(x).block_until_ready()
"""


def test_second_signal_ends_a_compiled_program_at_once():
    child = Child(LONG_PROGRAM)
    child.wait_for("inside")
    time.sleep(0.5)
    child.process.send_signal(signal.SIGTERM)
    assert "SIGTERM received" in child.process.stderr.readline() + child.process.stderr.readline()
    child.process.send_signal(signal.SIGTERM)  # at once again: `timeout` signals the child and then its group
    with pytest.raises(subprocess.TimeoutExpired):
        child.process.wait(1.2)
    child.process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    code, _, err = child.end()
    assert code == 128 + signal.SIGTERM and time.monotonic() - start < 2
    assert "stopping now, without saving" in err


def test_forked_worker_dies_of_its_own_signal_alone():
    child = Child("""
        import os, signal, time
        from mer_r1_jax.training.signals import StopSignals
        with StopSignals() as stop:
            worker = os.fork()
            if worker == 0:
                time.sleep(20)
                os._exit(0)  # never further: kill(0) below would reach the whole group
            time.sleep(0.3)
            os.kill(worker, signal.SIGINT)  # Ctrl-C reaches the whole group: the worker leaves it to the parent
            time.sleep(0.3)
            print(os.waitpid(worker, os.WNOHANG)[0])
            os.kill(worker, signal.SIGTERM)
            print(os.WTERMSIG(os.waitpid(worker, 0)[1]))
            print(stop.should_stop())
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
            print(stop.should_stop())
    """)
    code, out, err = child.end()
    assert (code, out.split()) == (0, ["0", str(int(signal.SIGTERM)), "False", "True"]), err


def test_handlers_come_back_and_check_raises():
    before = [signal.getsignal(number) for number in StopSignals.handled]
    threads = threading.active_count()
    for _ in range(3):
        with StopSignals() as stop:
            stop.check()
            assert not stop.should_stop() and stop.signal_name is None
            signal.raise_signal(signal.SIGTERM)
            deadline = time.monotonic() + 5
            while not stop.should_stop() and time.monotonic() < deadline:
                time.sleep(0.01)
            with pytest.raises(StopRequested, match="SIGTERM"):
                stop.check()
            with pytest.raises(RuntimeError, match="already entered"):
                StopSignals().__enter__()
    assert [signal.getsignal(number) for number in StopSignals.handled] == before
    assert threading.active_count() == threads


def test_entering_outside_the_main_thread_is_refused():
    caught = []

    def enter():
        try:
            StopSignals().__enter__()
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(caught) == 1 and "main thread" in caught[0]
