"""Rollouts of the small run's policy after its SFT, as functions and as fixtures."""

from __future__ import annotations

import numpy as np
import pytest
from support.small_run import visits_of

from mer_r1_jax.training.prompts import plan_buckets
from mer_r1_jax.training.state import trainable_names

TEXT_ONLY = trainable_names(train_audio=False, train_vision=False)
BETA = np.float32(0.04)


def buckets_of(setup):
    return plan_buckets(setup.config, setup.backbone.config, setup.data.rl, setup.config.rl.prompts_per_step)


@pytest.fixture(scope="session")
def maker(small):
    return small.rl_step(buckets_of(small))


def rollout_of(setup, maker, trained, numbers, step=0):
    return maker.rollout(trained, trained, visits_of(setup, setup.data.rl, numbers), step)


@pytest.fixture(scope="session")
def rollout(small, maker, trained):
    """Of four clips; the reference is the policy."""
    return rollout_of(small, maker, trained, [0, 1, 2, 3])
