"""SFT and RL of the lab: all arms and seeds are one program, each step of which is a step of every run.

Sampling and updates are vmapped over arms and seeds. What an arm makes of its answers is the product's own: formulas
of `rl.advantage` on calibration rewards of `rl.confidence`, through the policy loss of `rl.losses`.

Shape letters: A arms, S seeds; of one run B prompts, G answers of each, P tokens of a completion, W words of an answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.lab import tiny_policy
from mer_r1_jax.lab.scenes import SCORES, SETS, SKIPPED, STOP, Clips, Demonstrations
from mer_r1_jax.lab.worlds import ANSWER_WORDS, LabConfig
from mer_r1_jax.omni.batch import Array
from mer_r1_jax.rl.advantage import Arm, Rewards, advantages, arm_of
from mer_r1_jax.rl.confidence import NO_SET, Anchors, Calibration, calibration, calibration_loss, calibration_words
from mer_r1_jax.rl.losses import PolicyTargets, policy_loss, step_totals
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.rl.sampling import SamplingConfig
from mer_r1_jax.training.rl_step import beta_at
from mer_r1_jax.training.state import Params, make_optimizer

CANDIDATES = ("category", "word")  # what a confidence sums over, in the order of `tiny_policy.confidences`
_SFT_STREAM, _RL_STREAM = 1, 2  # of random numbers of a seed
# What is kept of every step: means of the rewards; their spread within groups; how the advantage correlates with the
# number of categories named (its drift, which tells where an arm will end up); KL to the policy after SFT.
SAMPLED = ("f1", "recall", "precision", "recall_spread", "precision_spread", "drift", "kl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabArm:
    """An arm as it is compared here.

    Attributes:
        name: as asked for: `mer_r1`, `mer_r1@1` (with calibration weight 1), `my_module.my_advantage`, `permuted`.
        arm: what the product calls it.
        config: of its advantages.
        permuted: its rewards are handed out at random within each group: the control.
    """

    name: str
    arm: str
    config: RlConfig
    permuted: bool = False

    @property
    def known(self) -> Arm:
        """What the product knows about it."""
        return arm_of(self.arm)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """Random numbers of one step of a run, the same for every arm.

    Attributes:
        row_B: int32, the clips.
        uniform_PBG: float32 in [0, 1), one for each token.
        order_BG: int32, an order of each group's answers, for the control.
    """

    row_B: Array
    uniform_PBG: Array
    order_BG: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Sampled answers of one step of a run, and what is known of them before an arm has its say.

    Attributes:
        display_B1: int32 [B, 1, 9], as seen.
        token_BGP: int32, the completions.
        score_3BG: float32, recall, precision and F1.
        named_BG: float32, how many categories were named.
        fast_BGWC: float32, fast confidences in nats; C as CANDIDATES.
        anchors: of the words, the product's.
        calibrations: R+ and R- of each answer, the product's, for each of CANDIDATES.
    """

    display_B1: Array
    token_BGP: Array
    score_3BG: Array
    named_BG: Array
    fast_BGWC: Array
    anchors: Anchors
    calibrations: tuple[Calibration, ...]


# ------------------------------------------------------------------------------------------------------------------ SFT


