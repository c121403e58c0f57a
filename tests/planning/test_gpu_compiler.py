"""Plans made with the real GPU compiler, which needs jax's CUDA plugin and no GPU: four layers of 3B on an H100."""

import dataclasses
import importlib.util
import re

import pytest
from support.loops import loops
from support.tiny_plan import tiny_config

from mer_r1_jax.kernels.attention import cudnn
from mer_r1_jax.planning.chips import topology_devices
from mer_r1_jax.planning.compilation import compile_program
from mer_r1_jax.planning.markdown import markdown
from mer_r1_jax.planning.planner import plan
from mer_r1_jax.planning.programs import RunPrograms

pytestmark = [
    pytest.mark.gpu_compiler,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="jax's CUDA plugin is not installed, expected for plans of GPUs: pip install -e '.[plan-gpu]'",
    ),
]

CARD = "h100:1"
LAYERS, CHUNK = 4, 16
WIDTH, FEED_FORWARD, VOCABULARY, KV_WIDTH = 2048, 11_008, 151_936, 256  # of 3B
LAYER = 2 * WIDTH * (WIDTH + KV_WIDTH) + 3 * WIDTH * FEED_FORWARD  # values of its matrices
# What hands an array on, or writes a part of it where it lies.
IN_PLACE = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "dynamic-update-slice"}


@pytest.fixture(scope="module")
def config():
    config = tiny_config(decode_chunk=CHUNK)
    sizes = dict(preset="3b", text_layers=LAYERS, audio_layers=2, vision_layers=2)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where compiled answers are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def sheet(config, cache):
    return plan(config, CARD, cache_dir=cache, only=["decode", "update"])


def test_a_run_is_planned_for_a_card_that_is_not_there(sheet):
    assert sheet.fits and not sheet.advice
    assert list(sheet.versions) == ["jax", "jaxlib", "jax-cuda13-plugin"]
    page = markdown(sheet)
    assert "1 x NVIDIA H100 80GB HBM3" in page
    assert "`update`" in page and "`decode`" in page


@pytest.mark.skipif(not cudnn.is_there(), reason="cuDNN is not installed: pip install --no-deps nvidia-cudnn-cu13")
@pytest.mark.parametrize(("card", "mesh"), [(CARD, {}), ("h100:8", {"fsdp": 4, "tensor": 2})])
def test_attention_is_cudnns_and_no_scores_are_in_memory(config, cache, card, mesh):
    """At the tiny plan's sizes attention is too small for it, so prompts and completions are as long as a run's."""
    long = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **mesh),
        data=dataclasses.replace(config.data, max_prompt_length=1024, prompt_buckets=(1024,)),
        rl=dataclasses.replace(config.rl, max_completion_length=512, prompts_per_step=8 if mesh else 2),
    )
    run = RunPrograms(long, topology_devices(card))
    (update,) = [one for one in run.rl(run.buckets("rl")[-1]) if one.name == "update"]
    compiled = compile_program(update, card, cache)
    assert not compiled.error
    calls = re.findall(r'custom_call_target="__cudnn\$fmha\w*?Softmax(Backward)?"', compiled.text)
    assert calls.count("Backward") >= 2 and calls.count("") >= 2  # of prompts and of completions
    scores = re.findall(r"f32\[(?:\d+,)*\d+,(?:1024,1024|512,1024|512,1536)\]", compiled.text)
    assert not scores


def test_every_product_of_the_update_is_found(sheet, config):
    """In whatever way the compiler makes it: by Triton, by cuBLAS, or fused."""
    update = next(program for program in sheet.programs if program.name == "update")
    tokens = config.rl.prompts_per_step * (64 + config.rl.num_generations * config.rl.max_completion_length)
    scored = config.rl.prompts_per_step * config.rl.num_generations * config.rl.max_completion_length
    # Forward; once more for the backward pass, but for a layer's last product; gradients of inputs and weights.
    layers = LAYERS * (4 * LAYER - WIDTH * FEED_FORWARD) * tokens
    least = 2 * (layers + 4 * WIDTH * VOCABULARY * scored)
    assert least <= update.work.flops <= 1.1 * least
    assert 0.9 <= update.asked <= 1
    assert update.work.silent_kernels == 0
    trained = LAYERS * LAYER + 2 * WIDTH * VOCABULARY
    assert update.held["parameters"] == pytest.approx(4 * trained, rel=1e-3)
    assert update.held["optimizer"] == pytest.approx(8 * trained, rel=1e-3)


def test_a_token_reads_its_weights_and_little_else(sheet):
    decode = next(program for program in sheet.programs if program.name == "decode")
    needed = 2 * (LAYERS * LAYER + WIDTH * VOCABULARY)
    # 2.1 times as much while each layer's slice of the stacked weights was copied.
    assert needed <= decode.work.hbm_bytes / CHUNK <= 1.2 * needed
    assert decode.bound == decode.seconds["memory"] >= CHUNK * needed / 3.35e12


def test_adapters_add_little_to_what_a_token_reads(config, cache):
    """Their products share an operand with the weights', which the compiler would put side by side with them."""
    lora = dataclasses.replace(config.model.lora, rank=32)
    model = dataclasses.replace(config.model, lora=lora, frozen_dtype="bfloat16")
    sheet = plan(dataclasses.replace(config, model=model), CARD, cache_dir=cache, only=["decode"])
    (decode,) = (program for program in sheet.programs if program.name == "decode")
    needed = 2 * (LAYERS * LAYER + WIDTH * VOCABULARY)
    assert needed <= decode.work.hbm_bytes / CHUNK <= 1.3 * needed


def test_the_token_loop_copies_no_weight(config, cache):
    run = RunPrograms(config, topology_devices(CARD))
    (decode,) = [one for one in run.rl(run.buckets("rl")[-1]) if one.name == "decode"]
    (inside,) = loops(compile_program(decode, CARD, cache).text, fused=False)
    # The logits are larger than the attention's matrices, whose copies would show in the traffic above.
    made = {one.opcode for one in inside if any(array.bytes >= 2 * WIDTH * FEED_FORWARD for array in one.arrays)}
    assert "get-tuple-element" in made and made <= IN_PLACE
