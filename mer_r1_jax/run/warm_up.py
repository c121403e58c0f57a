"""The longest shape of every program of training, compiled and run once on dummies before there are weights.

A run pads its prompts to a few lengths and meets the longest of them when it comes, perhaps hours after the start. Here
each phase makes one whole step at that length first: a state and a reference of zeros, prompts without a clip, and from
there the very programs, in the run's own order and with its own memory beside them. The result is thrown away before
weights are loaded or a checkpoint is read, so nothing of a run depends on it, and no second state is ever held.

What it proves: that each of these programs compiles for the devices that are there, and that its arguments, results and
temporary memory fit beside what the run holds meanwhile, with completions of full length: a program takes all of its
memory when it starts, however soon its loop over tokens ends. What it does not: programs of shorter prompts (smaller,
compiled when they are met) and of smaller decode batches, evaluation, what is held outside these programs (a run that
goes on reads its reference in the policy's dtype, beside the state, before it is cast), the host's memory, memory that
is lost between blocks of other sizes later on, and how long a step takes, as completions of rows without a prompt end
at once.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.config.schema import RlConfig, SftConfig
from mer_r1_jax.data.pipeline import Item
from mer_r1_jax.data.prefetch import LoadedItem
from mer_r1_jax.parallel.rows import put
from mer_r1_jax.planning.advice import STATE, Place, cures_of, largest, refusal_of, tried
from mer_r1_jax.planning.chips import GIB
from mer_r1_jax.planning.compilation import first_lines
from mer_r1_jax.planning.programs import RunPrograms, bytes_per_chip
from mer_r1_jax.run.inputs import Say
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.training.phase import Phase, prompts_at_once
from mer_r1_jax.training.reference import abstract_reference
from mer_r1_jax.training.rl_step import RlPrograms
from mer_r1_jax.training.sft_step import SftPhase
from mer_r1_jax.training.stopping import NEVER, Stop

# Programs as `RlPrograms` has them -> by the plan's names.
_WATCHED = {
    **{"encode_media": "encode", "cast": "cast", "rollout": "sample", "begin": "sample", "go_on": "decode"},
    **{"end": "sample", "logprobs": "reference", "score": "score", "advantages": "advantages"},
    "cut_minibatch": "minibatch",
}


class WarmUpError(RuntimeError):
    """A program of training that does not compile, or does not fit, at its longest shape."""


def is_wanted(setup: Setup) -> bool:
    """Whether `train.warm_up_longest` asks for a warm-up on the devices that are there."""
    wanted = setup.config.train.warm_up_longest
    # On a CPU it would take most of a small run's time, and no program is refused there for its memory.
    return wanted == "always" or (wanted == "auto" and setup.backbone.mesh.devices.flat[0].platform != "cpu")


def warm_up(
    setup: Setup, sft: SftPhase | None, rl: Phase[RlConfig] | None, done: int, say: Say, stop: Stop = NEVER
) -> None:
    """Makes one step of each phase that is not done yet at its longest shape.

    Args:
        setup: the parts of the run, none of whose weights are there yet.
        sft, rl: its phases.
        done: optimizer steps of the newest checkpoint, over both phases; 0 without one.
        say: prints a line.
        stop: asked before every program.

    Raises:
        WarmUpError: names the program, its shape and what to change.
        StopRequested: a signal came; nothing was begun or saved.
    """
    sft_steps = sft.total_steps if sft else 0
    began = time.monotonic()
    names: list[str] = []
    if sft is not None and done < sft_steps:
        names += _sft_step(setup, sft, stop)
    if rl is not None and done < sft_steps + rl.total_steps:
        names += _rl_step(setup, rl, stop)
    if names:
        seconds = time.monotonic() - began
        say(f"longest shapes compiled and run once in {seconds:.0f} s: {', '.join(dict.fromkeys(names))}")


def _sft_step(setup: Setup, phase: SftPhase, stop: Stop) -> list[str]:
    """One step of SFT on rows that are all padding; the names of the programs that ran."""
    longest = dataclasses.replace(phase, buckets=phase.buckets[-1:])
    batch, _ = longest.batch([])
    names: list[str] = []
    step = _told(setup, phase, "sft_step", phase.make_step(), names, stop)
    with _explained(setup, phase, STATE):
        state = _zeros(setup.abstract_state_of("sft"))
    step(state, put(batch, setup.backbone.mesh))
    return names


def _rl_step(setup: Setup, phase: Phase[RlConfig], stop: Stop) -> list[str]:
    """One rollout and one update on rows whose clips are all missing; the names of the programs that ran."""
    names: list[str] = []
    programs = _watched(setup, phase, names, stop)
    # The host's own part goes on rows without an answer. So no reward function is called, but each of them still has
    # its array of rewards, all unscored, in the program of the advantages.
    maker = dataclasses.replace(setup.rl_step(phase.buckets[-1:]), programs=programs)
    abstract = setup.abstract_state_of("rl")
    with _explained(setup, phase, STATE):
        state = _zeros(abstract)
        own = _zeros(abstract_reference(setup.config, abstract, setup.backbone))
    reference = state.split()[1] | own if phase.config.beta else None
    records = [phase.records[row % len(phase.records)] for row in range(phase.buckets[-1].rows)]
    rows = [LoadedItem(Item(record, epoch=0, global_index=row), None, None, 0.0) for row, record in enumerate(records)]
    rollout = maker.rollout(state.params, reference, rows, 0)
    update = _told(setup, phase, "update", programs.make_update(phase.optimizer), names, stop)
    update(state, programs.minibatch(rollout.experience, 0), np.float32(0))
    return names


def _watched(setup: Setup, phase: Phase[RlConfig], names: list[str], stop: Stop) -> RlPrograms:
    """The run's programs, each waited for and named where it fails."""
    programs = copy.copy(setup.programs)
    for attribute, name in _WATCHED.items():
        setattr(programs, attribute, _told(setup, phase, name, getattr(programs, attribute), names, stop))
    begin = programs.begin

    def begin_and_go_on(params: Any, prompts: Any, key: Any, sampling: Any, chunks: Any) -> Any:
        # Rows without a prompt end in the first chunk, and the loop of `sample` would ask for no second one.
        state, _ = begin(params, prompts, key, sampling, chunks)
        return programs.go_on(params, state, sampling, chunks, chunks.sizes(len(prompts.uid_B), sampling))

    programs.begin = begin_and_go_on
    return programs


