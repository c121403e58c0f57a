"""What is logged of a rollout: one line per completion, and the means of rewards, lengths and answers."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.data.prefetch import LoadedItem
from mer_r1_jax.parallel import processes
from mer_r1_jax.rl.advantage import Rewards, advantages
from mer_r1_jax.rl.reward_funcs import Scored, columns_of, metrics_of, together
from mer_r1_jax.rl.rollout import Completions
from mer_r1_jax.rl.scoring import ScoredAnswer, ScoredGroups


@dataclasses.dataclass(frozen=True)
class RolloutLog:
    """What the host keeps of a rollout's completions.

    Attributes:
        answers: scored, row by row and generation by generation.
        counts: how often a word or completion got no confidence, by reason.
        table: columns with one line per completion, without those of the user's reward functions.
        custom: what the user's reward functions gave, by name.
    """

    answers: list[ScoredAnswer]
    counts: Mapping[str, int]
    table: dict[str, list[Any]]
    custom: dict[str, Scored]

    def of_all_processes(self, leader: bool) -> RolloutLog:
        """Gathers the logs of all processes on process 0, which writes them; gives its own back on every other.

        Args:
            leader: whether this process speaks for its rows (several may load the same ones).
        """
        parts = processes.gather("the answers of a rollout", self if leader else RolloutLog([], {}, {}, {})) or [self]
        counts, table = collections.Counter(), collections.defaultdict(list)
        for part in parts:
            counts.update(part.counts)
            # Columns are joined by name, because a process without answers of its own has a table without columns.
            for name, column in part.table.items():
                table[name] += column
        return RolloutLog(
            answers=[answer for part in parts for answer in part.answers],
            counts=dict(counts),
            table=dict(table),
            custom=together([part.custom for part in parts]),
        )

    @property
    def columns(self) -> dict[str, list[Any]]:
        """The whole table."""
        return self.table | columns_of(self.custom)

    @property
    def metrics(self) -> dict[str, float]:
        """Lengths (tokens), truncation, words and categories of the completions, and the user's rewards."""
        if not self.answers:
            return {"completions/count": 0.0} | metrics_of(self.custom)
        lengths = np.asarray([answer.length for answer in self.answers], np.float64)
        ended = lengths[[not answer.truncated for answer in self.answers]]
        return {
            "completions/count": float(len(self.answers)),
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": float(np.mean([answer.truncated for answer in self.answers])),
            "completions/mean_terminated_length": ended.mean() if ended.size else 0.0,
            "answers/mean_words": float(np.mean([answer.rewards.n_words for answer in self.answers])),
            "answers/mean_unknown_words": float(np.mean([answer.rewards.n_unknown for answer in self.answers])),
            "answers/mean_repeats": float(np.mean([answer.rewards.n_repeats for answer in self.answers])),
            "answers/mean_categories": float(np.mean([answer.rewards.n_categories for answer in self.answers])),
            **{f"confidence/left_out/{reason}": float(count) for reason, count in self.counts.items()},
        } | metrics_of(self.custom)


def completions_table(
    loaded: Sequence[LoadedItem],
    groups: ScoredGroups,
    completions: Completions,
    scores: Mapping[str, np.ndarray],
    rollout_step: int,
) -> dict[str, list[Any]]:
    """One line per completion, as columns.

    Args:
        loaded: the prompts.
        groups: their answers, read and scored.
        completions: on the host.
        scores: advantage_BG, plus_BG and minus_BG (NaN where a completion has no R+ or R-).
        rollout_step: how many rollouts came before.
    """
    advantage_BG, plus_BG, minus_BG = (scores[name] for name in ("advantage_BG", "plus_BG", "minus_BG"))
    # Fewer groups than rows: those that only pad the batch have no line.
    lines = []
    for row, (visit, group) in enumerate(zip(loaded, groups.answers, strict=False)):
        for column, answer in enumerate(group):
            lines.append(
                {
                    "rollout_step": rollout_step,
                    "id": visit.record.id,
                    "generation": column,
                    "completion": answer.text,
                    "words": list(answer.parsed.words),
                    "truth": list(visit.record.solution),
                    **{name: answer.rewards.score(name) for name in ("recall", "precision", "f1")},
                    "format": answer.parsed.format_reward,
                    "r_plus": _or_none(plus_BG[row, column]),
                    "r_minus": _or_none(minus_BG[row, column]),
                    "advantage": float(advantage_BG[row, column]),
                    "length": answer.length,
                    "truncated": bool(answer.truncated),
                    # Each token outside the sample has 0, so the sum is the whole answer's, untempered and in nats.
                    "logprob": float(completions.logprob_BGC[row, column].sum()),
                }
            )
    names = lines[0] if lines else {}
    return {name: [line[name] for line in lines] for name in names}


