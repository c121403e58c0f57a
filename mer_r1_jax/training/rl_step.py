"""One RL step of MER-R1, top to bottom: encode, sample, score the reference, read the answers, score them slow and
fast, make advantages, update. docs/method.md has the formulas.

    RlStep.rollout   the step up to its experience, in the order of the method
    rollout (of rl/rollout.py), score, logprobs, group_advantages, cut_minibatch, update
                     the programs: pure functions of arrays, in the order in which the step calls them
    RlPrograms       the one table in which they are jitted; the planner (planning/programs.py) reads the same table

A prompt is computed once for all its completions. Frozen towers are encoded once a step and their features shared by
every program; trained ones are encoded again inside the update's gradient.

Shape letters are those of `omni/batch.py`: B prompts, T tokens of a prompt, G completions of a prompt, C tokens of a
completion, D model width; and of `rl/confidence.py`: W words of an answer, Q emotion wheels, Z candidate sets of Y
tokens. In a run of several processes B counts, on the host, the prompts that this process loads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax import faults
from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.data.prefetch import LoadedItem
from mer_r1_jax.faults import StopRequested
from mer_r1_jax.omni.batch import Array, AudioClips, BatchShape, Prompts, VisionClips
from mer_r1_jax.parallel.rows import local_rows, moved, put, row_shardings, row_share, split_rows
from mer_r1_jax.parallel.rules import DECODE_RULES, TRAIN_RULES, halfway, replicated
from mer_r1_jax.rl import compaction
from mer_r1_jax.rl.advantage import Rewards, advantages, arm_of, permute_within_groups, zero_spread
from mer_r1_jax.rl.bound_model import BoundModel
from mer_r1_jax.rl.confidence import (
    Anchors,
    AskedWords,
    asked_logprobs,
    calibration,
    calibration_loss,
    calibration_words,
    confidence_metrics,
    confidences,
)
from mer_r1_jax.rl.losses import (
    PolicyTargets,
    loss_mask,
    loss_temperature,
    policy_loss,
    step_totals,
    token_logprobs,
)
from mer_r1_jax.rl.packing import Continuations, continuation_hidden
from mer_r1_jax.rl.reward_funcs import RewardFunctions, Sample, Scored
from mer_r1_jax.rl.rollout import Completions, Sampled, rollout
from mer_r1_jax.rl.sampling import SamplingConfig
from mer_r1_jax.rl.scoring import AnswerScorer, ScoredGroups
from mer_r1_jax.training import chunked
from mer_r1_jax.training.backbone import Backbone, compiler_options
from mer_r1_jax.training.dropout import dropout_of
from mer_r1_jax.training.prompts import loaded_rows
from mer_r1_jax.training.rollout_log import RolloutLog, advantage_metrics, completions_table, mean_of, reward_metrics
from mer_r1_jax.training.state import Params, TrainState, accumulate, apply_gradients
from mer_r1_jax.training.stopping import NEVER, Stop

SEED_STREAMS = {"rollout": 1, "permute": 2}  # folded into the run's seed, so that streams of random bits never meet
Watch = Callable[[Sampled], None]  # is shown what a rollout has sampled so far


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Experience:
    """One rollout, ready to be learnt from: what `update` takes.

    Attributes:
        prompts: encoded where the towers are frozen; with their clips where a tower is trained.
        completion: the sampled completions, as a set of a packed row.
        targets: advantages, masks and the log-probabilities that the policy's own are held against.
        sampling_logprob_BGC: float32, under the distribution each token was drawn from; for a metric and a correction.
        anchors: answer words and fast contexts, for the arm with a calibration loss; None otherwise.
        candidate_ids_ZY: int32, the candidate sets of those anchors; None otherwise.
        rollout_mean_tokens: float32 scalar of a minibatch, tokens in the loss of the whole rollout over its number of
            minibatches; None where the rollout is one.
    """

    prompts: Prompts
    completion: Continuations
    targets: PolicyTargets
    sampling_logprob_BGC: Array
    anchors: Anchors | None = None
    candidate_ids_ZY: Array | None = None
    rollout_mean_tokens: Array | None = None


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What one rollout gives.

    Attributes:
        experience: for the update, or for several (`RlPrograms.minibatch`).
        metrics: scalars, on host or device; over all processes on the first one.
        table: columns of the sampled completions, likewise.
        tokens: real tokens of this process's prompts and completions.
    """

    experience: Experience
    metrics: dict[str, Any]
    table: dict[str, list[Any]]
    tokens: int


