"""The policy loss against TRL's own on the same tensors, its switches, and exact accumulation."""

import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.config.schema import LOSS_TYPES, ConfigError, RlConfig, SamplerCorrection
from mer_r1_jax.rl import losses
from mer_r1_jax.rl.losses import PolicyTargets, kl_penalty, loss_mask, policy_loss, step_totals

LENGTH = 7
CORRECTIONS = typing.get_args(SamplerCorrection)
LEVELS = typing.get_args(typing.get_type_hints(RlConfig)["importance_sampling_level"])
TRL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")  # those that TRL has as well


def batch(seed, rows=6):
    """Log-probabilities far enough apart for every clip to act, masks with an empty row, advantages of both signs."""
    rng = np.random.default_rng(seed)
    logprob = -rng.exponential(1.5, (rows, LENGTH)).astype(np.float32)
    lengths = rng.integers(1, LENGTH + 1, rows)
    lengths[0] = 0
    return dict(
        logprob=logprob,
        old_logprob=(logprob + rng.normal(size=logprob.shape) * 0.4).astype(np.float32),
        reference_logprob=(logprob + rng.normal(size=logprob.shape) * 0.3).astype(np.float32),
        advantage=rng.normal(size=rows).astype(np.float32),
        mask=np.arange(LENGTH) < lengths[:, None],
    )


def entropies_and_sampler(seed, tensors):
    """Entropies, some of them equal, and log-probabilities of a sampler that differs from the trainer now and then."""
    rng = np.random.default_rng(seed)
    shape = tensors["logprob"].shape
    trained = tensors["logprob"] if tensors["old_logprob"] is None else tensors["old_logprob"]
    return {
        "entropy": rng.integers(0, 9, shape).astype(np.float32) / 4,
        "sampling_logprob": (trained + rng.normal(size=shape) * rng.choice([0.01, 1.5], shape)).astype(np.float32),
    }


def trl_ratio(trained, sampling, mask, config):
    """The weights that TRL gives the loss, for `vllm_importance_sampling_mode` and its two bounds (its own lines stand
    inside a method that samples)."""
    log_ratio = (trained - sampling) * mask
    if config.sampler_correction in ("sequence_mask", "sequence_truncate"):
        log_ratio = log_ratio.sum(-1, keepdims=True)
    ratio = np.exp(log_ratio)
    low, high = config.sampler_correction_min, config.sampler_correction_max or np.inf
    if config.sampler_correction in ("token_truncate", "sequence_truncate"):
        return np.clip(ratio, low, high)
    return np.where((ratio < low) | (ratio > high), 0, ratio)


