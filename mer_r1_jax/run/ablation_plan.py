"""What an ablation runs: one SFT per seed, every arm and control from its export, all in one folder.

Runs are ordinary runs. They differ from the configuration they share in what their row of the table says and in
nothing else: all arms get the same steps, data, seeds and settings.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mer_r1_jax.config.bounds import NameOrPath, Seed, bounds_of, shown_value
from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.config.schema import ConfigError, ModelConfig, RlConfig, RunConfig
from mer_r1_jax.rl.advantage import ARMS
from mer_r1_jax.storage.run_settings import MAY_CHANGE, config_differences

SFT = "sft"  # row of the shared checkpoints
CONTROLS = {
    "permuted": "mer_r1 with the rewards permuted within each group, so that they say nothing",
    "sft": "further SFT in place of RL",
    "plateau": "SFT from the start with a fifth more steps, to see whether it had come to its end",
}
PLATEAU = 1.2  # times the steps of SFT
_NO_SIZES = {
    field.name: type(field.default)(0)
    for field in dataclasses.fields(ModelConfig)
    if field.name.startswith(("text_", "vision_", "audio_"))
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        config: what all runs share.
        out: the ablation's folder; every run is a folder in it.
        arms, seeds, controls: rows of the table, and how often each is run.
        control_sft_steps, control_sft_learning_rate: of the control `sft`.
    """

    config: RunConfig
    out: Path
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    controls: tuple[str, ...] = ()
    control_sft_steps: int = 0
    control_sft_learning_rate: float = 0.0

    @property
    def rows(self) -> tuple[str, ...]:
        """Rows of the table, the shared checkpoints first."""
        return (SFT, *self.arms, *(control_row(control) for control in self.controls))

    def jobs(self) -> list[Job]:
        """Every run in the order they are best started: seed by seed, those that others wait for first."""
        return [self.job(row, seed) for seed in self.seeds for row in self.rows]

    def job(self, row: str, seed: int) -> Job:
        """The run of one row and seed."""
        starts_new = row in (SFT, control_row("plateau"))
        name = run_name(row, seed)
        values: dict[str, Any] = dataclasses.asdict(self.config)
        values["train"] |= {"output_dir": str(self.out), "run_name": name, "seed": seed}
        # The arm says how rewards become advantages, which SFT has not; the default keeps it out of comparisons.
        values["rl"]["arm"] = RlConfig().arm
        # SFT rows stop before RL; all others take up their seed's export, whose sizes are its own.
        if starts_new:
            values["rl"]["max_steps"] = 0
        else:
            values["model"] |= _NO_SIZES | {"path": str(self.out / run_name(SFT, seed) / "export" / "hf")}
            values["sft"]["max_steps"] = 0
        if row == SFT:
            values["train"]["export"] = True
        elif row == control_row("plateau"):
            # As the configuration counts: steps stay whole numbers, epochs need not.
            field = "num_train_epochs" if self.config.sft.max_steps == -1 else "max_steps"
            values["sft"][field] = type(values["sft"][field])(round(PLATEAU * values["sft"][field], 6))
        elif row == control_row("sft"):
            values["rl"]["max_steps"] = 0
            values["sft"]["max_steps"] = self.control_sft_steps
            values["sft"]["optimizer"]["learning_rate"] = self.control_sft_learning_rate
        elif row == control_row("permuted"):
            values["rl"] |= {"arm": "mer_r1", "permute_rewards": True}
        else:
            values["rl"]["arm"] = row
        return Job(row, seed, from_mapping(values), needs="" if starts_new else run_name(SFT, seed))


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of an ablation.

    Attributes:
        row: of the table.
        seed: the run's.
        config: its configuration, in full.
        needs: name of the run whose export it starts from; "" when it starts from nothing.
    """

    row: str
    seed: int
    config: RunConfig
    needs: str

    @property
    def name(self) -> str:
        """Name of the run."""
        return run_name(self.row, self.seed)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.train.output_dir) / self.name


def control_row(control: str) -> str:
    """The row of a control."""
    return f"control_{control}"


def run_name(row: str, seed: int) -> str:
    """The name of the run of a row and seed."""
    return f"{row}_seed{seed}"


@dataclasses.dataclass(frozen=True)
class Controls:
    """Controls beside the arms, as asked for.

    Attributes:
        names: of CONTROLS.
        sft_steps: of the control `sft`: what the RL of an arm costs, in steps of SFT.
        sft_learning_rate: its peak; 0 = that of SFT.
    """

    names: Sequence[str] = ()
    sft_steps: int = 0
    sft_learning_rate: float = 0.0


def make_plan(
    config: RunConfig,
    out: Path,
    arms: Sequence[str],
    seeds: Sequence[str | int],
    controls: Controls = Controls(),
) -> Plan:
    """A plan that can be carried out.

    Raises:
        ConfigError: for everything that cannot be used, in one message.
    """
    known = NameOrPath(tuple(ARMS))
    problems = [
        f"--arms: {name!r} is no arm; expected some of {', '.join(ARMS)}, or module.function"
        for name in arms
        if known.problem(name)
    ]
    problems += [
        f"--controls: {name!r} is no control; expected some of {', '.join(CONTROLS)}"
        for name in controls.names
        if name not in CONTROLS
    ]
    # The schema's own bound, so that a plan takes what a run would.
    (seed_bound,) = bounds_of(Seed)
    problems += [
        f"--seeds: got {shown_value(seed)}, expected whole numbers: {wrong}"
        for seed in seeds
        if (wrong := seed_bound.problem(_whole_number(seed)))
    ]
    # Seeds are compared as numbers: 1 and 01 are one seed.
    for flag, values in (
        ("arms", arms),
        ("seeds", [number for seed in seeds if not math.isnan(number := _whole_number(seed))]),
        ("controls", controls.names),
    ):
        if twice := sorted({str(value) for value in values if list(values).count(value) > 1}):
            problems.append(f"--{flag}: {', '.join(twice)} stands there twice")
        if not {"arms": arms, "seeds": seeds}.get(flag, True):
            problems.append(f"--{flag}: got none, expected at least one")
    problems += _config_problems(config)
    if "sft" in controls.names and controls.sft_steps < 1:
        problems.append(
            f"--control_sft_steps: got {controls.sft_steps}, but the control sft needs the steps of SFT that cost as "
            "much as the RL of an arm; the seconds of both stand in the table of a finished ablation"
        )
    if not 0 <= controls.sft_learning_rate <= 10:  # as of the flag; NaN is refused too
        problems.append(f"--control_sft_learning_rate: got {controls.sft_learning_rate}, expected 0 (SFT's) to 10")
    if problems:
        raise ConfigError("the ablation cannot be run:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return Plan(
        config=config,
        out=out,
        arms=tuple(arms),
        seeds=tuple(int(seed) for seed in seeds),
        controls=tuple(controls.names),
        control_sft_steps=controls.sft_steps if "sft" in controls.names else 0,
        control_sft_learning_rate=(controls.sft_learning_rate or config.sft.optimizer.learning_rate)
        if "sft" in controls.names
        else 0.0,
    )


def _whole_number(seed: str | int) -> float:
    """The number that a seed's text stands for; NaN where it stands for none."""
    text = str(seed)
    return int(text) if text.isdecimal() and len(text) <= 20 else math.nan


