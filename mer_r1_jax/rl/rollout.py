"""Sampling groups of completions: prefill each prompt once, then a decode loop whose state is one pytree.

Shape letters are those of `mer_r1_jax.omni.batch`; C counts the tokens of a completion, a forced prefix included where
there is one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.omni.batch import PADDING, PROMPT, Array, Prompts, Tokens
from mer_r1_jax.omni.layers import active_mesh, constrain, mesh_axes
from mer_r1_jax.rl.bound_model import BoundModel
from mer_r1_jax.rl.sampling import SamplingConfig, sample, uniforms

# Why a completion ended.
STOP_ABSENT = 0  # the row holds no prompt, so nothing was sampled
STOP_EOS = 1  # an end token was sampled
STOP_LENGTH = 2  # the length cap was reached without one: a truncated completion


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Completions:
    """Sampled completions. Lengths and stop reasons are recorded while sampling, never read off the ids.

    Attributes:
        id_BGC: int32 token ids, the forced prefix first; 0 beyond the length.
        length_BG: int32 tokens, the forced prefix and the end token included.
        mask_BGC: bool, the tokens that were sampled: neither the forced prefix nor what lies beyond the length.
        stop_BG: int32, STOP_EOS, STOP_LENGTH (truncated) or STOP_ABSENT.
        logprob_BGC: float32 log-probability of each sampled token, untempered and over the whole vocabulary.
        sampling_logprob_BGC: float32 log-probability under the distribution it was drawn from: tempered, filtered,
            without the banned tokens. Both are 0 outside the mask.
    """

    id_BGC: Array
    length_BG: Array
    mask_BGC: Array
    stop_BG: Array
    logprob_BGC: Array
    sampling_logprob_BGC: Array

    @property
    def exists_BGC(self) -> Array:
        """bool, the tokens that exist: forced prefix and sampled ones."""
        return jnp.arange(self.id_BGC.shape[-1]) < self.length_BG[..., None]

    @property
    def truncated_BG(self) -> Array:
        """bool, completions that ended at the length cap."""
        return self.stop_BG == STOP_LENGTH


class RolloutError(ValueError):
    """A model that cannot be sampled from; the message says why."""


def check_finite(completions: Completions) -> None:
    """Refuses completions (on the host) that were drawn from scores that are no numbers: their tokens mean nothing.

    Raises:
        RolloutError: saying how many.
    """
    broken_BG = ~np.isfinite(np.asarray(completions.logprob_BGC)).all(axis=-1)
    if broken_BG.any():
        raise RolloutError(
            f"the model's scores are NaN or infinite in {int(broken_BG.sum())} of {broken_BG.size} answers, expected "
            "finite numbers: its weights are damaged, or its training had broken. Use an earlier checkpoint, or copy "
            "the model again"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """What has been sampled so far: as `Completions`, without a forced prefix."""

    id_BGC: Array
    logprob_BGC: Array
    sampling_logprob_BGC: Array
    length_BG: Array
    stop_BG: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutState:
    """Everything a decode loop carries from token to token; donate it when the loop is cut into several calls.

    `step` tokens of every completion are sampled; the last of them is not in the cache yet. `prompt_cache`,
    `uniform_BGC` and `position_B` (the first completion token's) do not change; they travel along so that a call needs
    nothing else.
    """

    step: Array
    sampled: Sampled
    cache: Any
    prompt_cache: Any
    uniform_BGC: Array
    position_B: Array


def rollout(model: BoundModel, prompts: Prompts, key: Array, sampling: SamplingConfig) -> Completions:
    """Samples `sampling.num_generations` completions of every prompt, all inside one jitted program.

    Args:
        model: the policy.
        prompts: encoded prompts (`Prompts.encoded`); an absent row yields nothing.
        key: of this rollout: the run's key with the number of rollouts before it folded in.
        sampling: static.

    Returns:
        Completions with C = len(sampling.forced_ids) + sampling.max_completion_length.
    """
    state = start(model, prompts, key, sampling)
    return finish(advance(model, state, sampling, sampling.max_completion_length).sampled, sampling.forced_ids)


def start(model: BoundModel, prompts: Prompts, key: Array, sampling: SamplingConfig) -> RolloutState:
    """Prefills the prompts and samples every completion's first token. Arguments as of `rollout`."""
    forced_ids, length = sampling.forced_ids, sampling.max_completion_length
    rows, generations = prompts.tokens.id_BT.shape[0], sampling.num_generations
    present_B = jnp.any(prompts.tokens.segment_BT == PROMPT, axis=-1)
    # A forced prefix is the same for the whole group, so it is prefilled with the prompt rather than decoded.
    tokens = append_to_prompt(prompts.tokens, prompts.next_position_B, forced_ids)
    h_BTD, prompt_cache = model.prefill(tokens, prompts.features_BRD, prompts.layout)
    h_BD = hidden_at(h_BTD, last_prompt_index(tokens))
    # The prompt is run once; its last hidden state predicts the first token of each of its G completions.
    h_BGD = jnp.broadcast_to(h_BD[:, None], (rows, generations, h_BD.shape[-1]))
    shape_BGC = (rows, generations, length)
    shape_BG = shape_BGC[:2]
    state = RolloutState(
        step=jnp.zeros((), jnp.int32),
        sampled=Sampled(
            id_BGC=jnp.zeros(shape_BGC, jnp.int32),
            logprob_BGC=jnp.zeros(shape_BGC, jnp.float32),
            sampling_logprob_BGC=jnp.zeros(shape_BGC, jnp.float32),
            length_BG=jnp.zeros(shape_BG, jnp.int32),
            # Truncated until an end token says otherwise: so an unfinished completion is one with STOP_LENGTH.
            stop_BG=jnp.where(present_B[:, None], jnp.full(shape_BG, STOP_LENGTH), STOP_ABSENT).astype(jnp.int32),
        ),
        cache=model.init_cache(rows, generations, length, prompt_cache.k_LBTKh.dtype),
        prompt_cache=prompt_cache,
        # All random numbers at once: none depends on the order in which tokens or chunks are decoded.
        uniform_BGC=uniforms(key, prompts.uid_B, generations, length),
        position_B=prompts.next_position_B + len(forced_ids),
    )
    return _append(model, state, h_BGD, sampling)


def advance(model: BoundModel, state: RolloutState, sampling: SamplingConfig, steps: int) -> RolloutState:
    """Samples up to `steps` further tokens; stops early once every completion has ended.

    Calling it again goes on where it stopped, so a host can cut a long rollout into calls (and donate the state).
    """
    last = jnp.minimum(state.step + steps, sampling.max_completion_length)
    # Before the loop: what it would do anew for every token is done once.
    decode, prompt_cache, cache = model.for_decoding(state.prompt_cache, state.cache)

    # Over all rows of all devices, so that every device leaves the loop at the same token.
    def unfinished(state: RolloutState):
        return (state.step < last) & jnp.any(running(state))

    def step(state: RolloutState) -> RolloutState:
        # The newest token is sampled but not in the cache: `decode` writes its keys and values, and predicts the next.
        slot = state.step - 1
        token_BG = jax.lax.dynamic_index_in_dim(state.sampled.id_BGC, slot, axis=-1, keepdims=False)
        position_BG = jnp.broadcast_to((state.position_B + slot)[:, None], token_BG.shape)
        h_BGD, cache = decode(token_BG, position_BG, slot, state.prompt_cache, state.cache)
        return _append(model, dataclasses.replace(state, cache=cache), h_BGD, sampling)

    ready = dataclasses.replace(state, prompt_cache=prompt_cache, cache=cache)
    done = jax.lax.while_loop(unfinished, step, ready)
    if cache is state.cache:
        return done
    return dataclasses.replace(done, prompt_cache=state.prompt_cache, cache=done.cache.stacked())


def finish(sampled: Sampled, forced_ids: tuple[int, ...] = ()) -> Completions:
    """The completions, once every one of them has ended."""
    # Forced tokens were given, not drawn: no log-probability, no place in the loss.
    forced = len(forced_ids)
    rows, generations, length = sampled.id_BGC.shape
    forced_BGC = jnp.broadcast_to(jnp.asarray(forced_ids, jnp.int32), (rows, generations, forced))
    after = [(0, 0), (0, 0), (forced, 0)]
    absent_BG = sampled.stop_BG == STOP_ABSENT
    return Completions(
        id_BGC=jnp.concatenate([forced_BGC, sampled.id_BGC], axis=-1),
        length_BG=jnp.where(absent_BG, 0, sampled.length_BG + forced),
        mask_BGC=jnp.pad(jnp.arange(length) < sampled.length_BG[..., None], after),
        stop_BG=sampled.stop_BG,
        logprob_BGC=jnp.pad(sampled.logprob_BGC, after),
        sampling_logprob_BGC=jnp.pad(sampled.sampling_logprob_BGC, after),
    )


def append_to_prompt(tokens: Tokens, next_position_B: Array, ids: tuple[int, ...]) -> Tokens:
    """Prompts with the same ids appended to each, behind the padding; absent rows stay absent."""
    if not ids:
        return tokens
    rows, count = tokens.id_BT.shape[0], len(ids)
    present_B1 = jnp.any(tokens.segment_BT == PROMPT, axis=-1, keepdims=True)
    # Behind a shorter prompt's padding: segments and positions say what a token sees, not its place in the row.
    position_BT = next_position_B[:, None] + jnp.arange(count)
    return Tokens(
        id_BT=jnp.concatenate([tokens.id_BT, jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (rows, count))], axis=1),
        segment_BT=jnp.concatenate(
            [tokens.segment_BT, jnp.broadcast_to(jnp.where(present_B1, PROMPT, PADDING), (rows, count))], axis=1
        ),
        position_3BT=jnp.concatenate(
            [tokens.position_3BT, jnp.broadcast_to(position_BT, (3, rows, count)).astype(jnp.int32)], axis=2
        ),
        source_BT2=jnp.concatenate([tokens.source_BT2, jnp.full((rows, count, 2), -1, jnp.int32)], axis=1),
    )


