"""What an update changes: which leaves are trained, the learning rate, AdamW, and updates left out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mer_r1_jax.config.schema import OptimizerConfig, RlConfig
from mer_r1_jax.storage.stored_arrays import named_leaves
from mer_r1_jax.training.rl_step import beta_at
from mer_r1_jax.training.state import (
    accumulate,
    applied_before,
    apply_gradients,
    as_stored,
    flatten,
    from_stored,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    nest,
    partition,
    state_shardings,
    trainable_names,
)

PARAMS = {"text/a": [1.0, -2.0], "text/b": [0.5], "vision/c": [3.0]}
GRADIENTS = {"text/a": [3.0, -4.0], "text/b": [12.0]}


def params():
    return {name: jnp.asarray(values, jnp.float32) for name, values in PARAMS.items()}


def gradients(**changes):
    return {name: jnp.asarray(values, jnp.float32) for name, values in (GRADIENTS | changes).items()}


def fresh_state(optimizer, dtype="float32"):
    return init_state(params(), trainable_names(train_audio=False, train_vision=False), optimizer, dtype)


@pytest.mark.parametrize(
    ("audio", "vision", "trained"),
    [
        (False, False, {"text/x"}),
        (True, False, {"text/x", "audio/x"}),
        (False, True, {"text/x", "vision/x"}),
        (True, True, {"text/x", "audio/x", "vision/x"}),
    ],
)
def test_language_model_is_always_trained_and_towers_on_demand(audio, vision, trained):
    names = ["text/x", "audio/x", "vision/x", "audio/bos_eos/embedding"]
    chosen, frozen = partition(dict.fromkeys(names, 0), trainable_names(train_audio=audio, train_vision=vision))
    assert set(chosen) == trained
    assert set(frozen) == set(names) - trained


def test_flat_parameters_are_the_nested_ones_and_back():
    nested = {"text": {"layers": {"q": 1, "k": 2}}, "vision": {"patch": 3}}
    flat = flatten(nested)
    assert flat == {"text/layers/q": 1, "text/layers/k": 2, "vision/patch": 3}
    trained, frozen = partition(flat, lambda name: name.startswith("text"))
    assert nest(trained | frozen) == nested


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Two steps of warm-up, of which the first already moves, then eight down to nothing.
        ({"warmup_ratio": 0.2}, [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]),
        ({"warmup_ratio": 0.0}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),
        ({"warmup_ratio": 0.2, "lr_scheduler_type": "constant"}, [0.5] + [1] * 10),
        (
            {"warmup_ratio": 0.0, "lr_scheduler_type": "cosine"},
            [0.5 + 0.5 * np.cos(np.pi * step / 10) for step in range(11)],
        ),
    ],
)
def test_learning_rate_warms_up_and_decays(changes, expected):
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, **changes), total_steps=10)
    np.testing.assert_allclose([schedule(step) / 2 for step in range(11)], expected, atol=1e-6)


def test_tiny_warm_up_share_still_is_one_full_step():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_ratio=0.03), total_steps=4)
    np.testing.assert_allclose([schedule(step) for step in range(4)], [1, 1, 2 / 3, 1 / 3], atol=1e-6)


def test_update_is_adamw_on_the_clipped_gradient():
    config = OptimizerConfig(
        learning_rate=0.1, warmup_ratio=0.0, weight_decay=0.01, max_grad_norm=6.5, lr_scheduler_type="constant"
    )
    optimizer = make_optimizer(config, total_steps=10)
    state, metrics = apply_gradients(fresh_state(optimizer), gradients(), jnp.float32(1), optimizer, "float32")
    assert float(metrics["grad_norm"]) == 13.0  # before clipping: sqrt(9 + 16 + 144)
    for name, gradient in GRADIENTS.items():
        g, p = np.asarray(gradient) / 2, np.asarray(PARAMS[name])
        m, v = 0.1 * g / (1 - 0.9), 0.001 * g**2 / (1 - 0.999)
        expected = p - 0.1 * (m / (np.sqrt(v) + 1e-8) + 0.01 * p)
        # 1 - 0.999 in float32 is off by 5e-5 of itself, which its square root halves.
        np.testing.assert_allclose(state.params[name], expected, atol=0.1 * 3e-5, rtol=0, err_msg=name)
    assert int(state.step) == 1
    np.testing.assert_array_equal(state.params["vision/c"], PARAMS["vision/c"])


def test_moments_are_kept_in_the_dtype_asked_for():
    optimizer = make_optimizer(OptimizerConfig(), total_steps=10)
    state = fresh_state(optimizer, "bfloat16")
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("bfloat16")} and len(moments) == 4
    state, _ = apply_gradients(state, gradients(), jnp.float32(1), optimizer, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in state.split()[0].values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("loss", "changes"),
    [(np.nan, {}), (np.inf, {}), (1.0, {"text/b": [np.nan]}), (1.0, {"text/a": [np.inf, 0.0]})],
)
def test_update_that_is_not_finite_is_left_out_and_counted(loss, changes):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), total_steps=10)
    update = jax.jit(lambda state, grads, loss: apply_gradients(state, grads, loss, optimizer, "float32"))
    before, _ = update(fresh_state(optimizer), gradients(), jnp.float32(1))
    after, metrics = update(before, gradients(**changes), jnp.float32(loss))
    unchanged = dataclasses.replace(
        after, step=before.step, skipped=before.skipped, skipped_in_a_row=before.skipped_in_a_row
    )
    jax.tree.map(np.testing.assert_array_equal, unchanged, before)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (2, 1, 1)
    again, metrics = update(after, gradients(**changes), jnp.float32(loss))
    assert (float(metrics["skipped_steps"]), float(metrics["skipped_in_a_row"])) == (2, 2)
    good, metrics = update(again, gradients(), jnp.float32(1))
    assert (float(metrics["skipped_steps"]), float(metrics["skipped_in_a_row"])) == (2, 0)
    assert not np.array_equal(good.params["text/a"], before.params["text/a"])


def test_the_learning_rate_that_is_told_is_the_one_an_update_had():
    """Of constant gradients every update of Adam is as long as its learning rate; two of these are left out."""
    settings = OptimizerConfig(learning_rate=0.1, warmup_ratio=0.3, weight_decay=0.0, max_grad_norm=1e9)
    optimizer, schedule = make_optimizer(settings, total_steps=10), learning_rate_schedule(settings, total_steps=10)
    update = jax.jit(lambda state, grads, loss: apply_gradients(state, grads, loss, optimizer, "float32"))
    state = fresh_state(optimizer)
    for step in range(1, 9):
        before, loss = np.asarray(state.params["text/b"]), jnp.float32(np.nan if step in (3, 4) else 1.0)
        state, metrics = update(state, gradients(), loss)
        count = applied_before(step, int(metrics["skipped_steps"]), int(metrics["skipped_in_a_row"]))
        had = 0.0 if step in (3, 4) else float(schedule(count))
        np.testing.assert_allclose(before - state.params["text/b"], had, atol=1e-5, rtol=0)
        assert count == (step - 1 if step <= 3 else 2 if step <= 5 else step - 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_shares_of_the_gradient_are_not_lost_among_micro_batches(dtype):
    """One share of 1 and 1,023 of 1/1024: each is below half a step of bfloat16 at 1, and together they are 1."""
    share_B = jnp.full(1024, 1 / 1024).at[0].set(1.0)
    trained = {"text/a": jnp.ones(3, dtype)}

    def loss(trained, batch):
        value = jnp.sum(trained["text/a"]) * jnp.sum(batch["share_B"]).astype(dtype)
        return value.astype(jnp.float32), {"share": jnp.sum(batch["share_B"])}

    value, metrics, gradients = jax.jit(lambda *args: accumulate(loss, *args, 1024))(trained, {"share_B": share_B})
    expected = 1 + 1023 / 1024
    assert gradients["text/a"].dtype == jnp.float32  # also for the optimizer, which casts by itself
    np.testing.assert_array_equal(gradients["text/a"], np.full(3, expected, np.float32))
    np.testing.assert_allclose([float(value), float(metrics["share"])], [3 * expected, expected])


def test_sums_over_micro_batches_of_float32_parameters_need_no_conversion():
    def loss(trained, batch):
        return jnp.sum(trained["text/a"] * batch["share_B"]), {}

    arguments = {"text/a": jnp.ones(())}, {"share_B": jnp.ones(4)}
    assert "convert_element_type" not in str(jax.make_jaxpr(lambda *given: accumulate(loss, *given, 2)[2])(*arguments))


def test_a_stored_state_keeps_trained_and_frozen_parameters_apart_and_comes_back():
    state = fresh_state(optax.adam(1e-3))
    stored = as_stored(state)
    assert list(named_leaves(stored)) == [
        "frozen.vision/c",
        "opt_state.0.count",
        *(f"opt_state.0.{moment}.text/{name}" for moment in ("mu", "nu") for name in ("a", "b")),
        "skipped",
        "skipped_in_a_row",
        "step",
        "trainable.text/a",
        "trainable.text/b",
    ]
    back = from_stored(stored)
    assert back.trained == state.trained and back.params.keys() == state.params.keys()
    assert all(back.params[name] is state.params[name] for name in state.params)


def test_moments_live_where_their_parameter_does():
    optimizer = optax.adam(1e-3)
    places = state_shardings(fresh_state(optimizer), {"text/a": "A", "text/b": "B", "vision/c": "C"}, "scalar")
    assert places.split() == ({"text/a": "A", "text/b": "B"}, {"vision/c": "C"})
    assert places.opt_state[0].mu == places.opt_state[0].nu == {"text/a": "A", "text/b": "B"}
    assert places.opt_state[0].count == places.step == places.skipped == "scalar"


def test_kl_weight_falls_to_a_quarter_by_half_time():
    weights = [beta_at(RlConfig(beta=0.04, beta_decay=0.75), step, 100) for step in (0, 25, 50, 100)]
    np.testing.assert_allclose(weights, [0.04, 0.04 * (1 - 0.375), 0.01, 0.01])
    assert beta_at(RlConfig(beta=0.04, beta_decay=0.0), 99, 100) == 0.04
