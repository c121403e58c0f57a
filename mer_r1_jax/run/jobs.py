"""Runs the jobs of an ablation as processes: some at once, each on cores of its own, none that is finished again.

A job is a process of its own, `python -m mer_r1_jax.run.jobs CONFIG.json`, which does what `mer-r1 train` does: a crash
or a kill costs that run alone, and its own resume takes it up. What it prints goes to `<out>/jobs/<name>.log`, its
configuration lies in `<out>/jobs/<name>.json`. It is stopped (saved, exit code 75) when the process that started it is
gone, so that nothing trains on unseen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from mer_r1_jax.config.build import to_json
from mer_r1_jax.run.ablation_plan import Job
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.training.signals import EXIT_SAVED, StopSignals

PROGRAM = (sys.executable, "-m", "mer_r1_jax.run.jobs")
FINISHED = "finished.json"  # in a run's folder: the process of the run ended well
PARENT = "MER_R1_ABLATION_PROCESS"  # environment of a job: the process that started it
JOBS, COMPILED = "jobs", "compiled"  # folders beside those of the runs
POLL_SECONDS = 0.2
PARENT_CHECK_SECONDS = 1.0
ORPHAN_SECONDS = 300.0  # to wait for runs whose ablation was killed
_TAIL = 8  # lines of a failed run's log that are shown


class JobsError(RuntimeError):
    """Runs that cannot be started, or that failed; the message names each with the end of what it said."""


@dataclasses.dataclass
class Outcome:
    """What became of the jobs of one attempt, by name.

    Attributes:
        finished: ended well, now or earlier.
        failed: name -> exit status and the end of its log.
        stopped: saved by a signal; the same command goes on with them.
        waiting: not started: stopped before their turn, or what they start from is not there.
    """

    finished: list[str] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    stopped: list[str] = dataclasses.field(default_factory=list)
    waiting: list[str] = dataclasses.field(default_factory=list)

    def check(self) -> None:
        """Raises JobsError when a run failed."""
        if not self.failed:
            return
        raise JobsError(
            f"{len(self.failed)} runs failed"
            + (f", and {len(self.waiting)} that start from them were left out" if self.waiting else "")
            + ". The same command goes on with them:\n"
            + "\n".join(f"  {name}: {how}" for name, how in self.failed.items())
        )


@dataclasses.dataclass(frozen=True)
class HeldFolder:
    """The folder of an ablation while this process keeps others out of it.

    Attributes:
        path: the folder.
        lock: file descriptor of its lock, which jobs inherit.
        say: is told what begins and ends there.
    """

    path: Path
    lock: int
    say: Callable[[str], None]


@contextlib.contextmanager
def hold(out: Path, say: Callable[[str], None], patience: float = ORPHAN_SECONDS) -> Iterator[HeldFolder]:
    """Makes the folder of an ablation and keeps others out of it.

    Jobs share the lock, so that those of an attempt that was killed are waited for: they notice, and save.

    Args:
        patience: seconds to wait.

    Raises:
        JobsError: it holds something else, stays in use, or cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Every ablation has the folder of jobs: without it, what lies here is somebody else's.
        if (found := sorted(entry.name for entry in out.iterdir())) and JOBS not in found:
            raise JobsError(
                f"{out} holds {', '.join(found[:5])} but no ablation: nothing was touched; choose another --out"
            )
        (out / JOBS).mkdir(exist_ok=True)
        lock = open(out / JOBS / ".lock", "w")
    except OSError as error:
        raise JobsError(f"{out} cannot be written: {error}; choose another --out") from error
    with lock:
        # Runs of an attempt that was killed hold the lock as well: they save within seconds of losing their parent.
        waited = 0.0
        while not _locked(lock):
            if waited == 0:
                say(f"another ablation is at work in {out}, or runs of an earlier attempt are still saving: waiting")
            if waited >= patience:
                raise JobsError(f"another ablation is at work in {out}: wait for its end, or choose another --out")
            time.sleep(POLL_SECONDS)
            waited += POLL_SECONDS
        yield HeldFolder(out, lock.fileno(), say)


def _locked(lock: IO[str]) -> bool:
    try:
        # flock belongs to the open file, which jobs inherit; a record lock would be this process's alone.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_finished(job: Job) -> bool:
    """Whether a job's run has come to its end."""
    return (job.folder / FINISHED).is_file()


def cores_for(parallel: int) -> list[tuple[int, ...]]:
    """Cores of each of so many processes; empty tuples leave the choice to the system.

    Raises:
        JobsError: there are fewer cores than processes.
    """
    if parallel < 1:
        raise JobsError(f"--parallel: got {parallel}, expected at least 1")
    if parallel == 1 or not hasattr(os, "sched_setaffinity"):
        return [()] * parallel
    # Of this process: a container may have fewer than the machine.
    cores = sorted(os.sched_getaffinity(0))
    if parallel > len(cores):
        raise JobsError(f"--parallel: got {parallel}, but there are {len(cores)} cores; expected at most as many")
    share = len(cores) // parallel
    return [tuple(cores[number * share : (number + 1) * share]) for number in range(parallel)]


def run_jobs(
    jobs: Sequence[Job],
    folder: HeldFolder,
    parallel: int,
    stop: StopSignals,
    scores_of: Callable[[Job], str] = lambda job: "",
    program: Sequence[str] = PROGRAM,
) -> Outcome:
    """Runs what is not finished. A job that another needs comes before it in `jobs`.

    Args:
        folder: what `hold` gave.
        parallel: processes at once.
        stop: asks for the end: running jobs are told to save, no others are started.
        scores_of: what a finished run came to, to be said.
        program: the command of a job, to which its configuration file is added.
    """
    return _Runner(jobs, folder, cores_for(parallel), scores_of, program).run(stop)


