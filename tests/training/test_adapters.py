"""Adapters in the model: at zero they change nothing, else they are what merging them into the kernels gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf.merging import MergedLeaf, fetch, merged
from mer_r1_jax.omni.layers import Linear, Settings, adapter_dropout, scan_layers, stack_layers
from mer_r1_jax.omni.lora import AdapterConfig, fresh_adapters, is_adapter, without_adapters
from mer_r1_jax.omni.thinker import abstract_thinker, bind
from mer_r1_jax.training.state import flatten, nest

ADAPTERS = AdapterConfig(rank=3, alpha=6.0)
CONFIG = ThinkerConfig.tiny(hidden_size=32, adapters=ADAPTERS)
SIZES = dict(D=8, H=2, h=3)


def shapes_of(config):
    return {name: leaf for name, leaf in flatten(abstract_thinker(config)[1]).items() if is_adapter(name)}


@pytest.fixture(scope="module")
def params():
    """The tiny model with adapters that change nothing yet, flat."""
    rng = np.random.default_rng(1)
    base = {
        name: 0.1 * rng.standard_normal(leaf.shape, np.float32)
        for name, leaf in flatten(abstract_thinker(CONFIG.base)[1]).items()
    }
    return base | fresh_adapters(shapes_of(CONFIG), jax.random.key(1))


def learnt(params):
    """The same with B as if it had been trained."""
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32) if name.endswith("lora_b") else leaf
        for name, leaf in params.items()
    }


def hidden(params, config=CONFIG):
    """Hidden states of one row of eight tokens."""
    id_BT = jnp.arange(8)[None] % 7
    model = bind(abstract_thinker(config)[0], nest(params))
    x_BTD = model.text.embed(id_BT)
    h_BTD, _ = model.text.rows(x_BTD, jnp.ones_like(id_BT), jnp.broadcast_to(jnp.arange(8), (3, 1, 8)), keep=False)
    return np.asarray(model.logits(h_BTD))


def test_new_adapters_change_no_bit_and_switched_off_ones_are_gone(params):
    off = hidden(without_adapters(params), CONFIG.base)
    np.testing.assert_array_equal(hidden(params), off)
    assert np.abs(hidden(learnt(params)) - off).max() > 1e-3


def test_an_adapter_is_its_merged_kernel(params):
    params = learnt(params)
    whole = flatten(merged(nest(params), ADAPTERS))
    assert not any(map(is_adapter, whole))
    assert sum(isinstance(leaf, MergedLeaf) for leaf in whole.values()) == 7
    layers = range(CONFIG.text.num_hidden_layers)
    arrays = {
        name: np.stack([fetch(leaf, layer) for layer in layers]) if isinstance(leaf, MergedLeaf) else leaf
        for name, leaf in whole.items()
    }
    np.testing.assert_allclose(hidden(params), hidden(arrays, CONFIG.base), atol=2e-5)


def test_a_merged_kernel_of_bfloat16_is_not_rounded():
    kernel, a, b = (
        np.ones((1, 2, 2), jnp.bfloat16),
        np.full((1, 2, 1), 1e-3, np.float32),
        np.ones((1, 1, 2), np.float32),
    )
    leaf = MergedLeaf(kernel, a, b, 2.0)
    assert leaf.dtype == np.float32
    np.testing.assert_allclose(leaf.read(0), 1.002)


@pytest.mark.parametrize("targets, count", [(("attention",), 8), (("mlp",), 6), (("attention", "mlp"), 14)])
def test_targets_name_the_parts_that_have_adapters(targets, count):
    chosen = {name: name in targets for name in ("attention", "mlp")}
    shapes = shapes_of(dataclasses.replace(CONFIG, adapters=AdapterConfig(rank=2, alpha=1.0, **chosen)))
    assert len(shapes) == count
    assert all(name.startswith("text/layers/") for name in shapes)


def test_new_adapters_are_pefts():
    """peft: kaiming_uniform_(A, a=sqrt(5)), which is uniform within 1 / sqrt(inputs), and B at zero."""
    shape = jax.ShapeDtypeStruct((2, 5, 20, 64), jnp.float32)  # layers, heads x head_dim = 100 inputs, rank
    made = fresh_adapters({"o/lora_a": shape, "o/lora_b": shape}, jax.random.key(0))
    assert not np.any(made["o/lora_b"])
    assert 0.0995 < np.abs(made["o/lora_a"]).max() <= 0.1
    np.testing.assert_allclose(np.std(made["o/lora_a"]), 0.1 / np.sqrt(3), rtol=0.02)


def test_the_base_is_the_same_with_and_without_adapters():
    settings = Settings("float32", "float32", 0.1, ADAPTERS)
    pair = []
    for part in (settings.adapted("attn"), settings):
        rngs = nnx.Rngs(params=0)
        projection = [
            Linear("...D,Dh->...h", SIZES, ("embed", "mlp"), bias=False, settings=part, rngs=rngs) for _ in range(2)
        ]
        pair.append(np.stack([one.kernel[...] for one in projection]))
        assert hasattr(projection[0], "lora_a") == part.in_adapted_part
    np.testing.assert_array_equal(*pair)


def projections(dropout, count=4):
    """Stacked projections without kernels, whose adapters alone are seen."""
    settings = Settings("float32", "float32", 0.0, AdapterConfig(rank=2, alpha=2.0, dropout=dropout)).adapted("attn")
    axes = ("embed", "heads", "head_dim")
    made = stack_layers(
        lambda rngs: Linear("...D,DHh->...Hh", SIZES, axes, bias=False, settings=settings, rngs=rngs),
        count,
        nnx.Rngs(0),
    )
    made.lora_a[...], made.lora_b[...] = jnp.ones((count, 8, 2)), jnp.ones((count, 2, 2, 3))
    return made


@pytest.mark.parametrize("remat", ["everything", "nothing"])
def test_dropout_drops_other_inputs_in_every_layer_and_only_where_it_is_asked_for(remat):
    layers, x = projections(0.25), jnp.ones((500, 8))

    def run(key):
        with adapter_dropout(key):
            _, y = scan_layers(layers, lambda layer, carry, _: (carry, layer(x)), 0.0, remat=remat)
        return np.asarray(y)

    np.testing.assert_array_equal(run(None), np.full((4, 500, 2, 3), 16.0))
    first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.3
    assert (first[0] != first[1]).mean() > 0.3  # layers draw for themselves
    # What is kept is scaled up, so that the mean stays; three quarters of the inputs are kept.
    np.testing.assert_allclose(first.mean((1, 2, 3)), 16, rtol=0.03)
    kept = first[..., 0, 0] / (2 / 0.75)
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-5)
    np.testing.assert_allclose(kept.var(), 8 * 0.75 * 0.25, rtol=0.15)


def test_dropout_differs_between_projections_of_a_layer():
    layers, x = projections(0.5, count=1), jnp.ones((400, 8))
    with adapter_dropout(jax.random.key(0)):
        _, y = scan_layers(layers, lambda layer, carry, _: (carry, (layer(x), layer(x))), 0.0)
    assert (np.asarray(y[0]) != np.asarray(y[1])).mean() > 0.5


def test_dropout_differs_between_a_pass_over_prompts_and_one_over_what_continues_them():
    layers = projections(0.5)

    def passed(*shape):
        x = jnp.ones(shape)
        return np.asarray(scan_layers(layers, lambda layer, carry, _: (carry, layer(x)), 0.0)[1]).reshape(4, 400, -1)

    with adapter_dropout(jax.random.key(0)):
        # As many numbers in both, so that the same key would drop the same ones.
        prompts, continuations = passed(1, 400, 8), passed(1, 4, 100, 8)
    assert (prompts != continuations).mean() > 0.5


def test_the_scale_of_adapters_is_not_rounded_to_the_compute_dtype():
    """32 / 12 is 0.2% more in bfloat16; each product is rounded by up to as much, but not all to one side."""
    settings = Settings("float32", "bfloat16", 0.0, AdapterConfig(rank=12, alpha=32.0)).adapted("attn")
    axes = ("embed", "heads", "head_dim")
    one = Linear("...D,DHh->...Hh", SIZES, axes, bias=False, settings=settings, rngs=nnx.Rngs(0))
    one.lora_a[...], one.lora_b[...] = jnp.eye(8, 12), jnp.zeros((12, 2, 3)).at[0].set(1.0)  # x's first number
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (4000, 8)), jnp.bfloat16)
    got, exact = np.asarray(one(x), np.float64)[:, 0, 0], np.asarray(x, np.float64)[:, 0] * 32 / 12
    np.testing.assert_allclose(got.sum(), exact.sum(), rtol=2e-4)
