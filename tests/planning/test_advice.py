"""What a plan advises where a program does not fit, and where a compiler refuses it."""

import dataclasses

import jax
import pytest

from mer_r1_jax.config.schema import MeshConfig, ModelConfig, RlConfig, RunConfig
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.parallel.mesh import make_mesh
from mer_r1_jax.planning.advice import REFUSALS, UNKNOWN, Place, advise, refusal_of
from mer_r1_jax.planning.chips import CHIPS, GIB
from mer_r1_jax.planning.markdown import markdown
from mer_r1_jax.planning.sheet import ProgramSheet, Sheet
from mer_r1_jax.planning.workload import ANSWERING
from mer_r1_jax.training.omni_backbone import OmniBackbone

PROGRAM = ProgramSheet(
    name="update",
    phase="rl",
    calls=1.0,
    held={"parameters": 8 * GIB, "optimizer": 16 * GIB},
    cache=0,
    temp=50 * GIB,
    other=0,
    hbm=72 * GIB,
    error="",
    note="",
    over=2 * GIB,
    compile_seconds=1.0,
    work=None,
    seconds={},
    asked=0.0,
    estimate=0.0,
    window_estimate=0.0,
    kernels=0.0,
    exposed=0.0,
    useful=0.0,
)
CONFIG = RunConfig(model=ModelConfig(packed_rows=True), rl=RlConfig(prompts_per_step=4))


def place(chip: str, devices: int, tensor: int = 1, decode_tensor: int = 1) -> Place:
    """Of a model with four key heads."""
    return Place(bool(CHIPS[chip].cuda), devices, tensor, decode_tensor, key_heads=4)


# Heads of messages as the compilers write them, and a word of what they mean.
MESSAGES = {
    "INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.52 = bf16[400,64]{1,0} dot(%a, %b)": "Triton",
    "INTERNAL: Shared memory size limit exceeded: requested 311296, available: 101376": "Triton",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack for %fusion": "vector memory",
    "INTERNAL: Mosaic failed to compile TPU kernel: failed to legalize operation": "Pallas",
    "INTERNAL: ptxas too old. Falling back to the driver to compile": "tool of CUDA",
    "UNIMPLEMENTED: cuDNN 9.1 does not support this graph": "cuDNN",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes": "more memory than the chip",
    "INVALID_ARGUMENT: Sharding does not divide the array": "mesh",
}


@pytest.mark.parametrize(("message", "meaning"), MESSAGES.items())
def test_what_a_compiler_says_is_put_in_our_words(message, meaning):
    assert meaning in refusal_of(message).reason


def test_every_kind_of_refusal_is_met_by_a_message():
    assert {id(refusal_of(message)) for message in MESSAGES} == {id(one) for one in REFUSALS}
    assert refusal_of("INTERNAL: something new") is UNKNOWN


@pytest.mark.parametrize("message", [*MESSAGES, "INTERNAL: something new"])
def test_a_refused_program_is_advised_on(message):
    """Why, what to try, and what the compiler said."""
    refused = dataclasses.replace(PROGRAM, error=message, over=0)
    (line,) = advise(CONFIG, [refused], CHIPS["h100"], place("h100", 1))
    refusal = refusal_of(message)
    assert line.startswith(f"update: the compiler refuses it: {refusal.reason}. Try ")
    assert f"Try {refusal.cures[0] if refusal.cures else 'model.packed_rows=False'}" in line
    assert line.endswith(f"It says: {message}")


def test_a_program_that_does_not_fit_one_card():
    (line,) = advise(CONFIG, [PROGRAM], CHIPS["h100"], place("h100", 1))
    assert line.startswith("update: 74.00 GiB of 72.0 GiB, 2.00 GiB too many; largest: temp 50.00, optimizer 16.00")
    assert "Try model.packed_rows=False" in line
    assert "rl.gradient_accumulation_steps=2" in line
    assert "rl.optimizer.dtype=bfloat16, which saves 8.00 GiB" in line
    assert line.endswith("more cards: 2 halve what is held")
    assert "mesh.tensor" not in line  # one card cannot be cut


def test_cures_are_those_of_the_chip():
    (line,) = advise(CONFIG, [PROGRAM], CHIPS["h100"], place("h100", 8))
    assert line.endswith("cards with more memory")  # nobody's host has sixteen
    assert "mesh.tensor=2" in line  # of half a prompt a card
    (line,) = advise(CONFIG, [PROGRAM], CHIPS["v5p"], place("v5p", 4))
    assert "packed_rows" not in line  # the kernel of a TPU skips what a packed row's mask forbids
    assert line.endswith("a larger slice: 8 chips halve what is held")


