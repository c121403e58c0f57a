"""The gradient of the loss against torch, parameter by parameter, and the same under every remat policy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.omni_cases import CASES
from support.omni_model import quick_jit, tiny_port

from mer_r1_jax.omni.batch import FeatureLayout
from mer_r1_jax.omni.config import REMAT
from mer_r1_jax.omni.hf import table
from mer_r1_jax.omni.thinker import abstract_thinker, bind
from mer_r1_jax.parity.processor_inputs import to_batch
from mer_r1_jax.parity.transformers_reference import torch_inputs

CASE = "left_padded"  # an image, a video and an audio clip in a padded batch
RELATIVE = 2e-4  # of a parameter's largest gradient, in float32


@functools.lru_cache(maxsize=2)
def our_gradient(remat: str, case: str):
    """(loss, gradients) of the mean negative log-probability of the next real token."""
    port = tiny_port()
    batch, _, _ = to_batch(CASES[case](), port.config)
    graphdef = abstract_thinker(dataclasses.replace(port.config, remat=remat))[0]

    def loss(params):
        model = bind(graphdef, params)
        features = model.encode_media(batch.vision, batch.audio)
        h_BTD = model.hidden(batch.tokens, features, FeatureLayout.of_batch(batch))
        logprob_BTN = jax.nn.log_softmax(model.logits(h_BTD[:, :-1]))
        taken_BT = jnp.take_along_axis(logprob_BTN, batch.tokens.id_BT[:, 1:, None], axis=2)[..., 0]
        both_BT = (batch.tokens.segment_BT[:, 1:] != 0) & (batch.tokens.segment_BT[:, :-1] != 0)
        return -jnp.sum(taken_BT * both_BT) / jnp.sum(both_BT)

    value, gradients = quick_jit(jax.value_and_grad(loss))(port.params)
    return float(value), jax.device_get(gradients)


def their_gradient():
    """(loss, bare transformers 4 name -> gradient) from torch; parameters the loss does not reach are absent."""
    model = tiny_port().reference
    inputs = CASES[CASE]()
    given = torch_inputs(inputs)
    logits = model(**given).logits[:, :-1]
    real = given["attention_mask"] == 1
    both = real[:, 1:] & real[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits[both], given["input_ids"][:, 1:][both])
    model.zero_grad()
    loss.backward()
    found = {table.plain_name(name): p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def test_every_parameters_gradient_is_torchs():
    port = tiny_port()
    value, gradients = our_gradient("nothing", CASE)
    expected_value, expected = their_gradient()
    assert abs(value - expected_value) < 1e-4
    leaves = table.leaves(gradients)
    problems, compared = [], 0
    for entry in table.entries(abstract_thinker(port.config)[1], port.config):
        got = leaves[entry.path] if entry.layer is None else leaves[entry.path][entry.layer]
        if entry.name not in expected:
            assert "bos_eos" in entry.name and not got.any(), f"{entry.name}: torch has no gradient"
            continue
        want = entry.to_ours(expected[entry.name])
        scale = np.abs(want).max()
        compared += 1
        if not np.abs(got - want).max() <= RELATIVE * scale:
            problems.append(f"{entry.name}: differs by {np.abs(got - want).max():.3g} of {scale:.3g}")
        if entry.name.endswith("k_proj.bias") or ".attn.k.bias" in entry.name:
            continue
        assert scale > 0, f"{entry.name}: torch's gradient is zero, so nothing is compared"
    assert not problems, "\n".join(problems)
    assert compared > 100


def test_remat_changes_nothing_but_memory():
    expected_value, expected = our_gradient("nothing", "odd_audio")
    for remat in REMAT[1:]:
        value, gradients = our_gradient(remat, "odd_audio")
        assert value == pytest.approx(expected_value, rel=1e-6)  # a few float32 roundings of a sum of another order
        for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4 * max(1e-3, np.abs(want).max()))


def test_remat_decides_what_is_kept_of_a_layer():
    """With "nothing" a layer leaves one residual, its input; with "everything" the attention weights stay as well."""
    port = tiny_port()
    batch, _, _ = to_batch(CASES["text"](), port.config)
    T, H = batch.tokens.id_BT.shape[1], port.config.text.num_attention_heads
    kept = {}
    for remat in REMAT:
        graphdef = abstract_thinker(dataclasses.replace(port.config, remat=remat))[0]

        def total(params, graphdef=graphdef):
            return bind(graphdef, params).hidden(batch.tokens, None, FeatureLayout()).sum()

        residuals = jax.tree.leaves(jax.eval_shape(lambda params, total=total: jax.vjp(total, params)[1], port.params))
        layers = port.config.text.num_hidden_layers
        kept[remat] = sum(leaf.size for leaf in residuals if leaf.shape[:1] == (layers,))
        if remat == "everything":
            assert any(leaf.size == layers * H * T * T for leaf in residuals)
    assert kept["nothing"] < kept["attention"] < kept["dots"] < kept["everything"]
