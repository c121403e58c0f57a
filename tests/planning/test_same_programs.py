"""A plan compiles the very programs a run makes: their jaxprs are compared, one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.jaxprs import program
from support.small_run import visits_of, with_config

from mer_r1_jax.parallel.rows import put
from mer_r1_jax.planning.programs import RunPrograms
from mer_r1_jax.planning.workload import Workload
from mer_r1_jax.training.sft_step import make_sft_step

NUMBERS = [0, 1, None, 3]  # one clip broke


def zeros(tree):
    """Arrays for abstract ones, where their sharding says."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), tree)


@pytest.fixture(scope="module")
def planned(small, sft_phase):
    slow, fast = sft_phase.lengths
    records = {"sft_records": len(small.data.sft), "rl_records": len(small.data.rl)}
    run = RunPrograms(small.config, jax.devices()[:1], Workload(slow_target=slow, fast_target=fast, **records))
    programs = [program for phase in run.phases() for program in run.of_phase(phase, run.buckets(phase)[-1])]
    return {program.name: program for program in programs}


@pytest.fixture(scope="module")
def called(small, sft_phase):
    """What one step of each phase calls: (jitted function, its arguments) by the plan's name."""
    batch, _ = sft_phase.batch(visits_of(small, small.data.sft, NUMBERS))
    step = make_sft_step(small.backbone, sft_phase.optimizer, sft_phase.config, sft_phase.towers_trained)
    state = zeros(small.abstract_state_of("sft"))
    return {"sft_step": (step, (state, put(batch, small.backbone.mesh)))} | called_by_rl(small)


def called_by_rl(small):
    """What one rollout and its first update call.

    The host's part is done for real, on real clips. Programs give zeros of their results' shapes, as only what they are
    called with matters here.
    """
    calls = {}

    def recorded(name, function):
        def call(*args):
            calls[name] = (function, args)
            return zeros(function.eval_shape(*args))

        return call

    phase, programs = small.rl_phase(), small.programs
    state = zeros(small.abstract_state_of("rl"))
    watched = {
        "encode_media": recorded("encode", programs.encode_media),
        "rollout": recorded("sample", programs.rollout),
        "score": recorded("score", programs.score),
        "logprobs": recorded("reference", programs.logprobs),
    }
    before = dict(programs.__dict__)
    programs.__dict__.update(watched)
    try:
        maker = small.rl_step(phase.buckets)
        rollout = maker.rollout(state.params, state.params, visits_of(small, small.data.rl, NUMBERS), 0)
    finally:
        programs.__dict__.clear()
        programs.__dict__.update(before)
    update = programs.make_update(phase.optimizer)
    programs.cut_minibatch = recorded("minibatch", programs.cut_minibatch)
    calls["update"] = (update, (state, programs.minibatch(rollout.experience, 0), np.float32(0.04)))
    return calls


@pytest.mark.parametrize("name", ["sft_step", "encode", "sample", "score", "reference", "update"])
def test_the_plan_traces_what_the_run_calls(planned, called, name):
    function, args = called[name]
    assert program(planned[name].function, (*planned[name].args, *planned[name].static)) == program(function, args)


@pytest.mark.parametrize("name", ["sample", "score", "minibatch", "update"])
def test_so_it_does_where_a_rollout_is_learnt_from_in_two_updates(small, name):
    several = {"prompts_per_step": 2, "steps_per_generation": 2}
    setup = with_config(small, rl=several, eval={"eval_steps": 0})
    run = RunPrograms(setup.config, jax.devices()[:1])
    planned = {program.name: program for program in run.of_phase("rl", run.buckets("rl")[-1])}
    function, args = called_by_rl(setup)[name]
    assert program(planned[name].function, (*planned[name].args, *planned[name].static)) == program(function, args)
    # Of a step's work: one update, half of the sampling, scoring and reference, and the old log-probabilities.
    expected = {"encode": 0.5, "sample": 0.5, "score": 0.5, "reference": 1.0, "minibatch": 1.0, "update": 1.0}
    assert {one.name: one.calls for one in planned.values()} == expected
    # The rollout is held beside the minibatch that was cut from it.
    assert planned["update"].held == planned["minibatch"].held
