"""What a plan hands to its programs lies on the mesh as a run's arguments do, on eight devices and on four.

Where an argument lies decides a program's collectives and its memory, and the results of one program are the next one's
arguments: the run's are real, made by running it.
"""

import math

import jax
import numpy as np
import pytest
from support.small_run import small_setup, visits_of

from mer_r1_jax.parallel.rows import put
from mer_r1_jax.planning.programs import RunPrograms
from mer_r1_jax.planning.workload import Workload
from mer_r1_jax.rl.sampling import SamplingConfig

NUMBERS = [0, 1, None, 3]  # one clip broke
NAMES = ["sft_step", "encode", "cast", "sample", "score", "reference", "update"]


MESHES = {
    "tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "decode_tensor": {"data": 1, "fsdp": 2, "decode_tensor": 2},  # four devices, as a step has four prompts
}


@pytest.fixture(scope="module", params=MESHES)
def cut(request, small_folder, compiled):
    """The small run's setup on a mesh."""
    mesh = MESHES[request.param]
    devices = jax.devices()[: math.prod(mesh.values())]
    return small_setup(small_folder, devices, media={"decode_workers": 0}, mesh=mesh)


@pytest.fixture(scope="module")
def planned(cut):
    slow, fast = cut.sft_phase().lengths
    records = {"sft_records": len(cut.data.sft), "rl_records": len(cut.data.rl)}
    devices = list(cut.backbone.mesh.devices.flat)
    run = RunPrograms(cut.config, devices, Workload(slow_target=slow, fast_target=fast, **records))
    programs = [program for phase in run.phases() for program in run.of_phase(phase, run.buckets(phase)[-1])]
    return {program.name: program.args for program in programs}


@pytest.fixture(scope="module")
def called(cut):
    """The arguments of a step of each phase by the plan's names; rollout and scoring run for real."""
    calls = {}

    def recorded(name, function):
        def call(*args):
            calls[name] = [arg for arg in args if not isinstance(arg, SamplingConfig)]  # which is static
            return function(*args)

        return call

    sft = cut.sft_phase()
    state = _state(cut, sft)
    batch, _ = sft.batch(visits_of(cut, cut.data.sft, NUMBERS))
    calls["sft_step"] = (state, put(batch, cut.backbone.mesh))

    rl, programs = cut.rl_phase(), cut.programs
    state = _state(cut, rl)
    watched = {
        "encode_media": recorded("encode", programs.encode_media),
        "cast": recorded("cast", programs.cast),
        "rollout": recorded("sample", programs.rollout),
        "score": recorded("score", programs.score),
        "logprobs": recorded("reference", programs.logprobs),
    }
    programs.__dict__.update(watched)
    maker = cut.rl_step(rl.buckets)
    rollout = maker.rollout(state.params, state.params, visits_of(cut, cut.data.rl, NUMBERS), 0)
    calls["update"] = (state, rollout.experience, np.float32(0.04))
    return calls


def _state(setup, phase):
    params = setup.backbone.init(seed=0)
    return setup.backbone.new_state(params, phase.is_trainable, phase.optimizer, phase.config.optimizer.dtype)


def test_every_program_is_watched(planned, called):
    assert sorted(planned) == sorted(called) == sorted(NAMES)


def test_prompts_count_once_unless_a_rollout_has_its_own(cut, planned):
    """Memory counts arrays of the plan, each once; where decoding cuts rows otherwise, there are two of each."""
    score, sample = (jax.tree.leaves(planned[name][1]) for name in ("score", "sample"))
    same = {one is other for one, other in zip(score, sample, strict=True)}
    assert same == {"decode_tensor" not in cut.backbone.mesh.shape}


@pytest.mark.parametrize("name", NAMES)
def test_arguments_lie_where_the_run_puts_them(planned, called, name):
    wanted = jax.tree_util.tree_leaves_with_path(planned[name])
    wrong = []
    for (path, leaf), real in zip(wanted, jax.tree.leaves(called[name]), strict=True):
        assert (leaf.shape, leaf.dtype) == (real.shape, real.dtype)
        if isinstance(real, np.ndarray | np.generic) or len(real.sharding.device_set) == 1:
            # A number, a key or a table that nothing has put on the mesh: jit hands it to every device.
            placed, where = leaf.sharding.is_fully_replicated, "on one device"
        else:
            placed = leaf.sharding.is_equivalent_to(real.sharding, real.ndim)
            where = getattr(real.sharding, "spec", real.sharding)
        if not placed:
            wrong.append(f"{jax.tree_util.keystr(path)}: planned {leaf.sharding.spec}, in a run {where}")
    assert not wrong, "\n".join(wrong)