def trl_loss(tensors, config, beta, num_items, accumulation=1, generation=None):
    """TRL's `_compute_loss`, called unbound: the trainer's model is replaced by the log-probabilities themselves.

    Everything between log-probabilities and loss is TRL's code; what it needs of the trainer is its settings, a place
    for metrics, and an accelerator of one process.

    Args:
        accumulation: micro-batches of an optimizer step.
        generation: micro-batches that a rollout is cut into, where these are more; `num_items` are its tokens.

    Returns:
        loss, gradient with respect to the log-probabilities (and to the entropies, where there are any), TRL's metrics.
    """
    import torch
    from trl.trainer.grpo_trainer import GRPOTrainer

    logprob = torch.tensor(tensors["logprob"], requires_grad=True)
    entropy = torch.tensor(tensors.get("entropy", np.zeros_like(tensors["logprob"])), requires_grad=True)
    metrics = {name: [] for name in ("kl", "entropy", "entropy_coef", "policy_loss")}
    metrics |= {f"clip_ratio/{name}": [] for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")}
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, entropy, None),
        get_high_entropy_mask=lambda *arguments: GRPOTrainer.get_high_entropy_mask(trainer, *arguments),
        loss_type=config.loss_type,
        importance_sampling_level=config.importance_sampling_level,
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon_high,
        beta=beta,
        max_completion_length=config.max_completion_length,
        top_entropy_quantile=config.top_entropy_quantile,
        off_policy_mask_threshold=None,
        use_vllm=config.sampler_correction != "none",
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        entropy_coef=config.entropy_coef,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=config.entropy_coef != 0,
        current_gradient_accumulation_steps=accumulation,
        args=types.SimpleNamespace(
            delta=config.delta or None,
            use_bias_correction_kl=False,
            steps_per_generation=generation or accumulation,
        ),
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(
            num_processes=1,
            reduce=lambda x, reduction: x,
            gather=lambda x: x,
            pad_across_processes=lambda x, **_: x,
            sync_gradients=True,
        ),
        _metrics={"train": metrics},
    )
    mask = torch.tensor(tensors["mask"]).int()
    inputs = dict(
        prompt_ids=torch.zeros(len(mask), 1, dtype=torch.long),
        prompt_mask=torch.ones(len(mask), 1, dtype=torch.int),
        completion_ids=torch.zeros(mask.shape, dtype=torch.long),
        completion_mask=mask,
        advantages=torch.tensor(tensors["advantage"]),
        ref_per_token_logps=torch.tensor(tensors["reference_logprob"]),
        num_items_in_batch=torch.tensor(num_items),
    )
    if tensors["old_logprob"] is not None:
        inputs["old_per_token_logps"] = torch.tensor(tensors["old_logprob"])
    if trainer.use_vllm:
        trained = tensors["logprob"] if tensors["old_logprob"] is None else tensors["old_logprob"]
        inputs["importance_sampling_ratio"] = torch.tensor(
            trl_ratio(trained, tensors["sampling_logprob"], tensors["mask"], config)
        )
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    gradients = logprob.grad.numpy()
    if "entropy" in tensors:
        gradients = (gradients, np.zeros_like(gradients) if entropy.grad is None else entropy.grad.numpy())
    return loss.item(), gradients, {name: values[0] for name, values in metrics.items() if values}


def own_loss(tensors, config, beta, totals):
    """Loss, gradient and metrics of this project on the same arrays."""

    def loss(logprob, entropy=None):
        targets = PolicyTargets(
            advantage_BG=tensors["advantage"],
            mask_BGC=tensors["mask"],
            present_BG=np.ones(len(tensors["mask"]), bool),
            old_logprob_BGC=tensors["old_logprob"],
            reference_logprob_BGC=tensors["reference_logprob"] if beta else None,
            sampling_logprob_BGC=tensors["sampling_logprob"] if config.sampler_correction != "none" else None,
        )
        return policy_loss(logprob, targets, beta, totals, config, entropy)

    if "entropy" in tensors:
        at = jnp.asarray(tensors["logprob"]), jnp.asarray(tensors["entropy"])
        (value, metrics), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(*at)
        return float(value), tuple(map(np.asarray, gradients)), metrics
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(tensors["logprob"]))
    return float(value), np.asarray(gradient), metrics


