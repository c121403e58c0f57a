"""Mistakes a port of the towers and the decoder can make, each planted in the source: the parity cases notice it.

What is compared with the limit is the port with the mistake against transformers, so this also shows that the limits
are not wide enough to let one of them pass.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from flax import nnx
from support.omni_cases import CASES
from support.omni_model import AUDIO, LOGITS, VISION, mutant, quick_jit, tiny_port

from mer_r1_jax.omni import audio, layers, text, vision
from mer_r1_jax.omni.batch import FeatureLayout
from mer_r1_jax.omni.layers import Settings
from mer_r1_jax.omni.thinker import abstract_thinker, bind
from mer_r1_jax.parity.processor_inputs import to_batch
from mer_r1_jax.parity.transformers_reference import run_reference

SETTINGS = Settings("float32", "float32", 0.02)

AUDIO_MISTAKES = {
    "none": [],
    "the first convolution's padding is not zeroed": [
        ("jnp.where(real_NF1, gelu(self.conv1(mel_NFM)), 0.0)", "gelu(self.conv1(mel_NFM))")
    ],
    "the sinusoid runs on from chunk to chunk": [
        (
            "sinusoids(F // 2, self.config.d_model).astype(self.dtype)",
            "jnp.tile(sinusoids(U * F // 2, self.config.d_model).reshape(U, F // 2, -1), (B * A, 1, 1))",
        )
    ],
    "padding frames are attended to": [("(frames_N[:, None] + 1) // 2)", "F // 2 + 0 * frames_N[:, None])")],
    "attention crosses chunks": [
        (
            "(layer(x, segment_Nt), None)",
            "(layer(x.reshape(B * A, U * F // 2, -1), segment_Nt.reshape(B * A, -1)).reshape(x.shape), None)",
        )
    ],
    "an approximate GELU": [("gelu(self.up(x_Ntd))", "jax.nn.gelu(self.up(x_Ntd))")],
    "the convolution's taps are reversed": [("self.kernel[...].astype", "self.kernel[...][::-1].astype")],
}
VISION_MISTAKES = {
    "none": [],
    "windows everywhere": [("jnp.where(full, whole_NS, window_NS)), None", "window_NS), None")],
    "full attention everywhere": [("jnp.where(full, whole_NS, window_NS)), None", "whole_NS), None")],
    "full attention crosses time": [
        (
            "layer(x_NSd, cos_NSh, sin_NSh, jnp.where(full, whole_NS, window_NS)), None",
            "layer(x_NSd.reshape(B * V, P * S, -1), cos_NSh.reshape(B * V, P * S, -1), "
            "sin_NSh.reshape(B * V, P * S, -1), jnp.where(full, whole_NS, window_NS).reshape(B * V, P * S)"
            ").reshape(x_NSd.shape), None",
        )
    ],
    "rows and columns are swapped": [("position_BVS2[..., None].astype", "position_BVS2[..., ::-1, None].astype")],
    "an approximate GELU": [("gelu(self.up(x_NsE))", "jax.nn.gelu(self.up(x_NsE))")],
    "the merger's norm comes after joining": [
        ("self.norm(x_NSd).reshape(x_NSd.shape[0], -1, self.width)",
         "(lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * jnp.tile(self.norm.scale[...], 4))("
         "x_NSd.reshape(x_NSd.shape[0], -1, self.width))")
    ],
}  # fmt: skip
TEXT_MISTAKES = {
    "none": [],
    "all axes follow the time": [("angle_3Y[1, ...", "angle_3Y[0, ..."), ("angle_3Y[2, ...", "angle_3Y[0, ...")],
    "height and width are swapped": [
        ("angle_3Y[1, ...", "angle_3Y[9 - 7, ..."),
        ("angle_3Y[2, ...", "angle_3Y[1, ..."),
    ],
    "sections are interleaved": [
        (
            "        return jnp.cos(angle_Y)",
            "        angle_Y = jnp.stack([angle_3Y[i % 3, ..., i] for i in range(angle_Y.shape[-1])], -1)\n"
            "        return jnp.cos(angle_Y)",
        )
    ],
    "later tokens are seen": [("causal=True", "causal=False")],
    "padding is seen": [("v_BTKh, segment_BT, segment_BT, **options", "v_BTKh, *2 * [segment_BT * 0 + 1], **options")],
    "tanh GELU for SiLU": [("jax.nn.silu(self.gate(x))", "jax.nn.gelu(self.gate(x))")],
    "the final norm is missing": [("return self.norm(h_BTD), cache", "return h_BTD, cache")],
}


def run_tower(module, name: str, clips) -> np.ndarray:
    """Features of a (mutant) tower with the tiny Thinker's weights."""
    port = tiny_port()
    tower = {"audio": "AudioTower", "vision": "VisionTower"}[name]
    config = getattr(port.config, name)
    made = nnx.eval_shape(
        lambda: getattr(module, tower)(config, settings=SETTINGS, remat="everything", rngs=nnx.Rngs(0))
    )
    graphdef, _ = nnx.split(made)
    return np.asarray(quick_jit(lambda params, clips: nnx.merge(graphdef, params)(clips))(port.params[name], clips))


