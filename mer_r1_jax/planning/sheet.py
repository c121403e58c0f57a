"""The sheet of a plan: memory by part, work, a lower bound of each program's time, and hours an epoch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from mer_r1_jax.config.build import difference
from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.planning.chips import Chip
from mer_r1_jax.planning.compilation import Compiled
from mer_r1_jax.planning.programs import PlannedProgram, bytes_per_chip
from mer_r1_jax.planning.work import Work

PARTS = ("parameters", "base", "towers", "optimizer", "reference", "rollout", "batch", "features", "experience")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramSheet:
    """One program: memory in bytes a chip, work and time of one call.

    Attributes:
        name, phase: of the program.
        calls: calls an optimizer step.
        held: what lives on the chip while it runs, by part of PARTS.
        cache, temp: temporary memory: keys and values, and the rest.
        other: outputs that are new, arguments that are in no part, and code.
        hbm: of the chip.
        error: the compiler's, where it gave no program; its memory is then unknown but for `over`.
        note: how it was compiled other than a run would; empty when it was not.
        over: bytes beyond the chip's memory, 0 when the program fits.
        compile_seconds: of the compile, when it was done.
        work: what one chip does in one call; None without a program.
        seconds: lower bound of the time of one call, by resource: compute, memory, interconnect.
        asked: share of the work of all chips that the program asks for; the rest is done on several chips in common.
        estimate: seconds of one call by the compiler's own cycle model, without collectives and kernels; 0 on GPUs,
            whose compiler makes none.
        window_estimate: the same, but a product takes as long as the busier of matrix units at their peak and memory
            at its bandwidth, its windows read again as often as they have to be (`windows.py`). The compiler takes
            memory for about a third as fast as the data sheet says.
        kernels: seconds of the kernels at the chip's peak.
        exposed: seconds of the collectives beside which nothing else runs, at the bandwidth of all links together; a
            ring that uses one of three dimensions takes three times as long.
        useful: seconds in which all chips at their peak would do the useful operations; 0 where these are not stated.
    """

    name: str
    phase: str
    calls: float
    held: dict[str, int]
    cache: int
    temp: int
    other: int
    hbm: int
    error: str
    note: str
    over: int
    compile_seconds: float
    work: Work | None
    seconds: dict[str, float]
    asked: float
    estimate: float
    window_estimate: float
    kernels: float
    exposed: float
    useful: float

    @property
    def total(self) -> int:
        """Bytes a chip while the program runs."""
        return sum(self.held.values()) + self.cache + self.temp + self.other

    @property
    def fits(self) -> bool:
        """Whether the compiler gave a program and all memory together is the chip's at most."""
        return not self.error and not self.over

    @property
    def bound(self) -> float:
        """Seconds one call takes at least."""
        return max(self.seconds.values(), default=0.0)

    def utilisation(self, *, windows: bool = False, exposed: bool = False) -> float:
        """Static MFU, the useful operations over what the chips could do in the time of a call.

        0 where useful operations are not stated, or the compiler makes no estimate.

        Args:
            windows: by `window_estimate`, which is a lower bound of the products' time; else by `estimate`.
            exposed: with the collectives that nothing hides; else as if all were hidden.
        """
        if not self.estimate:
            return 0.0
        seconds = (self.window_estimate if windows else self.estimate) + self.kernels
        return self.useful / (seconds + self.exposed * exposed)


def program_sheet(
    program: PlannedProgram, compiled: Compiled, work: Work | None, chip: Chip, chips: int
) -> ProgramSheet:
    """The sheet of one compiled program."""
    held = {part: bytes_per_chip(program.held[part]) for part in PARTS if part in program.held}
    in_parts = {id(leaf) for tree in program.held.values() for leaf in jax.tree.leaves(tree)}
    loose = bytes_per_chip([leaf for leaf in jax.tree.leaves(program.args) if id(leaf) not in in_parts])
    fresh = compiled.output_bytes - compiled.alias_bytes
    cache = min(program.cache_bytes, compiled.temp_bytes)
    temp = compiled.temp_bytes - cache
    other = loose + fresh + compiled.code_bytes
    total = sum(held.values()) + cache + temp + other
    return ProgramSheet(
        name=program.name,
        phase=program.phase,
        calls=program.calls,
        held=held,
        cache=cache,
        temp=temp,
        other=other,
        hbm=chip.hbm_bytes,
        error=compiled.error,
        note=compiled.note,
        over=max(compiled.over_bytes, total - chip.hbm_bytes, 0),
        compile_seconds=compiled.seconds,
        work=work,
        seconds=lower_bounds(work, chip) if work else {},
        asked=compiled.traced_flops / (work.flops * chips) if work and work.flops else 0.0,
        estimate=work.cycles / chip.clock if work and chip.clock else 0.0,
        window_estimate=_window_estimate(work, chip) if work and chip.clock else 0.0,
        kernels=work.kernel_flops / chip.flops if work else 0.0,
        exposed=work.exposed / chip.link_bandwidth if work else 0.0,
        useful=program.useful / (chip.flops * chips),
    )


