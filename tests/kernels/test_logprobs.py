"""gather_logprobs: every implementation against the reference, forward and gradient, on one device and on eight."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mer_r1_jax.kernels.logprobs import reference
from mer_r1_jax.kernels.logprobs.api import DIRECT_VOCAB, Partition, Tiles, gather_logprobs
from mer_r1_jax.kernels.logprobs.tiles import CHIPS, tiles_for

TILES = Tiles(rows=32, vocab=256, grad_rows=16, grad_vocab=128, chunk=128, cores=1, vmem_bytes=2**24)
TEMPERATURE = 0.8
EMPTY = 2  # a candidate set without a token
FLOAT32 = 2e-5  # largest difference, relative to the largest number of an array: probabilities keep 16 bits
# bfloat16 hidden states, unembedding and logits' gradients, float32 sums: rounding of 8 bits, averaged over many terms.
BFLOAT16 = {"logprob": 2e-5, "entropy": 2e-5, "sets": 4e-5, "dx": 1e-2, "dw": 1e-2}


@functools.cache
def case(N, D, V, K=3, Z=5, seed=0):
    """Arrays of a call and the cotangents of its results; sets overlap, one is empty, some rows have none."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, V, (Z, 6)).astype(np.int32)
    ids[:2, 0], ids[EMPTY] = V - 1, -1
    return dict(
        x=rng.normal(size=(N, D)).astype(np.float32),
        w=(rng.normal(size=(D, V)) * 2 / D**0.5).astype(np.float32),
        token=rng.integers(0, V, N).astype(np.int32),
        sets=rng.integers(-1, Z, (N, K)).astype(np.int32),
        ids=ids,
        weights=[rng.normal(size=shape).astype(np.float32) for shape in ((N,), (N,), (N, K))],
    )


def scored(case, score, dtype=jnp.float32, vocab_first=False):
    """Results and gradients of `score(x, w) -> (logprob, entropy, sets)` as float32 arrays by name."""
    x, w = jnp.asarray(case["x"], dtype), jnp.asarray(case["w"], dtype)

    @jax.jit
    def run(x, w, weights):
        results, pull = jax.vjp(score, x, w.T if vocab_first else w)
        return *results, *pull(tuple(weights))

    *results, dw = run(x, w, case["weights"])
    names = ("logprob", "entropy", "sets", "dx", "dw")
    arrays = (*results, dw.T if vocab_first else dw)
    return {name: np.asarray(a, np.float32) for name, a in zip(names, arrays, strict=True)}


def by(case, **settings):
    """`scored` of the api."""

    def score(x, w):
        scores = gather_logprobs(
            x,
            w,
            case["token"],
            sets=case["sets"],
            candidate_ids_ZY=case["ids"],
            temperature=TEMPERATURE,
            **settings,
        )
        return scores.logprob, scores.entropy, scores.sets

    return score


def by_reference(case):
    def score(x, w):
        logits = reference.logits(x, w, vocab_first=False) / TEMPERATURE
        tokens = reference.token_scores(logits, case["token"])
        return *tokens, reference.set_scores(logits, case["sets"], jnp.asarray(case["ids"]))

    return score


def assert_close(got, want, limit):
    for name in want:
        scale = np.abs(want[name]).max()
        allowed = limit[name] if isinstance(limit, dict) else limit
        assert scale > 0, name
        worst = np.abs(got[name] - want[name]).max() / scale
        assert worst <= allowed, f"{name}: largest relative difference {worst:.2e}, allowed {allowed:.0e}"


PALLAS = dict(implementation="pallas", tiles=TILES, interpret=True)
CHUNKED = dict(implementation="direct", chunk=16)


@pytest.mark.parametrize(
    ("shape", "vocab_first", "settings"),
    [
        ((61, 256, 700), False, PALLAS),
        ((32, 128, 512), True, PALLAS),
        ((61, 256, 700), True, dict(implementation="xla")),
        ((7, 100, 5001), False, dict(implementation="xla")),
        ((61, 100, 700), True, dict(implementation="direct")),
        ((61, 100, 700), True, CHUNKED),
        ((61, 100, 700), False, CHUNKED),
    ],
)
def test_every_implementation_agrees_with_the_reference(shape, vocab_first, settings):
    arrays = case(*shape)
    got = scored(arrays, by(arrays, vocab_first=vocab_first, **settings), vocab_first=vocab_first)
    assert_close(got, scored(arrays, by_reference(arrays)), FLOAT32)


