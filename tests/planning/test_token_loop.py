"""What the real TPU compiler makes of the loop over tokens: no weight is gathered in it and no cache is laid out anew.

It decides more by itself than the CPU's, which `tests/parallel/test_decode_layout.py` reads: one that gathered the
unembedding for every token was seen on TPUs alone. The model is two layers of real heads; its vocabulary and its caches
are large beside a token's activations, as at full size.
"""

import collections
import dataclasses
import re

import jax
import numpy as np
import pytest
from support.loops import layers_loop, token_loop

from mer_r1_jax.config.schema import MeshConfig, RlConfig
from mer_r1_jax.omni.batch import Prompts, Tokens
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.parallel.mesh import make_mesh
from mer_r1_jax.parallel.rows import row_shardings
from mer_r1_jax.parallel.rules import DECODE_RULES, replicated
from mer_r1_jax.planning.chips import topology_devices
from mer_r1_jax.planning.compilation import compile_program
from mer_r1_jax.planning.hlo import COLLECTIVES
from mer_r1_jax.planning.programs import PlannedProgram
from mer_r1_jax.rl.sampling import SamplingConfig
from mer_r1_jax.training.chunked import state_shardings
from mer_r1_jax.training.omni_backbone import OmniBackbone
from mer_r1_jax.training.rl_step import RlPrograms

# Long completions: a chip's caches would lie in its vector memory otherwise.
ROWS, TOKENS, GENERATIONS, LENGTH, CHUNK = 16, 256, 4, 16384, 32
VOCABULARY, WIDTH, LAYERS, KV_HEADS, HEAD = 16384, 1024, 2, 4, 128
OPERATIONS = 33  # of a layer that the compiler counts time for
_CYCLES = re.compile(r'"estimated_cycles":"\d{1,15}"')
# What hands an array on, or writes a part of it where it lies.
IN_PLACE = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "dynamic-update-slice"}


def programs_on(slice_, **mesh):
    config = ThinkerConfig.tiny(
        vocab_size=VOCABULARY, hidden_size=WIDTH, param_dtype="bfloat16", compute_dtype="bfloat16"
    )
    text = dataclasses.replace(
        config.text,
        intermediate_size=4096,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // HEAD,
        num_key_value_heads=KV_HEADS,
        mrope_section=(16, 24, 24),
    )
    config = dataclasses.replace(config, text=text)
    backbone = OmniBackbone.create(config, make_mesh(MeshConfig(**mesh), topology_devices(slice_)))
    sampling = SamplingConfig(
        max_completion_length=LENGTH, eos_ids=(3,), temperature=0.8, top_p=0.9, num_generations=GENERATIONS
    )
    return RlPrograms(backbone, RlConfig(decode_chunk=CHUNK), sampling)


def arguments_of(programs):
    """Weights in the layout of decoding, prompts without clips, and where the random bits come from."""
    backbone = programs.backbone
    shardings = backbone.shardings | backbone.decode_shardings
    weights = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
        for name, leaf in backbone.shapes.items()
    }
    flat = np.zeros((ROWS, TOKENS), np.int32)
    tokens = Tokens(
        id_BT=flat, segment_BT=flat, position_3BT=np.stack([flat] * 3), source_BT2=np.stack([flat] * 2, axis=-1)
    )
    rows = Prompts(
        tokens=tokens,
        next_position_B=flat[:, 0],
        uid_B=flat[:, 0].astype(np.uint32),
    )
    everywhere = replicated(backbone.mesh)
    placed = jax.tree.map(_abstract, rows, row_shardings(rows, backbone.mesh, DECODE_RULES))
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=everywhere)
    return weights, placed, key


def _abstract(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def whole(programs):
    """Sampling in one program."""
    return programs.rollout, arguments_of(programs), (programs.sampling,)


def chunk(programs):
    """A chunk after the first."""
    arguments, static = arguments_of(programs), (programs.sampling, programs.chunks)
    state, _ = programs.begin.eval_shape(*arguments, *static)
    state = jax.tree.map(_abstract, state, state_shardings(programs.backbone.mesh))
    return programs.go_on, (arguments[0], state), (*static, programs.chunks.sizes(ROWS, programs.sampling))


@pytest.mark.parametrize(
    ("program", "slice_", "mesh"),
    [
        (whole, "v5p:2x2x4", dict(data=1, fsdp=8, tensor=2)),
        (whole, "v5p:2x2x4", dict(data=1, fsdp=8, decode_tensor=2)),
        (whole, "v5p:2x2x4", dict(data=1, fsdp=4, decode_tensor=2, tensor=2)),
        (chunk, "v5e:2x4", dict(data=1, fsdp=4, tensor=2)),
        (chunk, "v5e:2x4", dict(data=1, fsdp=4, decode_tensor=2)),
    ],
)
def test_the_token_loop_gathers_no_weight_and_copies_no_cache(program, slice_, mesh, tmp_path):
    programs = programs_on(slice_, **mesh)
    function, arguments, static = program(programs)
    planned = PlannedProgram(name="sample", phase="rl", function=function, args=arguments, static=static, held={})
    text = compile_program(planned, slice_, tmp_path).text
    inside = token_loop(text)
    samples = ROWS // mesh["fsdp"] * GENERATIONS  # of a chip
    of_heads = mesh.get("tensor", 1) * mesh.get("decode_tensor", 1)
    logits = 4 * samples * VOCABULARY // of_heads
    activations = 2 * ROWS * GENERATIONS * WIDTH  # of all rows: what comes together before a feed-forward layer
    smallest = 2 * WIDTH * KV_HEADS * HEAD  # of the matrices of a layer
    assert max(logits, activations) < smallest
    moved = collections.defaultdict(list)
    for one in inside:
        if (kind := one.opcode.removesuffix("-start")) in COLLECTIVES:
            moved[kind].append(size_of(one))
    assert moved["all-to-all"] == [logits] and not moved["collective-permute"]
    assert max(size for sizes in moved.values() for size in sizes) == max(logits, activations)
    cache = 2 * LAYERS * samples * LENGTH * KV_HEADS // of_heads * HEAD
    # One all-reduce for attention, and before and after the feed-forward layer one collective each.
    layer = layers_loop(text)
    kinds = collections.Counter(one.opcode.removesuffix("-start") for one in layer)
    assert {kind: kinds[kind] for kind in COLLECTIVES if kinds[kind]} == {"all-gather": 1, "all-reduce": 2}
    # An operation takes a microsecond, however small: what is the same in every layer has no place here.
    assert len([one for one in layer if _CYCLES.search(one.attributes)]) <= OPERATIONS
    made = [one for one in inside if any(array.bytes >= cache for array in one.arrays)]
    assert {one.opcode for one in made} <= IN_PLACE
    assert sum(one.opcode == "dynamic-update-slice" for one in made) == 2  # a token's keys and its values


def size_of(instruction):
    return sum(array.bytes for array in instruction.arrays)
