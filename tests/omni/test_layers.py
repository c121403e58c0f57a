"""The shared pieces against torch, and what they refuse."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from support.omni_model import tiny_port

from mer_r1_jax.kernels.attention.api import attention, shared_prompt_attention
from mer_r1_jax.omni.architecture_checks import ConfigError
from mer_r1_jax.omni.audio import sinusoids
from mer_r1_jax.omni.config import AudioConfig, TextConfig, ThinkerConfig, VisionConfig
from mer_r1_jax.omni.layers import LayerNorm, RMSNorm, Settings, axis_rules, constrain, gelu

SETTINGS = Settings("float32", "float32", 0.02)


def small_values() -> np.ndarray:
    """Values so small that an epsilon ten times larger or smaller changes their norm by far more than rounding."""
    return np.random.default_rng(0).normal(size=(7, 64)).astype(np.float32) * 1e-3


def test_layer_norm_has_torchs_epsilon():
    x = small_values()
    got = LayerNorm(64, "embed", settings=SETTINGS, rngs=nnx.Rngs(0))(jnp.asarray(x))
    np.testing.assert_allclose(got, torch.nn.LayerNorm(64)(torch.tensor(x)).detach(), atol=1e-6)


def test_rms_norm_has_its_epsilon_and_rounds_before_the_weight():
    x = small_values()
    port = tiny_port()
    reference = port.reference.model.language_model.layers[0].input_layernorm
    norm = RMSNorm(64, "embed", eps=port.config.text.rms_norm_eps, settings=SETTINGS, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.asarray(reference.weight.detach().numpy())
    np.testing.assert_allclose(norm(jnp.asarray(x)), reference(torch.tensor(x)).detach(), atol=1e-6)
    x16 = torch.tensor(x, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = (reference.weight.to(torch.bfloat16) * type(reference)(64)(x16).to(torch.bfloat16)).float()
    got = norm(jnp.asarray(x16.float().numpy()).astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), expected.numpy())


def test_gelu_is_the_exact_one():
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    np.testing.assert_allclose(gelu(jnp.asarray(x)), torch.nn.functional.gelu(torch.tensor(x)), atol=1e-6)


@pytest.mark.parametrize("channels", [32, 64, 256])
def test_sinusoids_are_those_of_transformers(channels):
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import SinusoidsPositionEmbedding

    expected = SinusoidsPositionEmbedding(100, channels).positional_embedding.numpy()
    # torch's exponential may be off by one unit in the last place, which the frame number multiplies.
    np.testing.assert_allclose(sinusoids(100, channels), expected, atol=1e-5)


def attention_inputs(B=2, T=6, H=4, K=2, h=8, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, T, heads, h)), dtype) for heads in (H, K, K)]


def test_attention_within_segments():
    """A query of segment s sees earlier keys of segment 1 and of s, and nothing else."""
    inputs = attention_inputs()
    segment = np.array([[0, 1, 1, 2, 3, 3], [1, 1, 2, 2, 0, 3]])
    got = np.asarray(attention(*inputs, jnp.asarray(segment), jnp.asarray(segment), causal=True, shared_segment=1))
    query, key, value = map(np.asarray, inputs)
    for b in range(2):
        for t in range(6):
            if segment[b, t] == 0:
                continue
            seen = [s for s in range(t + 1) if segment[b, s] != 0 and segment[b, s] in (1, segment[b, t])]
            for head in range(4):
                weight = np.exp(key[b, seen, head // 2] @ query[b, t, head] * 8**-0.5)
                expected = weight / weight.sum() @ value[b, seen, head // 2]
                np.testing.assert_allclose(got[b, t, head], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_to_nothing_is_finite_and_has_finite_gradients(dtype):
    query, key, value = attention_inputs(dtype=dtype)
    nothing = jnp.zeros((2, 6), jnp.int32)

    def total(query, key, value):
        return attention(query, key, value, nothing, nothing).astype(jnp.float32).sum()

    result, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(query * 1e4, key * 1e4, value)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (result, *gradients))


def test_shared_prompt_attention_is_one_softmax():
    rng = np.random.default_rng(0)
    B, G, C, T, H, K, h = 2, 3, 2, 5, 4, 2, 8
    query = jnp.asarray(rng.normal(size=(B, G, C, H, h)), jnp.float32)
    prompt_key, prompt_value = (jnp.asarray(rng.normal(size=(B, T, K, h)), jnp.float32) for _ in range(2))
    own_key, own_value = (jnp.asarray(rng.normal(size=(B, G, C, K, h)), jnp.float32) for _ in range(2))
    prompt_mask = jnp.asarray([[False, True, True, True, True], [True, True, True, False, False]])
    own_mask = jnp.broadcast_to(jnp.tril(jnp.ones((C, C), bool)), (B, G, C, C))
    got = shared_prompt_attention(query, prompt_key, prompt_value, prompt_mask, own_key, own_value, own_mask)
    for g in range(G):
        key = jnp.concatenate([prompt_key, own_key[:, g]], axis=1)
        value = jnp.concatenate([prompt_value, own_value[:, g]], axis=1)
        full = jnp.pad(query[:, g], ((0, 0), (T, 0), (0, 0), (0, 0)))
        segment = jnp.concatenate([prompt_mask.astype(jnp.int32), jnp.ones((B, C), jnp.int32)], axis=1)
        np.testing.assert_allclose(
            got[:, g], attention(full, key, value, segment, segment, causal=True)[:, T:], atol=1e-6
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(key=(2, 6, 3, 8)), "multiple of the 3 key heads"),
        (dict(value=(2, 5, 2, 8)), r"value \(2, 5, 2, 8\), expected \(2, 6, 2, 8\)"),
        (dict(key_segment=(2, 7)), r"key_segment \(2, 7\)"),
    ],
)
def test_attention_names_shapes_that_do_not_fit(change, message):
    shapes = dict(query=(2, 6, 4, 8), key=(2, 6, 2, 8), value=(2, 6, 2, 8), query_segment=(2, 6), key_segment=(2, 6))
    with pytest.raises(ValueError, match=message):
        attention(*(jnp.zeros(shape) for shape in (shapes | change).values()))
    with pytest.raises(ValueError, match="implementation 'flash'"):
        attention(*(jnp.zeros(shape) for shape in shapes.values()), implementation="flash")


def test_constrain_places_activations_by_the_rules():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rules = {"batch": ("data",), "heads": "tensor", "mlp": ("data", "tensor"), "embed": None}
    x = jnp.zeros((4, 3, 8))

    def place(x):
        return constrain(x, ("batch", "length", "heads"))

    assert place(x) is x  # no rules, no constraint
    with axis_rules(rules, mesh):
        assert jax.jit(lambda x: place(x))(x).sharding.spec == PartitionSpec("data", None, "tensor")
        # "batch" has taken the data axis, so "mlp" is cut over the other alone.
        clash = jax.jit(lambda x: constrain(x, ("batch", "length", "mlp")))(x).sharding
        assert clash.shard_shape(x.shape) == (2, 3, 2)
        with pytest.raises(ValueError, match="'batch' has size 3, which the 2 devices"):
            constrain(jnp.zeros((3, 3, 8)), ("batch", "length", "heads"))
    assert place(x) is x
    with pytest.raises(ValueError, match="no axis 'fsdp', only data, tensor"), axis_rules({"embed": "fsdp"}, mesh):
        pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AudioConfig(d_model=1281), "AudioConfig.d_model is 1281: expected a multiple"),
        (lambda: AudioConfig(n_window=50), "AudioConfig.n_window is 50: expected 100"),
        (lambda: VisionConfig(spatial_merge_size=4), "VisionConfig.spatial_merge_size is 4: expected 2"),
        (lambda: VisionConfig(fullatt_block_indexes=(3, 32)), "layer numbers from 0 to depth - 1 = 31"),
        (lambda: VisionConfig(window_size=20), "at least one merged cell of 28 pixels"),
        (lambda: TextConfig(mrope_section=(16, 24, 16)), r"add up to head_dim / 2 = 64"),
        (lambda: TextConfig(num_key_value_heads=3), "a multiple of num_key_value_heads=3"),
        (lambda: TextConfig(num_hidden_layers=0), "TextConfig.num_hidden_layers is 0"),
        (lambda: ThinkerConfig(audio=AudioConfig(output_dim=64)), "AudioConfig.output_dim is 64"),
        (lambda: ThinkerConfig.tiny(image_token_id=512), "ThinkerConfig.image_token_id is 512"),
        (lambda: ThinkerConfig.tiny(remat="all"), "ThinkerConfig.remat is 'all': expected one of nothing"),
        (lambda: ThinkerConfig.tiny(compute_dtype="int8"), "ThinkerConfig.compute_dtype is 'int8'"),
    ],
)
def test_impossible_architectures_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_released_sizes_have_the_released_parameter_counts():
    from mer_r1_jax.omni.thinker import abstract_thinker

    for config, expected in (
        (ThinkerConfig.qwen2_5_omni_3b(), 4_703_464_448),
        (ThinkerConfig.qwen2_5_omni_7b(), 8_931_813_888),
    ):
        _, shapes, axes = abstract_thinker(config)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected
        named = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
        assert [len(names) for names in named] == [leaf.ndim for leaf in jax.tree.leaves(shapes)]


def test_configs_are_values():
    config = ThinkerConfig.tiny()
    same = dataclasses.replace(config, vision=dataclasses.replace(config.vision, fullatt_block_indexes=[1, 3]))
    assert config == same and hash(config) == hash(same)
