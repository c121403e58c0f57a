"""Supervised fine-tuning: every prompt carries its slow and its fast target, in one row.

The prompt (and its media) is computed once for both: they are two continuations that do not see each other. Every
micro-batch divides by the tokens of the whole optimizer step, so micro-batches simply add up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.config.schema import RunConfig, SftConfig
from mer_r1_jax.data.prefetch import LoadedItem
from mer_r1_jax.data.records import Record
from mer_r1_jax.omni.batch import Array, Prompts
from mer_r1_jax.rl.losses import token_logprobs
from mer_r1_jax.rl.packing import Continuations, continuation_hidden
from mer_r1_jax.rl.tags import AnswerTags, TagError
from mer_r1_jax.training.backbone import Backbone, compiler_options
from mer_r1_jax.training.dropout import dropout_of
from mer_r1_jax.training.phase import Phase, phase_parts
from mer_r1_jax.training.prompts import loaded_rows
from mer_r1_jax.training.state import Params, TrainState, accumulate, apply_gradients

LENGTH_STEP = 8  # target lengths are padded to a multiple of this
MAX_LISTED = 10  # records an error names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """Targets of one kind, one for each prompt (G = 1).

    Attributes:
        continuation: the target's tokens, the fast target's forced prefix included.
        loss_mask_BGC: bool, tokens in the loss: neither padding nor a forced prefix.
    """

    continuation: Continuations
    loss_mask_BGC: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SftBatch:
    """One optimizer step of SFT.

    Attributes:
        prompts: with their clips.
        slow, fast: targets; `fast` is None when no fast targets are mixed in.
    """

    prompts: Prompts
    slow: Targets
    fast: Targets | None


def sft_loss(
    backbone: Backbone,
    params: Params,
    batch: SftBatch,
    tokens_in_loss: dict[str, jax.Array],
    fast_fraction: float,
    towers_trained: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """This micro-batch's share of (1 - f) x mean over slow tokens + f x mean over fast tokens of the step, in nats.

    Args:
        tokens_in_loss: tokens of the whole optimizer step, "slow" and "fast".
        fast_fraction: f.
        towers_trained: whether a tower is trained, so that gradients flow through the media encoding; frozen towers are
            encoded with their gradient stopped.
    """
    model = backbone.bind(params)
    features_BRD = model.encode_media(batch.prompts.vision, batch.prompts.audio)
    if not towers_trained and features_BRD is not None:
        features_BRD = jax.lax.stop_gradient(features_BRD)
    kinds = {"slow": batch.slow} | ({"fast": batch.fast} if batch.fast is not None else {})
    shares = {"slow": 1 - fast_fraction, "fast": fast_fraction} if batch.fast is not None else {"slow": 1.0}
    # Both targets follow the same prompt in one forward pass: hidden states [B, 1, C, D] that predict their tokens.
    sets = (kind.continuation for kind in kinds.values())
    hidden = continuation_hidden(model, batch.prompts.encoded(features_BRD), *sets, packed=backbone.packed_rows)
    means = {}
    for (name, kind), h_BGCD in zip(kinds.items(), hidden, strict=True):
        logprob_BGC, _ = token_logprobs(model, h_BGCD, kind.continuation.id_BGC, temperature=1.0)
        total = jnp.sum(jnp.where(kind.loss_mask_BGC, logprob_BGC, 0.0))
        means[name] = -total / jnp.maximum(tokens_in_loss[name], 1)
    loss: Any = sum(shares[name] * mean for name, mean in means.items())
    return loss, {f"loss/{name}": mean for name, mean in means.items()}


def make_sft_step(
    backbone: Backbone, optimizer: Any, config: SftConfig, towers_trained: bool
) -> Callable[[TrainState, SftBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted `step(state, batch) -> (state, metrics)`; the state is donated."""

    def sft_step(state: TrainState, batch: SftBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        # Tokens of the whole step, before it is cut: micro-batches then add up to the step's mean, however they fall.
        kinds = {"slow": batch.slow} | ({"fast": batch.fast} if batch.fast is not None else {})
        counts = {name: jnp.sum(kind.loss_mask_BGC, dtype=jnp.float32) for name, kind in kinds.items()}
        trained, frozen = state.split()

        def loss(trained: Params, micro_batch: SftBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
            with dropout_of(backbone, state.step, micro_batch.prompts):
                return sft_loss(backbone, trained | frozen, micro_batch, counts, config.fast_fraction, towers_trained)

        with backbone.rules():
            value, metrics, gradients = accumulate(loss, trained, batch, config.gradient_accumulation_steps)
        state, update_metrics = apply_gradients(state, gradients, value, optimizer, config.optimizer.dtype)
        return state, {"loss": value} | metrics | update_metrics

    return jax.jit(sft_step, donate_argnums=0, compiler_options=compiler_options(backbone))


class TargetError(ValueError):
    """SFT targets that cannot be used; every record is named."""


@dataclasses.dataclass(frozen=True)
class TargetIds:
    """One record's targets as token ids, each with the tokens that are in the loss."""

    slow: tuple[np.ndarray, np.ndarray]
    fast: tuple[np.ndarray, np.ndarray] | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SftPhase(Phase[SftConfig]):
    """The SFT phase of a run with the targets of its records, all of them checked before anything compiles.

    Attributes:
        targets: by record id.
        lengths: padded tokens of slow and of fast targets; 0 for fast ones where none are mixed in.
    """

    targets: dict[str, TargetIds]
    lengths: tuple[int, int]

    @classmethod
    def of(cls, config: RunConfig, records: tuple[Record, ...], backbone: Backbone, tags: AnswerTags) -> SftPhase:
        """The phase of these records.

        Raises:
            ConfigError, TargetError: settings or targets that cannot be used.
        """
        parts = phase_parts(config, "sft", records, backbone)
        targets, lengths = _all_targets(records, tags, config.sft)
        return cls(**parts, targets=targets, lengths=lengths)

    def make_step(self) -> Callable[[TrainState, SftBatch], tuple[TrainState, dict[str, jax.Array]]]:
        """The jitted `step(state, batch) -> (state, metrics)` of this phase, one whoever asks; the state is donated."""
        return self._step

    @functools.cached_property
    def _step(self) -> Callable[[TrainState, SftBatch], tuple[TrainState, dict[str, jax.Array]]]:
        return make_sft_step(self.backbone, self.optimizer, self.config, self.towers_trained)

    def batch(self, loaded: Sequence[LoadedItem]) -> tuple[SftBatch, int]:
        """The host batch of a step, and how many real tokens it has."""
        rows, tokens = loaded_rows(loaded, self.buckets, self.backbone.config)
        # A broken clip keeps its row but gets no targets, so nothing of it is in the loss.
        targets = [self.targets[visit.record.id] if visit.clips else None for visit in loaded]
        count = rows.uid_B.shape[0]
        # [B, 1, C]: one continuation of each kind a prompt, padded to the longest target of the whole phase.
        slow = _pad([target and target.slow for target in targets], count, self.lengths[0])
        fast = _pad([target and target.fast for target in targets], count, self.lengths[1]) if self.lengths[1] else None
        tokens += sum(int(kind.continuation.exists_BGC.sum()) for kind in (slow, fast) if kind is not None)
        return SftBatch(prompts=rows, slow=slow, fast=fast), tokens


def _all_targets(
    records: Sequence[Record], tags: AnswerTags, config: SftConfig
) -> tuple[dict[str, TargetIds], tuple[int, int]]:
    """Every record's targets by id, and the padded lengths of slow and fast ones (0: no fast targets)."""
    targets, problems = {}, []
    # Every record is tried before the error is raised, so that one start names all targets that need mending.
    for record in records:
        try:
            reasoning, answer = record.target_reasoning, record.target_answer
            assert reasoning is not None and answer is not None, f"{record.where}: read for SFT, which wants both"
            slow = tags.slow_target(reasoning, answer)
            # Only slow answers have a demonstration; the fast target lists the truth's words.
            fast = tags.fast_target(", ".join(record.solution)) if config.fast_fraction else None
        except TagError as error:
            problems.append(f"{record.where}: {record.id}: {error}")
            continue
        cap = config.max_completion_length
        longest = max(len(slow[0]), len(fast[0]) if fast else 0)
        if longest > cap:
            problems.append(
                f"{record.where}: {record.id}: its target has {longest} tokens, expected at most "
                f"sft.max_completion_length={cap}; shorten it or raise the cap"
            )
        targets[record.id] = TargetIds(slow, fast)
    if problems:
        more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        raise TargetError(
            f"{len(problems)} of {len(records)} SFT targets cannot be used:\n  "
            + "\n  ".join(problems[:MAX_LISTED] + more)
        )

    def padded(kind: str) -> int:
        longest = max(
            (len(getattr(target, kind)[0]) for target in targets.values() if getattr(target, kind)), default=0
        )
        return -(-longest // LENGTH_STEP) * LENGTH_STEP

    return targets, (padded("slow"), padded("fast"))


def _pad(targets: Sequence[tuple[np.ndarray, np.ndarray] | None], rows: int, length: int) -> Targets:
    """Targets as arrays [rows, 1, length]; None leaves a row empty."""
    id_BGC = np.zeros((rows, 1, length), np.int32)
    exists_BGC, loss_mask_BGC = np.zeros(id_BGC.shape, bool), np.zeros(id_BGC.shape, bool)
    for row, target in enumerate(targets):
        if target is not None:
            ids, in_loss = target
            id_BGC[row, 0, : len(ids)], loss_mask_BGC[row, 0, : len(ids)] = ids, in_loss
            exists_BGC[row, 0, : len(ids)] = True
    return Targets(continuation=Continuations(id_BGC=id_BGC, exists_BGC=exists_BGC), loss_mask_BGC=loss_mask_BGC)