@pytest.mark.parametrize("settings", [PALLAS, dict(implementation="xla")], ids=["pallas", "xla"])
def test_bfloat16_stays_close_to_float32(settings):
    """The inputs are the same rounded numbers, so that what differs is the arithmetic."""
    arrays = dict(case(61, 256, 700))
    for name in ("x", "w"):
        arrays[name] = np.asarray(jnp.asarray(arrays[name], jnp.bfloat16), np.float32)
    got = scored(arrays, by(arrays, **settings), jnp.bfloat16)
    assert_close(got, scored(arrays, by_reference(arrays)), BFLOAT16)


def test_two_cores_share_the_backward_kernel_without_a_race():
    """As on v4 and v5p: the interpreter runs two cores, delays copies until they are waited for and looks for races."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    arrays = case(70, 128, 512)
    tiles = Tiles(rows=48, vocab=256, grad_rows=16, grad_vocab=128, chunk=128, cores=2, vmem_bytes=2**24)
    interpret = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True, dma_execution_mode="on_wait")
    got = scored(arrays, by(arrays, implementation="pallas", tiles=tiles, interpret=interpret))
    assert not interpret_pallas_call.races.races_found
    assert_close(got, scored(arrays, by_reference(arrays)), FLOAT32)


@pytest.mark.parametrize(("rows", "cores"), [(1, 1), (16, 1), (10, 2), (48, 2), (70, 2)])
def test_few_rows_are_padded_to_the_blocks_that_the_backward_kernel_needs(rows, cores):
    """A block has 16 rows at least, and each core needs two: below 17 rows, or 49 on two, some are padding."""
    arrays = case(rows, 128, 512)
    block = tiles_for(rows, 128, 512 * 128, 5, 4, "TPU v5" if cores == 2 else "TPU v5e").grad_rows
    tiles = dataclasses.replace(TILES, rows=16, grad_rows=block, cores=cores)
    interpret = pltpu.InterpretParams(num_cores_or_threads=cores, dma_execution_mode="on_wait")
    got = scored(arrays, by(arrays, implementation="pallas", tiles=tiles, interpret=interpret))
    assert_close(got, scored(arrays, by_reference(arrays)), FLOAT32)


@pytest.mark.parametrize("settings", [PALLAS, dict(implementation="xla"), CHUNKED], ids=["pallas", "xla", "direct"])
def test_a_vocabulary_cut_over_devices_gives_the_same(settings):
    """Rows over data and fsdp, vocabulary over tensor, the stored unembedding's width over fsdp; the rows are odd."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    partition = Partition(mesh=mesh, rows=("data", "fsdp"), vocab=("tensor",), width=("fsdp",))
    arrays = case(61, 128, 600)
    if "tiles" in settings:
        settings = settings | {"tiles": dataclasses.replace(TILES, rows=16, grad_rows=8)}
    stored = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))

    def score(x, w):
        return by(arrays, partition=partition, **settings)(x, jax.lax.with_sharding_constraint(w, stored))

    assert_close(scored(arrays, score), scored(arrays, by_reference(arrays)), FLOAT32)


