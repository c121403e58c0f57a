"""Plans one configuration on one slice: every program compiled, read and put on the sheet, and what to change.

Of a program that does not fit the sheet says what is too big, by how much, and the settings that make it smaller; the
RL update may also be tried under other settings.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

from mer_r1_jax.config.schema import ConfigError, RunConfig
from mer_r1_jax.planning.chips import GIB, chip_of, topology_devices
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


REMATS = ("nothing", "attention", "dots")
FACTORS = (1, 4)  # times the configuration's prompts


def advise(config: RunConfig, programs: Sequence[ProgramSheet], chips: int) -> tuple[str, ...]:
    """One line for each program that does not fit: what is too big, by how much, and what would mend it."""
    return tuple(_line(config, program, chips) for program in programs if not program.fits)


def _line(config: RunConfig, program: ProgramSheet, chips: int) -> str:
    if program.error and not program.over:
        return f"{program.name}: the compiler refuses it: {program.error}"
    held = sum(program.held.values())
    over, hbm = program.over / GIB, program.hbm / GIB
    if program.error:
        # The compiler counts the program's own arguments; what is held besides them comes on top.
        size = f"{program.name}: more than {hbm:.1f} GiB, {over:.2f} GiB or more too many"
        cause = f"{held / GIB:.2f} GiB are held ({_largest(program.held)}), the rest is temporary"
    else:
        size = f"{program.name}: {program.total / GIB:.2f} GiB of {hbm:.1f} GiB, {over:.2f} GiB too many"
        cause = f"largest: {_largest({**program.held, 'cache': program.cache, 'temp': program.temp})}"
    return f"{size}; {cause}. {'; or '.join(_cures(config, program, chips))}"


def _largest(parts: dict[str, int], count: int = 3) -> str:
    ordered = sorted(parts.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in ordered)


def _cures(config: RunConfig, program: ProgramSheet, chips: int) -> list[str]:
    """Settings that would make up for what is too much, those that change nothing else first."""
    phase, section = program.phase, getattr(config, program.phase)
    cures = []
    if config.mesh.data > 1:
        cures.append(f"mesh.fsdp={config.mesh.data * max(config.mesh.fsdp, 1)} and mesh.data=1, which cut what is held")
    rows = section.prompts_per_step // section.gradient_accumulation_steps
    cut = chips // config.mesh.tensor
    trains = program.name in ("sft_step", "update")
    if trains and rows > cut and rows % (2 * cut) == 0:
        more = 2 * section.gradient_accumulation_steps
        cures.append(f"{phase}.gradient_accumulation_steps={more}, which about halves the temporary memory")
    if trains and config.model.remat != "nothing":
        cures.append("model.remat=nothing, which keeps nothing of a layer")
    if not trains and section.prompts_per_step > cut and section.prompts_per_step % (2 * cut) == 0:
        cures.append(f"{phase}.prompts_per_step={section.prompts_per_step // 2}, which halves the rows of a chip")
    if rows <= cut:
        tensor = 2 * config.mesh.tensor
        cures.append(f"mesh.tensor={tensor}, as one row a chip cannot be cut further otherwise")
    if section.optimizer.dtype == "float32":
        saved = program.held.get("optimizer", 0) / 2 / GIB
        cures.append(f"{phase}.optimizer.dtype=bfloat16, which saves {saved:.2f} GiB")
    if config.model.param_dtype == "float32":
        saved = sum(program.held.get(part, 0) for part in ("parameters", "towers", "reference")) / 2 / GIB
        cures.append(f"model.param_dtype=bfloat16, which saves {saved:.2f} GiB and rounds every update")
    cures.append(f"a larger slice: {2 * chips} chips halve what is held")
    return ["Try " + cures[0], *cures[1:]]


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
        """The compiler's estimate for one prompt; what a larger batch saves shows here."""
        return self.update.estimate / self.prompts


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