# ----------------------------------------------------------------------------------------------------------- the step


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RlStep:
    """Makes experience with the policy as it is. One step is `rollout` and then the jitted `update`; with
    `rl.steps_per_generation` and `rl.num_iterations` several updates follow one rollout.

    Attributes:
        config: the settings of RL.
        programs: the jitted programs.
        scorer: reads and scores answers on the host.
        candidate_ids_ZY: int32, the token sets that a word's confidence sums over.
        reward_funcs: the user's reward functions; None without any.
        buckets: shapes that batches of prompts are padded to.
        seed: of the run.
        towers_trained: whether RL trains a tower, which is then encoded inside the gradient.
    """

    config: RlConfig
    programs: RlPrograms
    scorer: AnswerScorer
    candidate_ids_ZY: np.ndarray
    reward_funcs: RewardFunctions | None
    buckets: Sequence[BatchShape]
    seed: int
    towers_trained: bool = False

    def rollout(
        self,
        params: Params,
        reference: Params | None,
        loaded: Sequence[LoadedItem],
        rollout_step: int,
        stop: Stop = NEVER,
    ) -> Rollout:
        """Samples and scores the groups of one rollout's prompts.

        Args:
            params: of the policy.
            reference: parameters of the reference, without adapters where they are switched off; None when there is
                no KL term.
            loaded: the rollout's prompts; a broken clip's row stays, empty.
            rollout_step: how many rollouts came before.
            stop: asked between the parts, and while the device or a reward function is waited for.

        Raises:
            StopRequested: a signal left the rollout.
        """
        stop.check()
        config, programs, mesh = self.config, self.programs, self.programs.backbone.mesh
        clock = _Clock()

        # 1. Prompts, padded to the smallest bucket that holds all of them: tokens [B, T] and the clips' tensors.
        host_prompts, prompt_tokens = loaded_rows(loaded, self.buckets, programs.backbone.config)
        with_clips = put(host_prompts, mesh)

        # 2. Encode: the towers' features [B, R, D] take the place of the clips in everything that follows.
        prompts = programs.encode(params, with_clips)

        # 3. Sample G completions of every prompt. A sample's random bits follow from the run's seed, the rollout, the
        #    visit of the clip, the generation and the token, so a resumed run draws the same ones on any mesh.
        key = self.sampling_key(rollout_step)
        with programs.rollout_params(params) as decoding:
            completions = programs.sample(decoding, prompts, key, stop=stop)
        completion = Continuations(id_BGC=completions.id_BGC, exists_BGC=completions.exists_BGC)
        host: Completions = local_rows(completions, mesh)
        clock.lap("timing_s/gen")

        # 4. Log-probabilities [B, G, C] under the reference, for the KL term; under the policy that sampled, where more
        #    than one update is made from this rollout. (The first one takes its own, with the gradient stopped.) They
        #    need nothing of what the host finds, so the device computes them while it reads.
        reference_logprob_BGC = old_logprob_BGC = None
        if reference is not None:
            # Frozen towers are the policy's own, so their features are the reference's too.
            seen = programs.encode(reference, with_clips) if self.towers_trained else prompts
            reference_logprob_BGC = programs.logprobs(reference, seen, completion)
            del seen
        if config.updates_per_rollout > 1:
            old_logprob_BGC = programs.logprobs(params, prompts, completion)
        clock.lap("timing_s/reference")

        # 5. Read the answers on the host: words, recall, precision, F1 and format of each, and its anchors (where its
        #    words are predicted, and the same answer once more behind an empty think block).
        truths = [visit.record.solution if visit.clips else None for visit in loaded]
        truths += [None] * (len(host_prompts.uid_B) - len(truths))  # rows that only pad the batch
        groups = self.scorer.groups(host, truths)
        stop.check()
        clock.lap("timing_s/reward")

        # 6. Score the anchors with and without the reasoning: log-probabilities [B, G, W, Q] of the words' categories,
        #    in nats, both from one forward pass. The user's reward functions run while the device does.
        anchors = put(groups.anchors, mesh)
        slow, fast = programs.score(params, prompts, completion, anchors, self.candidate_ids_ZY)
        clock.lap("timing_s/score")
        custom: dict[str, Scored] = {}
        with contextlib.suppress(StopRequested):  # where a call was left, the check that follows raises it everywhere
            custom = self._custom_rewards(loaded, groups, host, stop)
        stop.check()
        if custom:
            clock.lap("timing_s/reward_funcs")
        if reference_logprob_BGC is not None:
            stop.wait(reference_logprob_BGC)
            jax.block_until_ready(reference_logprob_BGC)
        clock.lap("timing_s/reference")  # what the host's work did not hide

        # 7. Advantages [B, G]: each reward normalised within its group, then added as the arm says. The method's:
        #    A = z(R_R) + z(R_P) + lambda (z(R+) + z(R-)) + w z(R_F).
        custom_BG = tuple(scored.grid(host.length_BG.shape) for scored in custom.values())
        rewards = put(dataclasses.replace(groups.rewards, custom_BG=custom_BG), mesh)
        shuffle = jax.random.fold_in(self._stream("permute"), rollout_step)
        scores, scalars = programs.advantages(rewards, anchors, (slow, fast), shuffle, config=config)
        stop.wait(scores)
        jax.block_until_ready(scores)
        clock.lap("timing_s/score")

        # 8. Everything the update needs; it divides by the tokens of the whole step, so nothing is normalised here.
        calibrated = arm_of(config.arm).calibration_loss
        experience = Experience(
            prompts=with_clips if self.towers_trained else prompts,
            completion=completion,
            targets=PolicyTargets(
                advantage_BG=scores["advantage_BG"],
                mask_BGC=loss_mask(completions.mask_BGC, completions.truncated_BG, config.mask_truncated_completions),
                present_BG=completions.length_BG > 0,
                old_logprob_BGC=old_logprob_BGC,
                reference_logprob_BGC=reference_logprob_BGC,
            ),
            sampling_logprob_BGC=completions.sampling_logprob_BGC,
            anchors=anchors if calibrated else None,
            candidate_ids_ZY=self.candidate_ids_ZY if calibrated else None,
        )
        log = RolloutLog(
            answers=[answer for group in groups.answers for answer in group],
            counts=groups.counts,
            table=completions_table(loaded, groups, host, local_rows(scores, mesh), rollout_step),
            custom=custom,
        ).of_all_processes(row_share(mesh).leader)
        return Rollout(
            experience=experience,
            metrics=log.metrics | scalars | clock.laps,
            table=log.columns,
            tokens=prompt_tokens + int(host.length_BG.sum()),
        )

    def sampling_key(self, rollout_step: int) -> jax.Array:
        """The random bits that completions of a rollout are drawn with."""
        return jax.random.fold_in(self._stream("rollout"), rollout_step)

    def _stream(self, name: str) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.seed), SEED_STREAMS[name])

    def _custom_rewards(
        self, loaded: Sequence[LoadedItem], groups: ScoredGroups, host: Completions, stop: Stop
    ) -> dict[str, Scored]:
        """Runs the user's reward functions on the completions that exist, in the order of the table's lines."""
        if self.reward_funcs is None:
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
        return self.reward_funcs.score(samples, stop.asked)