def last_prompt_index(tokens: Tokens) -> Array:
    """int32 [B], where each row's last prompt token is, whichever side the padding is on (0 in an absent row)."""
    index_T = jnp.arange(tokens.id_BT.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(tokens.segment_BT == PROMPT, index_T, 0), axis=-1)


def hidden_at(h_BTD: Array, index_B: Array) -> Array:
    """h [B, D] at one index of each row."""
    return jnp.take_along_axis(h_BTD, index_B[:, None, None], axis=1)[:, 0]


def running(state: RolloutState) -> Array:
    """bool [B, G], completions that have not ended: the cap is the only reason left and not reached yet."""
    return (state.sampled.stop_BG == STOP_LENGTH) & (state.sampled.length_BG == state.step)


def _append(model: BoundModel, state: RolloutState, h_BGD: Array, sampling: SamplingConfig) -> RolloutState:
    """Samples one token for every completion still running and writes it at index `step`."""
    index, sampled = state.step, state.sampled
    uniform_BG = jax.lax.dynamic_index_in_dim(state.uniform_BGC, index, axis=-1, keepdims=False)
    token_BG, logprob_BG, sampling_logprob_BG = _drawn(model, h_BGD, uniform_BG, sampling)
    running_BG = running(state)
    ended_BG = running_BG & jnp.isin(token_BG, jnp.asarray(sampling.eos_ids, jnp.int32))

    # What has ended is decoded along with the rest of its group, and keeps its zeros.
    def write(values_BGC, new_BG):
        new_BG = jnp.where(running_BG, new_BG, 0).astype(values_BGC.dtype)
        return jax.lax.dynamic_update_index_in_dim(values_BGC, new_BG, index, axis=-1)

    sampled = Sampled(
        id_BGC=write(sampled.id_BGC, token_BG),
        logprob_BGC=write(sampled.logprob_BGC, logprob_BG),
        sampling_logprob_BGC=write(sampled.sampling_logprob_BGC, sampling_logprob_BG),
        length_BG=sampled.length_BG + running_BG,
        stop_BG=jnp.where(ended_BG, STOP_EOS, sampled.stop_BG),
    )
    return dataclasses.replace(state, step=index + 1, sampled=sampled)