def _config_problems(config: RunConfig) -> list[str]:
    problems = []
    for phase, what in (("sft", "the checkpoint all arms start from"), ("rl", "what the arms are compared by")):
        if getattr(config, phase).max_steps == 0:
            problems.append(f"{phase}.max_steps: got 0, but it makes {what}; set the number of steps, or -1 for epochs")
    if not config.data.eval_path and not (config.data.synthetic_dir and config.data.synthetic_eval_clips):
        problems.append("data.eval_path: got nothing, expected held-out clips to compare the arms on")
    if config.rl.permute_rewards:
        problems.append("rl.permute_rewards: got true, which is --controls=permuted here; leave it off")
    return problems


def setting_differences(jobs: Sequence[Job]) -> list[str]:
    """One line for every setting in which a run that is there already was made otherwise than planned."""
    lines = []
    for job in jobs:
        saved = job.folder / "config.json"
        # A run's start writes config.json last: without it no step was made under any settings.
        if saved.is_file():
            was = json.loads(saved.read_text())
            planned = dataclasses.asdict(job.config)
            # Where the shared checkpoint lies follows from the folder, which may have been moved.
            may_change = (*MAY_CHANGE, "model.path") if job.needs else MAY_CHANGE
            lines += [f"{job.name}: {line}" for line in config_differences(was, planned, may_change)]
    return lines
