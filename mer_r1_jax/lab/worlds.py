"""The lab's worlds by name, and what else an experiment in it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mer_r1_jax.config.bounds import Count, Rows, Seed, Share
from mer_r1_jax.config.build import with_values
from mer_r1_jax.config.schema import ConfigError, OptimizerConfig, RlConfig, SftConfig
from mer_r1_jax.data.synthetic.world import MODALITIES, WorldConfig
from mer_r1_jax.data.synthetic.world import WORLDS as DRAWN

SUGGESTIONS = 2  # categories that a reasoning names for each modality: the one or two its cues suggest most
CONCLUSION = 3  # categories of the conclusion, where a reasoning ends with one
ANSWER_WORDS = 5  # of an answer, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabConfig:
    """One experiment. The sections `sft` and `rl` are a run's; what the tiny policy has no use for is not read.

    Attributes:
        world: how scenes and labels are drawn.
        answers_from_trace: a slow answer sees its reasoning alone, no longer the clip.
        misread: a display is seen as any display; stands for what a model's eyes and ears get wrong.
        data_seed: of the scenes, the same for all seeds of the model.
        sft_clips, rl_clips, eval_clips: scenes of each split; `world.annotators` label each clip of the first.
        width: of the policy.
        eval_samples: answers sampled of each held-out clip, for the measure of sampled ones.
        common_point: measure F1 at a common operating point too, which takes as long as all else that is measured.
        sft, rl: how it is trained.
    """

    world: WorldConfig = DRAWN["even"]
    answers_from_trace: bool = False
    misread: Share = 0.1
    data_seed: Seed = 0
    sft_clips: Count = 4000
    rl_clips: Count = 5000
    eval_clips: Count = 2000
    width: Rows = 48
    eval_samples: Count = 1
    common_point: bool = False
    sft: SftConfig = SftConfig(
        max_steps=1200, prompts_per_step=160, fast_fraction=0.25, optimizer=OptimizerConfig(learning_rate=3e-3)
    )
    # One learning rate for every arm and world: an arm that wins by a rate of its own has won nothing.
    rl: RlConfig = RlConfig(
        max_steps=150,
        prompts_per_step=12,
        num_generations=8,
        max_completion_length=len(MODALITIES) * SUGGESTIONS + ANSWER_WORDS,
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )

    @property
    def trace_length(self) -> int:
        """Tokens of a reasoning."""
        return len(MODALITIES) * SUGGESTIONS + CONCLUSION * self.world.concludes


WORLDS: dict[str, LabConfig] = {
    "default": LabConfig(world=DRAWN["even"]),
    "U": LabConfig(world=DRAWN["U"]),
    "O": LabConfig(world=DRAWN["O"]),
    "T": LabConfig(world=dataclasses.replace(DRAWN["even"], trace_skip=0.3), answers_from_trace=True),
    "concluding": LabConfig(world=DRAWN["concluding"]),
}
PURPOSES = {
    "default": "one to four emotions, plain cues, labels with slips",
    "U": "slow answers name too few (one to five emotions, weak cues), so that F1 wants recall; what "
    "`mer-r1 train --config=synthetic` draws",
    "O": "slow answers name too many (labels always add a wrong emotion), so that F1 wants precision",
    "T": "as default, but slow answers see nothing but their reasoning, which skips a third of the cues",
    "concluding": "as default, but reasonings end with the answer",
}

# Switches of RL that the lab's own programs do not follow.
_ONLY_IN_RUNS = (
    *("entropy_coef", "top_entropy_quantile", "sampler_correction", "sync_ref_model"),
    *("temper_logprobs", "wheels_without_truth", "untagged_answer", "format_reward"),
    *("steps_per_generation", "num_iterations"),
)


def with_settings(config: LabConfig, values: Mapping[str, Any]) -> LabConfig:
    """A configuration with some fields replaced.

    Args:
        config: to begin with.
        values: dotted name -> value, such as `rl.beta` or `world.label_gain`.

    Raises:
        ConfigError: an unknown name, a value of another type, or one outside its bounds.
    """
    try:
        config = with_values(config, values)
    except ConfigError:
        raise
    except ValueError as error:  # probabilities that do not sum to one
        raise ConfigError(f"the settings cannot be used: {error}") from error
    for name, value, least in (
        ("sft.max_steps", config.sft.max_steps, 1),
        ("rl.max_steps", config.rl.max_steps, 1),
        ("eval_clips", config.eval_clips, 2),  # one has no spread
    ):
        if value < least:
            raise ConfigError(f"the settings cannot be used: {name}: got {value}, expected at least {least} here")
    for name in _ONLY_IN_RUNS:
        value, usual = getattr(config.rl, name), getattr(RlConfig(), name)
        if value != usual:
            raise ConfigError(
                f"the settings cannot be used: rl.{name}: got {value!r}, expected {usual!r}: the lab does not "
                "have this switch; leave it out here, or try it in a run (mer-r1 train --config=synthetic)"
            )
    return config