def _drawn(model: BoundModel, h_BGD: Array, uniform_BG: Array, sampling: SamplingConfig) -> tuple[Array, Array, Array]:
    """The next token of every completion from its hidden state: what `sample` gives, each [B, G].

    Drawing takes a dozen sums over the vocabulary, so on a mesh a token's logits come together once. Devices that hold
    parts of the vocabulary for the same completions exchange them, so that each draws for its share of those; where
    they do not divide, each draws for all of them. S counts completions, row by row. Every place is named, or the
    compiler would bring the unembedding together instead.
    """
    shape_BG = uniform_BG.shape
    logits_SN = constrain(model.logits(h_BGD.reshape(-1, h_BGD.shape[-1])), ("batch", "vocab"))
    shared = _cut("drawn") > _cut("batch") and logits_SN.shape[0] % _cut("drawn") == 0
    place = "drawn" if shared else "batch"
    logits_SN = constrain(logits_SN, (place, None))
    drawn_S = sample(logits_SN, constrain(uniform_BG.reshape(-1), (place,)), sampling)
    first_BG, second_BG, third_BG = (constrain(one_S.reshape(shape_BG), ("batch", "group")) for one_S in drawn_S)
    return first_BG, second_BG, third_BG


def _cut(name: str) -> int:
    """Parts a logical axis is cut into under the active `axis_rules`; 1 when there are none."""
    mesh = active_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in mesh_axes(name))