@pytest.mark.torch
@given(
    seed=st.integers(0, 1000),
    loss_type=st.sampled_from(TRL_LOSS_TYPES),
    level=st.sampled_from(LEVELS),
    epsilons=st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.05, 0.1)]),
    delta=st.sampled_from([0.0, 1.4]),
    beta=st.sampled_from([0.0, 0.04, 0.5]),
    on_policy=st.booleans(),
)
@settings(max_examples=60)
def test_policy_loss_and_gradient_equal_trl(seed, loss_type, level, epsilons, delta, beta, on_policy):
    tensors = batch(seed)
    if on_policy:
        tensors["old_logprob"] = None
    config = RlConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon=epsilons[0],
        epsilon_high=epsilons[1],
        delta=delta,
        max_completion_length=9,
    )
    totals = step_totals(tensors["mask"], np.ones(len(tensors["mask"]), bool))
    value, gradient, metrics = own_loss(tensors, config, beta, totals)
    expected, expected_gradient, expected_metrics = trl_loss(tensors, config, beta, int(tensors["mask"].sum()))
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=1e-6)
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", *(["kl"] if beta else [])):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.torch
@given(
    seed=st.integers(0, 1000),
    loss_type=st.sampled_from(TRL_LOSS_TYPES),
    level=st.sampled_from(LEVELS),
    coefficient=st.sampled_from([0.0, 0.3]),
    quantile=st.sampled_from([1.0, 0.6, 0.2, 0.0]),
    correction=st.sampled_from(CORRECTIONS),
    bounds=st.sampled_from([(0.0, 3.0), (0.5, 2.0), (0.8, 0.0)]),
    on_policy=st.booleans(),
)
@settings(max_examples=60)
def test_entropy_switches_and_the_sampler_s_correction_equal_trl(
    seed, loss_type, level, coefficient, quantile, correction, bounds, on_policy
):
    """Alone and together: loss, gradients by log-probabilities and entropies, and the mean weight."""
    tensors = batch(seed)
    if on_policy:
        tensors["old_logprob"] = None
    tensors |= entropies_and_sampler(seed + 1, tensors)
    config = RlConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        entropy_coef=coefficient,
        top_entropy_quantile=quantile,
        sampler_correction=correction,
        sampler_correction_min=bounds[0],
        sampler_correction_max=bounds[1],
        max_completion_length=9,
    )
    mask = tensors["mask"]
    value, gradients, metrics = own_loss(tensors, config, 0.04, step_totals(mask, np.ones(len(mask), bool)))
    expected, expected_gradients, expected_metrics = trl_loss(tensors, config, 0.04, int(mask.sum()))
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["kl"], expected_metrics["kl"], rtol=2e-5, atol=1e-6)
    if correction != "none":
        trained = tensors["logprob"] if on_policy else tensors["old_logprob"]
        ratio = trl_ratio(trained, tensors["sampling_logprob"], mask, config)
        of_tokens = ratio[mask] if correction.startswith("token") else ratio
        name = "sampling/importance_sampling_ratio/mean"
        np.testing.assert_allclose(metrics[name], of_tokens.mean(), rtol=2e-5)


def test_the_share_of_highest_entropy_is_counted_among_tokens_of_the_loss():
    entropy = np.array([[[0.1, 0.9, 0.5, 99.0], [0.7, 0.3, 0.5, np.nan]]], np.float32)
    mask = np.array([[[1, 1, 1, 0], [1, 1, 1, 0]]], bool)

    def kept(share):
        return np.asarray(losses.highest_entropy(jnp.asarray(entropy), mask, share)).astype(int).tolist()

    assert kept(0.0) == [[[0, 1, 0, 0], [0, 0, 0, 0]]]
    assert kept(0.3) == [[[0, 1, 0, 0], [1, 0, 0, 0]]]
    assert kept(0.5) == [[[0, 1, 1, 0], [1, 0, 1, 0]]]  # the two of 0.5 together
    assert kept(1.0) == mask.astype(int).tolist()
    assert not losses.highest_entropy(jnp.asarray(entropy), np.zeros_like(mask), 0.5).any()


@pytest.mark.parametrize(
    ("correction", "weights", "beyond"),
    [
        ("token_truncate", [[2.0, 0.5, 1.0], [1.5, 1.0, 1.0]], 2 / 5),
        ("token_mask", [[0.0, 0.0, 1.0], [1.5, 1.0, 1.0]], 2 / 5),
        ("sequence_truncate", [[1.0], [1.5]], 0.0),  # 4 x 0.25, and 1.5
        ("sequence_mask", [[1.0], [1.5]], 0.0),
    ],
)
def test_the_sampler_is_corrected_for_by_hand(correction, weights, beyond):
    """Ratios 4, 0.25, 1 and 1.5, 1 (then padding that must not count), within [0.5, 2]."""
    trained = np.log([[[0.4, 0.1, 0.2], [0.3, 0.2, 0.2]]]).astype(np.float32)
    sampled = np.log([[[0.1, 0.4, 0.2], [0.2, 0.2, 1e-9]]]).astype(np.float32)
    mask = np.array([[[1, 1, 1], [1, 1, 0]]], bool)
    config = RlConfig(sampler_correction=correction, sampler_correction_min=0.5, sampler_correction_max=2.0)
    weight, found = losses.sampler_ratio(jnp.asarray(trained), jnp.asarray(sampled), mask, config)
    np.testing.assert_allclose(weight[0], weights, rtol=1e-5)
    share = float((found & mask).sum() / mask.sum()) if correction.startswith("token") else float(found.mean())
    assert share == pytest.approx(beyond)


