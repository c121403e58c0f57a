"""Cached decoding, packed completions and padding: every way of running the same tokens gives the same numbers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.omni_cases import CASES, ROOMY
from support.omni_model import quick_jit, tiny_port

from mer_r1_jax.omni.batch import AudioClips, FeatureLayout, Tokens, VisionClips
from mer_r1_jax.omni.thinker import abstract_thinker, bind
from mer_r1_jax.parity.port import run_port
from mer_r1_jax.parity.processor_inputs import to_batch

G, C = 3, 5  # completions of a prompt, tokens of a completion
CLOSE = dict(atol=2e-4, rtol=0)  # hidden states are of size 3


@functools.cache
def case(name: str = "left_padded"):
    """(prompts as a batch, next_position_B, ids_BGC of random completions)."""
    batch, next_position_B, _ = to_batch(CASES[name](), tiny_port().config)
    B = len(next_position_B)
    return batch, next_position_B, np.random.default_rng(0).integers(0, 470, (B, G, C)).astype(np.int32)


def program(function):
    """`function(model, ...)` jitted over the tiny Thinker's parameters."""
    graphdef = abstract_thinker(tiny_port().config)[0]
    jitted = quick_jit(lambda params, *arguments: function(bind(graphdef, params), *arguments))
    return functools.partial(jitted, tiny_port().params)


def extended(tokens: Tokens, next_position_B, ids: np.ndarray, segment: np.ndarray, offset: np.ndarray) -> Tokens:
    """Rows with more tokens behind them: ids [B, n], their segments and their position after the prompt's end [n]."""
    B, n = ids.shape
    position_Bn = next_position_B[:, None] + offset
    return Tokens(
        id_BT=np.concatenate([tokens.id_BT, ids], axis=1),
        segment_BT=np.concatenate([tokens.segment_BT, np.broadcast_to(segment, (B, n))], axis=1),
        position_3BT=np.concatenate([tokens.position_3BT, np.broadcast_to(position_Bn, (3, B, n))], axis=2),
        source_BT2=np.concatenate([tokens.source_BT2, np.tile([-1, 0], (B, n, 1))], axis=1),
    )


@functools.cache
def separate_rows() -> np.ndarray:
    """h_BGCD of every completion, each run as a row of its own behind its prompt: the plain truth."""
    batch, next_position_B, ids_BGC = case()

    @program
    def hidden(model, tokens):
        features = model.encode_media(batch.vision, batch.audio)
        return model.hidden(tokens, features, FeatureLayout.of_batch(batch))

    rows = [
        hidden(extended(batch.tokens, next_position_B, ids_BGC[:, g], np.ones(C, np.int32), np.arange(C)))[:, -C:]
        for g in range(G)
    ]
    return np.stack(rows, axis=1)


def test_one_prompt_cache_serves_a_group_token_by_token():
    batch, next_position_B, ids_BGC = case()

    @program
    def decode(model):
        features = model.encode_media(batch.vision, batch.audio)
        h_BTD, prompt = model.prefill(batch.tokens, features, FeatureLayout.of_batch(batch))

        def step(cache, slot):
            position_BG = jnp.broadcast_to((next_position_B + slot)[:, None], ids_BGC.shape[:2])
            h_BGD, cache = model.decode(jnp.asarray(ids_BGC)[:, :, slot], position_BG, slot, prompt, cache)
            return cache, h_BGD

        cache, h_CBGD = jax.lax.scan(step, model.init_cache(len(ids_BGC), G, C + 2), jnp.arange(C))
        return h_BTD, h_CBGD.transpose(1, 2, 0, 3), prompt, cache

    h_BTD, h_BGCD, prompt, cache = decode()
    np.testing.assert_allclose(h_BGCD, separate_rows(), **CLOSE)
    text = tiny_port().config.text
    heads = (text.num_key_value_heads, text.head_dim)
    assert prompt.k_LBTKh.shape == (text.num_hidden_layers, *batch.tokens.id_BT.shape, *heads)
    assert cache.v_LBGCKh.shape == (text.num_hidden_layers, len(ids_BGC), G, C + 2, *heads)
    assert not cache.k_LBGCKh[:, :, :, C:].any(), "slots that were not decoded are untouched"


def test_given_completions_are_scored_at_once_against_the_prompt_cache():
    batch, next_position_B, ids_BGC = case()

    @program
    def score(model):
        features = model.encode_media(batch.vision, batch.audio)
        _, prompt = model.prefill(batch.tokens, features, FeatureLayout.of_batch(batch))
        position_BGC = jnp.broadcast_to(next_position_B[:, None, None] + jnp.arange(C), ids_BGC.shape)
        return model.contexts(jnp.asarray(ids_BGC), jnp.ones(ids_BGC.shape, jnp.int32), position_BGC, prompt)

    np.testing.assert_allclose(score(), separate_rows(), **CLOSE)


def packed() -> Tokens:
    batch, next_position_B, ids_BGC = case()
    segment = np.repeat(np.arange(2, 2 + G), C).astype(np.int32)
    return extended(batch.tokens, next_position_B, ids_BGC.reshape(-1, G * C), segment, np.tile(np.arange(C), G))


