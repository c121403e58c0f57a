"""What SFT and RL have in common before their first step: how many steps, which shapes, what is trained and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from mer_r1_jax.config.schema import ConfigError, RlConfig, RunConfig, SftConfig
from mer_r1_jax.data.pipeline import steps_for_epochs
from mer_r1_jax.data.records import Record
from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.parallel.rows import row_share
from mer_r1_jax.training.backbone import Backbone
from mer_r1_jax.training.prompts import plan_buckets
from mer_r1_jax.training.state import (
    Params,
    TrainState,
    learning_rate_schedule,
    make_optimizer,
    tower_flags,
    trainable_names,
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Phase:
    """A phase of a run.

    Attributes:
        name: sft or rl.
        config: its section.
        records: its prompts.
        backbone: what it trains.
        total_steps: optimizer steps.
        buckets: shapes of its batches, rows those of this process.
        towers_trained: whether a tower is trained, and so encoded inside the gradient.
        is_trainable: says of a parameter's name whether the phase trains it.
        optimizer: AdamW with the schedule.
        schedule: learning rate at each step, counted from 0.
    """

    name: str
    config: SftConfig | RlConfig
    records: tuple[Record, ...]
    backbone: Backbone
    total_steps: int
    buckets: list[BatchShape]
    towers_trained: bool
    is_trainable: Callable[[str], bool]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule

    def new_state(self, params: Params) -> TrainState:
        """A fresh train state around parameters."""
        return self.backbone.new_state(params, self.is_trainable, self.optimizer, self.config.optimizer.dtype)


def phase_parts(config: RunConfig, name: str, records: tuple[Record, ...], backbone: Backbone) -> dict[str, Any]:
    """The fields of a `Phase`.

    Raises:
        ConfigError: settings that do not fit together, or do not fit the records.
    """
    section, towers = getattr(config, name), tower_flags(config, name)
    steps = total_steps(config, name, len(records))
    if name == "rl":
        _check_iterations(config, steps)
    rows = row_share(backbone.mesh).of(section.prompts_per_step)
    return {
        "name": name,
        "config": section,
        "records": records,
        "backbone": backbone,
        "total_steps": steps,
        "buckets": plan_buckets(config, backbone.config, records, rows),
        "towers_trained": any(towers.values()),
        "is_trainable": trainable_names(**towers),
        "optimizer": make_optimizer(section.optimizer, steps),
        "schedule": learning_rate_schedule(section.optimizer, steps),
    }


def total_steps(config: RunConfig, name: str, records: int) -> int:
    """Optimizer steps of a phase: the number given, or what its epochs take.

    Raises:
        ConfigError: when a step takes more prompts than there are records.
    """
    section = getattr(config, name)
    if section.prompts_per_step > records:
        raise ConfigError(
            f"{name}.prompts_per_step: got {section.prompts_per_step}, but data.{name}_path has {records} usable "
            "records; lower it"
        )
    if section.max_steps >= 0:
        return section.max_steps
    return steps_for_epochs(records, section.prompts_per_step, section.num_train_epochs)


def _check_iterations(config: RunConfig, steps: int) -> None:
    """Refuses step counts that would cut the updates made from one rollout in two."""
    iterations = config.rl.num_iterations
    if steps % iterations:
        raise ConfigError(
            f"rl.max_steps: got {steps} updates, expected a multiple of rl.num_iterations={iterations}: a rollout is "
            "used up before the run ends"
        )
    if config.eval.eval_steps % iterations:
        raise ConfigError(
            f"eval.eval_steps: got {config.eval.eval_steps}, expected a multiple of rl.num_iterations={iterations}: "
            "evaluations come between rollouts"
        )
