"""One row = one prompt followed by its completions, which see the prompt and themselves but not each other.

Several sets of continuations of different length share a row (the slow completions and the fast scoring contexts), so
that all of them are scored in one forward pass: one code path, one dtype, one block shape. With 2048 prompt tokens and
4 x 300 completion tokens this is 2.9 times fewer tokens than four full rows.

Shape letters are those of `mer_r1_jax.omni.batch`; C differs from set to set.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mer_r1_jax.omni.batch import PADDING, PROMPT, Array, Prompts, Tokens
from mer_r1_jax.rl.bound_model import BoundModel
from mer_r1_jax.rl.rollout import hidden_at, last_prompt_index


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuations:
    """A set of token sequences that continue the prompts of a batch.

    Attributes:
        id_BGC: int32 token ids.
        exists_BGC: bool, True for the tokens that exist; each sequence is right-padded.
    """

    id_BGC: Array
    exists_BGC: Array


def pack(prompt: Tokens, next_position_B: Array, *sets: Continuations) -> Tokens:
    """Puts every continuation behind its prompt: set after set, generation after generation.

    Args:
        prompt: padded prompts [B, T]; media tokens keep their source.
        next_position_B: int32, the rotary position that follows each prompt.
        *sets: continuations of these prompts; each gets segments and positions of its own.

    Returns:
        Tokens [B, T + sum of G * C over the sets]. Continuation tokens are text: the same position on all three axes.

    Raises:
        ValueError: a set has another number of rows than the prompts.
    """
    rows = prompt.id_BT.shape[0]
    ids, segments, positions = [prompt.id_BT], [prompt.segment_BT], [prompt.position_3BT]
    segment = PROMPT + 1
    # A segment of its own keeps each continuation from seeing the others; all go on at the position after the prompt.
    for continuations in sets:
        generations, length = continuations.id_BGC.shape[1:]
        if continuations.id_BGC.shape[0] != rows:
            raise ValueError(f"{continuations.id_BGC.shape[0]} rows of continuations for {rows} prompts")
        segment_G1 = segment + jnp.arange(generations, dtype=jnp.int32)[:, None]
        segment_BGC = jnp.where(continuations.exists_BGC, segment_G1, PADDING)
        position_B1C = next_position_B[:, None, None] + jnp.arange(length, dtype=jnp.int32)
        position_BGC = jnp.where(continuations.exists_BGC, position_B1C, 1)  # padding sits at position 1
        ids.append(continuations.id_BGC.reshape(rows, -1))
        segments.append(segment_BGC.reshape(rows, -1))
        positions.append(jnp.broadcast_to(position_BGC.reshape(rows, -1), (3, rows, generations * length)))
        segment += generations
    id_BT = jnp.concatenate(ids, axis=1).astype(jnp.int32)
    added = id_BT.shape[1] - prompt.id_BT.shape[1]
    return Tokens(
        id_BT=id_BT,
        segment_BT=jnp.concatenate(segments, axis=1).astype(jnp.int32),
        position_3BT=jnp.concatenate(positions, axis=2).astype(jnp.int32),
        source_BT2=jnp.concatenate([prompt.source_BT2, jnp.full((rows, added, 2), -1, jnp.int32)], axis=1),
    )


def predictor_hidden(h_BTD: Array, prompt: Tokens, *sets: Continuations) -> tuple[Array, ...]:
    """The hidden state that predicts each continuation token, for every set of a packed row.

    The first token of a continuation is predicted by the prompt's last token, every other one by its predecessor.

    Args:
        h_BTD: hidden states of `pack(prompt, ..., *sets)`.
        prompt: the prompts that were packed.
        *sets: the sets that were packed, in the same order.

    Returns:
        One array [B, G, C, D] per set.
    """
    rows, width = h_BTD.shape[0], h_BTD.shape[-1]
    first_BD = hidden_at(h_BTD, last_prompt_index(prompt))
    offset = prompt.id_BT.shape[1]
    hidden = []
    for continuations in sets:
        generations, length = continuations.id_BGC.shape[1:]
        own_BGCD = h_BTD[:, offset : offset + generations * length].reshape(rows, generations, length, width)
        first_BG1D = jnp.broadcast_to(first_BD[:, None, None], (rows, generations, 1, width))
        # One place to the right: token c - 1 predicts token c, and nobody asks what the last one predicts.
        hidden.append(jnp.concatenate([first_BG1D, own_BGCD[:, :, :-1]], axis=2))
        offset += generations * length
    return tuple(hidden)


def continuation_hidden(model: BoundModel, prompts: Prompts, *sets: Continuations, packed: bool) -> tuple[Array, ...]:
    """The hidden state that predicts each token of every set, each prompt computed once.

    Args:
        model: the policy, or the reference.
        prompts: encoded prompts (`Prompts.encoded`).
        *sets: continuations of these prompts.
        packed: True computes one row of prompt and all continuations, for attention that skips what the mask forbids;
            False computes the continuations against the prompt's keys and values, which needs no such attention: with
            plain XLA a packed row pays for every pair of completions that do not see each other. Either way all sets go
            through one call, in one block shape.

    Returns:
        One array [B, G, C, D] per set.

    Raises:
        ValueError: rows are not packed, and the sets have different G.
    """
    tokens, next_position_B = prompts.tokens, prompts.next_position_B
    if packed:
        h_BTD = model.hidden(pack(tokens, next_position_B, *sets), prompts.features_BRD, prompts.layout)
        return predictor_hidden(h_BTD, tokens, *sets)
    if len(counts := {one.id_BGC.shape[1] for one in sets}) > 1:
        raise ValueError(f"sets of {sorted(counts)} continuations a prompt: expected as many in each, or packed=True")
    h_BTD, cache = model.prefill(tokens, prompts.features_BRD, prompts.layout)
    first_BD = hidden_at(h_BTD, last_prompt_index(tokens))
    # Side by side [B, G, sum of C]: nothing is padded to the length of another set, and kernels see one shape.
    ids, segments, positions = [], [], []
    for number, one in enumerate(sets):
        position_B1C = next_position_B[:, None, None] + jnp.arange(one.id_BGC.shape[2], dtype=jnp.int32)
        ids.append(one.id_BGC)
        segments.append(jnp.where(one.exists_BGC, PROMPT + 1 + number, PADDING))
        positions.append(jnp.where(one.exists_BGC, position_B1C, 1))
    id_BGC, segment_BGC, position_BGC = (jnp.concatenate(parts, axis=2) for parts in (ids, segments, positions))
    h_BGCD = model.contexts(id_BGC, segment_BGC, position_BGC, cache)
    first_BG1D = jnp.broadcast_to(first_BD[:, None, None], (*h_BGCD.shape[:2], 1, h_BGCD.shape[3]))
    hidden, offset = [], 0
    for one in sets:
        own_BGCD = h_BGCD[:, :, offset : offset + one.id_BGC.shape[2]]
        hidden.append(jnp.concatenate([first_BG1D, own_BGCD[:, :, :-1]], axis=2))
        offset += one.id_BGC.shape[2]
    return tuple(hidden)
