"""What SFT and RL settle before their first step: steps, shapes, what is trained, how answers are sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import optax
from jax.sharding import Mesh

from mer_r1_jax.config.schema import ConfigError, RlConfig, RunConfig, SftConfig
from mer_r1_jax.data.pipeline import batches_for_epochs
from mer_r1_jax.data.records import Record
from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.parallel.mesh import row_cut
from mer_r1_jax.parallel.rows import row_share
from mer_r1_jax.rl.sampling import SamplingConfig
from mer_r1_jax.rl.tags import AnswerTags
from mer_r1_jax.training.backbone import Backbone
from mer_r1_jax.training.prompts import plan_buckets
from mer_r1_jax.training.state import (
    Params,
    TrainState,
    learning_rate_schedule,
    make_optimizer,
    tower_flags,
    trained_in,
)

Section = TypeVar("Section", SftConfig, RlConfig)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Phase(Generic[Section]):
    """A phase of a run, by the section of the configuration it has.

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
    config: Section
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
        _check_updates(config, steps)
    # Of this process; all of them together make the step's batch, or the rollout.
    rows = row_share(backbone.mesh).of(prompts_at_once(section))
    return {
        "name": name,
        "config": section,
        "records": records,
        "backbone": backbone,
        "total_steps": steps,
        "buckets": plan_buckets(config, backbone.config, records, rows),
        "towers_trained": any(towers.values()),
        "is_trainable": trained_in(config, name),
        "optimizer": make_optimizer(section.optimizer, steps),
        "schedule": learning_rate_schedule(section.optimizer, steps),
    }


def prompts_at_once(section: SftConfig | RlConfig) -> int:
    """Prompts of a batch, all processes together: those of an SFT step, or of a rollout."""
    return section.prompts_per_rollout if isinstance(section, RlConfig) else section.prompts_per_step


def steps_of(section: SftConfig | RlConfig, records: int) -> int:
    """Optimizer steps of a phase over so many records: the number given, or what its epochs take."""
    # -1 asks for epochs.
    if section.max_steps >= 0:
        return section.max_steps
    batches = batches_for_epochs(records, prompts_at_once(section), section.num_train_epochs)
    return batches * (section.updates_per_rollout if isinstance(section, RlConfig) else 1)


def total_steps(config: RunConfig, name: str, records: int) -> int:
    """`steps_of` a phase.

    Raises:
        ConfigError: when a batch takes more prompts than there are records.
    """
    section = getattr(config, name)
    # The stream of prompts would refuse this too, but only when the phase begins, perhaps after hours of SFT.
    if prompts_at_once(section) > records:
        rollout = section.prompts_per_step < prompts_at_once(section)
        raise ConfigError(
            f"{name}.prompts_per_step: got {section.prompts_per_step}"
            + (f" x rl.steps_per_generation={section.steps_per_generation}" if rollout else "")
            + f", but data.{name}_path has {records} usable records; lower it"
        )
    return steps_of(section, records)


def _check_updates(config: RunConfig, steps: int) -> None:
    """Refuses step counts that would cut the updates made from one rollout in two."""
    updates = config.rl.updates_per_rollout
    settings = ("steps_per_generation", "num_iterations")
    product = " x ".join(f"rl.{name}={size}" for name in settings if (size := getattr(config.rl, name)) > 1)
    if steps % updates:
        raise ConfigError(
            f"rl.max_steps: got {steps} updates, expected a multiple of {product}: a rollout is used up before the "
            "run ends"
        )
    if config.eval.eval_steps % updates:
        raise ConfigError(
            f"eval.eval_steps: got {config.eval.eval_steps}, expected a multiple of {product}: evaluations come "
            "between rollouts"
        )


def sampling_config(rl: RlConfig, thinker: ThinkerConfig, banned_ids: tuple[int, ...]) -> SamplingConfig:
    """How the training rollout samples; `banned_ids` are never sampled."""
    return SamplingConfig(
        max_completion_length=rl.max_completion_length,
        eos_ids=thinker.eos_token_ids,
        banned_ids=banned_ids,
        temperature=rl.temperature,
        top_k=rl.top_k,
        top_p=rl.top_p,
        min_p=rl.min_p,
        num_generations=rl.num_generations,
    )


def banned_ids_of(tags: AnswerTags, thinker: ThinkerConfig) -> tuple[int, ...]:
    """Ids no completion may hold: special tokens, media placeholders and ids without a token."""
    return tags.banned_ids(thinker.text.vocab_size, eos_ids=thinker.eos_token_ids, extra=thinker.media_token_ids)


def check_rows(config: RunConfig, mesh: Mesh) -> None:
    """Refuses batches whose rows the devices cannot share evenly.

    Raises:
        ConfigError: with the number of prompts that would do.
    """
    problems, cut = [], row_cut(mesh)
    for phase in ("sft", "rl"):
        section = getattr(config, phase)
        # Rows of a micro-batch, which is what the devices share.
        rows = section.prompts_per_step // section.gradient_accumulation_steps
        if section.max_steps and rows % cut:
            problems.append(
                f"{phase}.prompts_per_step: got {section.prompts_per_step} in {section.gradient_accumulation_steps} "
                f"micro-batch(es), {rows} rows each, but mesh.data x mesh.fsdp x mesh.decode_tensor = {cut} "
                f"devices share the rows of one; try {-(-rows // cut) * cut * section.gradient_accumulation_steps}"
            )
    if problems:
        raise ConfigError("the configuration cannot be used:\n" + "\n".join(f"  - {line}" for line in problems))