class _Runner:
    def __init__(
        self,
        jobs: Sequence[Job],
        folder: HeldFolder,
        cores: list[tuple[int, ...]],
        scores_of: Callable[[Job], str],
        program: Sequence[str],
    ):
        self._out, self._say, self._lock = folder.path, folder.say, folder.lock
        self._scores_of, self._program = scores_of, program
        self._environment = _environment(folder.path)
        self._free = list(cores)
        self._running: dict[subprocess.Popen, tuple[Job, tuple[int, ...], float]] = {}
        self.outcome = Outcome(finished=[job.name for job in jobs if is_finished(job)])
        self._pending = [job for job in jobs if not is_finished(job)]
        self._total = len(jobs)
        if self.outcome.finished:
            self._say(f"{len(self.outcome.finished)} of {len(jobs)} runs are finished already")

    def run(self, stop: StopSignals) -> Outcome:
        try:
            while self._running or self._startable():
                # Everything that may start does, then one look at what has ended.
                while self._free and not stop.should_stop() and (job := self._startable()):
                    self._start(job)
                if not self._running:
                    break
                if stop.should_stop():
                    self._tell_all_to_stop()
                time.sleep(POLL_SECONDS)
                self._collect()
        finally:
            for process in self._running:  # only after an error of this program: nothing may go on unseen
                process.terminate()
        self.outcome.waiting = [job.name for job in self._pending]
        return self.outcome

    def _startable(self) -> Job | None:
        ready = (job for job in self._pending if not job.needs or job.needs in self.outcome.finished)
        return next(ready, None)

    def _start(self, job: Job) -> None:
        self._pending.remove(job)
        cores = self._free.pop()
        settings = self._out / JOBS / f"{job.name}.json"
        atomic_files.write_text(settings, to_json(job.config))
        with open(self._log(job), "ab") as log, _pinned(cores):
            process = subprocess.Popen(
                [*self._program, str(settings)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                pass_fds=(self._lock,),
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            )
        self._running[process] = (job, cores, time.monotonic())
        where = f" on cores {', '.join(map(str, cores))}" if cores else ""
        self._say(f"{job.name}: begun{where}, {self._log(job)}")

    def _log(self, job: Job) -> Path:
        return self._out / JOBS / f"{job.name}.log"

    def _tell_all_to_stop(self) -> None:
        for process, (job, _, _) in self._running.items():
            # Each is told once: a second signal would end a run without a checkpoint.
            if job.name not in self.outcome.stopped:
                process.send_signal(signal.SIGTERM)
                self.outcome.stopped.append(job.name)

    def _collect(self) -> None:
        for process in [process for process in self._running if process.poll() is not None]:
            job, cores, begun = self._running.pop(process)
            self._free.append(cores)
            seconds = round(time.monotonic() - begun)
            # It may have come to its end before it heard.
            told_to_stop = job.name in self.outcome.stopped
            if process.returncode == 0:
                atomic_files.write_json(job.folder / FINISHED, {"seconds_of_last_attempt": seconds})
                self.outcome.finished.append(job.name)
                if told_to_stop:
                    self.outcome.stopped.remove(job.name)
                done = f"{len(self.outcome.finished)} of {self._total}"
                self._say(f"{job.name}: finished after {seconds} s ({done}){self._scores_of(job)}")
            elif told_to_stop or process.returncode == EXIT_SAVED:
                # A run that does not listen yet dies of the signal, with another status: it had made no step.
                if not told_to_stop:
                    self.outcome.stopped.append(job.name)
                self._say(f"{job.name}: stopped")
            else:
                self.outcome.failed[job.name] = f"exit status {process.returncode}; {_tail(self._log(job))}"
                self._say(f"{job.name}: failed with exit status {process.returncode}")


def _environment(out: Path) -> Mapping[str, str]:
    """That of a job's process. Its runs compile the same programs: once is enough, unless the user keeps them."""
    return {"JAX_COMPILATION_CACHE_DIR": str(out / COMPILED)} | dict(os.environ) | {PARENT: str(os.getpid())}


@contextlib.contextmanager
def _pinned(cores: tuple[int, ...]) -> Iterator[None]:
    """A process started inside inherits the cores."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _tail(log: Path) -> str:
    """The error a run ended with, or the last lines it printed."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if line.startswith("error:")]
    shown = lines[errors[-1] :] if errors and len(lines) - errors[-1] <= 4 * _TAIL else lines[-_TAIL:]
    return f"the end of {log}:\n    " + "\n    ".join(shown)


def main(arguments: list[str]) -> int:
    """Runs, or goes on with, the run of a saved configuration; returns the exit code of `run.train.train`."""
    # The watch begins before the imports, which take seconds. Its parent is told to it: one that is gone by now would
    # have left this process to another, which lives on.
    parent = int(os.environ.get(PARENT, os.getppid()))
    threading.Thread(target=_stop_with_parent, args=(parent,), daemon=True).start()
    # Only a job trains: who starts jobs needs none of this.
    from mer_r1_jax.cli import ended, explained
    from mer_r1_jax.config.build import load_config
    from mer_r1_jax.run.train import train

    with explained():
        code = train(load_config(arguments[0]))
    return ended(code)


def _stop_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    # This is the signal that a user would send: the run saves at its next safe point and ends.
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
