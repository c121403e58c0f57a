"""Runs the port on the tensors of transformers' processor, to be compared with transformers itself."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.omni.batch import Batch, BatchShape, FeatureLayout
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.thinker import Params, abstract_thinker, bind
from mer_r1_jax.parity.processor_inputs import ProcessorInputs, to_batch


def run_port(
    params: Params,
    config: ThinkerConfig,
    inputs: ProcessorInputs,
    *,
    generate: int = 0,
    shape: BatchShape | None = None,
) -> dict[str, np.ndarray]:
    """Everything the port computes of one input, matrix products in the highest precision the device has.

    Args:
        params: as `load_params` gives them.
        config: their architecture.
        inputs: processor tensors of a batch.
        generate: new tokens to choose greedily; 0 for none.
        shape: sizes to pad the batch to, so that several inputs share a compiled program; the outputs have the sizes of
            the inputs all the same.

    Returns:
        float32 `logits` [batch, length, N], int32 `position_ids` [3, batch, length], as far as present float32
        `audio_features`, `image_features`, `video_features` (packed rows), and with `generate` int32 `greedy_ids`
        [batch, new tokens].

    Raises:
        InputError, PositionError: tensors that do not belong together.
    """
    batch, next_position_B, packing = to_batch(inputs, config, shape)
    rows, length = inputs.input_ids.shape
    with jax.default_matmul_precision("highest"):
        features_BRD, logits_BTN = _forward(config, params, batch)
        outputs = {
            "logits": np.asarray(logits_BTN)[:rows, :length],
            "position_ids": batch.tokens.position_3BT[:, :rows, :length],
        }
        if features_BRD is not None:
            outputs |= packing.pack(np.asarray(features_BRD, np.float32))
        if generate:
            chosen_BC = np.asarray(_greedy(config, generate, params, batch, features_BRD, next_position_B))
            outputs["greedy_ids"] = _as_generate(chosen_BC[:rows], config)
    return outputs


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: ThinkerConfig, params: Params, batch: Batch):
    model = bind(abstract_thinker(config)[0], params)
    features_BRD = model.encode_media(batch.vision, batch.audio)
    h_BTD = model.hidden(batch.tokens, features_BRD, FeatureLayout.of_batch(batch))
    return features_BRD, model.logits(h_BTD)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _greedy(config: ThinkerConfig, count: int, params: Params, batch: Batch, features_BRD, next_position_B):
    """int32 [B, count] most likely tokens, each fed back; what comes after an end token means nothing."""
    model = bind(abstract_thinker(config)[0], params)
    h_BTD, prompt_cache = model.prefill(batch.tokens, features_BRD, FeatureLayout.of_batch(batch))
    B, T = batch.tokens.id_BT.shape
    last_B = T - 1 - jnp.argmax(batch.tokens.segment_BT[:, ::-1] != 0, axis=1)
    h_BD = jnp.take_along_axis(h_BTD, last_B[:, None, None], axis=1)[:, 0]

    def step(carry, slot):
        h_BD, cache = carry
        token_B = jnp.argmax(model.logits(h_BD), axis=-1).astype(jnp.int32)
        position_B1 = (next_position_B + slot)[:, None]
        h_BGD, cache = model.decode(token_B[:, None], position_B1, slot, prompt_cache, cache)
        return (h_BGD[:, 0], cache), token_B

    _, token_CB = jax.lax.scan(step, (h_BD, model.init_cache(B, 1, count)), jnp.arange(count))
    return token_CB.T


def _as_generate(chosen_BC: np.ndarray, config: ThinkerConfig) -> np.ndarray:
    """What transformers' `generate` returns: padding after a row's end token, and no column after the last end."""
    is_end_BC = np.isin(chosen_BC, config.eos_token_ids)
    after_end_BC = np.cumsum(is_end_BC, axis=1) - is_end_BC > 0
    longest = int((~after_end_BC).sum(axis=1).max())
    return np.where(after_end_BC, config.pad_token_id, chosen_BC)[:, :longest].astype(np.int32)
