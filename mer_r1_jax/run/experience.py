"""One rollout, from prompts to experience: sample, read the answers, score them slow and fast, make advantages."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.data.prefetch import LoadedItem
from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.parallel import processes
from mer_r1_jax.parallel.rows import local_rows, put
from mer_r1_jax.rl.advantage import ARMS, AdvantageConfig, Rewards, advantages, permute_within_groups, zero_spread
from mer_r1_jax.rl.confidence import Anchors, calibration, confidence_metrics
from mer_r1_jax.rl.losses import loss_mask
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.rl.reward_funcs import Sample, Scored, columns_of, metrics_of, together
from mer_r1_jax.rl.rollout import Completions
from mer_r1_jax.rl.scoring import ScoredAnswer, ScoredGroups
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.stop_requested import StopRequested
from mer_r1_jax.training.prompts import prompt_rows
from mer_r1_jax.training.rl import Experience, PromptRows
from mer_r1_jax.training.state import Leaves
from mer_r1_jax.training.stopping import NEVER, Stop

SEED_STREAMS = {"rollout": 1, "permute": 2}  # folded into the run's seed, so that streams of random bits never meet


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What one rollout gives.

    Attributes:
        experience: for the update.
        metrics: scalars, on host or device; over all processes on the first one.
        table: columns of the sampled completions, likewise.
        tokens: real tokens of this process's prompts and completions.
    """

    experience: Experience
    metrics: dict[str, Any]
    table: dict[str, list[Any]]
    tokens: int