def test_entropies_are_asked_for_where_a_switch_reads_them():
    tensors = batch(1)
    totals = step_totals(tensors["mask"], np.ones(6, bool))
    for switch in (dict(entropy_coef=0.1), dict(top_entropy_quantile=0.5)):
        with pytest.raises(ValueError, match="need entropies"):
            own_loss(tensors, RlConfig(**switch), 0.0, totals)


def test_switches_that_are_off_leave_the_program_as_it_was():
    """The same jaxpr whether the entropies and bounds are given or not."""
    tensors = batch(2)
    totals = step_totals(tensors["mask"], np.ones(6, bool))

    def traced(config, **given):
        def loss(logprob, entropy):
            targets = PolicyTargets(
                advantage_BG=tensors["advantage"], mask_BGC=tensors["mask"], present_BG=np.ones(6, bool), **given
            )
            return policy_loss(logprob, targets, 0.0, totals, config, entropy)[0]

        return str(jax.make_jaxpr(loss)(tensors["logprob"], tensors["logprob"]))

    plain = traced(RlConfig())
    assert traced(RlConfig(sampler_correction_max=2.0, sampler_correction_min=0.5)) == plain
    assert traced(RlConfig(entropy_coef=0.1)) != plain
    assert traced(RlConfig(top_entropy_quantile=0.5)) != plain
    on = RlConfig(sampler_correction="token_mask")
    assert traced(on, sampling_logprob_BGC=tensors["old_logprob"]) != plain


@pytest.mark.torch
@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_micro_batches_add_up_as_in_trl(loss_type):
    """Losses and gradients of unevenly masked micro-batches, each with the whole step's denominators."""
    tensors, parts, beta = batch(3, rows=8), 2, 0.04
    config = RlConfig(loss_type=loss_type, max_completion_length=9)
    totals = step_totals(tensors["mask"], np.ones(8, bool), parts)
    num_items = int(tensors["mask"].sum())
    values, gradients = [], []
    for part in range(parts):
        at = slice(4 * part, 4 * part + 4)
        cut = {name: value[at] for name, value in tensors.items()}
        value, gradient, _ = own_loss(cut, config, beta, totals)
        # TRL divides dapo's whole-batch count by steps_per_generation / accumulation steps: 1 here.
        expected, expected_gradient, _ = trl_loss(cut, config, beta, num_items, accumulation=parts)
        np.testing.assert_allclose(value, expected, rtol=2e-5)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=1e-7)
        values.append(value)
        gradients.append(gradient)
    if loss_type != "bnpo":  # bnpo is a mean over micro-batches by definition
        whole, gradient, _ = own_loss(tensors, config, beta, step_totals(tensors["mask"], np.ones(8, bool)))
        np.testing.assert_allclose(sum(values), whole, rtol=2e-5)
        np.testing.assert_allclose(np.concatenate(gradients), gradient, rtol=2e-5, atol=1e-7)


