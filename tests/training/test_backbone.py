"""A backbone is what its protocols say: programs of SFT, RL and planning run on an object with nothing else."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from support.small_run import small_config_of, visits_of

from mer_r1_jax.parallel.rows import put
from mer_r1_jax.planning.programs import RunPrograms
from mer_r1_jax.rl.bound_model import BoundModel
from mer_r1_jax.training.backbone import Backbone
from mer_r1_jax.training.rl_step import RlPrograms


class Only:
    """An object through the names of a protocol: what else it has is not there."""

    def __init__(self, hidden, protocol):
        self._hidden, self._protocol, self.asked = hidden, protocol, set()

    def __getattr__(self, name):
        if name.startswith("_") or name not in {*vars(self._protocol), *self._protocol.__annotations__}:
            raise AssertionError(f"{self._protocol.__name__} has no {name}")
        self.asked.add(name)
        found = getattr(self._hidden, name)
        return found if name != "bind" else lambda params: Only(found(params), BoundModel)


@pytest.fixture
def only(small):
    """The small run over a backbone that has the protocol's names alone."""
    backbone = Only(small.backbone, Backbone)
    programs = RlPrograms(backbone, small.config.rl, small.programs.sampling)
    return dataclasses.replace(small, backbone=backbone, programs=programs)


def test_the_omni_backbone_satisfies_the_protocols(small):
    assert isinstance(small.backbone, Backbone)
    assert isinstance(small.backbone.bind(small.backbone.init(0)), BoundModel)


def test_an_object_without_a_name_does_not(small):
    class NoRules:
        config = mesh = packed_rows = shapes = shardings = decode_shardings = None
        bind = init = load = save = recast = abstract_state = new_state = print

    assert not isinstance(NoRules(), Backbone)
    with pytest.raises(AssertionError, match="Backbone has no graphdef"):
        _ = Only(small.backbone, Backbone).graphdef


def test_a_step_of_sft_and_one_of_rl_see_only_the_protocol(small, only, trained):
    losses = []
    for setup in (small, only):
        sft = setup.sft_phase()
        batch, _ = sft.batch(visits_of(setup, setup.data.sft, range(sft.config.prompts_per_step)))
        state, metrics = sft.make_step()(sft.new_state(copied(trained)), put(batch, setup.backbone.mesh))

        rl = setup.rl_phase()
        loaded = visits_of(setup, setup.data.rl, range(rl.config.prompts_per_step))
        rollout = setup.rl_step(rl.buckets).rollout(copied(trained), None, loaded, 0)
        update = setup.programs.make_update(rl.optimizer)
        state, updated = update(rl.new_state(copied(trained)), rollout.experience, np.float32(0))
        losses.append([float(value) for value in (metrics["loss"], updated["loss"], updated["grad_norm"])])
        assert int(state.step) == 1
    assert losses[0] == losses[1]  # the same programs
    assert {"bind", "config", "mesh", "rules", "new_state", "packed_rows", "recast"} <= only.backbone.asked


def test_a_plan_sees_only_the_protocol(small_folder):
    run = RunPrograms(small_config_of(small_folder), jax.devices()[:1])
    run.backbone = Only(run.backbone, Backbone)
    run.programs = RlPrograms(run.backbone, run.config.rl, run.programs.sampling)
    names = [program.name for phase in run.phases() for program in run.of_phase(phase, run.buckets(phase)[-1])]
    traced = [
        program.trace().jaxpr is not None
        for phase in run.phases()
        for program in run.of_phase(phase, run.buckets(phase)[-1])
    ]
    assert all(traced) and {"sft_step", "encode", "sample", "score", "update"} <= set(names)


def copied(params):
    """Steps take over the memory of what they are given."""
    return jax.tree.map(functools.partial(jax.numpy.array, copy=True), params)


def test_a_fresh_state_takes_its_parameters_and_copies_none(small):
    """Else all of them lie in memory twice at the start of a phase."""
    params = small.backbone.init(seed=0)
    given = dict(params)
    state = small.rl_phase().new_state(params)
    assert all(leaf.is_deleted() for leaf in given.values())
    assert set(state.params) == set(given) and not any(leaf.is_deleted() for leaf in state.params.values())