def _window_estimate(work: Work, chip: Chip) -> float:
    """The compiler's estimate, with the products by matrix units and windows instead."""
    others = work.cycles - sum(product.calls * product.cycles for product in work.products)
    products = sum(product.seconds(chip.flops, chip.hbm_bandwidth) for product in work.products)
    return others / chip.clock + products


def lower_bounds(work: Work, chip: Chip) -> dict[str, float]:
    """Seconds each resource of a chip is busy at least; the largest bounds the program's time from below."""
    return {
        "compute": work.flops / chip.flops,
        "memory": work.hbm_bytes / chip.hbm_bandwidth,
        "interconnect": work.sent / chip.link_bandwidth,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sheet:
    """The plan of one configuration on one slice.

    Attributes:
        config: the configuration.
        topology, chip, chips, mesh: the slice, its chip, how many, and how they are laid out.
        versions: of the compiler.
        buckets: the prompt shape of each phase.
        programs: one sheet each.
        epoch_steps: steps that one pass over a phase's records takes; empty where a model only answers.
        missing: programs of these phases that were left out on purpose.
        advice: what would make it fit, one line each; empty when it fits.
        alternatives: the RL update under other settings; empty where they were not tried.
        command: the command that makes this sheet.
    """

    config: RunConfig
    topology: str
    chip: Chip
    chips: int
    mesh: dict[str, int]
    versions: dict[str, str]
    buckets: dict[str, BatchShape]
    programs: tuple[ProgramSheet, ...]
    epoch_steps: dict[str, int]
    missing: tuple[str, ...]
    advice: tuple[str, ...]
    alternatives: tuple[Any, ...]
    command: str = ""

    @property
    def fits(self) -> bool:
        """Whether every program does."""
        return all(program.fits for program in self.programs)

    def step_seconds(self, phase: str) -> float | None:
        """Lower bound of one step; None while a program is not compiled."""
        programs = [program for program in self.programs if program.phase == phase]
        if self.missing or not programs or any(program.work is None for program in programs):
            return None
        return sum(program.calls * program.bound for program in programs)

    def epoch_hours(self, phase: str) -> float | None:
        """Lower bound of one pass over the phase's records; None while a program is not compiled."""
        seconds = self.step_seconds(phase)
        if seconds is None:
            return None
        updates = self.config.rl.updates_per_rollout if phase == "rl" else 1
        return seconds * updates * self.epoch_steps[phase] / 3600

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        default = dataclasses.asdict(RunConfig())
        settings = {name: new for name, (_, new) in difference(default, dataclasses.asdict(self.config)).items()}
        return {
            "config": self.config.name,
            "settings": settings,
            "topology": self.topology,
            "chips": self.chips,
            "mesh": self.mesh,
            "versions": self.versions,
            "buckets": {phase: dataclasses.asdict(shape) for phase, shape in self.buckets.items()},
            "fits": self.fits,
            "advice": list(self.advice),
            "missing": list(self.missing),
            "epoch_steps": self.epoch_steps,
            "step_seconds_lower_bound": {phase: self.step_seconds(phase) for phase in self.buckets},
            "epoch_hours_lower_bound": {phase: self.epoch_hours(phase) for phase in self.epoch_steps},
            "programs": [_program_json(program) for program in self.programs],
            "alternatives": [
                {"remat": one.remat, "prompts": one.prompts, "update": _program_json(one.update)}
                for one in self.alternatives
            ],
            "command": self.command,
        }


def _program_json(program: ProgramSheet) -> dict[str, Any]:
    values = {
        "name": program.name,
        "phase": program.phase,
        "calls_per_step": program.calls,
        "fits": program.fits,
        "bytes_per_chip": {
            **program.held,
            "cache": program.cache,
            "temp": program.temp,
            "other": program.other,
            "total": program.total,
            "hbm": program.hbm,
            "over": program.over,
        },
        "compile_seconds": round(program.compile_seconds, 1),
        "error": program.error,
        "note": program.note,
        "seconds_lower_bound": program.seconds,
        "share_of_work_asked_for": program.asked,
        "seconds_compiler_estimate": program.estimate,
        "seconds_by_windows": program.window_estimate,
        "seconds_of_synchronous_collectives": program.exposed,
        "static_mfu": program.utilisation(),
        "static_mfu_exposed": program.utilisation(exposed=True),
        "static_mfu_by_windows": program.utilisation(windows=True),
        "static_mfu_by_windows_exposed": program.utilisation(windows=True, exposed=True),
    }
    if program.work:
        values["work_per_chip"] = dataclasses.asdict(program.work)
        del values["work_per_chip"]["products"]  # as many as the program has, and only their times are of interest
    return values
