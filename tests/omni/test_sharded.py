"""The Thinker on a mesh of 2 x 2 x 2 devices computes what one device computes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support.omni_cases import PromptMaker, inputs_of
from support.omni_model import quick_jit, tiny_port

from mer_r1_jax.config.schema import MeshConfig
from mer_r1_jax.omni.batch import FeatureLayout
from mer_r1_jax.omni.layers import axis_rules
from mer_r1_jax.omni.thinker import abstract_thinker, bind
from mer_r1_jax.parallel.mesh import make_mesh
from mer_r1_jax.parallel.rules import TRAIN_RULES, on, param_shardings
from mer_r1_jax.parity.processor_inputs import to_batch

G, C = 2, 3


@functools.cache
def prompts():
    """Four rows, so that the batch is cut over data x fsdp."""
    makers = [
        PromptMaker(1).text(3).image(4, 6).text(5),
        PromptMaker(2).text(2).audio(150).text(2),
        PromptMaker(3).text(12),
        PromptMaker(4).text(1).video(2, 4, 4, 1.0).text(2).audio(90).text(3),
    ]
    return to_batch(inputs_of(makers), tiny_port().config)


def step(params, batch, next_position_B):
    """Logits of the prompts, a loss gradient, and the logits of a few decoded tokens."""
    graphdef = abstract_thinker(tiny_port().config)[0]
    layout = FeatureLayout.of_batch(batch)

    def loss(params):
        model = bind(graphdef, params)
        logits = model.logits(model.hidden(batch.tokens, model.encode_media(batch.vision, batch.audio), layout))
        real_BT = batch.tokens.segment_BT != 0
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) * real_BT) / jnp.sum(real_BT), logits

    (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    model = bind(graphdef, params)
    _, prompt = model.prefill(batch.tokens, model.encode_media(batch.vision, batch.audio), layout)

    def token(cache, slot):
        position_BG = jnp.broadcast_to((next_position_B + slot)[:, None], (len(next_position_B), G))
        h_BGD, cache = model.decode(5 + 7 * slot + position_BG % 11, position_BG, slot, prompt, cache)
        return cache, model.logits(h_BGD)

    cache, decoded = jax.lax.scan(token, model.init_cache(len(next_position_B), G, C), jnp.arange(C))
    return logits, gradients, decoded, cache.k_LBGCKh


def test_mesh_equals_one_device():
    port = tiny_port()
    batch, next_position_B, _ = prompts()
    expected = jax.device_get(quick_jit(step)(port.params, batch, next_position_B))

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, shapes, axes = abstract_thinker(port.config)
    params = jax.device_put(port.params, param_shardings(shapes, axes, mesh))
    with axis_rules(on(mesh, TRAIN_RULES), mesh):
        logits, gradients, decoded, cache = quick_jit(lambda *arguments: step(*arguments))(
            params, batch, next_position_B
        )

    real_BT = batch.tokens.segment_BT != 0
    np.testing.assert_allclose(np.asarray(logits)[real_BT], expected[0][real_BT], atol=1e-3)
    np.testing.assert_allclose(decoded, expected[2], atol=1e-3)
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-4 * max(1e-2, np.abs(want).max()))

    # Really cut: parameters over fsdp and tensor, the cache's rows over data x fsdp and its heads over tensor.
    q = params["text"]["layers"]["attn"]["q"]["kernel"]
    assert q.sharding.shard_shape(q.shape) == (3, q.shape[1] // 2, q.shape[2] // 2, q.shape[3])
    assert cache.sharding.shard_shape(cache.shape) == (3, 1, G, C, 1, cache.shape[-1])
