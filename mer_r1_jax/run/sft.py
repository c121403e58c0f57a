"""The SFT phase: targets checked before anything compiles, then steps until the budget is spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mer_r1_jax import faults
from mer_r1_jax.config.errors import ConfigError
from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.data.pipeline import steps_for_epochs
from mer_r1_jax.data.prefetch import LoadedItem
from mer_r1_jax.data.records import Record
from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.parallel import processes
from mer_r1_jax.parallel.rows import put
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.rl.tags import AnswerTags, TagError
from mer_r1_jax.run.session import Session, StepLog
from mer_r1_jax.run.setup import Setup, tower_flags
from mer_r1_jax.stop_requested import StopRequested
from mer_r1_jax.storage.checkpoints import Restored
from mer_r1_jax.training.prompts import plan_buckets, prompt_rows
from mer_r1_jax.training.sft import SftBatch, Targets, make_sft_step
from mer_r1_jax.training.state import (
    Leaves,
    learning_rate_schedule,
    make_optimizer,
    trainable_names,
)

LENGTH_STEP = 8  # target lengths are padded to a multiple of this
MAX_LISTED = 10  # records an error names


class TargetError(ValueError):
    """SFT targets that cannot be used; every record is named."""


@dataclasses.dataclass(frozen=True)
class TargetIds:
    """One record's targets as token ids, with the tokens that are in the loss."""

    slow: tuple[np.ndarray, np.ndarray]
    fast: tuple[np.ndarray, np.ndarray] | None


class SftPhase:
    """Supervised fine-tuning of one run."""

    name = "sft"

    def __init__(self, setup: Setup):
        config = setup.config
        self.setup, self.config = setup, config.sft
        self.total_steps = total_steps(config, "sft", len(setup.data.sft))
        self.targets, self.lengths = _all_targets(setup.data.sft, setup.tags, config)
        rows = setup.share.of(self.config.prompts_per_step)
        self.buckets = plan_buckets(config, setup.backbone.config, setup.data.sft, rows)
        towers = tower_flags(config, "sft")
        self.is_trainable = trainable_names(**towers)
        self.encode_inside = any(towers.values())
        self.optimizer = make_optimizer(self.config.optimizer, self.total_steps)
        self._schedule = learning_rate_schedule(self.config.optimizer, self.total_steps)

    def run(self, session: Session, leaves: Leaves | None, restored: Restored | None) -> Leaves | None:
        """Trains from fresh leaves or a checkpoint to the end of the phase.

        Returns:
            All parameters, or None when a signal stopped the run (a checkpoint was saved).
        """
        setup, config = self.setup, self.setup.config
        with session.begin(self, setup.data.sft, leaves, restored) as begun:
            state, data, done = begun.state, begun.data, begun.done
            step_function = make_sft_step(setup.backbone, self.optimizer, self.config, self.encode_inside)
            with StepLog(session, self.name, self.total_steps, done, begun.num_tokens) as log:
                saved = done
                for step in range(done + 1, self.total_steps + 1):
                    position = data.state()
                    try:
                        batch, tokens = self.batch(data.next(step, session.stop.asked))
                    except StopRequested:
                        if saved < step - 1:
                            session.save(self.name, step - 1, state, position, log)
                        return None
                    faults.here("sft_step", step)
                    learning_rate = float(self._schedule(step - 1))
                    state, metrics = step_function(state, put(batch, setup.backbone.mesh))
                    log.add(step, {**metrics, **data.metrics(), "learning_rate": learning_rate}, tokens)
                    stopping = session.stopping()
                    if step % config.train.save_steps == 0 or step == self.total_steps or stopping:
                        session.save(self.name, step, state, data.state(), log)
                        saved = step
                        log.restart_clock()
                    if stopping:
                        return None
        return state.trainable | state.frozen

    def batch(self, loaded: Sequence[LoadedItem]) -> tuple[SftBatch, int]:
        """The host batch of a step, and how many real tokens it has."""
        prompts = [visit.clips.prompt if visit.clips else None for visit in loaded]
        rows = prompt_rows(prompts, self.buckets, self.setup.backbone.config, [visit.item.uid for visit in loaded])
        targets = [self.targets[visit.record.id] if visit.clips else None for visit in loaded]
        slow = _pad([target and target.slow for target in targets], rows.uid_B.shape[0], self.lengths[0])
        fast = (
            _pad([target and target.fast for target in targets], rows.uid_B.shape[0], self.lengths[1])
            if self.lengths[1]
            else None
        )
        tokens = sum(len(prompt.ids) for prompt in prompts if prompt is not None)
        tokens += sum(int(kind.continuation.exists_BGC.sum()) for kind in (slow, fast) if kind is not None)
        return SftBatch(prompts=rows.batch, next_position_B=rows.next_position_B, slow=slow, fast=fast), tokens