def _told(
    setup: Setup, phase: Phase, name: str, function: Callable[..., Any], names: list[str], stop: Stop
) -> Callable[..., Any]:
    """A program that is waited for, noted in `names`, and explained where it fails."""

    def call(*arguments: Any, **settings: Any) -> Any:
        stop.check()  # every process runs the same programs in the same order
        with _explained(setup, phase, name):
            result = jax.block_until_ready(function(*arguments, **settings))
        names.append(name)
        return result

    return call


@contextlib.contextmanager
def _explained(setup: Setup, phase: Phase, name: str) -> Iterator[None]:
    shape = _shape(phase)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise WarmUpError(_explanation(setup, phase, name, str(error))) from error
    except Exception as error:  # of tracing or lowering: a fault of ours or of a library, to be shown whole
        error.add_note(f"while {phase.name} {name} was compiled at its longest shape, {shape}")
        raise


def _explanation(setup: Setup, phase: Phase, name: str, message: str) -> str:
    """What was wrong, at which shape, what is held meanwhile, and which settings make it smaller."""
    config, devices = setup.config, setup.backbone.mesh.devices.flatten()
    refusal = refusal_of(message)
    held = _held(setup, phase, name)
    place = Place.of(setup.backbone, gpu=devices[0].platform == "gpu")
    cures = refusal.cures or cures_of(config, phase.name, name, held, place)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
    room = f" of {limit / GIB:.1f} GiB" if limit else ""
    return (
        f"{phase.name} {name} at its longest shape, {_shape(phase)}: {refusal.reason}. Expected every program of the "
        f"run to fit at once, so that none fails at a later step; {sum(held.values()) / GIB:.2f} GiB{room} are held "
        f"meanwhile on each device ({largest(held)}). {tried(cures)}; `mer-r1 plan` says what fits without a device. "
        "train.warm_up_longest=never begins all the same, as shorter prompts may fit. It says: "
        + first_lines(message).rstrip(".")
    )


def _shape(phase: Phase) -> str:
    bucket, section = phase.buckets[-1], phase.config
    rows = f"{prompts_at_once(section)} prompts of {bucket.tokens} tokens"
    if isinstance(section, SftConfig):
        return f"{rows} with targets of at most {section.max_completion_length}"
    return f"{rows} x {section.num_generations} completions of {section.max_completion_length}"


def _held(setup: Setup, phase: Phase, name: str) -> dict[str, int]:
    """Bytes a device that live while a program runs, by part, as a plan counts them."""
    planned = RunPrograms(setup.config, list(setup.backbone.mesh.devices.flat))
    bucket = dataclasses.replace(phase.buckets[-1], rows=prompts_at_once(phase.config))
    programs = planned.of_phase(phase.name, bucket)
    # What a plan leaves out runs between two that it has; the first one holds the state, and the batch besides.
    held = {program.name: program.held for program in programs}.get(name, programs[0].held)
    return {part: bytes_per_chip(tree) for part, tree in held.items()}


def _zeros(abstract: Any) -> Any:
    """Zeros of these shapes and dtypes, each made where it is said to live."""

    def make() -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)

    return jax.block_until_ready(jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))())