def fine_tune(config: LabConfig, data: Demonstrations, seeds: Sequence[int]) -> Params:
    """Trains a policy for every seed on slow and fast demonstrations; parameters [S, ...]."""
    sft = config.sft
    optimizer = make_optimizer(sft.optimizer, sft.max_steps)
    fast_rows = round(sft.fast_fraction * sft.prompts_per_step)

    def loss(params: Params, display_N9: Array, slow_NP: Array, fast_NP: Array, row: Array) -> Array:
        fast, slow = row[:fast_rows], row[fast_rows:]
        total = (1 - sft.fast_fraction) * told(params, display_N9[slow], slow_NP[slow], answer_only=False)
        if fast_rows:  # a fast answer's skipped reasoning is given, so nothing is learnt from it
            total += sft.fast_fraction * told(params, display_N9[fast], fast_NP[fast], answer_only=True)
        return total

    def told(params: Params, display: Array, token: Array, answer_only: bool) -> Array:
        """Mean cross-entropy of the demonstrations' tokens, in nats."""
        raw = tiny_policy.logits(params, display, token, config, answer_only=answer_only)
        token = token[..., -raw.shape[-2] :]
        spoken = tiny_policy.spoken(token)
        return -jnp.sum(jnp.where(spoken, _logprob(raw, token), 0.0)) / jnp.sum(spoken)

    @jax.jit
    def run(params: Params, rows_tB: Array, *data: Array) -> Params:
        def step(state, row_B):
            params, opt_state = state
            updates, opt_state = optimizer.update(jax.grad(loss)(params, *data, row_B), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        trained: Any = jax.lax.scan(step, (params, optimizer.init(params)), rows_tB)[0][0]
        return trained

    # Random numbers are NumPy's, made here: a loop that makes them on the device compiles for seconds.
    streams = [np.random.default_rng((seed, _SFT_STREAM)) for seed in seeds]
    params = [tiny_policy.init(config, rng) for rng in streams]
    shape = (sft.max_steps, sft.prompts_per_step)
    rows_StB = np.stack([rng.integers(0, len(data.display_N9), shape, np.int32) for rng in streams])
    everyone = jax.vmap(run, (0, 0, None, None, None))
    stacked = {name: np.stack([one[name] for one in params]) for name in params[0]}
    return everyone(stacked, rows_StB, data.display_N9, data.slow_NP, data.fast_NP)


# ------------------------------------------------------------------------------------------------------------------- RL


def reinforce(
    config: LabConfig, clips: Clips, start_S: Params, seeds: Sequence[int], arms: Sequence[LabArm], *, every: int
) -> Iterator[tuple[int, Params, np.ndarray]]:
    """Trains every arm from every seed's checkpoint. A seed's arms see the same clips and the same random numbers.

    Args:
        config: the experiment.
        clips: to train on, with clean truths.
        start_S: parameters after SFT, the reference too.
        seeds, arms: the runs.
        every: steps between two stops.

    Yields:
        At every stop and at the end: steps so far, parameters [A, S, ...], and SAMPLED of the steps since the last
        stop, float32 [A, S, steps, len(SAMPLED)].
    """
    rl = config.rl
    optimizer = make_optimizer(rl.optimizer, rl.max_steps)
    betas = jnp.asarray([beta_at(rl, step, rl.max_steps) for step in range(rl.max_steps)])
    draws_St = _draws(config, len(clips.truth_N), seeds)
    # Only the arm with a calibration loss has a weight here; where there is none of them the term is not compiled.
    loss_weight_A = jnp.asarray([arm.config.calibration_weight * arm.known.calibration_loss for arm in arms])
    calibrates = any(arm.known.calibration_loss for arm in arms)

    def learn(state, number: Array, reference: Params, draw: Draw, clips: tuple[Array, Array], beta: Array):
        params, opt_state = state
        groups = _groups(params, draw, *clips, config)
        # Every arm's advantage, of which one is kept: arms share most of their terms, which XLA computes once, where a
        # piece of program for each arm would compile for longer than all runs take.
        advantage_BG = jnp.stack([advantage(arm, groups, draw.order_BG) for arm in arms])[number]
        weights = (beta, loss_weight_A[number] if calibrates else None)
        gradients, kl = jax.grad(_loss, has_aux=True)(params, reference, groups, advantage_BG, weights, config)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), _observed(groups, advantage_BG, kl)

    learn_S = jax.vmap(learn, (0, None, 0, 0, None, None))
    learn_AS = jax.vmap(learn_S, (0, 0, None, None, None, None))  # arms share the reference and the random numbers

    def step(t, state, clips, draws_St: Draw, start_S: Params):
        state_AS, log_AStM = state
        draw_S = jax.tree.map(lambda x: x[:, t], draws_St)
        state_AS, observed_ASM = learn_AS(state_AS, jnp.arange(len(arms)), start_S, draw_S, clips, betas[t])
        return state_AS, log_AStM.at[:, :, t % every].set(observed_ASM)

    @jax.jit
    def advance(state, first, last, *given):
        return jax.lax.fori_loop(first, last, lambda t, state: step(t, state, *given), state)

    params_AS = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(arms), *x.shape)), start_S)
    state_AS = (params_AS, jax.vmap(jax.vmap(optimizer.init))(params_AS))
    log_AStM = jnp.zeros((len(arms), len(seeds), every, len(SAMPLED)))
    given = ((clips.display_N9, clips.truth_N), draws_St, start_S)
    for first in range(0, rl.max_steps, every):
        last = min(first + every, rl.max_steps)
        state_AS, log_AStM = advance((state_AS, log_AStM), first, last, *given)
        yield last, state_AS[0], np.asarray(log_AStM[:, :, : last - first])