class _Clock:
    """Seconds between laps, added up by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


def beta_at(config: RlConfig, step: int, total_steps: int) -> float:
    """Weight of the KL term at optimizer step t: beta (1 - beta_decay min(1, t / (max_steps / 2))) (MER-R1)."""
    return config.beta * (1 - config.beta_decay * min(1.0, step / max(1.0, 0.5 * total_steps)))


# ------------------------------------------------------------------------------------------------------- the programs


def encode_media(model: BoundModel, vision: VisionClips | None, audio: AudioClips | None) -> Array | None:
    """Features [B, R, D] of clips, in the compute dtype; None when there are none."""
    return model.encode_media(vision, audio)


def cast_params(backbone: Backbone, params: Params) -> Params:
    """Parameters in the dtype of decoding; where they go is said by the table, as the shardings of the result."""
    cast = {name: value.astype(backbone.config.compute_dtype) for name, value in params.items()}
    for name, value in cast.items():
        places = backbone.shardings[name], backbone.decode_shardings[name]
        if (between := halfway(*places)) not in places:
            cast[name] = jax.lax.with_sharding_constraint(value, between)
    return cast


def score(
    model: BoundModel,
    prompts: Prompts,
    completion: Continuations,
    anchors: Anchors,
    candidate_ids_ZY: Array,
    packed: bool,
) -> tuple[Array, Array]:
    """Slow and fast confidences [B, G, W, Q] in nats.

    Completions (slow) and fast contexts are two sets of one forward pass: one code path, dtype and block shape, since
    kernels that differ by 0.01 to 0.07 nats would drown their difference. The logits are untempered, and computed at
    anchors alone.
    """
    slow_BGCD, fast_BGCD = continuation_hidden(model, prompts, completion, anchors.fast, packed=packed)
    return confidences(model, slow_BGCD, fast_BGCD, anchors, candidate_ids_ZY)


def ask(
    model: BoundModel, prompts: Prompts, asked: tuple[AskedWords, ...], candidate_ids_ZY: Array, packed: bool
) -> tuple[Array, ...]:
    """How sure the policy is of words in several texts behind the same prompts: `asked_logprobs` of each. Evaluation's
    part, which has no use for a fast context beside every answer.
    """
    sets = (one.continuation for one in asked)
    hidden = continuation_hidden(model, prompts, *sets, packed=packed)
    return asked_logprobs(model, hidden, asked, candidate_ids_ZY)


def logprobs(model: BoundModel, prompts: Prompts, completion: Continuations, temperature: float, packed: bool) -> Array:
    """Log-probabilities float32 [B, G, C] of completions, of logits / temperature."""
    (h_BGCD,) = continuation_hidden(model, prompts, completion, packed=packed)
    return token_logprobs(model, h_BGCD, completion.id_BGC, temperature=temperature)[0]


def group_advantages(
    rewards: Rewards, anchors: Anchors, slow_fast: tuple[Array, Array], key: Array, config: RlConfig
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Advantages of the arm, and what is logged of the rewards.

    Args:
        rewards: without confidences.
        anchors, slow_fast: what `score` took and gave.
        key: random bits of the control that shuffles rewards.
        config: static.

    Returns:
        advantage_BG, and the calibration rewards plus_BG (R+) and minus_BG (R-) in nats, NaN where invalid; metrics.
    """
    # R+: mean of slow - fast over the answer's correct words; R-: of fast - slow over its wrong ones.
    calibrated = calibration(*slow_fast, anchors)
    rewards = dataclasses.replace(
        rewards,
        plus_BG=calibrated.plus_BG,
        minus_BG=calibrated.minus_BG,
        plus_valid_BG=calibrated.plus_valid_BG,
        minus_valid_BG=calibrated.minus_valid_BG,
    )
    # What is logged is what was earned; the control shuffles afterwards.
    metrics = confidence_metrics(*slow_fast, anchors) | reward_metrics(rewards, config.format_weight)
    earned = rewards
    if config.permute_rewards:
        rewards = permute_within_groups(rewards, key)
    advantage_BG = advantages(config.arm, rewards, config)
    metrics |= advantage_metrics(advantage_BG, rewards, earned, config)
    metrics["frac_reward_zero_std"] = mean_of(
        zero_spread(advantage_BG, rewards.valid_BG), jnp.any(rewards.valid_BG, -1)
    )
    scores = {
        "advantage_BG": advantage_BG,
        "plus_BG": jnp.where(calibrated.plus_valid_BG, calibrated.plus_BG, jnp.nan),
        "minus_BG": jnp.where(calibrated.minus_valid_BG, calibrated.minus_BG, jnp.nan),
    }
    return scores, metrics


