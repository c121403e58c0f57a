"""The comparisons of a certificate: a sound model agrees with transformers and with itself, a wrong one does not."""

import dataclasses

import jax.numpy as jnp
import pytest
from support.tiny_hf import make_tiny_thinker

from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.hf.load import load_params
from mer_r1_jax.parity import self_checks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small = dict(text={"num_hidden_layers": 2}, vision={"depth": 1, "fullatt_block_indexes": [0]})
    make_tiny_thinker(folder, seed=3, audio={"encoder_layers": 1}, **small)
    config = dataclasses.replace(load_config(folder), param_dtype="float32", compute_dtype="float32")
    return folder, load_params(folder, config), config


def transposed(params):
    """The parameters with the query matrix of the second text layer turned, as a port might load a square one."""
    kernel = params["text"]["layers"]["attn"]["q"]["kernel"]
    turned = kernel.at[1].set(kernel[1].reshape(64, 64).T.reshape(kernel[1].shape))
    attn = {**params["text"]["layers"]["attn"], "q": {**params["text"]["layers"]["attn"]["q"], "kernel": turned}}
    return {**params, "text": {**params["text"], "layers": {**params["text"]["layers"], "attn": attn}}}


def test_a_sound_model_agrees_and_a_transposed_query_does_not(model):
    folder, params, config = model
    found = self_checks.against_transformers(str(folder), params, config)
    assert len(found) == 6 and all(one.agrees for one in found), list(map(str, found))
    assert all(0 < one.worst for one in found if one.name.endswith(("logits", "features")))
    wrong = {one.name: one for one in self_checks.against_transformers(str(folder), transposed(params), config)}
    assert not wrong["logits"].agrees and wrong["logits"].worst > 100 * wrong["logits"].limit
    assert wrong["audio_features"].agrees  # the towers are as they were


def test_cache_and_batch_change_nothing_and_it_shows_when_they_do(model, monkeypatch):
    _, params, config = model
    cached = self_checks.cached_against_uncached(params, config)
    assert cached is not None and cached.agrees and int(cached.name.split()[0]) >= 1
    assert self_checks.batch_against_single(params, config).agrees
    plain = self_checks.run_port

    def broken(params, config, inputs, *, generate=0, shape=None):
        outputs = plain(params, config, inputs, generate=generate, shape=shape)
        if len(inputs.input_ids) > 1:
            outputs["logits"] = outputs["logits"] + jnp.eye(2)[:, :1, None]  # something leaks into the first row
        if generate:
            outputs["greedy_ids"] = outputs["greedy_ids"][:, ::-1]  # the cache gives them in another order
        return outputs

    monkeypatch.setattr(self_checks, "run_port", broken)
    assert not self_checks.batch_against_single(params, config).agrees
    again = self_checks.cached_against_uncached(params, config)
    assert again is not None and not again.agrees
