"""Weights laid out for decoding: where they lie, how long they live, what they cost a token, and the same numbers."""

import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support.loops import loops, token_loop

from mer_r1_jax.config.schema import MeshConfig, RlConfig
from mer_r1_jax.faults import StopRequested
from mer_r1_jax.omni.batch import Prompts, Tokens
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.thinker import abstract_thinker
from mer_r1_jax.parallel.mesh import AXES, make_mesh
from mer_r1_jax.parallel.rows import put
from mer_r1_jax.parallel.rules import DECODE_RULES, TRAIN_RULES, ShardingError, param_shardings
from mer_r1_jax.planning.hlo import COLLECTIVES, parse
from mer_r1_jax.rl.rollout import start
from mer_r1_jax.rl.sampling import SamplingConfig
from mer_r1_jax.training.omni_backbone import OmniBackbone
from mer_r1_jax.training.rl_step import RlPrograms
from mer_r1_jax.training.signals import StopSignals
from mer_r1_jax.training.stopping import NEVER, Stop

ROWS, TOKENS, GENERATIONS, LENGTH = 8, 6, 2, 10
SAMPLING = SamplingConfig(max_completion_length=LENGTH, eos_ids=(3,), temperature=0.8, num_generations=GENERATIONS)
KEY = jax.random.fold_in(jax.random.key(1), 0)
MESHES = [
    dict(data=2, fsdp=2, tensor=2),
    dict(data=1, fsdp=4, tensor=2),
    dict(data=1, fsdp=8, tensor=1),
    dict(data=1, fsdp=4, decode_tensor=2),
    dict(data=2, fsdp=2, decode_tensor=2),
]


def programs_on(mesh, devices=None, compute_dtype="float32"):
    config = ThinkerConfig.tiny(initializer_range=0.1, compute_dtype=compute_dtype)
    backbone = OmniBackbone.create(config, make_mesh(MeshConfig(**mesh), devices))
    return RlPrograms(backbone, RlConfig(), SAMPLING)


@functools.cache
def host_params():
    return jax.device_get(programs_on({}, jax.devices()[:1]).backbone.init(0))


def params_on(backbone):
    return {name: jax.device_put(leaf, backbone.shardings[name]) for name, leaf in host_params().items()}


def prompt_rows():
    rng = np.random.default_rng(0)
    shape = (ROWS, TOKENS)
    tokens = Tokens(
        id_BT=rng.integers(5, 400, shape).astype(np.int32),
        segment_BT=np.ones(shape, np.int32),
        position_3BT=np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (3, *shape)).copy(),
        source_BT2=np.full((*shape, 2), -1, np.int32),
    )
    return Prompts(
        tokens=tokens,
        next_position_B=np.full(ROWS, TOKENS, np.int32),
        uid_B=np.arange(ROWS, dtype=np.uint32),
    )


def test_no_weight_is_cut_along_the_model_width():
    _, shapes, axes = abstract_thinker(ThinkerConfig.qwen2_5_omni_7b())
    for of_heads in ("tensor", "decode_tensor"):
        mesh = make_mesh(MeshConfig(data=1, fsdp=4, **{of_heads: 2}))
        layers = param_shardings({"text": shapes["text"]}, {"text": axes["text"]}, mesh, DECODE_RULES)["text"]["layers"]
        cut = [axis for axis in ("tensor", "fsdp", "decode_tensor") if axis in mesh.shape]
        assert layers["mlp"]["down"]["kernel"].spec == PartitionSpec(None, tuple(cut), None)
        assert layers["mlp"]["up"]["kernel"].spec == PartitionSpec(None, None, tuple(cut))
        heads = ("tensor", "decode_tensor")[: len(cut) - 1]  # an axis of one cuts nothing
        assert layers["attn"]["q"]["kernel"].spec == PartitionSpec(None, None, heads, None)
    assert {axis for axes in DECODE_RULES.values() for axis in axes} == set(AXES)
    assert DECODE_RULES.keys() <= TRAIN_RULES.keys()
    for rules in (DECODE_RULES, TRAIN_RULES):
        shared = [axis for axis in rules["vocab"] if axis not in rules["batch"]]
        assert list(rules["drawn"])[: len(rules["batch"])] == list(rules["batch"])
        assert set(rules["drawn"]) == set(AXES) and list(rules["drawn"])[-len(shared) :] == shared


