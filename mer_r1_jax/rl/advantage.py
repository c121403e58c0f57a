"""From the rewards of sampled groups to one advantage per completion: every arm out of the same few functions.

All arrays are [B, G]: B prompts, G completions sampled for each. A value may be *invalid* (a completion without a wrong
word has no confidence on wrong words); an invalid value takes no part in its group's statistics and its z is exactly 0.

With standard deviations s_R, s_P of recall and precision and their correlation r, normalising the sum makes the
advantage correlate with them by (s_R + r s_P) / s_sum and (s_P + r s_R) / s_sum: the noisier reward owns the update.
Normalising each first gives both sqrt((1 + r) / 2). That is the difference between the arms `rd` and `ad`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.omni.batch import Array
from mer_r1_jax.rl.own_function import check_result, own_function

EPSILON = 1e-4  # added to the standard deviation, as TRL does


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards:
    """Rewards of sampled groups, float32 [B, G], and which of them count, bool [B, G].

    A value that is not finite is invalid, whatever its mask says.

    Attributes:
        recall_BG, precision_BG, f1_BG: in [0, 1], means over the wheels.
        format_BG: 0 or 1.
        valid_BG: the completion exists; masks the format reward.
        scored_BG: its prompt's truth lies on a wheel, so that the three answer rewards mean something.
        plus_BG: mean over correct words of slow minus fast confidence, in nats (R+). None where the arm needs none.
        minus_BG: mean over wrong words of fast minus slow confidence, in nats (R-).
        plus_valid_BG, minus_valid_BG: the completion has a correct (wrong) word with a confidence.
        custom_BG: one array for each reward function of the user's, NaN where a completion is unscored.
        categories_BG: categories named, mean over the wheels. No reward: how an arm moves it is logged.
    """

    recall_BG: Array
    precision_BG: Array
    f1_BG: Array
    format_BG: Array
    valid_BG: Array
    scored_BG: Array
    plus_BG: Array | None = None
    minus_BG: Array | None = None
    plus_valid_BG: Array | None = None
    minus_valid_BG: Array | None = None
    custom_BG: tuple[Array, ...] = ()
    categories_BG: Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to turn rewards into advantages.

    Attributes:
        advantage: the formula.
        needs_confidence: whether slow and fast confidences have to be computed.
        candidates: what a word's confidence sums over: the first tokens of its whole "category" or of the "word" alone.
        calibration_loss: whether lambda times the differentiable calibration loss is added to the policy loss.
    """

    advantage: Callable[[Rewards, RlConfig], Array]
    needs_confidence: bool = False
    candidates: str = "category"
    calibration_loss: bool = False