def test_every_device_scores_its_own_rows_only():
    """Of whole logits too, which the compiler cuts into chunks of all rows if it is left to choose."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    partition = Partition(mesh=mesh, rows=("data",))
    arrays = case(512, 128, 600)

    def loss(x, w):
        return gather_logprobs(x, w, arrays["token"], partition=partition, **CHUNKED).logprob.sum()

    row, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    step = jax.jit(jax.grad(loss, (0, 1)), in_shardings=(row, whole))
    text = step.lower(arrays["x"], arrays["w"]).compile().as_text()
    rows = {int(rows) for rows in re.findall(r"f32\[(\d+),600\]", text)}
    trips = {int(trips) for trips in re.findall(r'"known_trip_count":{"n":"(\d+)"}', text)}
    assert rows == {128, 16} and trips == {512 // 8 // 16} and "all-gather" not in text  # 128: the unembedding's width


@pytest.mark.parametrize("settings", [PALLAS, dict(implementation="xla"), dict(implementation="direct")])
def test_ignored_rows_and_empty_sets_have_stated_values_and_no_gradient(settings):
    arrays = case(61, 128, 512)
    mask = np.arange(61) % 3 == 0
    mask[16:48] = False  # whole tiles of rows that nobody counts
    sets = np.full_like(arrays["sets"], -1)
    sets[:, 0], sets[:, 1] = 0, EMPTY

    def score(x, w):
        scores = gather_logprobs(
            x, w, arrays["token"], sets=sets, candidate_ids_ZY=arrays["ids"], mask=mask, **settings
        )
        return scores.logprob, scores.entropy, scores.sets

    got = scored(arrays, score)
    floor = np.float32(np.log(reference.FLOOR))
    assert not got["logprob"][~mask].any() and not got["entropy"][~mask].any()
    assert (got["sets"][~mask] == floor).all() and (got["sets"][:, 1:] == floor).all()
    assert not got["dx"][~mask].any() and got["dx"][mask].any(axis=1).all()
    other = dict(arrays, x=np.where(mask[:, None], arrays["x"], 7.0).astype(np.float32))
    assert_close(scored(other, score), got, 1e-6)


def test_a_row_does_not_depend_on_the_other_rows():
    """Few anchors, scored by themselves, have the bits they have among many."""
    arrays = case(61, 128, 512)
    few = slice(3, 9)

    def run(at):
        scores = gather_logprobs(arrays["x"][at], arrays["w"], arrays["token"][at], **PALLAS)
        return np.asarray(scores.logprob), np.asarray(scores.entropy)

    for whole, part in zip(run(slice(None)), run(few), strict=True):
        np.testing.assert_array_equal(whole[few], part)


def test_tiles_fit_the_chips_and_the_implementation_follows_platform_and_shape():
    for kind, chip in CHIPS.items():
        for D, V in ((3584, 152064), (3584, 38016), (2048, 151936), (1280, 51865)):
            if (kind, V) == ("TPU v4", 38016):  # two cores need an even number of tiles, and its VMEM holds small ones
                continue
            tiles = tiles_for(16384, D, V, 0, 2, kind)
            assert 16384 % tiles.rows == 0 and 16384 // tiles.grad_rows >= 2 * chip.cores, (kind, D, V, tiles)
            assert -(-V // tiles.grad_vocab) % chip.cores == 0 and D % tiles.chunk == 0
        few = tiles_for(40, 3584, 152064, 256, 2, kind)
        assert few.rows <= 48 and few.vocab == tiles_for(16384, 3584, 152064, 256, 2, kind).vocab
        # The table of sets comes in whole tiles of 128, and they are what VMEM has to hold.
        assert tiles_for(1024, 3584, 152064, 300, 2, kind) == tiles_for(1024, 3584, 152064, 384, 2, kind)
    assert tiles_for(64, 100, 152064, 0, 2, "TPU v5") is None and tiles_for(64, 128, 152064, 0, 2, "cpu") is None

    def primitives(D, V, **settings):
        shapes = jax.ShapeDtypeStruct((8, D), jnp.float32), jax.ShapeDtypeStruct((D, V), jnp.float32)
        run = functools.partial(gather_logprobs, token=np.zeros(8, np.int32), **settings)
        return str(jax.make_jaxpr(run)(*shapes))

    assert "pallas_call" in primitives(128, 8192, device_kind="TPU v5")
    for settings in ({}, {"device_kind": "TPU v5"}):
        small = primitives(64, 2048, **settings)
        assert "pallas_call" not in small and "while" not in small and "scan" not in small
    large = primitives(64, DIRECT_VOCAB + 1)
    assert "pallas_call" not in large and "scan" in large


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(temperature=0.0), "temperature is 0.0"),
        (dict(implementation="triton"), "expected one of pallas, xla, direct"),
        (dict(implementation="pallas"), "device_kind"),
        (dict(token=None), "nothing to score"),
        (dict(token=np.zeros(3, np.int32)), r"token has shape \(3,\), expected \(4,\)"),
        (dict(vocab_first=True), "is vocab_first set right"),
        (dict(sets=np.zeros((4, 1), np.int32)), "without candidate_ids_ZY"),
        (dict(unembedding=np.zeros((64, 9), jnp.bfloat16)), "cast one of them"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes, message):
    call = dict(hidden=np.zeros((4, 64), np.float32), unembedding=np.zeros((64, 9), np.float32))
    with pytest.raises(ValueError, match=message):
        gather_logprobs(**call | dict(token=np.zeros(4, np.int32)) | changes)
