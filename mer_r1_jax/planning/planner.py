"""Plans one configuration on one slice: every program compiled, read and put on the sheet."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

from mer_r1_jax.config.schema import ConfigError, RunConfig
from mer_r1_jax.planning.advice import advise, alternatives
from mer_r1_jax.planning.chips import chip_of, topology_devices
from mer_r1_jax.planning.compilation import compile_program, versions
from mer_r1_jax.planning.programs import RunPrograms
from mer_r1_jax.planning.sheet import ProgramSheet, Sheet, program_sheet
from mer_r1_jax.planning.work import work_of

PROGRAMS = ("sft_step", "encode", "cast", "sample", "decode", "score", "reference", "update")


def plan(
    config: RunConfig,
    topology: str,
    *,
    cache_dir: pathlib.Path,
    only: Sequence[str] = PROGRAMS,
    try_others: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Sheet:
    """The sheet of a configuration on a slice, each phase in its largest bucket of prompts.

    Args:
        config: the configuration.
        topology: the slice, as Cloud TPU spells it.
        cache_dir: where compiled answers are kept.
        only: programs to compile, of PROGRAMS; the others are left off the sheet, and with them the hours.
        try_others: compile the RL update under other remat settings and batches too.
        progress: called with a line as each program is done.

    Raises:
        ConfigError, ShardingError, TopologyError: nothing can be compiled.
    """
    if unknown := sorted(set(only) - set(PROGRAMS)):
        raise ConfigError(f"unknown programs {', '.join(unknown)}: expected some of {', '.join(PROGRAMS)}")
    chip = chip_of(topology)
    run = RunPrograms(config, topology_devices(topology))
    if not run.phases():
        raise ConfigError("nothing to plan: sft.max_steps and rl.max_steps are both 0, so the run trains nothing")
    buckets = {phase: run.buckets(phase)[-1] for phase in run.phases()}
    sheets: list[ProgramSheet] = []
    missing: list[str] = []
    for phase, shape in buckets.items():
        for program in run.of_phase(phase, shape):
            if program.name not in only:
                missing.append(program.name)
                continue
            compiled = compile_program(program, topology, cache_dir)
            work = work_of(compiled.text, program.longest_loop, program.visited) if compiled.text else None
            sheets.append(program_sheet(program, compiled, work, chip, run.backbone.mesh.size))
            progress(f"{topology} {program.name}: {_outcome(sheets[-1])}")

    def update_of(other: RunConfig) -> ProgramSheet:
        (sheet,) = plan(other, topology, cache_dir=cache_dir, only=["update"], progress=progress).programs
        return sheet

    mesh = run.backbone.mesh
    return Sheet(
        config=config,
        topology=topology,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        versions=versions(),
        buckets=buckets,
        programs=tuple(sheets),
        epoch_steps={phase: run.epoch_steps(phase) for phase in buckets},
        missing=tuple(missing),
        advice=advise(config, sheets, mesh.size),
        alternatives=tuple(alternatives(config, update_of)) if try_others and "rl" in buckets else (),
    )


def _outcome(program: ProgramSheet) -> str:
    took = f"compiled in {program.compile_seconds:.0f} s"
    if program.error:
        return f"{took}: {program.error}"
    verdict = "fits" if program.fits else f"{program.over / 2**30:.2f} GiB too many"
    return f"{took}, {program.total / 2**30:.2f} GiB ({verdict}), at least {program.bound:.3f} s"