@pytest.mark.parametrize("mistake", AUDIO_MISTAKES)
def test_audio_tower_mistakes_are_noticed(mistake):
    inputs = CASES["odd_audio"]()
    expected = run_reference(tiny_port().reference, inputs)["audio_features"]
    batch, _, _ = to_batch(inputs, tiny_port().config)
    got = run_tower(mutant(audio, *AUDIO_MISTAKES[mistake]), "audio", batch.audio)[0, 0, : len(expected)]
    difference = np.abs(got - expected).max()
    assert difference <= AUDIO if mistake == "none" else difference > 10 * AUDIO, difference


@pytest.mark.parametrize("mistake", VISION_MISTAKES)
def test_vision_tower_mistakes_are_noticed(mistake):
    inputs = CASES["video"]()
    expected = run_reference(tiny_port().reference, inputs)["video_features"]
    batch, _, _ = to_batch(inputs, tiny_port().config)
    got = run_tower(mutant(vision, *VISION_MISTAKES[mistake]), "vision", batch.vision)[0, 0]
    difference = np.abs(got - expected).max()
    assert difference <= VISION if mistake == "none" else difference > 10 * VISION, difference


@pytest.mark.parametrize("mistake", TEXT_MISTAKES)
def test_decoder_mistakes_are_noticed(mistake):
    difference = decoder_difference(mutant(text, *TEXT_MISTAKES[mistake]))
    assert difference <= LOGITS if mistake == "none" else difference > 10 * LOGITS, difference


def test_rotating_neighbours_instead_of_halves_is_noticed():
    wrong = mutant(text)
    wrong.rotate = mutant(
        layers,
        ("first, second = jnp.split(x, 2, axis=-1)", "first, second = x[..., ::2], x[..., 1::2]"),
        (
            "axis=-1)\n\n\ndef stack_layers",
            "axis=-1).reshape(*x.shape[:-1], 2, -1).mT.reshape(x.shape)\n\n\ndef stack_layers",
        ),
    ).rotate
    assert decoder_difference(wrong) > 10 * LOGITS


def decoder_difference(module) -> float:
    """Worst difference of the logits when this (mutant) decoder runs on the port's embeddings."""
    port = tiny_port()
    inputs, batch, expected, x_BTD = decoder_case()
    decoder = nnx.eval_shape(
        lambda: module.TextDecoder(
            port.config.text, tied=False, settings=SETTINGS, remat="everything", rngs=nnx.Rngs(0)
        )
    )
    graphdef, _ = nnx.split(decoder)

    @quick_jit
    def run(params, x_BTD):
        decoder = nnx.merge(graphdef, params)
        h_BTD, _ = decoder.rows(x_BTD, batch.tokens.segment_BT, batch.tokens.position_3BT, keep=False)
        return decoder.logits(h_BTD)

    real_BT = inputs.attention_mask == 1
    return float(np.abs(np.asarray(run(port.params["text"], x_BTD)) - expected)[real_BT].max())


@functools.cache
def decoder_case():
    """(inputs, batch, transformers' logits, the port's embeddings) of a left-padded batch with every kind of medium."""
    port = tiny_port()
    inputs = CASES["left_padded"]()
    batch, _, _ = to_batch(inputs, port.config)
    graphdef = abstract_thinker(port.config)[0]

    @quick_jit
    def embed(params):
        model = bind(graphdef, params)
        return model.embed(batch.tokens, model.encode_media(batch.vision, batch.audio), FeatureLayout.of_batch(batch))

    return inputs, batch, run_reference(port.reference, inputs)["logits"], embed(port.params)
