"""The RL phase: a rollout, one or more updates from it, evaluations in between.

Checkpoints are taken between rollouts, so that no buffer of experience has to be kept with them. A rollout can take
minutes and a spot machine gives seconds, so a signal that comes while one is made leaves it: the step before is saved,
and the run that goes on samples it again, from the same random bits. A signal that comes half-way through the updates
of a rollout is obeyed after the last of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mer_r1_jax import faults
from mer_r1_jax.config.errors import ConfigError
from mer_r1_jax.data.prefetch import ClipPrefetcher
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.run.experience import ExperienceMaker, Rollout
from mer_r1_jax.run.session import Session, StepLog
from mer_r1_jax.run.setup import Setup, tower_flags
from mer_r1_jax.run.sft import total_steps
from mer_r1_jax.stop_requested import StopRequested
from mer_r1_jax.storage.checkpoints import AllDamagedError, CheckpointError, Restored
from mer_r1_jax.storage.damage import DamagedStepError
from mer_r1_jax.training.prompts import plan_buckets
from mer_r1_jax.training.rl import beta_at
from mer_r1_jax.training.state import (
    Leaves,
    TrainState,
    learning_rate_schedule,
    make_optimizer,
    partition,
    trainable_names,
)

log = logging.getLogger(__name__)


class RlPhase:
    """Reinforcement learning of one run."""

    name = "rl"

    def __init__(self, setup: Setup):
        self.setup, self.config = setup, setup.config.rl
        self.total_steps = total_steps(setup.config, "rl", len(setup.data.rl))
        if self.total_steps % self.config.num_iterations:
            raise ConfigError(
                f"rl.max_steps: got {self.total_steps} updates, expected a multiple of "
                f"rl.num_iterations={self.config.num_iterations}: a rollout is used up before the run ends"
            )
        if setup.config.eval.eval_steps % self.config.num_iterations:
            raise ConfigError(
                f"eval.eval_steps: got {setup.config.eval.eval_steps}, expected a multiple of rl.num_iterations="
                f"{self.config.num_iterations}: evaluations come between rollouts"
            )
        rows = setup.share.of(self.config.prompts_per_step)
        self.buckets = plan_buckets(setup.config, setup.backbone.config, setup.data.rl, rows)
        towers = tower_flags(setup.config, "rl")
        self.is_trainable = trainable_names(**towers)
        self.optimizer = make_optimizer(self.config.optimizer, self.total_steps)
        self._schedule = learning_rate_schedule(self.config.optimizer, self.total_steps)
        self._maker = ExperienceMaker(setup, self.buckets, encode_inside=any(towers.values()))

    def run(
        self,
        session: Session,
        leaves: Leaves | None,
        restored: Restored | None,
        evaluate: Callable[[TrainState, int], None],
    ) -> Leaves | None:
        """Trains from the SFT result or a checkpoint to the end of the phase.

        Args:
            evaluate: called with the state and the steps done, before the first step and after each.

        Returns:
            All parameters, or None when a signal stopped the run (a checkpoint was saved).
        """
        setup = self.setup
        with session.begin(self, setup.data.rl, leaves, restored) as begun:
            state, data, done = begun.state, begun.data, begun.done
            reference = self._reference(session, state, fresh=restored is None)
            update = setup.programs.make_update(self.optimizer, setup.candidates.ids_ZY)
            with StepLog(session, self.name, self.total_steps, done, begun.num_tokens) as log:
                try:
                    evaluate(state, done)
                except StopRequested:
                    return None  # nothing was done since the newest checkpoint
                log.restart_clock()
                rollout: Rollout | None = None
                saved = done
                for step in range(done + 1, self.total_steps + 1):
                    first_update = (step - 1) % self.config.num_iterations == 0
                    if first_update:
                        position = data.state()
                        try:
                            rollout = self._rollout(session, state, reference, data, step)
                        except StopRequested:
                            log.note(f"the rollout of rl step {step} was left; the run that goes on samples it again")
                            if saved < step - 1:
                                session.save(self.name, step - 1, state, position, log)
                            return None
                        faults.here("rl_update", step)
                    beta = beta_at(self.config, step - 1, self.total_steps)
                    state, metrics = update(state, rollout.experience, np.float32(beta))
                    metrics |= {"beta": beta, "learning_rate": float(self._schedule(step - 1))}
                    log.add(step, metrics | rollout.metrics | data.metrics(), rollout.tokens if first_update else 0)
                    if first_update and self._logs_completions(step):
                        self._log_completions(session, log, step, rollout)
                    if step % self.config.num_iterations == 0:
                        log.flush()  # the next rollout needs the update anyhow, and what comes first is not its time
                        stopping = self._between_rollouts(session, log, state, data, step, evaluate)
                        if stopping:
                            return None
                        if self._save_is_due(step):
                            saved = step
                        log.restart_clock()
        return state.trainable | state.frozen

    def _rollout(
        self, session: Session, state: TrainState, reference: Leaves | None, data: ClipPrefetcher, step: int
    ) -> Rollout:
        """The experience of the updates from `step` on; raises StopRequested where a signal leaves it."""
        return self._maker.make(
            (state.trainable, state.frozen),
            reference and (reference, state.frozen),
            data.next(step, session.stop.asked),
            (step - 1) // self.config.num_iterations,
            session.stop,
        )

    def _save_is_due(self, step: int) -> bool:
        """Whether a checkpoint is taken after `step`, the last update of a rollout, without being asked for."""
        return step % self.setup.config.train.save_steps < self.config.num_iterations or step == self.total_steps

    def _between_rollouts(
        self, session: Session, log: StepLog, state: TrainState, data: Any, step: int, evaluate: Callable[..., None]
    ) -> bool:
        """Saves and evaluates where that is due; returns whether a signal stops the run here, saved."""

        def save() -> None:
            session.save(self.name, step, state, data.state(), log)

        due = self._save_is_due(step)
        stopping = session.stopping()  # read once: a signal may come at any moment
        if due or stopping:
            save()
        if stopping:
            return True
        try:
            evaluate(state, step)
        except StopRequested:
            if not due:
                save()
            return True
        return False

    def _logs_completions(self, step: int) -> bool:
        """Whether a logging step is among the updates made from the rollout that begins at `step`."""
        train = self.setup.config.train
        every, last = train.logging_steps, step + self.config.num_iterations - 1
        return train.log_completions and last // every > (step - 1) // every

    def _reference(self, session: Session, state: TrainState, fresh: bool) -> Leaves | None:
        """The frozen copy of the trainable leaves the phase started from, kept on disk once for later attempts."""
        if not self.config.beta:
            return None
        kept = session.folder.open_checkpoints("reference", max_to_keep=1)
        if fresh:
            # A copy, because the state's own buffers are donated to the first update.
            reference = jax.tree.map(lambda leaf: leaf.copy(), state.trainable)
            kept.save(0, reference, {})
            return reference
        shapes = partition(self.setup.backbone.shapes, self.is_trainable)[0]
        shardings = self.setup.backbone.shardings
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
            for name, leaf in shapes.items()
        }
        try:
            restored = kept.restore(abstract)
            lost = None if restored else f"{kept.directory} holds nothing"
        except AllDamagedError as error:
            lost = str(error)
        if lost is None:
            return restored.arrays
        reference, origin = self._start_of_rl(session, abstract, lost)
        log.warning("the reference was lost and is made again from %s. %s", origin, lost)
        kept.save(0, reference, {})
        return reference

    def _start_of_rl(self, session: Session, abstract: Leaves, lost: str) -> tuple[Leaves, str]:
        """The trainable leaves that RL started from, and where they were found.

        Raises:
            ReferenceLostError: they are nowhere any more.
        """
        if not session.sft_steps:
            origin = self.setup.config.model.path or f"random weights of seed {self.setup.config.train.seed}"
            return partition(self.setup.initial_leaves(), self.is_trainable)[0], origin

        def end_of_sft(step: int, host: dict[str, Any]) -> dict[str, Leaves]:
            if host.get("phase") != "sft":
                raise DamagedStepError("it is no checkpoint of SFT")
            in_sft = self.setup.abstract_state_of(
                "sft"
            )  # where a tower is trained, its leaves lie elsewhere than in RL
            return {
                kind: {name: abstract[name] for name in getattr(in_sft, kind) if name in abstract}
                for kind in ("trainable", "frozen")
            }

        try:
            arrays = session.checkpoints.restore(end_of_sft, step=session.sft_steps, part=True).arrays
        except CheckpointError as error:
            raise ReferenceLostError(
                f"the reference, which this run needs to go on, is lost ({lost}), and so is the end of SFT that it "
                f"could be made from again ({error}). Expected one of them: put a copy of {session.folder.path}/"
                f"reference/0 or of checkpoint {session.sft_steps} back, or begin again under another train.run_name"
            ) from error
        return arrays["trainable"] | arrays["frozen"], f"checkpoint {session.sft_steps}, the end of SFT"

    def _log_completions(self, session: Session, log: StepLog, step: int, rollout: Rollout) -> None:
        session.metrics.write_completions(step, rollout.table)
        for line in range(min(self.setup.config.train.num_completions_to_print, len(rollout.table.get("id", ())))):
            clip, words, truth, f1 = (rollout.table[name][line] for name in ("id", "words", "truth", "f1"))
            log.note(
                f"  {printable(clip)}: {rollout.table['completion'][line]!r}\n"
                f"  answer {printable(', '.join(words)) or 'none'} | truth {printable(', '.join(truth))} | "
                + ("its truth is on no wheel" if f1 is None else f"F1 {f1:.2f}")
            )


class ReferenceLostError(RuntimeError):
    """The reference that RL started from is not there any more."""
