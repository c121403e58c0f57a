"""Plans one configuration on one slice: every program compiled, read and put on the sheet, and what to change.

The RL update may also be tried under other settings.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

from mer_r1_jax.config.schema import ConfigError, RunConfig
from mer_r1_jax.planning.advice import Place, advise, refusal_of
from mer_r1_jax.planning.answering import AnsweringPrograms, as_opened
from mer_r1_jax.planning.chips import chip_of, topology_devices
from mer_r1_jax.planning.compilation import compile_program, versions
from mer_r1_jax.planning.programs import RunPrograms
from mer_r1_jax.planning.sheet import ProgramSheet, Sheet, program_sheet
from mer_r1_jax.planning.work import work_of

PROGRAMS = ("sft_step", "encode", "cast", "sample", "decode", "ask", "score", "reference", "minibatch", "update")


def plan(
    config: RunConfig,
    topology: str,
    *,
    cache_dir: pathlib.Path,
    only: Sequence[str] = (),
    try_others: bool = False,
    answering: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Sheet:
    """The sheet of a configuration on a slice, each phase in its largest bucket of prompts.

    Args:
        config: the configuration.
        topology: the slice as Cloud TPU spells it, or a card of CHIPS and their number, such as h100:8.
        cache_dir: where compiled answers are kept.
        only: programs to compile, each of this plan's, or none for all of them; the others are left off the
            sheet, and with them the hours.
        try_others: compile the RL update under other remat settings and batches too.
        answering: plan what the run's export takes to answer clips, in place of the run.
        progress: called with a line as each program is done.

    Raises:
        ConfigError, ShardingError, TopologyError: nothing can be compiled.
    """
    if unknown := sorted(set(only) - set(PROGRAMS)):
        raise ConfigError(f"unknown programs {', '.join(unknown)}: expected some of {', '.join(PROGRAMS)}")
    if answering and try_others:
        raise ConfigError("--try_others compiles the RL update, which answering has not: leave one of the two out")
    chip = chip_of(topology)
    devices = topology_devices(topology)
    config = as_opened(config, len(devices)) if answering else config
    run = (AnsweringPrograms if answering else RunPrograms)(config, devices)
    if not run.phases():
        raise ConfigError(
            "nothing to plan: sft.max_steps and rl.max_steps are both 0, so the run trains nothing; --answering plans "
            "what a model takes to answer"
        )
    buckets = {phase: run.buckets(phase)[-1] for phase in run.phases()}
    programs = [program for phase, shape in buckets.items() for program in run.of_phase(phase, shape)]
    names = [program.name for program in programs]
    if absent := [name for name in only if name not in names]:
        there = "answering" if answering else "what this configuration trains"
        raise ConfigError(
            f"programs: got {', '.join(absent)}, expected some of those of {there}: {', '.join(names)}; leave out what "
            "is not there" + (", or add --answering for its own" if "ask" in absent else "")
        )
    missing = [name for name in names if only and name not in only]
    sheets: list[ProgramSheet] = []
    for program in programs:
        if program.name in missing:
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
        chip=chip,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        versions=versions(chip),
        buckets=buckets,
        programs=tuple(sheets),
        epoch_steps={} if answering else {phase: run.epoch_steps(phase) for phase in buckets},
        missing=tuple(missing),
        advice=advise(config, sheets, chip, Place.of(run.backbone, bool(chip.cuda))),
        alternatives=tuple(alternatives(config, update_of)) if try_others and "rl" in buckets else (),
    )


def _outcome(program: ProgramSheet) -> str:
    took = f"compiled in {program.compile_seconds:.0f} s"
    if program.error:
        return f"{took}: refused, {'too big' if program.over else refusal_of(program.error).reason}"
    verdict = "fits" if program.fits else f"{program.over / 2**30:.2f} GiB too many"
    return f"{took}, {program.total / 2**30:.2f} GiB ({verdict}), at least {program.bound:.3f} s"


REMATS = ("nothing", "attention", "dots")
FACTORS = (1, 4)  # times the configuration's prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternative:
    """The RL update under other settings.

    Attributes:
        remat, prompts: the settings.
        update: what becomes of the program.
    """

    remat: str
    prompts: int
    update: ProgramSheet

    @property
    def prompt_seconds(self) -> float:
        """The compiler's estimate for one prompt, or the lower bound where it makes none (GPUs).

        What a larger batch saves shows here.
        """
        return (self.update.estimate or self.update.bound) / self.prompts


def alternatives(config: RunConfig, update: Callable[[RunConfig], ProgramSheet]) -> Iterator[Alternative]:
    """Every remat setting with every batch; once one does not fit, larger batches are not tried.

    Args:
        config: the configuration the others are made from.
        update: plans the RL update of a configuration.
    """
    for remat in REMATS:
        for factor in FACTORS:
            prompts = factor * config.rl.prompts_per_step
            model = dataclasses.replace(config.model, remat=remat)
            rl = dataclasses.replace(config.rl, prompts_per_step=prompts)
            sheet = update(dataclasses.replace(config, model=model, rl=rl))
            yield Alternative(remat=remat, prompts=prompts, update=sheet)
            if not sheet.fits:
                break
