"""The 7B run on 16 chips of v5p, its RL update and its rollout compiled by the real TPU compiler: they fit, and why.

The rollout is the shipped configuration's; layers are scanned, so fewer of them would hardly compile faster. The update
takes the shape and the mesh that performance is stated for, 64 rows of 4096 tokens on 16 chips of `fsdp`, and so does a
chunk of decoding, 256 rows on another mesh.
"""

import dataclasses
from pathlib import Path

import pytest

from mer_r1_jax.config.build import load_config
from mer_r1_jax.planning.planner import plan

pytestmark = pytest.mark.timeout(1800)  # minutes of compiling on a busy machine

CONFIG = Path(__file__).parents[2] / "experiments/configs/omni_7b.py"
SLICE, CHIPS = "v5p:2x2x4", 16
LAYERS = 28
PARAMETERS = 7_615_616_512  # of the language model, as Qwen publishes it
TABLE = 152_064 * 3_584  # values of the embedding, and of the unembedding
MIB = 2**20
CHUNK = 128  # tokens decoded at once


@pytest.fixture(scope="module")
def config():
    """The shipped configuration."""
    return load_config(str(CONFIG))


@pytest.fixture(scope="module")
def sheets(config, tmp_path_factory):
    """The plans of both programs by name."""
    cache = tmp_path_factory.mktemp("cache")
    large = dataclasses.replace(config.rl, prompts_per_step=64, max_completion_length=512)
    whole = dataclasses.replace(config.mesh, tensor=1, decode_tensor=1)
    return {
        "update": plan(dataclasses.replace(config, rl=large, mesh=whole), SLICE, cache_dir=cache, only=["update"]),
        "sample": plan(config, SLICE, cache_dir=cache, only=["sample"]),
    }


@pytest.fixture(scope="module")
def programs(sheets):
    return {name: sheet.programs[0] for name, sheet in sheets.items()}


def test_both_programs_fit(sheets, programs):
    for name, sheet in sheets.items():
        assert [program.name for program in sheet.programs] == [name]
        assert sheet.fits
        assert sheet.advice == ()
    assert programs["update"].held["parameters"] == pytest.approx(4 * PARAMETERS / CHIPS, rel=1e-3)
    # In bfloat16, the compute dtype.
    assert programs["update"].held["reference"] == programs["update"].held["parameters"] // 2
    assert programs["update"].held["optimizer"] == pytest.approx(8 * PARAMETERS / CHIPS, rel=1e-3)


def test_the_update_does_its_work_once(programs):
    """Nothing but cheap operations is computed again, all chips share the work, and the estimate says it is dense."""
    update = programs["update"]
    assert (update.work.silent_kernels, update.work.open_loops) == (0, 0)
    assert update.asked == pytest.approx(1, abs=0.05)
    # By the estimate of the compiler; and by matrix units and windows, which more vector memory hardly changes.
    assert update.utilisation() >= 0.84
    assert update.utilisation(windows=True) >= 0.86


def test_no_loop_gathers_the_unembedding_or_a_stack_of_layers(programs):
    """Forward and backward gather a layer's weights once each; the tables are gathered and reduced outside of loops."""
    for one in programs["update"].work.collectives:
        assert one.bytes <= 2 * TABLE
        if one.bytes == 2 * TABLE:
            assert one.calls <= 2
        elif one.bytes >= MIB:
            assert one.calls <= 2 * 3 * LAYERS  # at most three weights of a layer have the same size


def test_decoding_moves_weights_and_cache_and_little_else(config, programs):
    sample, tokens = programs["sample"], config.rl.max_completion_length
    assert sample.work.open_loops == 1
    tensor = config.mesh.tensor * config.mesh.decode_tensor
    # The embedding is looked up, not read.
    needed = sample.held["rollout"] - 2 * TABLE // tensor + sample.cache
    assert needed <= sample.work.hbm_bytes / tokens <= 1.15 * needed
    # Only prefill gathers weights; a token's own collectives are activations, and logits of the rows of a tensor group.
    completions = config.rl.prompts_per_step * config.rl.num_generations // (CHIPS // tensor)
    logits = 4 * completions * TABLE // 3_584 // tensor
    for one in sample.work.collectives:
        assert one.calls < tokens or one.bytes < MIB or (one.kind, one.bytes) == ("all-to-all", logits)
    a_token = sum(one.calls for one in sample.work.collectives if one.calls >= tokens) / tokens
    assert a_token <= 3 * LAYERS + 6
    assert sample.bound <= 0.74  # seconds; 1.46 on 16 chips of fsdp


def test_a_chunk_of_decoding_needs_little_besides_weights_and_cache(config, tmp_path):
    rl = dataclasses.replace(config.rl, prompts_per_step=64, max_completion_length=2048, decode_chunk=CHUNK)
    mesh = dataclasses.replace(config.mesh, data=4, fsdp=1, decode_tensor=1, tensor=4)
    config = dataclasses.replace(config, rl=rl, mesh=mesh)
    (decode,) = plan(config, SLICE, cache_dir=tmp_path, only=["decode"]).programs
    prompt, completions = 2048, 4 * 2048  # tokens of a row
    rows, token = 64 // 4, 2 * 2 * LAYERS * 128  # rows of a chip; bytes of a token: one key head of it and one value
    needed = decode.held["rollout"] - 2 * TABLE // 4 + rows * token * (prompt + completions)
    assert needed <= decode.work.hbm_bytes / CHUNK <= 1.1 * needed
    assert decode.temp <= 0.05 * 1024 * MIB
