"""What a run measures, written where people look: metrics.jsonl, reporters, completion tables.

metrics.jsonl is the truth and must succeed. Reporters and tables are for looking at: when one of them fails, it
is named in one warning and left out from then on, and training goes on. A disk that takes no table any more stops the
run all the same: the next checkpoint would not fit either, and the run that goes on would lack the table.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mer_r1_jax import faults
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.atomic_files import DISK_ERRORS, WriteError, writing
from mer_r1_jax.storage.run_directory import RunDirectory
from mer_r1_jax.training.reporters import open_reporters

PHASES = ("sft", "rl")  # in the order a run goes through them

log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes a run's metrics; on resume takes back the lines of steps that will be made again.

    Args:
        run: the open run folder.
        resume_at: (phase, step) of the checkpoint the run goes on from; None when it starts from nothing. Later lines
            than that move to `logs/attempt_<n>/metrics_discarded.jsonl`: nothing is lost and no step is there twice.
        report_to: places besides metrics.jsonl, as `train.report_to` names them.
    """

    def __init__(
        self, run: RunDirectory, resume_at: tuple[str, int] | None = None, report_to: Sequence[str] = ("tensorboard",)
    ):
        self._path = run.metrics_file
        self._completions = run.completions
        # Discarding replaces the file, so it comes before the opening: an older handle would write to the lost one.
        discard_after(run.metrics_file, run.attempt_logs / "metrics_discarded.jsonl", resume_at)
        with writing("metrics.jsonl", self._path):
            self._file = open(self._path, "ab", buffering=0)
        self._start = time.monotonic()
        self._broken: set[str] = set()
        self._reporters = open_reporters(report_to, run, resume_at)

    def write(self, phase: str, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Writes one line.

        Args:
            phase: "sft" or "rl".
            step: optimizer steps done in this phase.
            metrics: name -> scalar; device arrays are fetched in one transfer.

        Returns:
            The metrics as Python floats. A NaN stays a NaN here and becomes the string "NaN" in the file.
        """
        if phase not in PHASES:
            raise ValueError(f"phase is {phase!r}, expected one of {', '.join(PHASES)}")
        values = to_floats(metrics)
        # Seconds since 1970, to the millisecond.
        line = {"step": int(step), "phase": phase, "time": round(time.time(), 3)}
        line |= {name: encode_number(value) for name, value in values.items()}
        with writing("metrics.jsonl", self._path):
            atomic_files.append(self._file, f"{json.dumps(line, allow_nan=False)}\n".encode())
        # The file has the line before any reporter has a chance to fail.
        for name, reporter in self._reporters.items():
            self._attempt(name, lambda reporter=reporter: reporter.write(phase, step, values))
        return values

    def write_completions(self, step: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Writes sampled completions, columns of equal length, to `completions/completions_<step>.parquet`."""
        path = self._completions / f"completions_{step:05d}.parquet"
        table = pa.table({name: pa.array(list(values)) for name, values in columns.items()})
        self._attempt(
            "the table of completions",
            lambda: atomic_files.write_atomically(path, lambda file: pq.write_table(table, file)),
        )
        faults.here("completions_written", path)

    def sync(self) -> None:
        """Waits until every line is on disk. To be called before a checkpoint, which must not outlive its metrics."""
        with writing("metrics.jsonl", self._path):
            os.fsync(self._file.fileno())
        faults.here("metrics_synced")

    def close(self) -> None:
        """Syncs and closes. Closing twice does no harm."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()
        # Reporters may wait for a server, so they are closed after the lines are safe on disk.
        for name, reporter in self._reporters.items():
            self._attempt(name, reporter.close)
        self._reporters = {}

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _attempt(self, backend: str, action) -> None:
        if backend in self._broken:
            return
        try:
            action()
        except Exception as error:  # a backend for looking at must never stop a run
            if isinstance(error, WriteError) and getattr(error, "errno", None) in DISK_ERRORS:
                raise
            self._broken.add(backend)
            log.warning("%s cannot be written and is left out from now on: %s. metrics.jsonl goes on.", backend, error)


class NoMetrics:
    """In place of a MetricsWriter on the processes that do not write: what the first one writes is all of it."""

    def write(self, phase: str, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Writes nothing."""
        return to_floats(metrics)

    def write_completions(self, step: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Writes nothing."""

    def sync(self) -> None:
        """Has nothing to wait for."""

    def __enter__(self) -> NoMetrics:
        return self

    def __exit__(self, *_) -> None:
        pass


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl, with "NaN" and "Infinity" as floats again. A last line cut by a kill is left out."""
    lines = []
    for line in Path(path).read_text().splitlines():
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        lines.append({k: v if k == "phase" else decode_number(v) for k, v in parsed.items()})
    return lines


def discard_after(path: Path, discarded: Path, resume_at: tuple[str, int] | None) -> int:
    """Moves the lines of `path` that lie after `resume_at` to the end of `discarded`; returns how many.

    The moved lines are on disk before `path` is replaced, so a kill in between loses none. Lines that are not whole
    (the run was killed while writing) move as well.
    """
    if not path.exists():
        return 0
    kept, moved = [], []
    for line in path.read_text(errors="replace").splitlines():
        if line.strip():
            (kept if _is_kept(line, resume_at) else moved).append(line)
    if moved:
        with writing("the lines of metrics.jsonl that will be made again", discarded):
            with open(discarded, "ab", buffering=0) as file:
                atomic_files.append(file, "".join(f"{line}\n" for line in moved).encode())
                os.fsync(file.fileno())
        # Only now: the lines that go are safe in the other file.
        text = "".join(f"{line}\n" for line in kept)
        atomic_files.write_text(path, text)
        log.info("%d lines of %s lie after the step resumed from and moved to %s", len(moved), path.name, discarded)
    return len(moved)


def _is_kept(line: str, resume_at: tuple[str, int] | None) -> bool:
    if resume_at is None:
        return False
    try:
        parsed = json.loads(line)
        position = (PHASES.index(parsed["phase"]), parsed["step"])
    except (ValueError, KeyError, TypeError):
        return False
    # The phase is compared first, because steps count from 1 again in RL.
    return position <= (PHASES.index(resume_at[0]), resume_at[1])


def to_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Scalars of any kind as Python floats, all device arrays fetched together.

    Raises:
        ValueError: naming a metric that is not one number.
    """
    values = {}
    for name, value in zip(metrics, jax.device_get(list(metrics.values())), strict=True):
        array = np.asarray(value)
        is_number = array.dtype.kind in "biuf" or jnp.issubdtype(array.dtype, np.floating)  # bfloat16: kind "V"
        if array.size != 1 or not is_number:
            raise ValueError(f"metric {name!r} is {array.dtype}{list(array.shape)}, expected one number")
        values[name] = float(array.reshape(()))
    return values


def encode_number(value: float) -> float | int | str:
    """A number as valid JSON: NaN and infinities become "NaN", "Infinity", "-Infinity"; whole numbers lose the ".0"."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return int(value) if value == int(value) and abs(value) < 2**53 else value


def decode_number(value: Any) -> Any:
    """Undoes `encode_number`; anything else comes back as it is."""
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