def reward_metrics(rewards: Rewards, format_weight: float) -> dict[str, jax.Array]:
    """Means and spreads of each reward, for use inside `jit`. `reward` is F1 + w R_F whatever the arm, so that arms can
    be compared."""
    # Answer rewards mean nothing where the truth is on no wheel, but the format of such answers counts all the same.
    held_BG = rewards.valid_BG & rewards.scored_BG
    kinds = {
        "recall": (rewards.recall_BG, held_BG),
        "precision": (rewards.precision_BG, held_BG),
        "f1": (rewards.f1_BG, held_BG),
        "format": (rewards.format_BG, rewards.valid_BG),
        "r_plus": (rewards.plus_BG, rewards.plus_valid_BG),
        "r_minus": (rewards.minus_BG, rewards.minus_valid_BG),
    }
    metrics = {}
    for name, (x_BG, valid_BG) in kinds.items():
        mean = mean_of(x_BG, valid_BG)
        metrics[f"rewards/{name}/mean"] = mean
        metrics[f"rewards/{name}/std"] = jnp.sqrt(mean_of((x_BG - mean) ** 2, valid_BG))
        if name in ("recall", "precision", "f1"):
            # Within groups: what an advantage can be made of. The spread above is over all samples of the step.
            metrics[f"rewards/{name}/group_std"] = mean_of(jnp.sqrt(_variance(x_BG, held_BG)), _comparable(held_BG))
    metrics["rewards/recall/precision_corr"] = within_groups(rewards.recall_BG, rewards.precision_BG, held_BG)
    total_BG = rewards.f1_BG + format_weight * rewards.format_BG
    group_mean = functools.partial(mean_of, held=held_BG, axis=-1)
    # `reward_std` is within groups: it is what an advantage can be made of, and falls to 0 when groups agree.
    spread_B = jnp.sqrt(group_mean((total_BG - group_mean(total_BG)[:, None]) ** 2))
    return metrics | {"reward": mean_of(total_BG, held_BG), "reward_std": mean_of(spread_B, jnp.any(held_BG, -1))}


def advantage_metrics(
    advantage_BG: jax.Array, rewards: Rewards, earned: Rewards, config: RlConfig
) -> dict[str, jax.Array]:
    """What an arm's advantage is made of and where it pushes, for use inside `jit`.

    Args:
        advantage_BG: the advantages.
        rewards: what they were made of: under `rl.permute_rewards` another answer's of the group.
        earned: each answer's own.
        config: static.

    Returns:
        advantages/corr/{recall,precision,categories}: correlation within groups with what the answers earned, around 0
        for the control; a positive one with the categories named draws answers out, however alike two arms' advantages
        are otherwise.
        advantages/share/{calibration,format}: share of the advantage's variance that is gone where that term's weight
        is 0; exact where the arm adds its terms.
    """
    with_BG = {"recall": earned.recall_BG, "precision": earned.precision_BG, "categories": earned.categories_BG}
    metrics = {
        f"advantages/corr/{name}": within_groups(advantage_BG, x_BG, earned.valid_BG & earned.scored_BG)
        for name, x_BG in with_BG.items()
        if x_BG is not None
    }
    held_BG = rewards.valid_BG & rewards.scored_BG
    for name, field in (("calibration", "calibration_weight"), ("format", "format_weight")):
        # Some arms put the term inside a z, so its share is found by computing the advantage again without it.
        without_BG = advantages(config.arm, rewards, dataclasses.replace(config, **{field: 0.0}))
        # The covariances of the terms with the whole add up to its variance.
        own = _sum_of_products(advantage_BG - without_BG, advantage_BG, held_BG)
        whole = _sum_of_products(advantage_BG, advantage_BG, held_BG)
        metrics[f"advantages/share/{name}"] = jnp.where(whole > 0, own / jnp.where(whole > 0, whole, 1.0), 0.0)
    return metrics


def within_groups(x_BG: jax.Array, y_BG: jax.Array, held_BG: jax.Array) -> jax.Array:
    """Correlation of two values around their groups' means, over all groups; 0 where one of them never varies."""
    product, xx, yy = (_sum_of_products(a, b, held_BG) for a, b in ((x_BG, y_BG), (x_BG, x_BG), (y_BG, y_BG)))
    scale = jnp.sqrt(xx * yy)
    return jnp.where(scale > 0, product / jnp.where(scale > 0, scale, 1.0), 0.0)


def _sum_of_products(x_BG: jax.Array, y_BG: jax.Array, held_BG: jax.Array) -> jax.Array:
    """Of the deviations from each group's mean."""
    return jnp.sum(_centred(x_BG, held_BG) * _centred(y_BG, held_BG))


def _centred(x_BG: jax.Array, held_BG: jax.Array) -> jax.Array:
    return jnp.where(held_BG, x_BG - mean_of(x_BG, held_BG, axis=-1)[:, None], 0.0)


def _variance(x_BG: jax.Array, held_BG: jax.Array) -> jax.Array:
    """float32 [B], of each group, with ddof 1."""
    return jnp.sum(_centred(x_BG, held_BG) ** 2, axis=-1) / jnp.maximum(jnp.sum(held_BG, axis=-1) - 1, 1)


def _comparable(held_BG: jax.Array) -> jax.Array:
    """bool [B], groups with two values or more."""
    return jnp.sum(held_BG, axis=-1) > 1


def mean_of(x: jax.Array, held: jax.Array, axis: int | None = None) -> jax.Array:
    """Mean over the values that are held; 0 when there are none."""
    return jnp.sum(jnp.where(held, x, 0.0), axis=axis) / jnp.maximum(jnp.sum(held, axis=axis), 1)


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