@pytest.mark.torch
@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_updates_of_one_rollout_have_the_losses_and_clips_of_trl(loss_type):
    """A rollout of twelve completions, learnt from in two updates of three micro-batches each."""
    tensors, updates, parts, beta = batch(4, rows=12), 2, 3, 0.04
    config = RlConfig(loss_type=loss_type, max_completion_length=9, steps_per_generation=updates)
    tokens, clips = int(tensors["mask"].sum()), 0.0
    for number in range(updates):
        update = slice(6 * number, 6 * number + 6)
        mask = tensors["mask"][update]
        totals = step_totals(mask, np.ones(6, bool), parts, jnp.float32(tokens / updates))
        region, expected_clips = 0.0, []
        for part in range(parts):
            at = slice(6 * number + 2 * part, 6 * number + 2 * part + 2)
            cut = {name: value[at] for name, value in tensors.items()}
            value, gradient, metrics = own_loss(cut, config, beta, totals)
            # In TRL `steps_per_generation` counts micro-batches.
            trl = trl_loss(cut, config, beta, tokens, accumulation=parts, generation=parts * updates)
            np.testing.assert_allclose(value, trl[0], rtol=2e-5, atol=1e-7)
            np.testing.assert_allclose(gradient, trl[1], rtol=2e-5, atol=1e-7)
            region += float(metrics["clip_ratio/region_mean"])
            # A mean over the micro-batch's own tokens.
            expected_clips.append(trl[2]["clip_ratio/region_mean"] * max(1, cut["mask"].sum()))
        np.testing.assert_allclose(region, sum(expected_clips) / mask.sum(), rtol=1e-5)
        clips += region
    assert clips > 0


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_masked_tokens_and_absent_rows_leave_no_trace(loss_type, level):
    """What stands behind the mask, infinities included, changes neither loss nor gradient; nor do absent rows."""
    tensors = batch(5)
    config = RlConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=9)
    present = np.ones(6, bool)
    clean = own_loss(tensors, config, 0.04, step_totals(tensors["mask"], present))
    dirty = dict(tensors)
    for name, rubbish in (("logprob", -np.inf), ("old_logprob", np.inf), ("reference_logprob", np.nan)):
        dirty[name] = np.where(tensors["mask"], tensors[name], rubbish).astype(np.float32)
    padded = {name: np.concatenate([value, value[:2]]) for name, value in dirty.items()}
    padded["mask"][6:] = False
    value, gradient, _ = own_loss(padded, config, 0.04, step_totals(padded["mask"], np.append(present, [False, False])))
    np.testing.assert_allclose(value, clean[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[:6], clean[1], rtol=1e-6)
    assert not gradient[6:].any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_step_without_a_token_has_a_zero_loss(loss_type):
    tensors = batch(6)
    tensors["mask"] = np.zeros_like(tensors["mask"])
    config = RlConfig(loss_type=loss_type)
    value, gradient, metrics = own_loss(tensors, config, 0.04, step_totals(tensors["mask"], np.ones(6, bool)))
    assert value == 0 and not gradient.any()
    assert all(np.isfinite(metric) for metric in metrics.values())


def test_truncated_completions_leave_the_loss_only_when_asked():
    mask = np.ones((1, 2, 3), bool)
    truncated = np.array([[True, False]])
    assert loss_mask(mask, truncated, False).all()
    np.testing.assert_array_equal(loss_mask(mask, truncated, True).sum(-1), [[0, 3]])


def test_kl_is_zero_for_equal_policies_and_positive_otherwise():
    logprob = jnp.linspace(-4, -0.1, 9)
    assert not np.asarray(kl_penalty(logprob, logprob)).any()
    assert (np.asarray(kl_penalty(logprob, logprob[::-1]))[[0, -1]] > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss_type="gspo"), "grpo, bnpo, dr_grpo, dapo"),
        (dict(importance_sampling_level="word"), "token, sequence"),
        (dict(epsilon=1.1), "epsilon"),
        (dict(epsilon=-0.1), "epsilon"),
        (dict(delta=1.1), "delta"),
        (dict(entropy_coef=-0.1), "entropy_coef"),
        (dict(top_entropy_quantile=1.5), "top_entropy_quantile"),
        (dict(sampler_correction="truncate"), "token_truncate, token_mask"),
        (dict(sampler_correction_min=3.0), "less than rl.sampler_correction_max=3"),
        (dict(sampler_correction="token_mask", sampler_correction_max=0.0), "without a bound"),
        (dict(max_completion_length=0), "max_completion_length"),
    ],
)
def test_impossible_loss_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping({"rl": changes})