def total_steps(config: RunConfig, phase: str, records: int) -> int:
    """Optimizer steps of a phase: the number given, or what its epochs take.

    Raises:
        ConfigError: when a step takes more prompts than there are records.
    """
    section = getattr(config, phase)
    if section.prompts_per_step > records:
        raise ConfigError(
            f"{phase}.prompts_per_step: got {section.prompts_per_step}, but data.{phase}_path has {records} usable "
            "records; lower it"
        )
    if section.max_steps >= 0:
        return section.max_steps
    return steps_for_epochs(records, section.prompts_per_step, section.num_train_epochs)


def describe(buckets: Sequence[BatchShape], phase: str, added: str) -> list[str]:
    """One line a bucket, for the start of a run."""
    rows = "rows" if processes.count() == 1 else "rows a process"
    return [
        f"{phase}: {shape.rows} {rows} x {shape.tokens} prompt tokens + {added}; {shape.vision_clips} x "
        f"{shape.frame_pairs} frame pairs of {shape.patches} patches, "
        f"{shape.audio_clips} x {2 * shape.audio_units} s audio"
        for shape in buckets
    ]


def _all_targets(
    records: Sequence[Record], tags: AnswerTags, config: RunConfig
) -> tuple[dict[str, TargetIds], tuple[int, int]]:
    """Every record's targets by id, and the padded lengths of slow and fast ones (0: no fast targets)."""
    targets, problems = {}, []
    for record in records:
        try:
            slow = tags.slow_target(record.target_reasoning, record.target_answer)
            fast = tags.fast_target(", ".join(record.solution)) if config.sft.fast_fraction else None
        except TagError as error:
            problems.append(f"{record.where}: {record.id}: {error}")
            continue
        cap = config.sft.max_completion_length
        longest = max(len(slow[0]), len(fast[0]) if fast else 0)
        if longest > cap:
            problems.append(
                f"{record.where}: {record.id}: its target has {longest} tokens, expected at most "
                f"sft.max_completion_length={cap}; shorten it or raise the cap"
            )
        targets[record.id] = TargetIds(slow, fast)
    if problems:
        more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        raise TargetError(
            f"{len(problems)} of {len(records)} SFT targets cannot be used:\n  "
            + "\n  ".join(problems[:MAX_LISTED] + more)
        )

    def padded(kind: str) -> int:
        longest = max(
            (len(getattr(target, kind)[0]) for target in targets.values() if getattr(target, kind)), default=0
        )
        return -(-longest // LENGTH_STEP) * LENGTH_STEP

    return targets, (padded("slow"), padded("fast"))


def _pad(targets: Sequence[tuple[np.ndarray, np.ndarray] | None], rows: int, length: int) -> Targets:
    """Targets as arrays [rows, 1, length]; None leaves a row empty."""
    id_BGC = np.zeros((rows, 1, length), np.int32)
    exists_BGC, loss_mask_BGC = np.zeros(id_BGC.shape, bool), np.zeros(id_BGC.shape, bool)
    for row, target in enumerate(targets):
        if target is not None:
            ids, in_loss = target
            id_BGC[row, 0, : len(ids)], loss_mask_BGC[row, 0, : len(ids)] = ids, in_loss
            exists_BGC[row, 0, : len(ids)] = True
    return Targets(continuation=Continuations(id_BGC=id_BGC, exists_BGC=exists_BGC), loss_mask_BGC=loss_mask_BGC)
