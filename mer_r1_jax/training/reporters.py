"""Where metrics go besides metrics.jsonl (`train.report_to`): TensorBoard, Weights & Biases, a function of the user's.

All of it is for looking at, so none of it may stop or slow a run. What talks to a server, or is not ours, works in a
thread of its own behind a queue: a call that hangs delays nothing, one that fails is told once to whoever writes next.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mer_r1_jax.foreign_text import printable
from mer_r1_jax.rl.own_function import own_function
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.run_directory import RunDirectory

CLOSE_SECONDS = 30.0  # given to what is still on its way at a run's end
QUEUED = 10_000  # lines on their way at most, some 100 MB
_LOGIN_SECONDS = 30.0  # that Weights & Biases may wait for a key on a terminal


class ReporterError(ValueError):
    """A place for metrics that does not exist here; the message says what is missing."""


class Reporter(Protocol):
    """A place that metrics are sent to; its methods may raise anything."""

    def write(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Sends a step's metrics."""
        ...

    def close(self) -> None:
        """Sends what is still on its way."""
        ...


def check_report_to(report_to: Sequence[str]) -> None:
    """Finds everything that `train.report_to` names, before anything is compiled.

    Raises:
        ReporterError: a package is not installed.
        OwnFunctionError: a dotted path leads to no function.
    """
    for name in report_to:
        if name == "wandb":
            try:
                importlib.import_module("wandb")
            except ImportError as error:
                raise ReporterError(
                    f"train.report_to: got 'wandb', and its package cannot be imported ({error}). Expected it beside "
                    "this one: pip install 'mer-r1-jax[wandb]', or leave it out of train.report_to"
                ) from error
        elif name != "tensorboard":
            own_function("train.report_to", name)


def open_reporters(
    report_to: Sequence[str], run: RunDirectory, resume_at: tuple[str, int] | None
) -> dict[str, Reporter]:
    """Name, as a warning shows it -> reporter. Nothing is connected to before the first line is written."""
    opened: dict[str, Reporter] = {}
    for name in report_to:
        if name == "tensorboard":
            opened["TensorBoard"] = TensorBoard(run.tensorboard, run.attempt, resume_at)
        elif name == "wandb":
            opened["Weights & Biases"] = _Background(lambda: _WandbRun(run))
        else:
            # The default argument binds the name now; the thread calls this after the loop has moved on.
            opened[name] = _Background(lambda name=name: _Call(own_function("train.report_to", name)))
    return opened


class TensorBoard:
    """Scalars in one event file per phase and attempt.

    Written in the calling thread through tensorboardX's record writer: its SummaryWriter hands events to a thread that
    dies of a full disk, after which the caller hangs on a full queue.
    """

    def __init__(self, folder: Path, attempt: int, resume_at: tuple[str, int] | None):
        # Here, as tensorboardX imports torch where that is installed, and commands that only look at settings come by.
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2, summary_pb2

        # Protobuf makes their classes when they are imported, so no type checker knows them.
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._writer = event_file_writer.EventsWriter
        self._folder, self._attempt = folder, attempt
        self._files: dict[str, Any] = {}
        # Whoever starts in SFT makes all of RL anew.
        self._rl_is_new = resume_at is None or resume_at[0] == "sft"

    def write(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Appends one event."""
        if phase not in self._files:
            self._files[phase] = self._open(phase, step)
            # An earlier attempt's curve would stand until RL begins.
            if self._rl_is_new and phase == "sft" and (self._folder / "rl").is_dir():
                self._files["rl"] = self._open("rl", 0)
        event = self._events.Event(wall_time=time.time(), step=step)
        for name, value in values.items():
            event.summary.value.append(self._summaries.Summary.Value(tag=printable(name), simple_value=value))
        self._files[phase].write_event(event)
        self._files[phase].flush()

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()

    def _open(self, phase: str, step: int) -> Any:
        (self._folder / phase).mkdir(parents=True, exist_ok=True)
        file = self._writer(str(self._folder / phase / "events"), filename_suffix=f".attempt_{self._attempt}")
        # Tells TensorBoard to forget what an earlier attempt wrote from this step on.
        restart = self._events.SessionLog(status=self._events.SessionLog.START)
        file.write_event(self._events.Event(wall_time=time.time(), step=step, session_log=restart))
        return file


class _Background:
    """Calls a reporter in a thread of its own, in the order of the lines.

    Args:
        make: makes the reporter, in that thread.
    """

    def __init__(self, make: Callable[[], Reporter]):
        self._make = make
        self._lines: queue.Queue[tuple[str, int, dict[str, float]] | None] = queue.Queue(QUEUED)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def write(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Queues a line; raises what an earlier one has met."""
        if self._thread is None:
            # A daemon: a run that is done does not wait for a server.
            self._thread = threading.Thread(target=self._work, name="reporter", daemon=True)
            self._thread.start()
        self._tell()
        try:
            # The thread reads the line later, so it gets a copy; a full queue raises, because a run must not wait.
            self._lines.put_nowait((phase, step, dict(values)))
        except queue.Full:
            raise TimeoutError(f"it has taken none of the last {QUEUED:,} lines") from None

    def close(self) -> None:
        """Waits for what is on its way, no longer than CLOSE_SECONDS."""
        if self._thread is None:
            return
        try:
            # The thread sends the lines before the None, then closes the reporter and ends.
            self._lines.put_nowait(None)
        except queue.Full:
            pass  # the thread is stuck, which is told below
        self._thread.join(CLOSE_SECONDS)
        self._tell()
        if self._thread.is_alive():
            raise TimeoutError(
                f"it was not done {CLOSE_SECONDS:g} s after the run's end; its last lines may be missing"
            )

    def _tell(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"{type(self._error).__name__}: {printable(str(self._error), 300)}")

    def _work(self) -> None:
        try:
            reporter = self._make()
            while (line := self._lines.get()) is not None:
                reporter.write(*line)
            reporter.close()
        except BaseException as error:  # SystemExit too: the user's function, and a library that gives up
            self._error = error


class _Call:
    """A function of the user's, called with (phase, step, metrics)."""

    def __init__(self, function: Callable[[str, int, dict[str, float]], Any]):
        self._function = function

    def write(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        self._function(phase, step, dict(values))

    def close(self) -> None:
        pass


class _WandbRun:
    """A run of Weights & Biases, gone on with by later attempts: its id lies in the run's folder.

    Steps count anew in each phase, and a resumed run makes some of them again, which W&B's own counter does not allow:
    each phase has its own axis instead, `sft/step` and `rl/step`. Key, project, entity and mode are W&B's own to read
    from its environment variables; WANDB_PROJECT is mer-r1 where it is not set.
    """

    def __init__(self, run: RunDirectory):
        wandb: Any = importlib.import_module("wandb")
        id_file = run.path / "wandb_id"
        if not id_file.exists():
            atomic_files.write_text(id_file, uuid.uuid4().hex[:12])
        config = json.loads(run.config_file.read_text())
        # `resume="allow"` creates the run at the first attempt and resumes it at every later one.
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mer-r1"),
            name=config.get("train", {}).get("run_name") or config.get("name"),
            id=id_file.read_text().strip(),
            resume="allow",
            config=config,
            # The run's own log has what is printed; a key that nobody types in must not be waited for.
            settings={"console": "off", "login_timeout": _LOGIN_SECONDS},
        )
        for phase in ("sft", "rl"):
            self._run.define_metric(f"{phase}/step")
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")

    def write(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{phase}/{printable(name)}": value for name, value in values.items()} | {f"{phase}/step": step})

    def close(self) -> None:
        self._run.finish()
