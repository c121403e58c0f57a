"""The jitted programs of one RL step: encode, cast, sample, score, refer, update. Each is a pure function of arrays.

Frozen towers are encoded once and their features shared by every program; trainable ones are encoded again inside the
update's gradient. A row holds a prompt once and all its completions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mer_r1_jax import faults
from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.omni.batch import Array, Batch
from mer_r1_jax.omni.thinker import FeatureLayout, Thinker
from mer_r1_jax.rl import confidence
from mer_r1_jax.rl.losses import PolicyLossConfig, StepTotals, policy_loss, step_totals, token_logprobs
from mer_r1_jax.rl.packing import Continuations, continuation_hidden
from mer_r1_jax.rl.rollout import Completions, rollout
from mer_r1_jax.rl.sampling import SamplingConfig
from mer_r1_jax.training.backbone import Backbone
from mer_r1_jax.training.chunked import ChunkedRollout
from mer_r1_jax.training.sft import accumulate
from mer_r1_jax.training.state import Leaves, TrainState, apply_gradients
from mer_r1_jax.training.stopping import NEVER, Stop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRows:
    """Prompts on the device with what every program needs of them.

    Attributes:
        batch: token rows and media.
        next_position_B: int32 rotary position that follows each prompt.
        uid_B: uint32 identity of each visit of a prompt; the random bits of its completions follow from it.
    """

    batch: Batch
    next_position_B: Array
    uid_B: Array

    @property
    def of_rollout(self) -> dict[str, Any]:
        """What `rl.rollout.rollout` and `start` take of prompts, by the names of their arguments."""
        return {
            "tokens": self.batch.tokens,
            "layout": FeatureLayout.of_batch(self.batch),
            "next_position_B": self.next_position_B,
            "prompt_uid_B": self.uid_B,
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Experience:
    """One rollout, ready to be learnt from.

    Attributes:
        prompts: the prompts.
        features_BRD: media features of frozen towers; None when a tower is trained and encoded inside the gradient.
        completion: the sampled completions, as a set of a packed row.
        loss_mask_BGC: bool, tokens in the loss.
        present_BG: bool, completions that exist.
        advantage_BG: float32.
        sampling_logprob_BGC: float32, under the distribution each token was drawn from.
        reference_logprob_BGC: float32, under the reference; None when there is no KL term.
        old_logprob_BGC: float32, under the policy that sampled; None when that is the policy being updated.
        anchors: answer words and fast contexts, for the arm with a calibration loss; None otherwise.
    """

    prompts: PromptRows
    features_BRD: Array | None
    completion: Continuations
    loss_mask_BGC: Array
    present_BG: Array
    advantage_BG: Array
    sampling_logprob_BGC: Array
    reference_logprob_BGC: Array | None
    old_logprob_BGC: Array | None
    anchors: confidence.Anchors | None


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: its programs are cached on it
class RlPrograms:
    """Every jitted program of RL and of evaluation, for one backbone and one set of static settings."""

    backbone: Backbone
    config: RlConfig
    sampling: SamplingConfig

    def encode(self, leaves: tuple[Leaves, Leaves], batch: Batch) -> Array | None:
        """Media features [B, R, D] of a batch; None when it has no media."""
        return self.encode_program(leaves, batch.vision, batch.audio)

    @functools.cached_property
    def encode_program(self) -> Callable[..., Array | None]:
        """The jitted program of `encode`. Arguments: leaves, vision clips, audio clips."""
        return self._jit(lambda model, vision, audio: model.encode_media(vision, audio))

    @contextlib.contextmanager
    def rollout_weights(self, leaves: tuple[Leaves, Leaves]) -> Iterator[tuple[Leaves, Leaves]]:
        """The parameters as `sample` wants them, while it lasts: in the compute dtype, laid out for decoding.

        What training holds like that already is passed on, so where nothing differs nothing is copied. The copies are
        freed at the end; what still runs with them ends undisturbed.
        """
        cast = self.cast_program(self.recast(leaves)) if self.backbone.recast else {}
        try:
            yield self.with_cast(leaves, cast)
        finally:
            for leaf in cast.values():
                leaf.delete()

    @functools.cached_property
    def cast_program(self) -> Callable[[Leaves], Leaves]:
        """The jitted program of `rollout_weights`. Argument: the leaves that `recast` gives."""
        backbone = self.backbone
        shardings = {name: backbone.decode_shardings[name] for name in backbone.recast}

        def cast(leaves: Leaves) -> Leaves:
            return {name: leaf.astype(backbone.config.compute_dtype) for name, leaf in leaves.items()}

        return jax.jit(cast, out_shardings=shardings)

    def recast(self, leaves: tuple[Leaves, Leaves]) -> Leaves:
        """Those of the parameters that decoding wants in another dtype or another place."""
        return {name: leaf for part in leaves for name, leaf in part.items() if name in self.backbone.recast}

    def with_cast(self, leaves: tuple[Leaves, Leaves], cast: Leaves) -> tuple[Leaves, Leaves]:
        """The parameters with those of `cast` in their place."""
        trainable, frozen = ({name: cast.get(name, leaf) for name, leaf in part.items()} for part in leaves)
        return trainable, frozen

    def sample(
        self,
        weights: tuple[Leaves, Leaves],
        prompts: PromptRows,
        features_BRD: Array | None,
        key: Array,
        rollout_step: Array,
        *,
        generations: int,
        sampling: SamplingConfig | None = None,
        forced_ids: tuple[int, ...] = (),
        stop: Stop = NEVER,
    ) -> Completions:
        """Samples `generations` completions of every prompt; settings are the training rollout's unless given.

        Args:
            weights: the parameters as `rollout_weights` gives them.
            prompts, features_BRD: the prompts, and the media features of their rows.
            key, rollout_step: the random bits follow from them and the prompts' identities.
            generations, sampling, forced_ids: static; as of `rl.rollout.rollout`.
            stop: asked before every chunk, and while the device is waited for.

        Raises:
            StopRequested: a signal left the rollout. Where it is not cut into chunks, the device goes on with it for as
                long as this process lives; parameters and optimizer state can be saved meanwhile.
        """
        stop.check()
        sampling = sampling or self.sampling
        chunked = 0 < self.config.decode_chunk < sampling.max_completion_length
        arguments = weights, prompts, features_BRD, key, rollout_step
        if chunked:
            completions = self.chunked_rollout(generations, sampling, forced_ids)(*arguments, stop)
        else:
            completions = self.sample_program(generations, sampling, forced_ids)(*arguments)
        faults.here("sampled", generations)
        stop.wait(completions)
        return completions

    @functools.cache  # noqa: B019 - as `sample_program`
    def chunked_rollout(
        self, generations: int, sampling: SamplingConfig, forced_ids: tuple[int, ...] = ()
    ) -> ChunkedRollout:
        """`sample` in chunks of `rl.decode_chunk` tokens. Arguments as those of `sample_program`."""
        return ChunkedRollout(self.backbone, sampling, generations, forced_ids, self.config.decode_chunk)

    @functools.cache  # noqa: B019 - one object a run; the cache lives as long as its programs should
    def sample_program(
        self, generations: int, sampling: SamplingConfig, forced_ids: tuple[int, ...] = ()
    ) -> Callable[..., Completions]:
        """The jitted program of `sample`. Arguments: weights, prompts, features_BRD, key, rollout_step."""

        def sample(model: Thinker, prompts: PromptRows, features_BRD, key, rollout_step):
            return rollout(
                model,
                features=features_BRD,
                **prompts.of_rollout,
                key=key,
                rollout_step=rollout_step,
                generations=generations,
                config=sampling,
                forced_ids=forced_ids,
            )

        return self._jit(sample, decode=True)

    @functools.cached_property
    def score(self) -> Callable[..., tuple[Array, Array]]:
        """Slow and fast confidences [B, G, W, Q] in nats, from one forward pass over prompt, completions and contexts.

        Arguments: leaves, prompts, features_BRD, completion (Continuations), anchors, candidate_ids_ZY.
        """

        def score(model: Thinker, prompts: PromptRows, features_BRD, completion, anchors, candidate_ids_ZY):
            slow_h, fast_h = self._hidden(model, prompts, features_BRD, completion, anchors.fast)
            return confidence.confidences(model, slow_h, fast_h, anchors, candidate_ids_ZY)

        return self._jit(score)

    @functools.cached_property
    def logprobs(self) -> Callable[..., Array]:
        """Tempered log-probabilities [B, G, C] of completions: of the reference, or of the policy that sampled.

        Arguments: leaves, prompts, features_BRD, completion (Continuations).
        """

        def logprobs(model: Thinker, prompts: PromptRows, features_BRD, completion: Continuations):
            (h_BGCD,) = self._hidden(model, prompts, features_BRD, completion)
            return token_logprobs(model, h_BGCD, completion.id_BGC, temperature=self.config.temperature)[0]

        return self._jit(logprobs)

    def _hidden(
        self, model: Thinker, prompts: PromptRows, features_BRD: Array | None, *sets: Continuations
    ) -> tuple[Array, ...]:
        """The hidden states [B, G, C, D] that predict the tokens of each set, all through one forward pass."""
        return continuation_hidden(
            model,
            prompts.batch.tokens,
            features_BRD,
            FeatureLayout.of_batch(prompts.batch),
            prompts.next_position_B,
            *sets,
            packed=self.backbone.packed_rows,
        )

    def _jit(self, function: Callable[..., Any], *, decode: bool = False) -> Callable[..., Any]:
        """Jits a function of (model, *arrays) as one of (leaves, *arrays), under the rules of training or decoding."""

        def bound(leaves: tuple[Leaves, Leaves], *arrays: Any) -> Any:
            with self.backbone.rules(decode=decode):
                return function(self.backbone.bind(*leaves), *arrays)

        return jax.jit(bound)

    def make_update(
        self, optimizer: Any, candidate_ids_ZY: Array
    ) -> Callable[[TrainState, Experience, Array], tuple[TrainState, dict[str, Array]]]:
        """The jitted `update(state, experience, beta) -> (state, metrics)`; the state is donated."""
        config, parts = self.config, self.config.gradient_accumulation_steps
        loss_config = policy_loss_config(config)

        def update(state: TrainState, experience: Experience, beta: Array) -> tuple[TrainState, dict[str, Array]]:
            totals = step_totals(experience.loss_mask_BGC, experience.present_BG, parts)
            words = confidence.calibration_words(experience.anchors) if experience.anchors is not None else None

            def loss(trainable: Leaves, micro_batch: Experience):
                model = self.backbone.bind(trainable, state.frozen)
                return self._loss(model, micro_batch, beta, totals, words, loss_config, candidate_ids_ZY)

            with self.backbone.rules():
                value, metrics, gradients = accumulate(loss, state.trainable, experience, parts)
            state, update_metrics = apply_gradients(state, gradients, value, optimizer, config.optimizer.dtype)
            return state, {"loss": value} | metrics | update_metrics

        return jax.jit(update, donate_argnums=0)

    def _loss(
        self,
        model: Thinker,
        experience: Experience,
        beta: Array,
        totals: StepTotals,
        words: Array | None,
        loss_config: PolicyLossConfig,
        candidate_ids_ZY: Array,
    ) -> tuple[Array, dict[str, Array]]:
        prompts, completion, anchors = experience.prompts, experience.completion, experience.anchors
        features_BRD = experience.features_BRD
        if features_BRD is None:
            features_BRD = model.encode_media(prompts.batch.vision, prompts.batch.audio)
        sets = (completion,) if anchors is None else (completion, anchors.fast)
        h_BGCD, *fast_h = self._hidden(model, prompts, features_BRD, *sets)
        logprob_BGC, entropy_BGC = token_logprobs(model, h_BGCD, completion.id_BGC, temperature=self.config.temperature)
        mask_BGC = experience.loss_mask_BGC
        value, metrics = policy_loss(
            logprob_BGC,
            experience.old_logprob_BGC,
            experience.reference_logprob_BGC,
            experience.advantage_BG,
            mask_BGC,
            beta=beta,
            totals=totals,
            config=loss_config,
            present=experience.present_BG,
        )
        if anchors is not None:
            slow, fast = confidence.confidences(model, h_BGCD, fast_h[0], anchors, candidate_ids_ZY)
            calibration = confidence.calibration_loss(slow, fast, anchors, words)
            value = value + self.config.calibration_weight * calibration
            metrics["calibration_loss"] = calibration
        tokens = jnp.maximum(totals.tokens, 1)
        gap_BGC = jnp.where(mask_BGC, jnp.abs(experience.sampling_logprob_BGC - logprob_BGC), 0.0)
        metrics["entropy"] = jnp.sum(jnp.where(mask_BGC, entropy_BGC, 0.0)) / tokens
        metrics["sampling/sampling_logp_difference/mean"] = jnp.sum(gap_BGC) / tokens
        return value, jax.lax.stop_gradient(metrics)


def policy_loss_config(config: RlConfig) -> PolicyLossConfig:
    """The settings of the policy loss."""
    return PolicyLossConfig(
        loss_type=config.loss_type,
        importance_sampling_level=config.importance_sampling_level,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        delta=config.delta or None,
        max_completion_length=config.max_completion_length,
    )


def beta_at(config: RlConfig, step: int, total_steps: int) -> float:
    """Weight of the KL term at optimizer step t: beta (1 - beta_decay min(1, t / (max_steps / 2))) (MER-R1)."""
    return config.beta * (1 - config.beta_decay * min(1.0, step / max(1.0, 0.5 * total_steps)))
