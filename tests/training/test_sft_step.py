"""The SFT step on real clips and a small Thinker: what the loss is, and what must not change it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.small_run import visits_of

from mer_r1_jax.omni.batch import FeatureLayout, Tokens
from mer_r1_jax.parallel.rows import put, split_rows
from mer_r1_jax.training.sft_step import SftBatch, make_sft_step
from mer_r1_jax.training.state import init_state, trainable_names


def batch_of(small, phase, numbers):
    """The host batch of records by number; None stands for a clip that broke."""
    return phase.batch(visits_of(small, small.data.sft, numbers))[0]


@pytest.fixture(scope="module")
def params(small):
    return small.backbone.init(seed=1)


@pytest.fixture(scope="module")
def step_of(small):
    """parts -> the jitted SFT step by plain gradient descent, so that the change of a leaf is its gradient."""
    steps = {}

    def step_of(parts):
        if parts not in steps:
            config = dataclasses.replace(small.config.sft, gradient_accumulation_steps=parts)
            steps[parts] = make_sft_step(small.backbone, optax.sgd(1.0), config, towers_trained=True)
        return steps[parts]

    return step_of


@pytest.fixture(scope="module")
def gradients_of(small, params, step_of):
    """(batch, parts) -> (gradients by name, metrics)."""

    def gradients_of(batch, parts=1):
        everything = trainable_names(train_audio=True, train_vision=True)
        copied = jax.tree.map(jnp.array, params)
        state = init_state(copied, everything, optax.sgd(1.0), "float32")
        state, metrics = step_of(parts)(state, put(batch, small.backbone.mesh))
        return {name: np.asarray(params[name] - new) for name, new in state.split()[0].items()}, jax.device_get(metrics)

    return gradients_of


def assert_same_gradients(one, other):
    """Equal to rounding: against the largest entry of each leaf, and never all zero."""
    assert one.keys() == other.keys()
    for name in one:
        scale = np.abs(one[name]).max()
        assert scale > 0, name
        np.testing.assert_allclose(other[name], one[name], rtol=0, atol=2e-5 * scale + 2e-7, err_msg=name)


def test_loss_is_the_weighted_mean_over_slow_and_fast_tokens(small, sft_phase, params, gradients_of):
    batch = batch_of(small, sft_phase, [0, 3, 4, 1])
    _, metrics = gradients_of(batch)
    slow, slow_tokens = plain_loss(small, params, batch, batch.slow)
    fast, fast_tokens = plain_loss(small, params, batch, batch.fast)
    # The empty think block is given, not learnt.
    assert fast_tokens == slow_tokens - sum(
        len(small.tags.ids(small.data.sft[n].target_reasoning)) + len(small.tags.empty_think) for n in (0, 3, 4, 1)
    )
    np.testing.assert_allclose(metrics["loss/slow"], slow, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/fast"], fast, rtol=1e-5)
    fraction = small.config.sft.fast_fraction
    np.testing.assert_allclose(metrics["loss"], (1 - fraction) * slow + fraction * fast, rtol=1e-5)


def plain_loss(small, params, batch, targets):
    """Mean negative log-probability of a kind of target: each behind its prompt in a row of its own, no packing."""
    prompts = batch.prompts
    lengths = np.sum(prompts.tokens.segment_BT == 1, axis=1)
    ids, exists = targets.continuation.id_BGC[:, 0], targets.continuation.exists_BGC[:, 0]
    rows, width = ids.shape[0], int(lengths.max()) + ids.shape[1]
    full = {
        "id_BT": np.zeros((rows, width), np.int32),
        "segment_BT": np.zeros((rows, width), np.int32),
        "position_3BT": np.ones((3, rows, width), np.int32),
        "source_BT2": np.full((rows, width, 2), -1, np.int32),
    }
    scored = np.zeros((rows, width), bool)
    for row, length in enumerate(lengths):
        target = ids[row][exists[row]]
        end = length + len(target)
        full["id_BT"][row, :end] = [*prompts.tokens.id_BT[row, :length], *target]
        full["segment_BT"][row, :end] = 1
        full["position_3BT"][:, row, :length] = prompts.tokens.position_3BT[:, row, :length]
        full["position_3BT"][:, row, length:end] = batch.prompts.next_position_B[row] + np.arange(len(target))
        full["source_BT2"][row, :length] = prompts.tokens.source_BT2[row, :length]
        scored[row, length:end] = targets.loss_mask_BGC[row, 0][exists[row]]

    @jax.jit
    def logits(params):
        model = small.backbone.bind(params)
        features = model.encode_media(prompts.vision, prompts.audio)
        return model.logits(model.hidden(Tokens(**full), features, FeatureLayout.of_batch(prompts)))

    logits_BTN = np.asarray(logits(params), np.float64)[:, :-1]
    shifted = logits_BTN - logits_BTN.max(-1, keepdims=True)
    logprob_BTN = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logprob_BTN, full["id_BT"][:, 1:, None], -1)[..., 0]
    return -chosen[scored[:, 1:]].mean(), int(scored.sum())


def test_micro_batches_add_up_to_the_step_whatever_their_masks(small, sft_phase, gradients_of):
    # Targets differ in length, and one micro-batch has no token in its loss: its clip broke.
    batch = batch_of(small, sft_phase, [0, None, 4, 3])
    whole, whole_metrics = gradients_of(batch, parts=1)
    parts, parts_metrics = gradients_of(batch, parts=4)
    assert_same_gradients(whole, parts)
    for name in ("loss", "loss/slow", "loss/fast", "grad_norm"):
        np.testing.assert_allclose(parts_metrics[name], whole_metrics[name], rtol=1e-5, err_msg=name)


def test_row_of_a_broken_clip_changes_nothing_else(small, sft_phase, gradients_of):
    here, metrics = gradients_of(batch_of(small, sft_phase, [0, None, 4, 3]))
    elsewhere, other = gradients_of(batch_of(small, sft_phase, [0, 4, 3, None]))
    assert_same_gradients(here, elsewhere)
    np.testing.assert_allclose(metrics["loss"], other["loss"], rtol=1e-6)
    fewer, _ = gradients_of(batch_of(small, sft_phase, [0, 4, None, None]))
    name = "text/embed/embedding"
    assert np.abs(fewer[name] - here[name]).max() > 1e-3 * np.abs(here[name]).max()  # a clip that counts does count


def test_batch_of_broken_clips_alone_moves_nothing(small, sft_phase, gradients_of):
    gradients, metrics = gradients_of(batch_of(small, sft_phase, [None] * 4))
    assert all(not np.any(gradient) for gradient in gradients.values())
    assert metrics["loss"] == 0 and metrics["skipped_steps"] == 0


def test_frozen_towers_stay_and_the_language_model_gets_the_same_gradient(small, sft_phase, params, gradients_of):
    batch = batch_of(small, sft_phase, [0, 3, 4, 1])
    inside, _ = gradients_of(batch)
    state = init_state(
        jax.tree.map(jnp.array, params),
        trainable_names(train_audio=False, train_vision=False),
        optax.sgd(1.0),
        "float32",
    )
    step = make_sft_step(small.backbone, optax.sgd(1.0), small.config.sft, towers_trained=False)
    state, _ = step(state, put(batch, small.backbone.mesh))
    assert {name.partition("/")[0] for name in state.trained} == {"text"}
    for name, leaf in state.split()[1].items():
        np.testing.assert_array_equal(leaf, params[name], err_msg=name)
    outside = {name: np.asarray(params[name] - new) for name, new in state.split()[0].items()}
    assert_same_gradients({name: inside[name] for name in outside}, outside)


def test_rows_are_cut_in_order_and_what_has_none_is_repeated():
    batch = {"id_BT": np.arange(8).reshape(4, 2), "position_3BT": np.arange(12).reshape(3, 4, 1), "beta": np.float32(3)}
    cut = split_rows(batch, 2)
    np.testing.assert_array_equal(cut["id_BT"], [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    np.testing.assert_array_equal(cut["position_3BT"][1], batch["position_3BT"][:, 2:])
    np.testing.assert_array_equal(cut["beta"], [3, 3])


def test_a_batch_is_what_the_step_takes(small, sft_phase):
    batch = batch_of(small, sft_phase, [0, 1, 2, 3])
    assert isinstance(batch, SftBatch)
    assert batch.prompts.tokens.id_BT.shape == (4, 64)
    # No loss on the prefilled empty think block, loss on everything else that exists.
    forced = len(small.tags.empty_think)
    assert not batch.fast.loss_mask_BGC[..., :forced].any() and batch.fast.continuation.exists_BGC[..., :forced].all()
    np.testing.assert_array_equal(
        batch.fast.loss_mask_BGC[..., forced:], batch.fast.continuation.exists_BGC[..., forced:]
    )
    np.testing.assert_array_equal(batch.slow.loss_mask_BGC, batch.slow.continuation.exists_BGC)
