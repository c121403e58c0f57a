"""The small run's parts as fixtures, made once a process; all processes of a session share compiled programs."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest
from support.small_run import TRAINED, make_data, small_setup, visits_of

from mer_r1_jax.parallel.rows import put
from mer_r1_jax.training.sft_step import make_sft_step


@functools.cache
def _folder(base):
    folder = base / "small"
    folder.mkdir()
    return make_data(folder)


@functools.cache
def _setup(folder):
    return small_setup(folder, media={"decode_workers": 0})


@functools.cache
def _trained(setup):
    phase = setup.sft_phase()
    dtype = phase.config.optimizer.dtype
    state = setup.backbone.new_state(setup.backbone.init(seed=0), phase.is_trainable, phase.optimizer, dtype)
    step = make_sft_step(setup.backbone, phase.optimizer, phase.config, phase.towers_trained)
    order = np.random.default_rng(0)
    for _ in range(phase.total_steps):
        numbers = order.permutation(TRAINED)[: phase.config.prompts_per_step]
        batch, _ = phase.batch(visits_of(setup, setup.data.sft, numbers))
        state, _ = step(state, put(batch, setup.backbone.mesh))
    return state.params


@pytest.fixture(scope="session")
def compiled():
    """Folder of compiled programs, for all processes of these tests and for the commands they run."""
    return Path(os.environ["JAX_COMPILATION_CACHE_DIR"])


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """Clips, records and tokenizer of the small run."""
    return _folder(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def small(small_folder, compiled):
    """The small run's setup on one device, decoding in this process."""
    return _setup(small_folder)


@pytest.fixture(scope="session")
def sft_phase(small):
    """The small run's SFT phase."""
    return small.sft_phase()


@pytest.fixture(scope="session")
def trained(small):
    """Parameters after the small run's SFT: answers are well-formed half of the time, and differ."""
    return _trained(small)
