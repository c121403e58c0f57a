"""gather_logprobs at the size of the 7B model, compiled by the real TPU compiler: it compiles, and what it needs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support.tpu_compiler import compile_for, topology

from mer_r1_jax.kernels.logprobs.api import Partition, gather_logprobs

N, D, V = 16384, 3584, 152064  # rows of a step of one chip, and the 7B model's width and vocabulary
GIB = 2**30
NAIVE_TEMP = 13.92 * GIB  # whole float32 logits, forward and backward, on one v5p


def arrays(N=N, V=V, dtype=jnp.bfloat16):
    shapes = ((N, D), dtype), ((D, V), dtype), ((N,), jnp.int32)
    return tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)


def forward_and_backward(slice_, **settings):
    """Log-probability and entropy, and the gradients of both, as a function to compile for a slice's devices."""
    kind = slice_.devices[0].device_kind

    def run(x, w, token):
        def score(x, w):
            scores = gather_logprobs(x, w, token, device_kind=kind, implementation="pallas", **settings)
            return scores.logprob, scores.entropy

        results, pull = jax.vjp(score, x, w)
        return results, pull(results)

    return run


@pytest.mark.parametrize("chip", ["v4", "v5e", "v6e"])
def test_the_kernels_compile_at_full_size(chip):
    slice_ = topology(chip)
    compiled = compile_for(forward_and_backward(slice_), arrays(), slice_)
    assert compiled.memory_analysis().temp_size_in_bytes <= NAIVE_TEMP / 100


def test_on_v5p_cut_over_four_chips():
    """fsdp 2 x tensor 2: the unembedding is gathered once, its gradient scattered once, and no logit travels."""
    slice_ = topology("v5p")
    mesh = Mesh(np.array(slice_.devices).reshape(2, 2), ("fsdp", "tensor"))
    partition = Partition(mesh=mesh, rows=("fsdp",), vocab=("tensor",), width=("fsdp",))
    specs = PartitionSpec("fsdp"), PartitionSpec("fsdp", "tensor"), PartitionSpec("fsdp")
    placed = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for a, spec in zip(arrays(N=2 * N), specs, strict=True)
    ]
    compiled = compile_for(forward_and_backward(slice_, partition=partition), tuple(placed), slice_)
    text = compiled.as_text()
    kinds = re.findall(r"= \S+ (all-gather|reduce-scatter|all-to-all)(?:-start)?\(", text)
    assert sorted(kinds) == ["all-gather", "reduce-scatter"]
    assert " while(" not in text
    # Besides the kernels' own: the gathered half of the unembedding, and its gradient before it is scattered.
    half = 2 * D * (V // 2)
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * half + NAIVE_TEMP / 50


@pytest.mark.parametrize(("chip", "rows"), [("v5e", 16), ("v4", 40), ("v5p", 48)])
def test_a_handful_of_rows_compiles_with_its_gradient(chip, rows):
    slice_ = topology(chip)
    compiled = compile_for(forward_and_backward(slice_), arrays(N=rows), slice_)
    assert compiled.as_text().count("tpu_custom_call") >= 2  # forward and backward


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p"])
def test_candidate_sets_of_a_few_anchors_compile_with_their_gradient(chip):
    """As the confidences ask for them; no logits of the anchors exist as a whole."""
    slice_ = topology(chip)
    kind, anchors, wheels, words = slice_.devices[0].device_kind, 1024, 5, 300

    def run(h, w, sets, ids):
        def confidence(h, w):
            settings = dict(device_kind=kind, implementation="pallas", candidate_ids_ZY=ids)
            return gather_logprobs(h, w, sets=sets, **settings).sets

        results, pull = jax.vjp(confidence, h, w)
        return results, pull(results)

    shapes = (
        jax.ShapeDtypeStruct((anchors, D), jnp.bfloat16),
        jax.ShapeDtypeStruct((D, V), jnp.bfloat16),
        jax.ShapeDtypeStruct((anchors, wheels), jnp.int32),
        jax.ShapeDtypeStruct((words, 8), jnp.int32),
    )
    compiled = compile_for(run, shapes, slice_)
    if chip == "v5e":  # on v5p the table is gathered by its sparse cores, which as_text() cannot print
        text = compiled.as_text()
        assert text.count("tpu_custom_call") >= 2  # forward and backward
        assert not re.search(rf"(f32|bf16)\[{anchors},{V}\]", text)
    table = 2 * 384 * V  # which token is in which set, 300 sets in whole tiles of 128
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * table + 2**27