@pytest.mark.parametrize(
    ("name", "tensor", "decode_tensor", "advised"),
    [
        ("update", 1, 4, "mesh.tensor=2 and mesh.decode_tensor=2, as one row"),
        ("update", 2, 1, "mesh.tensor=4, as one row"),
        ("update", 4, 1, None),
        ("sample", 1, 1, "mesh.decode_tensor=2, which cuts the weights"),
        ("sample", 2, 1, "mesh.decode_tensor=2, which cuts the weights"),
        ("cast", 1, 2, "mesh.decode_tensor=4, which cuts the weights"),
        ("sample", 1, 4, None),
        ("sample", 2, 2, None),
    ],
)
def test_no_more_devices_are_advised_than_there_are_key_heads(name, tensor, decode_tensor, advised):
    laid_out = place("v5p", 16, tensor, decode_tensor)
    (line,) = advise(CONFIG, [dataclasses.replace(PROGRAM, name=name)], CHIPS["v5p"], laid_out)
    if advised:
        assert advised in line
    else:
        assert "mesh.tensor" not in line and "mesh.decode_tensor" not in line
    answering = dataclasses.replace(PROGRAM, name="sample", phase=ANSWERING)
    (line,) = advise(CONFIG, [answering], CHIPS["v5p"], laid_out)
    assert ("mesh.tensor" in line) == (tensor * decode_tensor < 4)


def test_a_place_is_that_of_a_model_on_its_mesh():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, decode_tensor=2, tensor=-1))
    tiny = ThinkerConfig.tiny()
    four = dataclasses.replace(tiny, text=dataclasses.replace(tiny.text, num_key_value_heads=4))
    backbone = OmniBackbone.create(four, mesh)
    assert Place.of(backbone, gpu=True) == Place(True, 8, 2, 2, 4)
    alone = OmniBackbone.create(tiny, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert Place.of(alone, gpu=False) == Place(False, 1, 1, 1, 2)


def test_what_fits_needs_no_advice():
    assert advise(CONFIG, [dataclasses.replace(PROGRAM, over=0)], CHIPS["h100"], place("h100", 1)) == ()


def test_a_page_of_cards_says_what_is_theirs():
    """Which card, why it does not fit, what was compiled otherwise, and nothing of estimates nobody makes."""
    noted = dataclasses.replace(PROGRAM, note="every product by cuBLAS")
    sheet = Sheet(
        config=CONFIG,
        topology="h100:2",
        chip=CHIPS["h100"],
        chips=2,
        mesh={"data": 1, "fsdp": 2, "tensor": 1},
        versions={"jax": "1"},
        buckets={},
        programs=(noted,),
        epoch_steps={},
        missing=(),
        advice=advise(CONFIG, [noted], CHIPS["h100"], place("h100", 2)),
        alternatives=(),
    )
    page = markdown(sheet)
    assert "2 x NVIDIA H100 80GB HBM3, mesh data 1, fsdp 2, tensor 1. Compiled by jax 1, without a GPU" in page
    assert f"**It does not fit.**\n\n- {sheet.advice[0]}" in page
    assert "- `update`: every product by cuBLAS." in page
    assert "989 TFLOP/s" in page and "cuDNN" in page
    assert "own estimate" not in page  # that is a TPU page's
    assert sheet.to_json()["programs"][0]["note"] == noted.note


def test_what_is_not_trained_is_made_small_before_what_is():
    adapted = dataclasses.replace(PROGRAM, held={"parameters": GIB, "base": 28 * GIB, "towers": 4 * GIB})
    (line,) = advise(CONFIG, [adapted], CHIPS["h100"], place("h100", 1))
    assert "model.frozen_dtype=bfloat16, which saves 16.00 GiB and rounds no update" in line
    assert "model.param_dtype=bfloat16, which saves 16.50 GiB" in line  # the base goes along
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, frozen_dtype="bfloat16"))
    (line,) = advise(config, [adapted], CHIPS["h100"], place("h100", 1))
    assert "frozen_dtype" not in line
    assert "model.param_dtype=bfloat16, which saves 0.50 GiB" in line