def zscore(x_BG: Array, valid_BG: Array, scale_rewards: str = "group") -> Array:
    """(x - mean) / (std + 1e-4) over each group's valid values, std with ddof 1.

    Args:
        x_BG, valid_BG: values, and which of them count.
        scale_rewards: what the std is taken over: each "group", the whole "batch", or "none": only the mean goes off.

    Returns:
        float32 [B, G]; exactly 0 where the value is invalid or not finite, and in groups with fewer than two valid
        values or no spread.
    """
    x_BG = x_BG.astype(jnp.float32)
    valid_BG = valid_BG & jnp.isfinite(x_BG)
    # Replaced, not weighed with 0: NaN x 0 is NaN.
    x_BG = jnp.where(valid_BG, x_BG, 0.0)
    centred_BG = jnp.where(valid_BG, x_BG - _mean(x_BG, valid_BG, axis=-1), 0.0)
    if scale_rewards == "group":
        z_BG = centred_BG / (_std(centred_BG, valid_BG, axis=-1) + EPSILON)
    elif scale_rewards == "batch":
        # Each group still loses its own mean; only the scale is the batch's, as in TRL.
        overall = jnp.where(valid_BG, x_BG - _mean(x_BG, valid_BG, axis=None), 0.0)
        z_BG = centred_BG / (_std(overall, valid_BG, axis=None) + EPSILON)
    else:
        z_BG = centred_BG
    # Rounding may leave equal values a spread of 1e-8, which the division would blow up to a z that counts.
    highest_B1 = jnp.max(jnp.where(valid_BG, x_BG, -jnp.inf), axis=-1, keepdims=True)
    lowest_B1 = jnp.min(jnp.where(valid_BG, x_BG, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(valid_BG & (highest_B1 > lowest_B1), z_BG, 0.0)


def _mean(x_BG: Array, valid_BG: Array, axis) -> Array:
    count = jnp.sum(valid_BG, axis=axis, keepdims=True)
    return jnp.sum(x_BG, axis=axis, keepdims=True) / jnp.maximum(count, 1)


def _std(centred_BG: Array, valid_BG: Array, axis) -> Array:
    """Standard deviation with ddof 1 of values whose mean was taken off and whose invalid entries are 0."""
    count = jnp.sum(valid_BG, axis=axis, keepdims=True)
    return jnp.sqrt(jnp.sum(centred_BG**2, axis=axis, keepdims=True) / jnp.maximum(count - 1, 1))


def zero_spread(x_BG: Array, valid_BG: Array) -> Array:
    """bool [B], groups with at least one valid value whose valid values are all equal (they teach nothing)."""
    highest_B = jnp.max(jnp.where(valid_BG, x_BG, -jnp.inf), axis=-1)
    lowest_B = jnp.min(jnp.where(valid_BG, x_BG, jnp.inf), axis=-1)
    return jnp.any(valid_BG, axis=-1) & (highest_B <= lowest_B)


def permute_within_groups(rewards: Rewards, key: Array) -> Rewards:
    """The control: a group's rewards, masks included, handed to its completions in a random order (all rewards alike).

    Advantages then have the same distribution but say nothing about the completion they are given to.
    """
    rows, generations = rewards.recall_BG.shape
    keys_B = jax.random.split(key, rows)
    order_BG = jax.vmap(lambda k: jax.random.permutation(k, generations))(keys_B)
    return jax.tree.map(lambda x_BG: jnp.take_along_axis(x_BG, order_BG, axis=-1), rewards)


# The terms the arms are put together from.


def _recall(rewards: Rewards) -> tuple[Array, Array]:
    return rewards.recall_BG, rewards.scored_BG & rewards.valid_BG


def _precision(rewards: Rewards) -> tuple[Array, Array]:
    return rewards.precision_BG, rewards.scored_BG & rewards.valid_BG


def _f1(rewards: Rewards) -> tuple[Array, Array]:
    return rewards.f1_BG, rewards.scored_BG & rewards.valid_BG


def _format(rewards: Rewards) -> tuple[Array, Array]:
    return rewards.format_BG, rewards.valid_BG


def _plus(rewards: Rewards) -> tuple[Array, Array]:
    return rewards.plus_BG, rewards.plus_valid_BG & rewards.scored_BG & rewards.valid_BG


def _minus(rewards: Rewards) -> tuple[Array, Array]:
    return rewards.minus_BG, rewards.minus_valid_BG & rewards.scored_BG & rewards.valid_BG


def _add(term: tuple[Array, Array], other: tuple[Array, Array], weight: float) -> tuple[Array, Array]:
    """term + weight * other, valid where `term` is; an invalid `other` adds nothing (ours)."""
    (x_BG, valid_BG), (y_BG, y_valid_BG) = term, other
    y_BG = jnp.where(y_valid_BG & jnp.isfinite(y_BG), y_BG, 0.0)
    return x_BG + weight * y_BG, valid_BG


def _z(term: tuple[Array, Array], config: RlConfig) -> Array:
    return zscore(*term, config.scale_rewards)


def _z_format(rewards: Rewards, config: RlConfig) -> Array:
    return config.format_weight * _z(_format(rewards), config)


def custom_rewards(rewards: Rewards, config: RlConfig) -> Array:
    """Sum of weight x z of each reward function of the user's: normalised apart, as the method's own rewards (ours)."""
    total_BG = jnp.zeros(rewards.valid_BG.shape, jnp.float32)
    weights = config.reward_weights or (1.0,) * len(rewards.custom_BG)
    for value_BG, weight in zip(rewards.custom_BG, weights, strict=True):
        total_BG += weight * _z((value_BG, rewards.valid_BG), config)
    return total_BG


# The arms. MER-R1: its ablation tables; "ours" where the paper leaves the choice open.


def baseline(rewards: Rewards, config: RlConfig) -> Array:
    """z(F1 + w R_F): one reward. Where the truth cannot be scored the format is all there is."""
    format_BG, valid_BG = _format(rewards)
    return _z(_add((config.format_weight * format_BG, valid_BG), _f1(rewards), 1.0), config)


def reward_sum(rewards: Rewards, config: RlConfig) -> Array:
    """`rd`: z(R_R + R_P) + w z(R_F), added first and normalised after."""
    return _z(_add(_recall(rewards), _precision(rewards), 1.0), config) + _z_format(rewards, config)


def dual_objective(rewards: Rewards, config: RlConfig) -> Array:
    """`ad`: z(R_R) + z(R_P) + w z(R_F), normalised apart and added after."""
    return _z(_recall(rewards), config) + _z(_precision(rewards), config) + _z_format(rewards, config)


def whitened_objectives(rewards: Rewards, config: RlConfig) -> Array:
    """`gdpo`: the advantages of `ad`, whitened over the step: their scale is always the same.

    Liu et al. 2026 (GDPO); TRL's `multi_objective_aggregation="normalize_then_sum"`.
    """
    ad_BG = dual_objective(rewards, config)
    valid_BG = rewards.valid_BG
    centred_BG = jnp.where(valid_BG, ad_BG - _mean(jnp.where(valid_BG, ad_BG, 0.0), valid_BG, axis=None), 0.0)
    white_BG = centred_BG / (_std(centred_BG, valid_BG, axis=None) + EPSILON)
    # A group without spread teaches nothing: the mean of the step would give all its answers the same push.
    return jnp.where(zero_spread(ad_BG, valid_BG)[:, None], 0.0, white_BG)


def mer_r1(rewards: Rewards, config: RlConfig) -> Array:
    """`ad` + lambda (z(R+) + z(R-)): the method."""
    calibration = _z(_plus(rewards), config) + _z(_minus(rewards), config)
    return dual_objective(rewards, config) + config.calibration_weight * calibration


def recall_side_only(rewards: Rewards, config: RlConfig) -> Array:
    """`sfcc_recall_only`: `ad` + lambda z(R+)."""
    return dual_objective(rewards, config) + config.calibration_weight * _z(_plus(rewards), config)


def reward_space(rewards: Rewards, config: RlConfig) -> Array:
    """`sfcc_reward_space`: z(R_R + lambda R+) + z(R_P + lambda R-) + w z(R_F)."""
    recall = _add(_recall(rewards), _plus(rewards), config.calibration_weight)
    precision = _add(_precision(rewards), _minus(rewards), config.calibration_weight)
    return _z(recall, config) + _z(precision, config) + _z_format(rewards, config)


def mixed_space(rewards: Rewards, config: RlConfig) -> Array:
    """`sfcc_mixed`: z(R_R + lambda R+) + z(R_P) + lambda z(R-) + w z(R_F) (which side is ours)."""
    recall = _add(_recall(rewards), _plus(rewards), config.calibration_weight)
    minus = config.calibration_weight * _z(_minus(rewards), config)
    return _z(recall, config) + _z(_precision(rewards), config) + minus + _z_format(rewards, config)


ARMS: dict[str, Arm] = {
    "baseline": Arm(advantage=baseline),
    "rd": Arm(advantage=reward_sum),
    "ad": Arm(advantage=dual_objective),
    "gdpo": Arm(advantage=whitened_objectives),
    "mer_r1": Arm(advantage=mer_r1, needs_confidence=True),
    "sfcc_word": Arm(advantage=mer_r1, needs_confidence=True, candidates="word"),
    "sfcc_recall_only": Arm(advantage=recall_side_only, needs_confidence=True),
    "sfcc_reward_space": Arm(advantage=reward_space, needs_confidence=True),
    "sfcc_mixed": Arm(advantage=mixed_space, needs_confidence=True),
    "sfcc_loss": Arm(advantage=dual_objective, needs_confidence=True, calibration_loss=True),
}


@functools.cache
def arm_of(name: str) -> Arm:
    """The arm of a name, or of the dotted path of a function `advantage(rewards, config)` of the user's.

    Raises:
        OwnFunctionError: a path without a function, or one whose function does not return one float for each answer.
        ValueError: neither a name nor a path.
    """
    if name in ARMS:
        return ARMS[name]
    if "." not in name:
        raise ValueError(f"arm is {name!r}, expected one of {', '.join(ARMS)}, or module.function")
    # Two sizes that differ, so that a function that mixes up its axes is found out.
    prompts, answers = 2, 3
    floats, flags = jnp.zeros((prompts, answers)), jnp.ones((prompts, answers), bool)
    rewards = ("recall_BG", "precision_BG", "f1_BG", "format_BG", "plus_BG", "minus_BG")
    masks = ("valid_BG", "scored_BG", "plus_valid_BG", "minus_valid_BG")
    fields: Any = {**dict.fromkeys(rewards, floats), **dict.fromkeys(masks, flags)}
    example = Rewards(**fields)
    meaning = "one advantage for each of G answers to each of B prompts"
    check_result("rl.arm", name, (example,), RlConfig(), (prompts, answers), meaning)
    return Arm(advantage=own_function("rl.arm", name))


def advantages(arm: str, rewards: Rewards, config: RlConfig) -> Array:
    """float32 [B, G], one advantage per completion, given to each of its tokens; no gradient flows through it.

    The arm's own, plus the user's reward functions, which every arm takes in the same way.

    Raises:
        ValueError: an unknown arm, or an arm that needs confidences without them.
    """
    chosen = arm_of(arm)
    if chosen.needs_confidence and rewards.plus_BG is None:
        raise ValueError(f"arm {arm!r} needs slow and fast confidences: fill plus_BG, minus_BG and their masks")
    return jax.lax.stop_gradient(chosen.advantage(rewards, config) + custom_rewards(rewards, config))
