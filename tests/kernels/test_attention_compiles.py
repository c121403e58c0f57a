"""The attention kernels compiled for real chips by the real compiler: they lower, they fit, and they hold little."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from support.tpu_compiler import CHIPS, compile_for, topology

from mer_r1_jax.kernels.attention import reference
from mer_r1_jax.kernels.attention.api import attention
from mer_r1_jax.kernels.decode_attention.api import decode_attention
from mer_r1_jax.kernels.placement import Placement
from mer_r1_jax.omni.batch import FeatureLayout, Tokens
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.layers import axis_rules
from mer_r1_jax.omni.thinker import abstract_thinker, bind
from mer_r1_jax.parallel.rules import TRAIN_RULES, on, param_shardings

MIB = 2**20


def array(*shape: int, dtype=jnp.bfloat16, sharding=None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def one_device(chip: str) -> Placement:
    return Placement(Mesh(np.array(topology(chip).devices[:1]), ("data",)))


def mesh_of_four(chip: str, rows: str) -> Mesh:
    devices = np.array(topology(chip).devices[:4]).reshape(2, 2)
    return Mesh(devices, (rows, "tensor"), axis_types=(AxisType.Auto,) * 2)


def kernel_calls(compiled) -> list[str]:
    """Names of the kernels a compiled program calls, one entry a call."""
    lines = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    names = ("attention_forward", "attention_backward", "decode_attention")
    return sorted(name for line in lines for name in names if name in line.split(" = ")[0])


def compiled_step(chip: str, policy, *, B: int, T: int, H: int, K: int, h: int):
    """Result and gradients of a causal layer of attention under a remat policy."""
    attend = functools.partial(attention, causal=True, shared_segment=1, placement=one_device(chip))

    def step(q, k, v, segment, gradient):
        layer = jax.checkpoint(lambda q, k, v: attend(q, k, v, segment, segment), policy=policy)
        out, pull = jax.vjp(layer, q, k, v)
        return out, *pull(gradient)

    q, kv = array(B, T, H, h), array(B, T, K, h)
    return compile_for(step, (q, kv, kv, array(B, T, dtype=jnp.int32), q), topology(chip))


def test_without_a_name_the_forward_kernel_would_run_twice():
    compiled = compiled_step("v5e", jax.checkpoint_policies.nothing_saveable, B=1, T=256, H=2, K=1, h=128)
    assert kernel_calls(compiled) == ["attention_backward", "attention_forward", "attention_forward"]


@pytest.mark.parametrize("chip", CHIPS)
def test_a_training_step_of_attention_compiles(chip):
    """A packed row of 7B heads, 4 x 4096, recomputed but for its result: each kernel runs once."""
    policy = jax.checkpoint_policies.save_only_these_names(reference.RESIDUALS)
    compiled = compiled_step(chip, policy, B=4, T=4096, H=28, K=4, h=128)
    assert kernel_calls(compiled) == ["attention_backward", "attention_forward"]
    # jax's splash attention takes 633 MiB here (v5p), plain XLA 14 GiB; README.md says how this was measured.
    assert compiled.memory_analysis().temp_size_in_bytes < 300 * MIB


@pytest.mark.parametrize("chip", CHIPS)
def test_a_decode_loop_compiles_and_copies_no_cache(chip):
    """Tokens written straight into the stacked cache and read by the kernel, over 2 x 2 devices: nothing is copied."""
    L, B, G, H, K, h, T, C = 4, 4, 8, 28, 4, 128, 2048, 1024
    mesh = mesh_of_four(chip, "data")
    placement = Placement(mesh, rows=("data",), heads=("tensor",))

    def placed(letters: str, *shape: int, dtype=jnp.bfloat16):
        return array(*shape, dtype=dtype, sharding=NamedSharding(mesh, placement.spec(letters)))

    def decode(query, prompt_key, prompt_value, mask, own_key, own_value, slot, tokens):
        def token(n, carry):
            query, *own = carry

            def layer(carry, number):
                query, own_key, own_value = carry
                new = query[:, :, :: H // K, None][None]  # stands for the token's key and value
                place = (number, 0, 0, 0, slot + n, 0)
                own_key = jax.lax.dynamic_update_slice(own_key, new, place)
                own_value = jax.lax.dynamic_update_slice(own_value, new, place)
                length = jnp.full((B, G), slot + n + 1)
                arguments = (query, prompt_key, prompt_value, mask, own_key, own_value, length)
                return (decode_attention(*arguments, number, placement=placement), own_key, own_value), None

            return jax.lax.scan(layer, (query, *own), jnp.arange(L))[0]

        return jax.lax.fori_loop(0, tokens, token, (query, own_key, own_value))

    prompt, own = placed("LBKTh", L, B, K, T, h), placed("LBGKCh", L, B, G, K, C, h)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    arguments = (placed("BGHh", B, G, H, h), prompt, prompt, placed("BT", B, T, dtype=bool), own, own, scalar, scalar)
    compiled = compile_for(decode, arguments, topology(chip), donate_argnums=(4, 5))
    memory = compiled.memory_analysis()
    assert kernel_calls(compiled) == ["decode_attention"]
    one_layer = own.size * 2 // 4 // L  # bytes of a device's own keys in one layer
    assert memory.alias_size_in_bytes >= 2 * L * one_layer
    assert memory.temp_size_in_bytes < one_layer // 4


def test_the_decoder_runs_the_kernels_on_a_tpu():
    """Prefill and a decode loop of the backbone itself, over 2 x 2 devices: the kernels, and no copy of the cache."""
    config = ThinkerConfig.tiny(hidden_size=512, compute_dtype="bfloat16")  # heads of 128
    text = config.text
    mesh = mesh_of_four("v5p", "fsdp")
    rules = on(mesh, TRAIN_RULES)
    graphdef, shapes, axes = abstract_thinker(config)
    shardings = param_shardings(shapes, axes, mesh, rules)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    B, T, G, C, L = 4, 512, 8, 1024, text.num_hidden_layers

    def rollout(params, segment, position, steps):
        with axis_rules(rules, mesh):
            model = bind(graphdef, params)
            tokens = Tokens(id_BT=segment, segment_BT=segment, position_3BT=position, source_BT2=None)
            _, prompt = model.prefill(tokens, None, FeatureLayout())

            def step(slot, carry):
                token, cache = carry
                h_BGD, cache = model.decode(token, token + slot, slot, prompt, cache)
                return h_BGD.argmax(axis=-1).astype(jnp.int32), cache

            return jax.lax.fori_loop(0, steps, step, (segment[:, :G], model.init_cache(B, G, C)))[0]

    def whole(*shape: int) -> jax.ShapeDtypeStruct:
        return array(*shape, dtype=jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))

    compiled = compile_for(rollout, (params, whole(B, T), whole(3, B, T), whole()), topology("v5p"))
    assert kernel_calls(compiled) == ["attention_forward", "decode_attention"]
    caches = 2 * L * B * text.head_dim * (T + G * C)  # bytes of bfloat16 keys and values of a device: half the rows
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * caches
