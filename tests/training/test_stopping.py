"""What is waited for is left when a signal comes, the grace of a spot machine is kept, and saves are not cut."""

import subprocess
import sys
import textwrap
import time

import pytest

from mer_r1_jax.faults import StopRequested
from mer_r1_jax.training.signals import EXIT_SAVED
from mer_r1_jax.training.stopping import NEVER, Stop

# The compiled program runs for minutes, as an uncut rollout of a large model does.
LONG_PROGRAM = """
    import os, signal, sys, threading, time
    import jax
    from mer_r1_jax.cli import ended
    from mer_r1_jax.faults import StopRequested
    from mer_r1_jax.training.signals import EXIT_SAVED, StopSignals
    from mer_r1_jax.training.stopping import Stop

    @jax.jit
    def long_program(x):
        return jax.lax.fori_loop(0, 10**9, lambda _, y: (y @ y) * 1e-3, x)

    x = jax.numpy.ones((200, 200))
    compiled = long_program.lower(x).compile()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
"""


def ended(script, limit=60.0):
    """(exit status, standard output, standard error) of a script that must end by itself, and soon."""
    words = [sys.executable, "-c", textwrap.dedent(LONG_PROGRAM) + textwrap.dedent(script)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=limit)
    return done.returncode, done.stdout, done.stderr


def test_a_program_on_the_device_is_left_and_what_it_reads_can_be_saved():
    code, said, err = ended("""
        with StopSignals(grace_seconds=20) as signals:
            try:
                running = compiled(x)
                Stop(signals).wait({"running": running, "not an array": 1})
            except StopRequested:
                print("saved", float(jax.device_get(x)[0, 0]), flush=True)
                ended(EXIT_SAVED)
    """)
    assert (code, said) == (EXIT_SAVED, "saved 1.0\n"), err


def test_a_process_that_cannot_stop_ends_when_the_grace_is_over_and_says_what_counts():
    code, _, err = ended("""
        with StopSignals(grace_seconds=1) as signals:
            compiled(x).block_until_ready()
    """)
    assert code == EXIT_SAVED
    assert "1 s after SIGTERM (train.preemption_grace_seconds)" in err
    assert "the last valid checkpoint counts: the same command goes on from there" in err


def test_a_save_that_is_late_is_not_cut():
    code, said, err = ended("""
        with StopSignals(grace_seconds=1) as signals:
            with signals.saving():
                time.sleep(2.5)
            print("saved")
            sys.exit(EXIT_SAVED)
    """)
    assert (code, said) == (EXIT_SAVED, "saved\n"), err
    assert "is still being written and goes on" in err and "ends now" not in err


@pytest.mark.parametrize("grace", ["0", "None"])
def test_without_a_grace_a_process_may_take_its_time(grace):
    code, said, _ = ended(f"""
        with StopSignals({grace}) as signals:
            time.sleep(2)
            print(signals.should_stop())
    """)
    assert (code, said) == (0, "True\n")


def test_nobody_who_never_stops_is_waited_for():
    begun = time.monotonic()
    NEVER.wait(object())
    NEVER.check()
    assert not NEVER.asked() and not NEVER.agreed() and time.monotonic() - begun < 1


def test_all_ask_the_signals_of_one_process():
    class Signals:
        def should_stop(self):
            return True

    stop = Stop(Signals())
    assert stop.asked() and stop.agreed()
    with pytest.raises(StopRequested):
        stop.check()