def advantage(arm: LabArm, groups: Groups, order_BG: Array) -> Array:
    """float32 [B, G], what an arm gives to each sampled answer."""
    found = groups.calibrations[CANDIDATES.index(arm.known.candidates)]
    recall_BG, precision_BG, f1_BG = groups.score_3BG
    everywhere = jnp.ones(recall_BG.shape, bool)
    rewards = Rewards(
        recall_BG=recall_BG,
        precision_BG=precision_BG,
        f1_BG=f1_BG,
        format_BG=jnp.ones_like(f1_BG),  # the policy can say nothing that is not well-formed
        valid_BG=everywhere,
        scored_BG=everywhere,
        plus_BG=found.plus_BG,
        minus_BG=found.minus_BG,
        plus_valid_BG=found.plus_valid_BG,
        minus_valid_BG=found.minus_valid_BG,
    )
    if arm.permuted:
        rewards = jax.tree.map(lambda x_BG: jnp.take_along_axis(x_BG, order_BG, axis=-1), rewards)
    return advantages(arm.arm, rewards, arm.config)


def _draws(config: LabConfig, clips: int, seeds: Sequence[int]) -> Draw:
    """The random numbers of every step, [S, steps, ...]."""
    rl = config.rl
    shape = (rl.max_steps, config.trace_length + ANSWER_WORDS, rl.prompts_per_step, rl.num_generations)
    streams = [np.random.default_rng((seed, _RL_STREAM)) for seed in seeds]
    order = np.broadcast_to(np.arange(rl.num_generations, dtype=np.int32), (*shape[:1], *shape[2:]))
    return Draw(
        row_B=np.stack([rng.integers(0, clips, (rl.max_steps, rl.prompts_per_step), np.int32) for rng in streams]),
        uniform_PBG=np.stack([rng.random(shape, np.float32) for rng in streams]),
        order_BG=np.stack([rng.permuted(order, axis=-1) for rng in streams]),
    )


def _groups(params: Params, draw: Draw, display_N9: Array, truth_N: Array, config: LabConfig) -> Groups:
    """Samples and scores the answers of a run's step."""
    trace = config.trace_length
    display_B1, truth_B1 = display_N9[draw.row_B][:, None], truth_N[draw.row_B][:, None]
    manner = tiny_policy.Manner(training_sampling(config.rl))
    token_BGP, raw = tiny_policy.sample(params, display_B1, draw.uniform_PBG, manner, config)

    # Confidences: the sampled answer once more, behind a skipped reasoning. No second answer is generated.
    word_BGW = token_BGP[..., trace:]
    skipped = token_BGP.at[..., :trace].set(SKIPPED)
    raw_fast = tiny_policy.logits(params, display_B1, skipped, config, answer_only=True)
    slow, fast = tiny_policy.confidences(raw, word_BGW), tiny_policy.confidences(raw_fast, word_BGW)
    category_BGW = tiny_policy.category_of(word_BGW)
    is_true_BGW = (truth_B1[..., None] >> category_BGW) & 1 > 0
    repeat_BGWQ = None
    if config.rl.calibration_counts == "category":  # the first word of each category alone
        same_BGWW = category_BGW[..., :, None] == category_BGW[..., None, :]
        repeat_BGWQ = jnp.any(same_BGWW & np.tri(ANSWER_WORDS, k=-1, dtype=bool), axis=-1)[..., None]
    nothing = jnp.zeros((*word_BGW.shape[:2], 0))
    anchors = Anchors(
        slow_BGW=word_BGW,  # where the words stand is of no use here: their confidences are there already
        fast_BGW=word_BGW,
        set_BGWQ=jnp.where(word_BGW != STOP, category_BGW, NO_SET)[..., None],  # one wheel
        repeat_BGWQ=repeat_BGWQ,
        correct_BGWQ=is_true_BGW[..., None],
        fast=Continuations(id_BGC=nothing, exists_BGC=nothing),
    )
    code_BG = tiny_policy.answer_code(word_BGW)
    return Groups(
        display_B1=display_B1,
        token_BGP=token_BGP,
        score_3BG=jnp.asarray(SCORES)[:, truth_B1, code_BG],
        named_BG=jnp.asarray(SETS.sum(axis=1), jnp.float32)[code_BG],
        fast_BGWC=fast,
        anchors=anchors,
        calibrations=tuple(calibration(slow[..., [c]], fast[..., [c]], anchors) for c in range(len(CANDIDATES))),
    )


