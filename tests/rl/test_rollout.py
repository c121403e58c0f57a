"""Rollouts against the plain way: one unpadded sequence at a time, recomputed without cache or packing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.rl_policy import bound, carried, log_softmax, packed_hidden, policy, prompts, row_logits, sampled, uids

from mer_r1_jax.omni.text import TextDecoder
from mer_r1_jax.rl import losses
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.rl.rollout import STOP_ABSENT, STOP_EOS, STOP_LENGTH, advance, finish, start
from mer_r1_jax.rl.sampling import SamplingConfig

LENGTH, WIDTH, GENERATIONS = 12, 11, 4
LENGTHS = (11, 6, 0, 8)
KEY = jax.random.fold_in(jax.random.key(1), 2)


def setting(**changes):
    config = policy()[0]
    base = dict(
        max_completion_length=LENGTH,
        eos_ids=tuple(range(40, 60)),  # so many that completions of a random model do end
        banned_ids=(*config.media_token_ids, 9),
        temperature=0.8,
    )
    return SamplingConfig(**(base | changes))


@functools.cache
def rolled(forced_ids=(), lengths=LENGTHS, width=WIDTH, generations=GENERATIONS, config=None, uid=None):
    uid_B = None if uid is None else jnp.asarray(uid, jnp.uint32)
    sampling = dataclasses.replace(config or setting(), num_generations=generations, forced_ids=forced_ids)
    completions = sampled(policy()[2], carried(*prompts(lengths, width), uid_B), KEY, sampling)
    return jax.tree.map(np.asarray, completions)


def recomputed(completions, row, generation, forced=0, lengths=LENGTHS, width=WIDTH):
    """(ids, logits that predict each of the sampled ids) the plain way."""
    ids = completions.id_BGC[row, generation, : completions.length_BG[row, generation]]
    return ids[forced:], row_logits(*prompts(lengths, width), row, ids)[forced:-1]


@pytest.mark.parametrize("forced_ids", [(), (70, 71, 72)])
def test_greedy_decoding_equals_full_recomputation(forced_ids):
    completions = rolled(forced_ids, config=setting(temperature=0.0))
    for row in (0, 1, 3):
        ids, logits = recomputed(completions, row, 0, len(forced_ids))
        logits = logits.copy()
        logits[:, list(setting().banned_ids)] = -np.inf
        assert len(ids) > 0
        np.testing.assert_array_equal(ids, logits.argmax(-1))
        np.testing.assert_array_equal(completions.id_BGC[row, 1:], completions.id_BGC[row, :-1])


def test_layers_taken_apart_for_the_loop_sample_the_same_in_one_call_or_in_several(monkeypatch):
    """As on GPUs, where slices of stacked arrays would be copied at every token."""
    expected = rolled()
    monkeypatch.setattr(TextDecoder, "slices_are_copied", lambda self: True)
    sampling = dataclasses.replace(setting(), num_generations=GENERATIONS)

    def run(params, prompts, steps):
        model = bound(params)
        state = start(model, prompts, KEY, sampling)
        for _ in range(-(-LENGTH // steps)):
            state = advance(model, state, sampling, steps)
        return finish(state.sampled), state.cache

    for steps in (LENGTH, 5):
        completions, cache = jax.jit(run, static_argnums=2)(policy()[2], carried(*prompts(LENGTHS, WIDTH), None), steps)
        np.testing.assert_array_equal(completions.id_BGC, expected.id_BGC)
        np.testing.assert_allclose(completions.logprob_BGC, expected.logprob_BGC, rtol=0, atol=1e-5)
        assert cache.k_LBGCKh.shape[:4] == (policy()[0].text.num_hidden_layers, len(LENGTHS), GENERATIONS, LENGTH)


@pytest.mark.parametrize("forced_ids", [(), (70, 71, 72)])
def test_sampling_logprobs_equal_full_recomputation(forced_ids):
    completions = rolled(forced_ids)
    for row in (0, 1, 3):
        for generation in range(GENERATIONS):
            ids, logits = recomputed(completions, row, generation, len(forced_ids))
            at = np.arange(len(ids)) + len(forced_ids)
            untempered = log_softmax(logits)[np.arange(len(ids)), ids]
            np.testing.assert_allclose(completions.logprob_BGC[row, generation, at], untempered, atol=5e-5)
            allowed = logits.astype(np.float64) / 0.8
            allowed[:, list(setting().banned_ids)] = -np.inf
            tempered = log_softmax(allowed)[np.arange(len(ids)), ids]
            np.testing.assert_allclose(completions.sampling_logprob_BGC[row, generation, at], tempered, atol=5e-5)


def test_policy_scores_the_tokens_it_sampled_alike():
    """The packed forward pass of the update gives the untempered log-probabilities of the decode loop."""
    completions = rolled()
    tokens, features, next_position = prompts(LENGTHS, WIDTH)
    own = Continuations(id_BGC=completions.id_BGC, exists_BGC=completions.mask_BGC)
    (h_BGCD,) = packed_hidden(policy()[2], tokens, features, next_position, own)
    logprob_BGC, _ = losses.token_logprobs(bound(), h_BGCD, completions.id_BGC, temperature=1.0)
    difference = np.where(completions.mask_BGC, logprob_BGC - completions.logprob_BGC, 0)
    assert np.abs(difference).max() < 5e-5


def test_samples_do_not_depend_on_the_batch_they_sit_in():
    """Other neighbours, another place, another padding, fewer generations: the same completions, bit for bit."""
    whole = rolled()
    uid = np.asarray(uids(len(LENGTHS)))
    alone = rolled(lengths=(8, 11), width=14, generations=2, uid=(int(uid[3]), int(uid[0])))
    for here, there in ((0, 3), (1, 0)):
        np.testing.assert_array_equal(alone.id_BGC[here], whole.id_BGC[there, :2])
        np.testing.assert_array_equal(alone.stop_BG[here], whole.stop_BG[there, :2])
    other = rolled(lengths=(8, 11), width=14, generations=2, uid=(1000, int(uid[0])))
    assert (other.id_BGC[0] != alone.id_BGC[0]).any()
    np.testing.assert_array_equal(other.id_BGC[1], alone.id_BGC[1])


def test_forced_prefix_starts_every_completion_and_is_not_sampled():
    forced_ids = (70, 71, 72)
    completions = rolled(forced_ids)
    assert completions.id_BGC.shape[-1] == LENGTH + 3
    for row in (0, 1, 3):
        np.testing.assert_array_equal(completions.id_BGC[row, :, :3], np.broadcast_to(forced_ids, (GENERATIONS, 3)))
    assert not completions.mask_BGC[..., :3].any()
    assert not completions.logprob_BGC[..., :3].any()
    np.testing.assert_array_equal(completions.mask_BGC.sum(-1)[[0, 1, 3]], completions.length_BG[[0, 1, 3]] - 3)


def test_stop_reasons_are_those_of_the_sampled_tokens():
    completions = rolled()
    reasons = set()
    for row in (0, 1, 3):
        for generation in range(GENERATIONS):
            length, stop = completions.length_BG[row, generation], completions.stop_BG[row, generation]
            ids = completions.id_BGC[row, generation]
            ended = np.isin(ids[:length], setting().eos_ids)
            assert not ended[:-1].any()
            assert stop == (STOP_EOS if ended[-1] else STOP_LENGTH)
            assert ended[-1] or length == LENGTH
            assert not ids[length:].any()
            np.testing.assert_array_equal(completions.mask_BGC[row, generation], np.arange(LENGTH) < length)
            reasons.add(int(stop))
    assert reasons == {STOP_EOS, STOP_LENGTH}
    np.testing.assert_array_equal(np.asarray(completions.truncated_BG), completions.stop_BG == STOP_LENGTH)


def test_absent_rows_yield_nothing():
    for forced_ids in ((), (70, 71, 72)):
        completions = rolled(forced_ids)
        assert (completions.stop_BG[2] == STOP_ABSENT).all()
        assert not completions.length_BG[2].any() and not completions.mask_BGC[2].any()


def test_an_end_token_at_the_cap_is_an_end_and_id_zero_is_a_token():
    """Truncation and length come from what was sampled, not from how the ids look."""
    everything = tuple(range(policy()[0].text.vocab_size))
    first = rolled(config=setting(eos_ids=everything, banned_ids=(), max_completion_length=1))
    assert (first.stop_BG[[0, 1, 3]] == STOP_EOS).all() and (first.length_BG[[0, 1, 3]] == 1).all()
    only_zero = setting(eos_ids=(1,), banned_ids=tuple(everything[2:]))
    completions = rolled(config=only_zero)
    present = completions.stop_BG[[0, 1, 3]]
    assert set(present.ravel()) <= {STOP_EOS, STOP_LENGTH}
    for row in (0, 1, 3):
        for generation in range(GENERATIONS):
            length = completions.length_BG[row, generation]
            ended = completions.stop_BG[row, generation] == STOP_EOS
            expected = [0] * (length - 1) + [1] if ended else [0] * LENGTH
            np.testing.assert_array_equal(completions.id_BGC[row, generation, :length], expected)


def test_a_rollout_cut_into_calls_equals_one_call_and_stops_early():
    params, config = policy()[2], setting(num_generations=GENERATIONS)
    begin = jax.jit(lambda params: start(bound(params), carried(*prompts(LENGTHS, WIDTH)), KEY, config))
    go_on = jax.jit(lambda params, state: advance(bound(params), state, config, 5), donate_argnums=1)
    state = begin(params)
    for _ in range(3):
        state = go_on(params, state)
    completions = jax.tree.map(np.asarray, finish(state.sampled))
    jax.tree.map(np.testing.assert_array_equal, completions, rolled())
    short = setting(num_generations=GENERATIONS, eos_ids=tuple(range(3, policy()[0].text.vocab_size)), banned_ids=())
    ended = jax.jit(lambda params, state: advance(bound(params), state, short, LENGTH))(params, begin(params))
    assert int(ended.step) < LENGTH  # nearly every token ends a completion


def test_banned_tokens_are_never_sampled():
    completions = rolled()
    config = setting()
    assert not np.isin(completions.id_BGC[completions.mask_BGC], config.banned_ids).any()
    seen = set(completions.id_BGC[completions.mask_BGC].tolist()) - set(config.eos_ids)
    banned = rolled(config=setting(banned_ids=tuple(sorted(seen))))
    assert len(seen) > 10 and not np.isin(banned.id_BGC[banned.mask_BGC], list(seen)).any()
