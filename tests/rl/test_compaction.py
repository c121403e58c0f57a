"""Chunked rollouts: whoever leaves the batch, the completions are those of one loop, and every one keeps its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.rl_policy import policy, prompts, uids

from mer_r1_jax.config.schema import MeshConfig, RlConfig
from mer_r1_jax.omni.batch import Prompts
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.text import Cache, PromptCache
from mer_r1_jax.parallel.mesh import make_mesh
from mer_r1_jax.parallel.rows import put
from mer_r1_jax.rl.compaction import Size, brought_back, compact, rows_needed, sizes, smallest
from mer_r1_jax.rl.rollout import STOP_ABSENT, STOP_EOS, STOP_LENGTH, RolloutState, Sampled, running
from mer_r1_jax.rl.sampling import SamplingConfig
from mer_r1_jax.training.omni_backbone import OmniBackbone
from mer_r1_jax.training.rl_step import RlPrograms

LENGTH, GENERATIONS = 12, 4
LENGTHS = (11, 6, 0, 8, 5, 0, 7, 9)  # two rows are absent


def test_a_batch_is_halved_group_by_group_and_then_row_by_row():
    assert sizes(12, 8) == (Size(12, 8), Size(12, 4), Size(12, 2), Size(12, 1))
    assert sizes(6, 2) == (Size(6, 2), Size(6, 1), Size(3, 1), Size(2, 1))
    assert sizes(5, 3) == (Size(5, 3), Size(5, 2), Size(5, 1), Size(3, 1))
    assert sizes(1, 1) == (Size(1, 1),)


def state_of(running_BG, step=5):
    """A state of arbitrary numbers, all of them different, in which these completions run."""
    rows, generations = running_BG.shape
    numbers = iter(range(1, 99))

    def some(*shape, dtype=np.float32):
        return jnp.asarray(np.arange(np.prod(shape)).reshape(shape) + 1000 * next(numbers), dtype)

    sampled = Sampled(
        id_BGC=some(rows, generations, LENGTH, dtype=np.int32),
        logprob_BGC=some(rows, generations, LENGTH),
        sampling_logprob_BGC=some(rows, generations, LENGTH),
        length_BG=jnp.where(running_BG, step, step - 2).astype(jnp.int32),
        stop_BG=jnp.where(running_BG, STOP_LENGTH, STOP_EOS).astype(jnp.int32),
    )
    own = (2, rows, generations, LENGTH, 1, 2)
    return RolloutState(
        step=jnp.int32(step),
        sampled=sampled,
        cache=Cache(k_LBGCKh=some(*own), v_LBGCKh=some(*own)),
        prompt_cache=PromptCache(
            k_LBTKh=some(2, rows, 3, 1, 2), v_LBTKh=some(2, rows, 3, 1, 2), valid_BT=some(rows, 3) % 2 == 0
        ),
        uniform_BGC=some(rows, generations, LENGTH),
        position_B=some(rows, dtype=np.int32),
    )


def belongings(state):
    """First token -> everything a running completion needs, flat."""
    found = {}
    for row, generation in zip(*np.nonzero(running(state)), strict=True):
        own = jax.tree.map(lambda x: x[row, generation], (state.sampled, state.uniform_BGC))  # noqa: B023
        caches = jax.tree.map(lambda x: x[:, row, generation], state.cache)  # noqa: B023
        prompt = state.prompt_cache
        of_row = (prompt.k_LBTKh[:, row], prompt.v_LBTKh[:, row], prompt.valid_BT[row], state.position_B[row])
        first = int(state.sampled.id_BGC[row, generation, 0])
        assert first not in found, "nobody is decoded twice"
        found[first] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves((own, caches, of_row))])
    return found


@pytest.mark.parametrize("seed", range(2))
def test_everyone_who_runs_moves_with_all_that_is_its_own(seed):
    rng = np.random.default_rng(seed)
    state, kept = state_of(rng.random((6, 4)) < 0.5), None
    first = state
    for share in (0.6, 0.4):
        ladder = sizes(6, 4)
        size = smallest(ladder, np.asarray(rows_needed(state, ladder, 1, LENGTH)))
        moved, kept = compact(state, kept, size)
        assert moved.position_B.shape == (size.rows,) and running(moved).shape == size
        before, after = belongings(state), belongings(moved)
        assert before.keys() == after.keys() and len(before) > 0
        for key in before:
            np.testing.assert_array_equal(after[key], before[key])
        whole = brought_back(moved.sampled, kept)
        jax.tree.map(np.testing.assert_array_equal, whole, first.sampled)
        # A step later some have ended; what they left with is what they come back with.
        ends = running(moved) & (rng.random(size) > share)
        ids = moved.sampled.id_BGC.at[:, :, 5].set(jnp.where(running(moved), 7, moved.sampled.id_BGC[:, :, 5]))
        sampled = dataclasses.replace(
            moved.sampled,
            id_BGC=ids,
            length_BG=moved.sampled.length_BG + running(moved),
            stop_BG=jnp.where(ends, STOP_EOS, moved.sampled.stop_BG),
        )
        state = dataclasses.replace(moved, step=moved.step + 1, sampled=sampled)
        first = dataclasses.replace(first, sampled=brought_back(sampled, kept))
    assert not (first.sampled.stop_BG == STOP_ABSENT).any()


def test_the_rows_needed_are_those_of_the_fullest_device():
    state = state_of(np.asarray([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], bool))
    ladder = sizes(2, 4)
    assert ladder == (Size(2, 4), Size(2, 2), Size(2, 1), Size(1, 1))
    needed = np.asarray(rows_needed(state, ladder, 2, LENGTH))
    assert needed.tolist() == [2, 2, 3, 3]
    assert smallest(ladder, needed) == Size(2, 2)
    assert not np.asarray(rows_needed(state, ladder, 2, 5)).any()  # at the cap nobody goes on


@functools.cache
def small_policy():
    """(config, flat parameters) of one layer, whose tokens differ widely."""
    wide = policy()[0]
    config = ThinkerConfig.tiny(
        vocab_size=wide.text.vocab_size, initializer_range=0.15, eos_token_ids=wide.eos_token_ids
    )
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_hidden_layers=1))
    return config, jax.device_get(OmniBackbone.create(config, make_mesh(MeshConfig(), jax.devices()[:1])).init(0))


SAMPLING = SamplingConfig(
    max_completion_length=LENGTH, eos_ids=tuple(range(40, 90)), temperature=0.8, num_generations=GENERATIONS
)


@functools.cache
def rolled(chunk, mesh=None, forced_ids=()):
    """Completions of RlPrograms.sample."""
    config, params = small_policy()
    devices = jax.devices()[:1] if mesh is None else None
    backbone = OmniBackbone.create(config, make_mesh(MeshConfig(**dict(mesh or ())), devices))
    programs = RlPrograms(backbone, RlConfig(decode_chunk=chunk), SAMPLING)
    params = {name: jax.device_put(leaf, backbone.shardings[name]) for name, leaf in params.items()}
    tokens, _, next_position_B = prompts(LENGTHS, 11)
    host = Prompts(
        tokens=tokens,
        next_position_B=next_position_B,
        uid_B=np.asarray(uids(len(LENGTHS))),
    )
    rows = put(host, backbone.mesh)
    sampling = dataclasses.replace(SAMPLING, forced_ids=forced_ids)
    with programs.rollout_params(params) as decoding:
        completions = programs.sample(decoding, rows, jax.random.fold_in(jax.random.key(1), 2), sampling)
    return jax.device_get(completions)


def assert_same(one, other):
    for name in ("id_BGC", "length_BG", "mask_BGC", "stop_BG"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for name in ("logprob_BGC", "sampling_logprob_BGC"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=0, atol=5e-6, err_msg=name)


def test_the_completions_are_ragged():
    lengths = rolled(0).length_BG[[0, 1, 3, 4, 6, 7]]
    assert lengths.min() < 3 and lengths.max() == LENGTH and len(np.unique(lengths)) > 5


@pytest.mark.parametrize(("chunk", "forced_ids"), [(1, ()), (5, (70, 71))])
def test_chunks_change_no_completion(chunk, forced_ids):
    assert_same(rolled(chunk, forced_ids=forced_ids), rolled(0, forced_ids=forced_ids))


def test_chunks_change_no_completion_on_a_mesh():
    assert_same(rolled(3, (("data", 2), ("fsdp", 2), ("tensor", 2))), rolled(0))