def training_sampling(rl: RlConfig) -> SamplingConfig:
    """How RL samples."""
    return SamplingConfig(
        max_completion_length=rl.max_completion_length,
        eos_ids=(STOP,),
        temperature=rl.temperature,
        top_k=rl.top_k,
        top_p=rl.top_p,
        min_p=rl.min_p,
    )


def _loss(
    params: Params,
    reference: Params,
    groups: Groups,
    advantage_BG: Array,
    weights: tuple[Array, Array | None],
    config: LabConfig,
) -> tuple[Array, Array]:
    """The loss of a run's step, and its KL to the reference in nats. Weights: of the KL and of the calibration loss."""
    beta, loss_weight = weights

    def both(params: Params) -> tuple[Array, Array]:
        raw = tiny_policy.logits(params, groups.display_B1, groups.token_BGP, config)
        return raw, _logprob(raw / config.rl.temperature, groups.token_BGP)

    raw, logprob_BGP = both(params)
    mask_BGP = tiny_policy.spoken(groups.token_BGP)
    present_BG = jnp.ones(advantage_BG.shape, bool)
    targets = PolicyTargets(
        advantage_BG=advantage_BG,
        mask_BGC=mask_BGP,
        present_BG=present_BG,
        reference_logprob_BGC=jax.lax.stop_gradient(both(reference)[1]),
    )
    value, metrics = policy_loss(logprob_BGP, targets, beta, step_totals(mask_BGP, present_BG), config.rl)
    if loss_weight is not None:
        words = groups.token_BGP[..., config.trace_length :]
        slow = tiny_policy.confidences(raw[..., config.trace_length :, :], words)[..., :1]
        total = calibration_words(groups.anchors)
        value += loss_weight * calibration_loss(slow, groups.fast_BGWC[..., :1], groups.anchors, total)
    return value, metrics["kl"]


def _observed(groups: Groups, advantage_BG: Array, kl: Array) -> Array:
    """SAMPLED of one step."""
    recall_BG, precision_BG, f1_BG = groups.score_3BG
    named_BG = groups.named_BG - groups.named_BG.mean(axis=-1, keepdims=True)
    scale = jnp.sqrt(jnp.sum(advantage_BG**2) * jnp.sum(named_BG**2))
    drift = jnp.sum(advantage_BG * named_BG) / jnp.maximum(scale, 1e-9)
    spread = [x_BG.std(axis=-1, ddof=1).mean() for x_BG in (recall_BG, precision_BG)]
    return jnp.stack([f1_BG.mean(), recall_BG.mean(), precision_BG.mean(), *spread, drift, kl])


def _logprob(raw: Array, token: Array) -> Array:
    """log-probability of each token. A sum over a one-hot row: the gradient of an indexed read is slow on CPUs."""
    hot = jax.nn.one_hot(token, raw.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(hot, jax.nn.log_softmax(raw), 0.0), axis=-1)