def test_a_prompt_packed_with_its_completions_equals_separate_rows():
    batch, _, ids_BGC = case()

    @program
    def hidden(model, tokens):
        features = model.encode_media(batch.vision, batch.audio)
        return model.hidden(tokens, features, FeatureLayout.of_batch(batch))

    h_BTD = hidden(packed())
    np.testing.assert_allclose(h_BTD[:, -G * C :].reshape(*ids_BGC.shape, -1), separate_rows(), **CLOSE)
    # Completions do not see each other: another first completion changes no other one.
    other = packed()
    other.id_BT[:, -G * C : -(G - 1) * C] += 1
    np.testing.assert_array_equal(hidden(other)[:, -(G - 1) * C :], h_BTD[:, -(G - 1) * C :])


def test_padding_may_hold_anything():
    """Rubbish in padded media, positions, ids and sources changes no real token, and nothing becomes NaN."""
    port = tiny_port()
    batch, _, _ = to_batch(CASES["left_padded"](), port.config, ROOMY)
    rng = np.random.default_rng(0)
    tokens, vision, audio = batch.tokens, batch.vision, batch.audio
    padding_BT = tokens.segment_BT == 0
    absent_BVP = np.arange(ROOMY.frame_pairs) >= vision.pairs_BV[..., None]
    absent_BVPS = absent_BVP[..., None] | (vision.window_BVS < 0)[:, :, None]
    frame_BAUF = np.arange(ROOMY.audio_units * 200).reshape(ROOMY.audio_units, 200)
    absent_BAUF = frame_BAUF >= audio.frames_BA[..., None, None]
    rubbish = dataclasses.replace(
        batch,
        tokens=Tokens(
            id_BT=np.where(padding_BT, rng.integers(0, 500, padding_BT.shape), tokens.id_BT).astype(np.int32),
            segment_BT=tokens.segment_BT,
            position_3BT=np.where(padding_BT, 77, tokens.position_3BT).astype(np.int32),
            source_BT2=np.where(padding_BT[..., None], 0, tokens.source_BT2).astype(np.int32),
        ),
        vision=VisionClips(
            patches_BVPSX=np.where(absent_BVPS[..., None], np.float32(np.nan), vision.patches_BVPSX),
            position_BVS2=vision.position_BVS2,
            window_BVS=vision.window_BVS,
            pairs_BV=vision.pairs_BV,
        ),
        audio=AudioClips(
            mel_BAUFM=np.where(absent_BAUF[..., None], np.float32(np.inf), audio.mel_BAUFM), frames_BA=audio.frames_BA
        ),
    )

    @program
    def hidden(model, batch):
        features = model.encode_media(batch.vision, batch.audio)
        return model.hidden(batch.tokens, features, FeatureLayout.of_batch(batch)), features

    clean, dirty = hidden(batch), hidden(rubbish)
    np.testing.assert_array_equal(clean[0][~padding_BT], dirty[0][~padding_BT])
    assert all(np.isfinite(array).all() for array in (*clean, *dirty))


def test_features_must_have_the_layout():
    batch, _, _ = case()

    @program
    def hidden(model):
        features = model.encode_media(batch.vision, batch.audio)
        return model.hidden(batch.tokens, features[:, 1:], FeatureLayout.of_batch(batch))

    with pytest.raises(ValueError, match="the layout .* has .* rows"):
        hidden()


def test_layouts_agree():
    batch, _, _ = to_batch(CASES["left_padded"](), tiny_port().config, ROOMY)
    layout = FeatureLayout.of_batch(batch)
    assert layout == FeatureLayout.of_shape(ROOMY) and layout.rows == 2 * 6 * 96 // 4 + 2 * 5 * 50
    got = layout.index(np.array([[-1, 9], [0, 3], [1, 3], [2, 3], [3, 3]]))
    np.testing.assert_array_equal(got, [0, 3, 147, 291, 541])


def test_bfloat16_computes_in_bfloat16():
    """Activations and caches have the compute dtype, logits are float32, and nothing is far from float32."""
    port = tiny_port()
    config = dataclasses.replace(port.config, compute_dtype="bfloat16")
    batch, next_position_B, _ = to_batch(CASES["text"](), config)
    graphdef = abstract_thinker(config)[0]

    @quick_jit
    def run(params):
        model = bind(graphdef, params)
        h_BTD, prompt = model.prefill(batch.tokens, None, FeatureLayout())
        h_BGD, cache = model.decode(jnp.array([[3]]), next_position_B[:, None], 0, prompt, model.init_cache(1, 1, 2))
        return h_BTD, h_BGD, prompt.k_LBTKh, cache.k_LBGCKh, model.logits(h_BGD)

    *halves, logits = run(port.params)
    assert {x.dtype for x in halves} == {jnp.dtype("bfloat16")} and logits.dtype == jnp.float32
    exact = run_port(port.params, port.config, CASES["text"](), generate=0)
    h_BTD = np.asarray(halves[0], np.float32)
    got = np.einsum("BTD,DN->BTN", h_BTD, np.asarray(port.params["text"]["head"]["kernel"]))
    assert np.corrcoef(got.ravel(), exact["logits"].ravel())[0, 1] > 0.99
