"""The reference of a run on disk: found again by a run that goes on, and made again where it can be."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.storage.checkpoints import AllDamagedError, CheckpointError, Checkpoints
from mer_r1_jax.storage.run_directory import RunDirectory
from mer_r1_jax.storage.step_store import DamagedStepError
from mer_r1_jax.training.phase import Phase
from mer_r1_jax.training.reference import Reference, dtypes_in_memory, switched_off, synced_at
from mer_r1_jax.training.state import Params, TrainState, as_stored, partition, stored_params

log = logging.getLogger(__name__)


class ReferenceLostError(RuntimeError):
    """The reference that a run needs to go on is not there any more."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredRun(Setup):
    """The parts of a run, and where it is kept.

    Attributes:
        folder: the run's folder.
        checkpoints: of training states, numbered by optimizer steps over both phases.
        sft_steps: steps of the whole SFT phase, which checkpoints of RL are numbered after.
    """

    folder: RunDirectory
    checkpoints: Checkpoints
    sft_steps: int


def open_reference(run: StoredRun, phase: Phase[RlConfig], state: TrainState, done: int | None) -> Reference | None:
    """The trained parameters as the phase started with them, kept on disk once for later attempts; None without KL.

    With `rl.sync_ref_model` each checkpoint has its own, and one more is being written.

    Args:
        done: updates of the checkpoint that the run goes on from; None where RL begins.

    Raises:
        ReferenceLostError: it is not there any more, and nothing is that it could be made from.
    """
    config = phase.config
    if not config.beta:
        return None
    is_off = switched_off(run.config)

    def of(params: Params, owned: bool = True) -> Reference:
        dtypes = dtypes_in_memory(params, run.backbone, config)
        held = {}
        for name in list(params):
            array = params.pop(name)  # what was read is freed one by one: both together are half as much again
            if array.dtype != dtypes[name]:
                held[name] = array.astype(dtypes[name])
            else:
                held[name] = array if owned else array.copy()
        return Reference(held, config, kept)

    needed = 1 + run.config.train.save_total_limit if config.sync_ref_model else 1
    kept = run.folder.open_checkpoints("reference", max_to_keep=needed)
    if done is None:
        # The state's own buffers, written before this goes on; they are donated to the first update, so the reference
        # gets others, each in its own dtype at once: never a second set of them at full width.
        trained, _ = state.split()
        reference = {name: array for name, array in trained.items() if not is_off(name)}
        if reference:
            kept.save(0, reference, {})
        return of(reference, owned=False)
    # Restored where each parameter lives in training, as the policy's own are.
    shapes, shardings = partition(run.backbone.shapes, phase.is_trainable)[0], run.backbone.shardings
    abstract = {
        name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[name])
        for name, shape in shapes.items()
        if not is_off(name)
    }
    if not abstract:
        return of({})
    number = synced_at(config, done)
    try:
        # One that follows the policy is that of this very step; later and earlier ones may lie beside it.
        if (restored := kept.restore(abstract, step=number if config.sync_ref_model else None)) is not None:
            return of(restored.arrays)
        lost = f"{kept.directory} holds nothing"
    except CheckpointError as error:
        if not (config.sync_ref_model or isinstance(error, AllDamagedError)):
            raise
        lost = str(error)
    if number:
        raise ReferenceLostError(
            f"the reference of update {number}, which checkpoint {run.sft_steps + done} needs to go on, is lost "
            f"({lost}). Expected a copy: it was mixed from policies that are gone (rl.sync_ref_model). Put "
            f"{kept.directory}/{number} back, or move that checkpoint away, so that the one before it is taken"
        )
    reference, origin = _start_of_rl(run, phase, abstract, lost)
    log.warning("the reference was lost and is made again from %s. %s", origin, lost)
    kept.save(0, reference, {})
    return of(reference)


def _start_of_rl(run: StoredRun, phase: Phase, abstract: Params, lost: str) -> tuple[Params, str]:
    """The trained parameters that RL started from, and where they were found.

    Raises:
        ReferenceLostError: they are nowhere any more.
    """
    if not run.sft_steps:
        origin = run.config.model.path or f"random weights of seed {run.config.train.seed}"
        params = run.initial_params()
        return {name: params[name] for name in abstract}, origin

    # Of the checkpoint only what RL trains is read, whichever kind SFT filed it under.
    def end_of_sft(step: int, host: dict[str, Any]) -> dict[str, Params]:
        if host.get("phase") != "sft":
            raise DamagedStepError("it is no checkpoint of SFT")
        stored = as_stored(run.abstract_state_of("sft"))  # which trains other towers than RL, perhaps
        return {
            kind: {name: abstract[name] for name in stored[kind] if name in abstract}
            for kind in ("trainable", "frozen")
        }

    try:
        end = run.checkpoints.restore(end_of_sft, step=run.sft_steps, part=True)
        if end is None:
            raise CheckpointError(f"{run.checkpoints.directory} holds nothing")
        arrays = end.arrays
    except CheckpointError as error:
        raise ReferenceLostError(
            f"the reference, which this run needs to go on, is lost ({lost}), and so is the end of SFT that it "
            f"could be made from again ({error}). Expected one of them: put a copy of {run.folder.path}/"
            f"reference/0 or of checkpoint {run.sft_steps} back, or begin again under another train.run_name"
        ) from error
    return stored_params(arrays), f"checkpoint {run.sft_steps}, the end of SFT"
