"""A tiny random policy, padded prompts for it, and its rollouts and scores, for the tests of `mer_r1_jax.rl`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support.tiny_tokenizer import tiny_tokenizer

from mer_r1_jax.omni.batch import FeatureLayout, Prompts, Tokens
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.thinker import abstract_thinker, bind, init_params
from mer_r1_jax.rl import packing
from mer_r1_jax.rl.rollout import rollout

ROW = 96  # tokens of a row of `row_logits`
LAYOUT = FeatureLayout(audio_clips=1, audio_rows=4)  # every prompt has two audio tokens


@functools.cache
def policy():
    """(config, graphdef, params) of a Thinker whose weights are spread so widely that mistakes show."""
    config = ThinkerConfig.tiny(
        vocab_size=len(tiny_tokenizer()), initializer_range=0.15, eos_token_ids=(tiny_tokenizer().eos_token_id,)
    )
    graphdef, _, _ = abstract_thinker(config)
    return config, graphdef, jax.jit(lambda key: init_params(config, key))(jax.random.key(0))


def bound(params=None):
    """The policy as a module. Inside jit pass the parameters in: closed over, they would be folded as constants."""
    _, graphdef, own = policy()
    return bind(graphdef, own if params is None else params)


def prompts(lengths, width, seed=0):
    """Right-padded prompts and their media: (Tokens, features_BRD, next_position_B). A length of 0 is an absent row.

    What a row holds depends on its length and the seed alone, not on the width or the other rows.
    """
    config = policy()[0]
    tokens, features, next_position = [], [], []
    for length in lengths:
        rng = np.random.default_rng([seed, length])
        ids = np.zeros(width, np.int32)
        source = np.full((width, 2), -1, np.int32)
        position = np.ones((3, width), np.int32)
        ids[:length] = rng.integers(0, 256, length)
        if length:
            source[1:3] = [[0, 3], [0, 1]]
            # As after a video: the height and width axes run ahead of time, and text goes on behind the furthest.
            position[:, :length] = np.arange(length) + np.array([[0], [2], [1]]) * (np.arange(length) == 2)
        segment = (np.arange(width) < length).astype(np.int32)
        tokens.append((ids, segment, position, source))
        features.append(rng.normal(size=(LAYOUT.rows, config.text.hidden_size)).astype(np.float32))
        next_position.append(length + 2 if length else 0)
    ids, segment, position, source = (np.stack(part) for part in zip(*tokens, strict=True))
    rows = Tokens(id_BT=ids, segment_BT=segment, position_3BT=position.transpose(1, 0, 2), source_BT2=source)
    return rows, np.stack(features), np.asarray(next_position, np.int32)


def carried(tokens, features, next_position_B, uid_B=None):
    """The same prompts as programs take them."""
    if uid_B is None:
        uid_B = uids(len(next_position_B))
    return Prompts(tokens=tokens, features_BRD=features, layout=LAYOUT, next_position_B=next_position_B, uid_B=uid_B)


@functools.partial(jax.jit, static_argnames="sampling")
def sampled(params, prompts, key, sampling):
    """`rollout` of the tiny policy, jitted."""
    return rollout(bound(params), prompts, key, sampling)


@functools.partial(jax.jit, static_argnames="packed")
def packed_hidden(params, tokens, features, next_position_B, *sets, packed=True):
    """Hidden states that predict the tokens of each set of continuations, from one forward pass."""
    return packing.continuation_hidden(bound(params), carried(tokens, features, next_position_B), *sets, packed=packed)


@jax.jit
def _one_row(params, tokens, features_BRD):
    model = bound(params)
    return model.logits(model.hidden(tokens, features_BRD, LAYOUT))


def row_logits(tokens, features, next_position_B, row, ids):
    """float32 [len(ids) + 1, N]: the logits that predict each of `ids` behind one prompt, and the next token.

    The plain way: one row, one sequence, no cache, no packing; padding at the end only, so that one program serves all.
    """
    length, added = int(np.sum(tokens.segment_BT[row] == 1)), len(ids)
    count = length + added
    assert count <= ROW
    position = np.ones((3, 1, ROW), np.int32)
    position[:, 0, :length] = tokens.position_3BT[:, row, :length]
    position[:, 0, length:count] = next_position_B[row] + np.arange(added)
    padded_ids, source = np.zeros((1, ROW), np.int32), np.full((1, ROW, 2), -1, np.int32)
    padded_ids[0, :count] = [*tokens.id_BT[row, :length], *ids]
    source[0, :length] = tokens.source_BT2[row, :length]
    alone = Tokens(
        id_BT=padded_ids,
        segment_BT=(np.arange(ROW) < count).astype(np.int32)[None],
        position_3BT=position,
        source_BT2=source,
    )
    return np.asarray(_one_row(policy()[2], alone, features[row : row + 1]))[0, length - 1 : count]


def log_softmax(logits):
    """float64 log-softmax over the last axis."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def uids(count):
    """uint32 [count], prompt numbers."""
    return jnp.arange(count, dtype=jnp.uint32) + 7
