"""What both phases of a run share while it goes on: its folder, checkpoints, metrics and signals."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from mer_r1_jax import faults
from mer_r1_jax.data.pipeline import PromptStream
from mer_r1_jax.data.prefetch import ClipPrefetcher, LoadThreads
from mer_r1_jax.data.quarantine import Quarantine
from mer_r1_jax.data.records import Record
from mer_r1_jax.omni.finite import not_finite
from mer_r1_jax.parallel import processes
from mer_r1_jax.run.fingerprints import write_clips
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.training.bucket_checkpoints import BucketCheckpoints
from mer_r1_jax.training.checkpoints import CheckpointError, Checkpoints, Restored
from mer_r1_jax.training.damage import DamagedStepError, is_count
from mer_r1_jax.training.metrics import MetricsWriter, NoMetrics, Progress
from mer_r1_jax.training.run_directory import RunDirectory
from mer_r1_jax.training.state import Leaves, TrainState
from mer_r1_jax.training.stopping import Stop


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


@dataclasses.dataclass(frozen=True)
class Begun:
    """Where a phase stands when an attempt takes it up.

    Attributes:
        state: the train state.
        data: the phase's prompts from here on.
        done: steps done.
        num_tokens: tokens seen in them.
    """

    state: TrainState
    data: ClipPrefetcher
    done: int
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class Session:
    """One attempt at a run.

    Attributes:
        setup: the parts that do not change.
        folder: the run's folder.
        checkpoints: of training states, numbered by optimizer steps over both phases.
        metrics: metrics.jsonl, TensorBoard, completion tables; written by the first process.
        stop: asks for SIGTERM and SIGINT.
        sft_steps: steps of the whole SFT phase, which checkpoints of RL are numbered after.
    """

    setup: Setup
    folder: RunDirectory
    checkpoints: Checkpoints | BucketCheckpoints
    metrics: MetricsWriter | NoMetrics
    stop: Stop
    sft_steps: int

    def prefetcher(self, records: tuple[Record, ...], prompts_per_step: int, load: Any, phase: str) -> ClipPrefetcher:
        """The stream of a phase's prompts, loaded ahead of use: this process's share of every step."""
        config, share = self.setup.config, self.setup.share
        stream = PromptStream(
            records,
            prompts_per_step,
            seed=config.train.seed * 2 + (phase == "rl"),
            process_index=share.index,
            process_count=share.count,
        )
        return ClipPrefetcher(
            stream,
            LoadThreads(load, max(1, config.media.decode_workers), self.setup.source.loader.longest_load(records)),
            Quarantine(len(records), config.data.max_quarantined_fraction),
            prompts_ahead=stream.local_prompts,
            counted=share.leader,
        )

    def stopping(self) -> bool:
        """Whether a signal has asked a process of the run to save and stop; the same answer on all of them."""
        return self.stop.agreed()

    @contextlib.contextmanager
    def begin(
        self, phase: Any, records: tuple[Record, ...], leaves: Leaves | None, restored: Restored | None
    ) -> Iterator[Begun]:
        """What a phase starts from: fresh parameters, or a checkpoint of its own.

        Args:
            phase: an SftPhase or RlPhase.
            records: its prompts.
            leaves: parameters to start from; None when `restored` is given.
            restored: a checkpoint of this phase, or None.
        """
        setup, config = self.setup, phase.config
        with self.prefetcher(records, config.prompts_per_step, setup.source.load, phase.name) as data:
            if restored is None:
                state = setup.new_state(leaves, phase.is_trainable, phase.optimizer, config.optimizer.dtype)
                yield Begun(state, data, done=0, num_tokens=0)
                return
            data.restore(restored.host["data"])
            num_tokens = restored.host["counters"]["num_tokens"]
            yield Begun(restored.arrays, data, done=restored.host["step"], num_tokens=num_tokens)

    def save(self, phase: str, step: int, state: Any, position: Any, log: StepLog) -> None:
        """Saves a checkpoint of `step` steps done in `phase`.

        Args:
            position: state of the phase's prompts after those steps.
            log: of the phase; its last step is written first.
        """
        with self.stop.signals.saving() if self.stop.signals else contextlib.nullcontext():
            log.flush()
            self.metrics.sync()  # a checkpoint must not outlive its metrics
            write_clips(self.setup, self.folder)  # nor what its clips were
            self.folder.publish()
            first = self.sft_steps if phase == "rl" else 0
            host = {"phase": phase, "step": step, "data": position, "counters": {"num_tokens": log.num_tokens}}
            self.checkpoints.save(first + step, state, host)

    def check_finite(self, skipped_in_a_row: float, phase: str, step: int) -> None:
        """Stops the run after too many skipped updates.

        Raises:
            NonFiniteError: naming the step and what to do.
        """
        limit = self.setup.config.train.max_nonfinite_steps
        if skipped_in_a_row >= limit:
            raise NonFiniteError(
                f"{phase} step {step}: {int(skipped_in_a_row)} updates in a row had a loss or gradient that is not "
                f"finite and were left out; the run stops at train.max_nonfinite_steps={limit}. Lower "
                f"{phase}.optimizer.learning_rate and go on from an earlier checkpoint under a new train.run_name"
            )


def check_numbers(leaves: Mapping[str, jax.Array], where: str) -> None:
    """Refuses a checkpoint with numbers that are none; every process of a run has to call it.

    Args:
        leaves: what was restored of it, by name.
        where: the checkpoint.

    Raises:
        CheckpointError: naming some of those leaves.
    """
    if broken := not_finite(leaves):
        names = ", ".join(broken[:5]) + (" and others" if len(broken) > 5 else "")
        raise CheckpointError(
            f"{where}: NaN or infinite values in {len(broken)} of {len(leaves)} parameters ({names}), expected finite "
            "numbers: the training had broken. Move that step's folder away, so that the one before it is taken, or "
            "train again"
        )


def check_host(host: Mapping[str, Any]) -> None:
    """Refuses a checkpoint's host state that `Session.save` has not made.

    Raises:
        DamagedStepError: naming what is not as it ought to be.
    """
    counters, data = host.get("counters"), host.get("data")
    right = {
        "phase": host.get("phase") in ("sft", "rl"),
        "step": is_count(host.get("step")),
        "counters": isinstance(counters, Mapping) and is_count(counters.get("num_tokens")),
        "data": isinstance(data, Mapping)
        and isinstance(data.get("stream"), Mapping)
        and isinstance(data.get("quarantine"), list),
    }
    if wrong := [name for name, as_saved in right.items() if not as_saved]:
        raise DamagedStepError(f"its host state is no training run's: {', '.join(wrong)} missing or of another type")


class StepLog:
    """Writes the metrics of a step after the next one was dispatched, so that the device never waits for the host."""

    def __init__(self, session: Session, phase: str, total: int, done: int, num_tokens: int):
        self._session, self._phase = session, phase
        self._nowhere = None if processes.is_first() else open(os.devnull, "w")
        self._progress = Progress(phase, total, done, self._nowhere)
        self._pending: tuple[int, dict[str, Any], int] | None = None
        self._last = time.perf_counter()
        self.num_tokens = num_tokens

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.close()
        if self._nowhere is not None:
            self._nowhere.close()

    def add(self, step: int, metrics: Mapping[str, Any], tokens: int) -> None:
        """Takes the metrics of a step that was just dispatched and writes those of the step before.

        Args:
            step: of the phase, from 1.
            metrics: over all processes, on host or device.
            tokens: of this process's rows.
        """
        faults.here("update_dispatched", f"{self._phase} {step}")
        self.flush()
        self._pending = (step, dict(metrics), tokens)
        faults.here("update_noted", f"{self._phase} {step}")

    def restart_clock(self) -> None:
        """Leaves what was done since the last step (a checkpoint, an evaluation) out of the next one's time."""
        self._last = time.perf_counter()

    def flush(self) -> None:
        """Writes what is pending; waits for the device."""
        if self._pending is None:
            return
        (step, metrics, tokens), self._pending = self._pending, None
        told = processes.gather("the tokens of a step", tokens if self._session.setup.share.leader else 0)
        tokens = tokens if told is None else sum(told)
        self.num_tokens += tokens
        metrics = jax.device_get(metrics) | {"num_tokens": self.num_tokens}
        now = time.perf_counter()  # a step's time ends when the device is done with it
        seconds, self._last = now - self._last, now
        metrics |= {"step_time": seconds, "perf/throughput": tokens / seconds}
        in_a_row = float(metrics.pop("skipped_in_a_row"))
        if step % self._session.setup.config.train.logging_steps == 0:
            self._progress.update(step, self._session.metrics.write(self._phase, step, metrics))
        self._session.check_finite(in_a_row, self._phase, step)

    def note(self, text: str) -> None:
        """Prints text beside the progress line."""
        self._progress.note(text)
