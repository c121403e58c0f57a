"""A small experiment that every test of the lab's policy and training can share."""

import dataclasses

import pytest

from mer_r1_jax.lab.scenes import draw_scenes
from mer_r1_jax.lab.worlds import WORLDS, with_settings

FEW = {
    **{"sft_clips": 60, "rl_clips": 40, "eval_clips": 30, "width": 16},
    **{"sft.max_steps": 30, "sft.prompts_per_step": 16},
    **{"rl.max_steps": 4, "rl.prompts_per_step": 3, "rl.num_generations": 4},
}


@pytest.fixture(scope="session")
def few():
    """Settings that train for a moment."""
    return with_settings(WORLDS["default"], FEW)


@pytest.fixture(scope="session")
def few_scenes(few):
    return draw_scenes(few)


@pytest.fixture(scope="session")
def from_trace(few):
    """The same where slow answers see nothing but their reasoning."""
    return dataclasses.replace(few, answers_from_trace=True)