def test_what_decoding_cannot_cut_is_refused_by_name():
    config = ThinkerConfig.tiny()
    narrow = dataclasses.replace(config, text=dataclasses.replace(config.text, intermediate_size=36))
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    OmniBackbone.create(config, mesh)
    with pytest.raises(ShardingError) as caught:
        OmniBackbone.create(narrow, mesh)
    assert "text/layers/mlp/up/kernel: dimension 'mlp' of size 36 is not a multiple of 8" in str(caught.value)


def test_weights_are_cast_once_and_freed():
    programs = programs_on(dict(data=2, fsdp=2, tensor=2), compute_dtype="bfloat16")
    backbone = programs.backbone
    params = params_on(backbone)
    with programs.rollout_params(params) as weights:
        assert weights.keys() == params.keys()
        for name, leaf in weights.items():
            if name.startswith("text/"):
                assert leaf.dtype == jnp.bfloat16
                assert leaf.sharding.is_equivalent_to(backbone.decode_shardings[name], leaf.ndim), name
            else:
                assert leaf is params[name], "towers are not decoded with"
        copies = [leaf for name, leaf in weights.items() if leaf is not params[name]]
    assert copies and all(leaf.is_deleted() for leaf in copies)
    assert not any(leaf.is_deleted() for leaf in params.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_weight_is_brought_together_whole_on_its_way_to_decoding(dtype):
    """A device gathers its part of the heads. In one step the compiler would gather the whole weight first."""
    programs = programs_on(dict(data=1, fsdp=4, decode_tensor=2), compute_dtype=dtype)
    params = params_on(programs.backbone)
    recast = {name: params[name] for name in programs.backbone.recast}
    instructions, entry = parse(programs.cast.lower(recast).compile().as_text())
    gathered = [
        array.bytes for one in instructions[entry].values() if "all-gather" in one.opcode for array in one.arrays
    ]
    # Of attention and the tables, which decoding does not cut over fsdp; in float32, as the CPU's collectives are.
    whole = [4 * leaf.size for name, leaf in recast.items() if "attn" in name or "embed" in name or "head" in name]
    assert gathered and max(gathered) == max(whole) // 2


def test_nothing_is_copied_where_training_holds_the_weights_like_that():
    for mesh, devices in (({}, jax.devices()[:1]), (dict(data=8), None)):
        programs = programs_on(mesh, devices)
        params = params_on(programs.backbone)
        with programs.rollout_params(params) as weights:
            assert all(weights[name] is leaf for name, leaf in params.items())
        assert not any(leaf.is_deleted() for leaf in params.values())


@functools.cache
def decoded(mesh):
    """Sampled completions, the uniform numbers they were drawn with, and logits of fixed tokens, on a mesh."""
    devices = None if mesh else jax.devices()[:1]
    programs = programs_on(dict(mesh), devices)
    backbone = programs.backbone
    rows = put(prompt_rows(), backbone.mesh)

    @jax.jit
    def fixed(weights, rows):
        with backbone.rules(decode=True):
            model, tokens = backbone.bind(weights), rows.tokens
            state = start(model, rows, KEY, SAMPLING)
            token_BG = jnp.broadcast_to(tokens.id_BT[:, :1], (ROWS, GENERATIONS))
            h_BGD, _ = model.decode(token_BG, token_BG * 0 + TOKENS, 0, state.prompt_cache, state.cache)
            return model.logits(h_BGD), state.uniform_BGC

    with programs.rollout_params(params_on(backbone)) as weights:
        sampled = programs.sample(weights, rows, KEY)
        return jax.device_get((sampled, *fixed(weights, rows)))


class SignalledAt(StopSignals):
    """As if a signal had come at a moment of `time.monotonic`."""

    def __init__(self, moment: float):
        super().__init__()
        self.moment = moment

    def should_stop(self) -> bool:
        return time.monotonic() > self.moment


def test_a_signal_leaves_a_rollout_whose_rows_are_moved():
    programs = programs_on(dict(data=1, fsdp=4, decode_tensor=2))
    long = dataclasses.replace(SAMPLING, max_completion_length=1000)
    rows = put(prompt_rows(), programs.backbone.mesh)
    with programs.rollout_params(params_on(programs.backbone)) as weights:

        def sampled(stop=NEVER):
            return jax.block_until_ready(programs.sample(weights, rows, KEY, long, stop=stop))

        sampled()  # compiled
        began = time.monotonic()
        sampled()
        whole = time.monotonic() - began
        began = time.monotonic()
        with pytest.raises(StopRequested):
            sampled(Stop(SignalledAt(began + whole / 8)))
        assert time.monotonic() - began < whole / 2


@pytest.mark.parametrize("mesh", MESHES)
def test_layouts_differ_by_rounding_and_not_in_their_random_bits(mesh):
    expected, logits, uniform = decoded(())
    sampled, own_logits, own_uniform = decoded(tuple(mesh.items()))
    np.testing.assert_array_equal(own_uniform, uniform)
    np.testing.assert_allclose(own_logits, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    np.testing.assert_array_equal(sampled.id_BGC, expected.id_BGC)
    np.testing.assert_allclose(sampled.logprob_BGC, expected.logprob_BGC, rtol=0, atol=1e-5)


def test_the_token_loop_gathers_no_weight_and_copies_no_cache():
    programs = programs_on(MESHES[1])
    backbone = programs.backbone
    rows = put(prompt_rows(), backbone.mesh)
    shardings = backbone.shardings | backbone.decode_shardings
    weights = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
        for name, leaf in backbone.shapes.items()
    }
    sampling = dataclasses.replace(SAMPLING, max_completion_length=64)  # so that a cache is larger than logits
    arguments = (weights, rows, KEY, sampling)
    text = backbone.config.text
    inside = token_loop(programs.rollout.lower(*arguments).compile().as_text())
    activations = ROWS * GENERATIONS * text.hidden_size * 4  # of all rows: what comes together before a layer
    logits = ROWS // 4 * GENERATIONS * text.vocab_size // 2 * 4  # of a chip's rows and vocabulary
    exchanged = [size_of(one) for one in inside if one.opcode.startswith("all-to-all")]
    assert exchanged == [logits]
    assert max(size_of(one) for one in inside if one.opcode.startswith("all-gather")) <= activations
    weight = min(4 * math.prod(leaf.shape[1:]) for name, leaf in backbone.shapes.items() if "text/layers/mlp/" in name)
    unembedding = 4 * text.hidden_size * text.vocab_size // 2
    assert weight > activations and weight != logits and unembedding > max(logits, activations)
    cut = dict(rows=ROWS // 4, heads=text.num_key_value_heads // 2)
    cache = 4 * text.num_hidden_layers * math.prod(cut.values()) * GENERATIONS * 64 * text.head_dim
    assert cache > logits
    copied = [one.type for one in inside if one.opcode == "copy" and size_of(one) >= cache]
    assert not copied


def test_the_loss_loop_does_not_gather_the_unembedding():
    config = ThinkerConfig.tiny(vocab_size=16384)
    backbone = OmniBackbone.create(config, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))

    def loss(params, h_ND, token_N):
        with backbone.rules():
            scores = backbone.bind(params).gather_logprobs(h_ND, token_N, implementation="xla")
        return scores.logprob.sum()

    leaves = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=backbone.shardings[name])
        for name, leaf in backbone.shapes.items()
    }
    arguments = (leaves, jnp.zeros((64, config.text.hidden_size)), jnp.zeros(64, jnp.int32))
    text = jax.jit(jax.grad(loss)).lower(*arguments).compile().as_text()
    share = 4 * config.text.hidden_size * config.text.vocab_size // 2  # of a chip, gathered over fsdp
    assert any(size_of(one) >= share for one in parse(text)[0][parse(text)[1]].values() if "all-gather" in one.opcode)
    inside = [one for loop in loops(text) for one in loop]
    assert inside
    moved = [one for one in inside if one.opcode.removesuffix("-start") in COLLECTIVES]
    assert all(size_of(one) < share // 8 for one in moved)


def size_of(instruction):
    return sum(array.bytes for array in instruction.arrays)