class ExperienceMaker:
    """Makes experience with the policy as it is."""

    def __init__(self, setup: Setup, buckets: Sequence[BatchShape], encode_inside: bool):
        self.setup, self.config = setup, setup.config.rl
        self.buckets = buckets
        self._encode_inside = encode_inside
        self._key = jax.random.key(setup.config.train.seed)
        self._arm = ARMS[self.config.arm]
        self._advantages = jax.jit(self._advantages_of)

    def make(
        self,
        leaves: tuple[Leaves, Leaves],
        reference: tuple[Leaves, Leaves] | None,
        loaded: Sequence[LoadedItem],
        rollout_step: int,
        stop: Stop = NEVER,
    ) -> Rollout:
        """Samples and scores the groups of one step's prompts.

        Args:
            leaves: trainable and frozen parameters of the policy.
            reference: those of the reference; None when there is no KL term.
            loaded: the step's prompts; a broken clip's row stays, empty.
            rollout_step: how many rollouts came before.
            stop: asked between the parts, and while the device or a reward function is waited for.

        Raises:
            StopRequested: a signal left the rollout.
        """
        stop.check()
        programs, mesh = self.setup.programs, self.setup.backbone.mesh
        clock = _Clock()
        prompts = [visit.clips.prompt if visit.clips else None for visit in loaded]
        rows = prompt_rows(prompts, self.buckets, self.setup.backbone.config, [visit.item.uid for visit in loaded])
        device = put(rows, mesh)
        features = programs.encode(leaves, device.batch)
        with programs.rollout_weights(leaves) as weights:
            completions = programs.sample(
                weights,
                device,
                features,
                self._stream("rollout"),
                np.int32(rollout_step),
                generations=self.config.num_generations,
                stop=stop,
            )
        host: Completions = local_rows(completions, mesh)
        clock.lap("timing_s/gen")
        truths = [visit.record.solution if visit.clips else None for visit in loaded]
        truths += [None] * (len(rows.uid_B) - len(truths))
        groups = self.setup.scorer.groups(host, truths)
        stop.check()
        clock.lap("timing_s/reward")
        completion = Continuations(id_BGC=completions.id_BGC, exists_BGC=completions.exists_BGC)
        anchors = put(groups.anchors, mesh)
        slow, fast = programs.score(leaves, device, features, completion, anchors, self.setup.candidates.ids_ZY)
        custom: dict[str, Scored] = {}
        with contextlib.suppress(StopRequested):  # where a call was left, the check that follows raises it everywhere
            custom = self._custom_rewards(loaded, groups, host, stop)  # while the device scores
        stop.check()
        if custom:
            clock.lap("timing_s/reward_funcs")
        custom_BG = tuple(scored.grid(host.length_BG.shape) for scored in custom.values())
        rewards = put(dataclasses.replace(groups.rewards, custom_BG=custom_BG), mesh)
        key = jax.random.fold_in(self._stream("permute"), rollout_step)
        advantage_BG, scalars, calibration_BG = self._advantages(rewards, anchors, slow, fast, key)
        stop.wait(advantage_BG)
        jax.block_until_ready(advantage_BG)
        clock.lap("timing_s/score")
        reference_logprob_BGC = None
        if reference is not None:
            # The towers are the policy's own when they are frozen, so their features are the reference's too.
            own = programs.encode(reference, device.batch) if self._encode_inside else features
            reference_logprob_BGC = programs.logprobs(reference, device, own, completion)
            stop.wait(reference_logprob_BGC)
            jax.block_until_ready(reference_logprob_BGC)
        clock.lap("timing_s/reference")
        experience = self._experience(device, features, completions, advantage_BG, reference_logprob_BGC, anchors)
        if self.config.num_iterations > 1:
            old = programs.logprobs(leaves, device, features, completion)
            experience = dataclasses.replace(experience, old_logprob_BGC=old)
        prompt_tokens = sum(len(prompt.ids) for prompt in prompts if prompt is not None)
        scores = {"advantage_BG": advantage_BG, "plus_BG": calibration_BG[0], "minus_BG": calibration_BG[1]}
        table = self._table(loaded, groups, host, local_rows(scores, mesh), rollout_step)
        answers, counts, table, custom = self._of_all(groups, table, custom)
        return Rollout(
            experience=experience,
            metrics=self._metrics(answers, counts) | metrics_of(custom) | scalars | clock.laps,
            table=table | columns_of(custom),
            tokens=prompt_tokens + int(host.length_BG.sum()),
        )

    def _stream(self, name: str) -> jax.Array:
        return jax.random.fold_in(self._key, SEED_STREAMS[name])

    def _custom_rewards(
        self, loaded: Sequence[LoadedItem], groups: ScoredGroups, host: Completions, stop: Stop
    ) -> dict[str, Scored]:
        """What the user's reward functions give for the completions that exist, in the order of `_table`."""
        if self.setup.reward_funcs is None:
            return {}
        samples = [
            Sample(
                record=visit.record,
                row=row,
                generation=column,
                text=answer.text,
                ids=tuple(host.id_BGC[row, column, : answer.length].tolist()),
            )
            for row, (visit, group) in enumerate(zip(loaded, groups.answers, strict=False))
            for column, answer in enumerate(group)
        ]
        return self.setup.reward_funcs.score(samples, stop.asked)

    def _experience(
        self,
        prompts: PromptRows,
        features: Any,
        completions: Completions,
        advantage_BG: Any,
        reference: Any,
        anchors: Any,
    ) -> Experience:
        mask_BGC = loss_mask(completions.mask_BGC, completions.truncated_BG, self.config.mask_truncated_completions)
        return Experience(
            prompts=prompts,
            features_BRD=None if self._encode_inside else features,
            completion=Continuations(id_BGC=completions.id_BGC, exists_BGC=completions.exists_BGC),
            loss_mask_BGC=mask_BGC,
            present_BG=completions.length_BG > 0,
            advantage_BG=advantage_BG,
            sampling_logprob_BGC=completions.sampling_logprob_BGC,
            reference_logprob_BGC=reference,
            old_logprob_BGC=None,
            anchors=anchors if self._arm.calibration_loss else None,
        )

    def _advantages_of(
        self, rewards: Rewards, anchors: Anchors, slow: jax.Array, fast: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
        """Advantages [B, G], metrics, and the calibration rewards R+ and R- (NaN where invalid), jitted."""
        config = self.config
        settings = AdvantageConfig(
            scale_rewards=config.scale_rewards,
            calibration_weight=config.calibration_weight,
            format_weight=config.format_weight,
            reward_weights=config.reward_weights or (1.0,) * len(config.reward_funcs),
        )
        calibrated = calibration(slow, fast, anchors)
        rewards = dataclasses.replace(
            rewards,
            plus_BG=calibrated.plus_BG,
            minus_BG=calibrated.minus_BG,
            plus_valid_BG=calibrated.plus_valid_BG,
            minus_valid_BG=calibrated.minus_valid_BG,
        )
        metrics = confidence_metrics(slow, fast, anchors) | _reward_metrics(rewards, config.format_weight)
        if config.permute_rewards:
            rewards = permute_within_groups(rewards, key)
        advantage_BG = advantages(config.arm, rewards, settings)
        metrics["frac_reward_zero_std"] = _mean(
            zero_spread(advantage_BG, rewards.valid_BG), jnp.any(rewards.valid_BG, -1)
        )
        plus_BG = jnp.where(calibrated.plus_valid_BG, calibrated.plus_BG, jnp.nan)
        minus_BG = jnp.where(calibrated.minus_valid_BG, calibrated.minus_BG, jnp.nan)
        return advantage_BG, metrics, (plus_BG, minus_BG)

    def _of_all(
        self, groups: ScoredGroups, table: dict[str, list[Any]], custom: dict[str, Scored]
    ) -> tuple[list[ScoredAnswer], dict[str, int], dict[str, list[Any]], dict[str, Scored]]:
        """Answers, counts, table and the user's rewards of all processes on the first one, which writes them; its own
        on every other."""
        own = ([answer for group in groups.answers for answer in group], groups.counts, table, custom)
        nothing = ([], {}, {}, {})
        told = processes.gather("the answers of a rollout", own if self.setup.share.leader else nothing) or [own]
        counts, columns = collections.Counter(), collections.defaultdict(list)
        for _, part_counts, part, _ in told:
            counts.update(part_counts)
            for name, column in part.items():
                columns[name] += column
        answers = [answer for part, _, _, _ in told for answer in part]
        return answers, dict(counts), dict(columns), together([part for _, _, _, part in told])

    def _metrics(self, answers: Sequence[ScoredAnswer], counts: dict[str, int]) -> dict[str, float]:
        """Lengths, truncation and answers of the sampled completions."""
        if not answers:
            return {"completions/count": 0.0}
        lengths = np.asarray([answer.length for answer in answers], np.float64)
        ended = lengths[[not answer.truncated for answer in answers]]
        return {
            "completions/count": float(len(answers)),
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": float(np.mean([answer.truncated for answer in answers])),
            "completions/mean_terminated_length": ended.mean() if ended.size else 0.0,
            "answers/mean_words": float(np.mean([answer.rewards.n_words for answer in answers])),
            "answers/mean_unknown_words": float(np.mean([answer.rewards.n_unknown for answer in answers])),
            "answers/mean_categories": float(np.mean([answer.rewards.n_categories for answer in answers])),
        } | {f"confidence/left_out/{reason}": float(count) for reason, count in counts.items()}

    def _table(
        self,
        loaded: Sequence[LoadedItem],
        groups: ScoredGroups,
        host: Completions,
        scores: dict[str, np.ndarray],
        rollout_step: int,
    ) -> dict[str, list[Any]]:
        """One line per completion."""
        advantage_BG, plus_BG, minus_BG = (scores[name] for name in ("advantage_BG", "plus_BG", "minus_BG"))
        rows = []
        for row, (visit, group) in enumerate(zip(loaded, groups.answers, strict=False)):
            for column, answer in enumerate(group):
                rows.append(
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
                        "logprob": float(host.logprob_BGC[row, column].sum()),
                    }
                )
        names = rows[0] if rows else {}
        return {name: [line[name] for line in rows] for name in names}


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def _reward_metrics(rewards: Rewards, format_weight: float) -> dict[str, jax.Array]:
    """Means and spreads of each reward. `reward` is F1 + w R_F whatever the arm, so that arms can be compared."""
    held = rewards.valid_BG & rewards.scored_BG
    kinds = {
        "recall": (rewards.recall_BG, held),
        "precision": (rewards.precision_BG, held),
        "f1": (rewards.f1_BG, held),
        "format": (rewards.format_BG, rewards.valid_BG),
        "r_plus": (rewards.plus_BG, rewards.plus_valid_BG),
        "r_minus": (rewards.minus_BG, rewards.minus_valid_BG),
    }
    metrics = {}
    for name, (x_BG, held_BG) in kinds.items():
        mean = _mean(x_BG, held_BG)
        metrics[f"rewards/{name}/mean"] = mean
        metrics[f"rewards/{name}/std"] = jnp.sqrt(_mean((x_BG - mean) ** 2, held_BG))
    total_BG = rewards.f1_BG + format_weight * rewards.format_BG
    group_mean = functools.partial(_mean, held=held, axis=-1)
    spread_B = jnp.sqrt(group_mean((total_BG - group_mean(total_BG)[:, None]) ** 2))
    return metrics | {"reward": _mean(total_BG, held), "reward_std": _mean(spread_B, jnp.any(held, -1))}


def _mean(x: jax.Array, held: jax.Array, axis: int | None = None) -> jax.Array:
    """Mean over the values that are held; 0 when there are none."""
    return jnp.sum(jnp.where(held, x, 0.0), axis=axis) / jnp.maximum(jnp.sum(held, axis=axis), 1)


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