def update(
    backbone: Backbone, config: RlConfig, optimizer: Any, state: TrainState, experience: Experience, beta: Array
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step: the clipped policy loss with its KL term, in micro-batches, then AdamW.

    Args:
        backbone, config, optimizer: static.
        state: donated.
        experience: of the whole step.
        beta: float32 scalar, weight of the KL term.
    """
    parts = config.gradient_accumulation_steps
    # Denominators of the whole step: micro-batches divide by them and simply add up, whatever their masks.
    targets = experience.targets
    totals = step_totals(targets.mask_BGC, targets.present_BG, parts, experience.rollout_mean_tokens)
    words = None if experience.anchors is None else calibration_words(experience.anchors)
    trained, frozen = state.split()

    def loss(trained: Params, micro_batch: Experience) -> tuple[Array, dict[str, Array]]:
        model = backbone.bind(trained | frozen)
        prompts, completion, targets = micro_batch.prompts, micro_batch.completion, micro_batch.targets
        if prompts.features_BRD is None:  # a tower is trained: its gradient flows through the features
            prompts = prompts.encoded(model.encode_media(prompts.vision, prompts.audio))

        # One forward pass over prompt and completions, and over the fast contexts where the loss reads those too.
        fast_sets = () if micro_batch.anchors is None else (micro_batch.anchors.fast,)
        with dropout_of(backbone, state.step, prompts):
            h_BGCD, *fast_BGCD = continuation_hidden(
                model, prompts, completion, *fast_sets, packed=backbone.packed_rows
            )
        logprob_BGC, entropy_BGC = token_logprobs(
            model,
            h_BGCD,
            completion.id_BGC,
            temperature=loss_temperature(config),
            entropy_gradient=config.entropy_coef > 0,
        )
        if config.sampler_correction != "none":
            targets = dataclasses.replace(targets, sampling_logprob_BGC=micro_batch.sampling_logprob_BGC)
        value, metrics = policy_loss(logprob_BGC, targets, beta, totals, config, entropy_BGC)
        if micro_batch.anchors is not None:  # the arm `sfcc_loss`: calibration as a loss, beside the advantages
            candidate_ids_ZY = micro_batch.candidate_ids_ZY
            slow, fast = confidences(model, h_BGCD, fast_BGCD[0], micro_batch.anchors, candidate_ids_ZY)
            metrics["calibration_loss"] = calibration_loss(slow, fast, micro_batch.anchors, words)
            value = value + config.calibration_weight * metrics["calibration_loss"]

        # Metrics in nats a token. Sampling and scoring run other kernels on the same tokens: their gap should be tiny.
        tokens = jnp.maximum(totals.tokens, 1)
        # A policy that has moved since is not held against its sampler: the one that sampled is.
        old_BGC = logprob_BGC if targets.old_logprob_BGC is None else targets.old_logprob_BGC
        gap_BGC = jnp.where(targets.mask_BGC, jnp.abs(micro_batch.sampling_logprob_BGC - old_BGC), 0.0)
        metrics["entropy"] = jnp.sum(jnp.where(targets.mask_BGC, entropy_BGC, 0.0)) / tokens
        metrics["sampling/sampling_logp_difference/mean"] = jnp.sum(gap_BGC) / tokens
        return value, jax.lax.stop_gradient(metrics)

    with backbone.rules():
        value, metrics, gradients = accumulate(loss, trained, experience, parts)
    state, update_metrics = apply_gradients(state, gradients, value, optimizer, config.optimizer.dtype)
    return state, {"loss": value} | metrics | update_metrics


def cut_minibatch(backbone: Backbone, experience: Experience, number: Array, parts: int) -> Experience:
    """One of the minibatches that a rollout is cut into: whole groups, as they follow each other in the rollout.

    Args:
        backbone: static; its mesh is what rows are cut over.
        experience: of the rollout: B rows, a multiple of `parts`. A configuration gives it so, as a rollout has
            `rl.prompts_per_step` x `parts` prompts (and `check_rows` sees to it that devices share each part evenly).
        number: int32 scalar, which, from 0; at least 0 and less than `parts`, since one beyond is not refused.
        parts: how many; static.

    Returns:
        B / parts rows, and the rollout's mean number of tokens a part.

    Raises:
        TypeError: rows that `parts` does not divide, when it is traced.
    """
    # In the order of the prompts, which is the same on every mesh: rows move between devices here, once an update.
    cut = jax.tree.map(lambda leaf: leaf[number], split_rows(experience, parts))
    cut = jax.tree.map(jax.lax.with_sharding_constraint, cut, row_shardings(cut, backbone.mesh))
    tokens = jnp.sum(experience.targets.mask_BGC, dtype=jnp.float32)
    return dataclasses.replace(cut, rollout_mean_tokens=tokens / parts)


# ---------------------------------------------------------------------------------------------------------- the table


class RlPrograms:
    """Every jitted program of RL and of evaluation, for one backbone and one set of static settings.

    Each takes parameters first, and arrays after them; static arguments (named at each) come last.

    Args:
        backbone: of the policy.
        config: the settings of RL.
        sampling: how the training rollout samples.
    """

    def __init__(self, backbone: Backbone, config: RlConfig, sampling: SamplingConfig):
        self.backbone, self.config = backbone, config
        self.sampling: SamplingConfig = sampling
        self._updates: dict[Any, Callable[..., tuple[TrainState, dict[str, Array]]]] = {}
        mesh, packed = backbone.mesh, backbone.packed_rows
        self.encode_media = self._jit(encode_media)
        self.cast = jax.jit(
            functools.partial(cast_params, backbone),
            out_shardings={name: backbone.decode_shardings[name] for name in backbone.recast},
        )
        self.rollout = self._jit(rollout, decode=True, static_argnums=3)  # sampling
        self.score = self._jit(functools.partial(score, packed=packed))
        self.ask = self._jit(functools.partial(ask, packed=packed))
        self.advantages = jax.jit(group_advantages, static_argnames="config")
        self.cut_minibatch = jax.jit(functools.partial(cut_minibatch, backbone), static_argnames="parts")
        self.logprobs = self._jit(functools.partial(logprobs, temperature=loss_temperature(config), packed=packed))
        # A rollout in chunks (chunked.py). Its state stays where it is and is donated from chunk to chunk.
        self.chunks = chunked.Chunks.on(mesh, config.decode_chunk)
        formats, everywhere = chunked.state_formats(mesh), replicated(mesh)
        of_chunk = {"decode": True, "out_shardings": (formats, everywhere)}
        self.begin = self._jit(chunked.begin, static_argnums=(3, 4), **of_chunk)  # sampling, chunks
        self.go_on = self._jit(  # sampling, chunks, sizes
            chunked.go_on, static_argnums=(2, 3, 4), donate_argnums=1, in_shardings=(None, formats), **of_chunk
        )
        self.compact = jax.jit(  # size
            functools.partial(chunked.compact, mesh),
            static_argnums=2,
            in_shardings=(formats, None),
            out_shardings=(formats, None),
        )
        self.end = jax.jit(functools.partial(chunked.end, mesh), static_argnums=2)  # sampling

    def make_update(self, optimizer: Any) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
        """The jitted `update(state, experience, beta) -> (state, metrics)`; the state is donated.

        One an optimizer, whoever asks: what was compiled for a warm-up is what the run then calls.
        """
        if optimizer not in self._updates:
            step = functools.partial(update, self.backbone, self.config, optimizer)
            options = compiler_options(self.backbone)
            self._updates[optimizer] = jax.jit(step, donate_argnums=0, compiler_options=options)
        return self._updates[optimizer]

    def _jit(self, function: Callable[..., Any], *, decode: bool = False, **settings: Any) -> Callable[..., Any]:
        """Jits a function of (model, *arrays) as one of (params, *arrays), under the rules of training or decoding."""

        def bound(params: Params, *arguments: Any) -> Any:
            with self.backbone.rules(decode=decode):
                return function(self.backbone.bind(params), *arguments)

        return jax.jit(bound, compiler_options=compiler_options(self.backbone, decode=decode), **settings)

    # What needs more than one program, or the host beside them.

    def encode(self, params: Params, prompts: Prompts) -> Prompts:
        """The prompts with their clips' features in the place of the clips."""
        return prompts.encoded(self.encode_media(params, prompts.vision, prompts.audio))

    def minibatch(self, experience: Experience, number: int) -> Experience:
        """What one of the updates of a rollout learns from: all of it with `rl.steps_per_generation` 1, or its part.

        As in TRL the parts are walked through in order, and again for each of `rl.num_iterations`; TRL shuffles the
        completions of a rollout once before it cuts it, while groups stay together here.

        Args:
            experience: of the rollout: `rl.prompts_per_step` x `rl.steps_per_generation` rows, all processes together.
            number: which update of that rollout, from 0 to `rl.updates_per_rollout` - 1.

        Returns:
            `rl.prompts_per_step` rows: where they are all of the rollout's, `experience` itself, nothing copied.
        """
        parts = self.config.steps_per_generation
        return experience if parts == 1 else self.cut_minibatch(experience, np.int32(number % parts), parts)

    @contextlib.contextmanager
    def rollout_params(self, params: Params) -> Iterator[Params]:
        """The parameters as `sample` wants them, while it lasts: in the compute dtype, laid out for decoding.

        What training holds like that already is passed on, so where nothing differs nothing is copied. The copies are
        freed at the end; what still runs with them ends undisturbed.
        """
        recast = {name: params[name] for name in self.backbone.recast}
        cast = self.cast(recast) if recast else {}
        try:
            yield params | cast
        finally:
            for value in cast.values():
                value.delete()

    def sample(
        self,
        params: Params,
        prompts: Prompts,
        key: Array,
        sampling: SamplingConfig | None = None,
        stop: Stop = NEVER,
        watch: Watch | None = None,
    ) -> Completions:
        """Samples completions of every prompt, in one program or, with `rl.decode_chunk`, in chunks of tokens.

        Args:
            params: as `rollout_params` gives them.
            prompts: encoded.
            key: of this rollout; the random bits follow from it and the prompts' identities.
            sampling: the training rollout's unless given.
            stop: asked before every chunk, and while the device is waited for.
            watch: shown what is sampled so far, after every chunk: of the rows that still take part, so of all of them
                where there is one prompt. What it raises leaves the rollout. Without chunks it is never called.

        Raises:
            StopRequested: a signal left the rollout. Where it is not cut into chunks, the device goes on with it for as
                long as this process lives; parameters and optimizer state can be saved meanwhile.
        """
        stop.check()
        how = self.sampling if sampling is None else sampling
        # Rows that stayed as training cuts them would be parted and brought together at every layer of every token.
        prompts = moved(prompts, self.backbone.mesh, DECODE_RULES)
        # A chunk as long as the cap would never give completions a chance to leave early.
        if 0 < self.chunks.tokens < how.max_completion_length:
            completions = self._sample_in_chunks(params, prompts, key, how, stop, watch)
        else:
            completions = self.rollout(params, prompts, key, how)
        faults.here("sampled", how.num_generations)
        # The wait is here, where a signal can end it; to read or to move tokens would block until the program is done.
        stop.wait(completions)
        return moved(completions, self.backbone.mesh, TRAIN_RULES)

    def _sample_in_chunks(
        self,
        params: Params,
        prompts: Prompts,
        key: Array,
        sampling: SamplingConfig,
        stop: Stop,
        watch: Watch | None,
    ) -> Completions:
        sizes = self.chunks.sizes(len(prompts.uid_B), sampling)
        size, kept = sizes[0], None
        state, needed = self.begin(params, prompts, key, sampling, self.chunks)
        while True:
            faults.here("rollout_chunk", sampling.num_generations)
            stop.wait(needed)
            if watch is not None:
                watch(state.sampled)  # before the next chunk, which takes the state's memory
            if not np.any(needed := jax.device_get(needed)):
                break  # every completion has ended
            if (smaller := compaction.smallest(sizes, needed)) != size:
                state, kept = self.compact(state, kept, smaller)
                size = smaller
            state, needed = self.go_on(params, state, sampling, self.chunks, sizes)
        return self.end(state.sampled, kept, sampling)
