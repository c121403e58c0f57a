"""Plans made with the real TPU compiler: the sheet's figures against counts by hand."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from support.tiny_plan import tiny_config

from mer_r1_jax.config.build import load_config
from mer_r1_jax.config.schema import ConfigError
from mer_r1_jax.parallel import SCOPED_VMEM, SCOPED_VMEM_KIB
from mer_r1_jax.planning.chips import CHIPS, GIB, TopologyError, chip_of, topology_devices
from mer_r1_jax.planning.compilation import _fingerprint, options_of
from mer_r1_jax.planning.flops import traced_flops
from mer_r1_jax.planning.markdown import markdown
from mer_r1_jax.planning.planner import alternatives, plan
from mer_r1_jax.planning.programs import RunPrograms, bytes_per_chip
from mer_r1_jax.planning.work import work_of

CONFIGS = Path(__file__).parents[2] / "experiments/configs"
SLICE = "v5p:2x2x1"
CHIPS_OF_SLICE = 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where compiled answers are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def sheet(cache):
    """The plan of the RL update."""
    return plan(tiny_config(), SLICE, cache_dir=cache, only=["update"])


def test_memory_counts_every_parameter_once_a_part(sheet):
    backbone = RunPrograms(tiny_config(), topology_devices(SLICE)).backbone

    def size(name):
        shape = backbone.shapes[name].shape
        axes = backbone.shardings[name].spec
        cut = math.prod(CHIPS_OF_SLICE for axis in axes if axis == "fsdp")
        return 4 * math.prod(shape) // cut

    text = sum(size(name) for name in backbone.shapes if name.startswith("text/"))
    towers = sum(size(name) for name in backbone.shapes if not name.startswith("text/"))
    held = sheet.programs[0].held
    # The reference is kept in bfloat16, the compute dtype, where parameters are float32.
    assert (held["parameters"], held["towers"], held["reference"]) == (text, towers, text // 2)
    counters = 8  # AdamW's and the schedule's step, int32, on every chip
    assert held["optimizer"] == 2 * text + counters
    assert sheet.programs[0].total > sum(held.values())


def test_the_update_does_at_least_its_matrix_products(sheet):
    """Forward and backward of prompt and completions, with each layer's forward done again for its backward."""
    config = tiny_config()
    thinker = RunPrograms(config, topology_devices(SLICE)).backbone.config.text
    D, f, h = thinker.hidden_size, thinker.intermediate_size, thinker.head_dim
    H, K = thinker.num_attention_heads, thinker.num_key_value_heads
    weights = thinker.num_hidden_layers * (2 * D * h * (H + K) + 3 * D * f)
    tokens = 64 + config.rl.num_generations * config.rl.max_completion_length  # of the one row of a chip
    scored = config.rl.num_generations * config.rl.max_completion_length
    layers = 2 * weights * tokens * 4  # forward twice, gradients of input and of weights
    head = 2 * D * thinker.vocab_size * scored * 4
    flops = sheet.programs[0].work.flops
    assert 0 < sheet.programs[0].asked <= 1
    assert layers + head <= flops <= 1.6 * (layers + head)  # attention and the gradient's edges come on top


def test_a_matmul_loop_counts_every_trip():
    trips, M, K = 7, 256, 512
    device = SingleDeviceSharding(topology_devices(SLICE)[0])
    x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16, sharding=device)
    w = jax.ShapeDtypeStruct((trips, K, K), jnp.bfloat16, sharding=device)

    def loop(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def until(x, w):
        """Goes on while the data says so."""

        def step(carry):
            return carry[0] + 1, jnp.tanh(carry[1] @ w[carry[0] % trips])

        return jax.lax.while_loop(lambda carry: (carry[0] < 99) & jnp.any(carry[1] > 0), step, (0, x))[1]

    def work(function, **options):
        compiled = jax.jit(function).trace(x, w).lower(lowering_platforms=("tpu",)).compile()
        return work_of(compiled.as_text(), **options), compiled.cost_analysis()["flops"]

    counted, reported = work(loop)
    one = 2 * M * K * K
    assert counted.flops == trips * one
    assert reported < 2 * one  # why the compiler's own figure will not do
    # Of the stacked weights a trip reads its own layer, not all of them.
    least = 2 * trips * (K * K + 2 * M * K)
    assert least <= counted.hbm_bytes <= 2 * least
    assert traced_flops(jax.jit(loop).trace(x, w).jaxpr) == counted.flops
    counted, _ = work(until, longest_loop=11)
    assert traced_flops(jax.jit(until).trace(x, w).jaxpr, longest_loop=11) == counted.flops
    assert counted.flops == 11 * one
    assert counted.open_loops == 1


def test_a_plan_is_compiled_once(cache, monkeypatch, sheet):
    files = sorted(cache.iterdir())
    assert len(files) == 2
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    again = plan(tiny_config(), SLICE, cache_dir=cache, only=["update"])
    assert again.programs == sheet.programs
    assert sorted(cache.iterdir()) == files
    with pytest.raises(TypeError):
        plan(tiny_config(max_completion_length=40), SLICE, cache_dir=cache, only=["update"])


def test_programs_of_products_are_compiled_with_more_vector_memory_and_kept_apart(monkeypatch):
    """A run's program carries the option; a plan that was made without it is not taken for one that was."""
    expected = {SCOPED_VMEM: str(SCOPED_VMEM_KIB["TPU v5"])}
    keys = set()
    for options in (expected, {}):
        monkeypatch.setattr("mer_r1_jax.training.backbone.product_options", lambda kind, options=options: options)
        run = RunPrograms(tiny_config(), topology_devices(SLICE))
        lowered = {one.name: one.trace().lower(lowering_platforms=("tpu",)) for one in run.rl(run.buckets("rl")[-1])}
        found = {name: options_of(one) for name, one in lowered.items()}
        assert found == dict.fromkeys(("encode", "score", "reference", "update"), options) | {"cast": {}, "sample": {}}
        keys.add(_fingerprint(lowered["update"], SLICE, chip_of(SLICE)))
    assert len(keys) == 2


def test_sums_of_gradients_run_beside_products_on_the_sparse_cores(cache, sheet):
    config = tiny_config()
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, sparse_core_collectives=True))
    (update,) = plan(config, SLICE, cache_dir=cache, only=["update"]).programs
    (usual,) = sheet.programs
    assert update.work.collective_operations == usual.work.collective_operations == usual.work.synchronous_operations
    assert update.work.sent == usual.work.sent == usual.work.exposed
    assert {one.kind for one in update.work.collectives if one.synchronous < one.calls} == {"reduce-scatter"}
    assert update.work.exposed < usual.work.exposed


def test_chips_without_sparse_cores_refuse_them():
    config = tiny_config()
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, sparse_core_collectives=True))
    with pytest.raises(ConfigError, match="mesh.sparse_core_collectives: got True on 'TPU v5 lite'"):
        RunPrograms(config, topology_devices("v5e:2x2"))


def test_both_readings_of_utilisation(sheet):
    """By hand, of a program with one second of each."""
    (update,) = sheet.programs
    one = dataclasses.replace(update, useful=3.0, estimate=4.0, window_estimate=2.0, kernels=1.0, exposed=1.0)
    assert (one.utilisation(), one.utilisation(exposed=True)) == (3 / 5, 3 / 6)
    assert (one.utilisation(windows=True), one.utilisation(windows=True, exposed=True)) == (3 / 3, 3 / 4)
    assert dataclasses.replace(one, estimate=0.0).utilisation(windows=True) == 0  # a GPU's compiler makes none
    # Products are read otherwise, all else is not.
    products = update.work.products
    chip = chip_of(SLICE)
    others = update.estimate - sum(product.calls * product.cycles for product in products) / chip.clock
    least = sum(product.calls * product.flops for product in products) / chip.flops
    assert products and update.window_estimate >= others + least
    page = markdown(dataclasses.replace(sheet, programs=(one,)))
    assert "| 60% / 50% | 100% / 75% |" in page


def test_the_cut_of_a_rollout_into_minibatches_is_planned_with_what_it_moves(cache):
    config = tiny_config(steps_per_generation=2)
    sheet = plan(config, SLICE, cache_dir=cache, only=["minibatch"])
    (cut,) = sheet.programs
    assert cut.fits and cut.calls == 1 and cut.held["experience"] > 0
    # The rollout's first half lies on half of the chips, and each of them gets a row of it.
    assert cut.work.sent > 0 and cut.bound > 0
    run = RunPrograms(config, topology_devices(SLICE))
    planned = {one.name: one for one in run.rl(run.buckets("rl")[-1])}
    part = planned["update"].args[1]
    assert cut.other >= bytes_per_chip(part)  # new beside the rollout, which stays
    assert {leaf.shape[0] for leaf in jax.tree.leaves(part.targets)} == {config.rl.prompts_per_step}
    assert "`minibatch`" in markdown(sheet)


def test_what_does_not_fit_is_named_with_its_cure(cache, monkeypatch, sheet):
    small = dataclasses.replace(chip_of(SLICE), hbm_bytes=2**16)
    monkeypatch.setitem(CHIPS, "v5p", small)
    tight = plan(tiny_config(), SLICE, cache_dir=cache, only=["update"])
    program = tight.programs[0]
    assert not tight.fits
    assert program.over == program.total - 2**16
    (line,) = tight.advice
    assert f"{program.over / GIB:.2f} GiB too many" in line
    assert "rl.optimizer.dtype=bfloat16" in line
    assert line in markdown(tight)


def test_sheet_is_complete(sheet):
    values = json.loads(json.dumps(sheet.to_json()))
    (program,) = values["programs"]
    assert values["fits"] and values["chips"] == CHIPS_OF_SLICE
    assert program["bytes_per_chip"]["total"] == sum(
        size for part, size in program["bytes_per_chip"].items() if part not in ("total", "hbm", "over")
    )
    kinds = {one["kind"] for one in program["work_per_chip"]["collectives"]}
    assert "all-gather" in kinds  # of parameters cut over fsdp
    assert values["epoch_steps"] == {"rl": -(-26_327 // 4)}
    assert values["missing"] == ["encode", "cast", "sample", "score", "reference"]
    assert values["epoch_hours_lower_bound"]["rl"] is None  # the update alone is no step
    assert "`update`" in markdown(sheet)


def test_hours_add_up_every_call_of_a_step(sheet):
    (update,) = sheet.programs
    seconds = {"compute": 2.0, "memory": 3.0, "interconnect": 1.0}
    programs = [dataclasses.replace(update, seconds=seconds), dataclasses.replace(update, calls=2, seconds=seconds)]
    whole = dataclasses.replace(sheet, programs=tuple(programs), missing=())
    assert whole.step_seconds("rl") == 3.0 + 2 * 3.0
    assert whole.epoch_hours("rl") == pytest.approx(9.0 * -(-26_327 // 4) / 3600)


def test_larger_batches_are_tried_until_one_does_not_fit(sheet):
    """Under "dots" 16 prompts are taken not to fit."""
    (update,) = sheet.programs
    tried = []

    def planned(config):
        tried.append((config.model.remat, config.rl.prompts_per_step))
        return dataclasses.replace(update, over=3 * GIB if config.model.remat == "dots" else 0)

    found = tuple(alternatives(tiny_config(), planned))
    assert tried == [("nothing", 4), ("nothing", 16), ("attention", 4), ("attention", 16), ("dots", 4)]
    assert [one.update.fits for one in found] == [True, True, True, True, False]
    page = markdown(dataclasses.replace(sheet, alternatives=found))
    assert "| attention | 16 | yes |" in page
    assert "| dots | 4 | no, over by 3.00 |" in page


@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:2x2x1", "v6e:1x1"])
def test_a_chip_has_the_memory_that_its_compiler_gives_out(topology):
    """The compiler says it of a program that takes too much; parameters that are no argument count on top of that."""
    mesh = Mesh(np.array(topology_devices(topology)), "x")
    array = jax.ShapeDtypeStruct((2**35,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(lambda x: x + 1).trace(array).lower(lowering_platforms=("tpu",)).compile()
    gives = re.search(r"available HBM \(([\d.]+)G\)", str(refused.value))
    assert gives and float(gives.group(1)) == pytest.approx(chip_of(topology).hbm_bytes / GIB, abs=0.005)


@pytest.mark.parametrize("topology", ["v5p:3x5", "h100:2x2"])
def test_an_unknown_slice_is_refused_by_name(tmp_path, topology):
    with pytest.raises(TopologyError, match=topology):
        plan(tiny_config(), topology, cache_dir=tmp_path)


def test_rows_the_slice_cannot_share_are_refused_before_compiling(tmp_path):
    with pytest.raises(ConfigError, match="rl.prompts_per_step: got 6"):
        plan(tiny_config(prompts_per_step=6), SLICE, cache_dir=tmp_path)


RECIPES = ["omni_7b.py", "omni_7b.py:v5e:16x16", "omni_7b.py:v6e:4x4", "omni_7b.py:v5e:2x4"]
RECIPES += ["omni_3b.py", "omni_3b.py:v5p:2x2x4", "omni_3b.py:v5e:2x4"]


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_configs_are_the_papers_recipe(name):
    config = load_config(f"{CONFIGS}/{name}")
    assert (config.rl.num_generations, config.rl.temperature, config.rl.arm) == (4, 0.9, "mer_r1")
    assert (config.data.max_prompt_length, config.rl.max_completion_length) == (2048, 1024)
    assert not config.model.train_vision_tower and not config.sft.train_vision_tower


@pytest.mark.parametrize(("name", "rank", "heads"), [("omni_3b.py", 0, 2), ("omni_7b.py", 32, 4)])
def test_eight_small_chips_have_a_layout_of_each_model(name, rank, heads):
    """All weights of 3B, and adapters of 7B on a base in bfloat16; rows are shared evenly."""
    config = load_config(f"{CONFIGS}/{name}:v5e:2x4")
    run = RunPrograms(config, topology_devices("v5e:2x4"))
    mesh = {"data": 1, "fsdp": 8 // heads, "decode_tensor": heads, "tensor": 1}
    assert dict(run.backbone.mesh.shape) == mesh
    assert heads == run.backbone.config.text.num_key_value_heads
    assert config.model.lora.rank == rank
    text = run.backbone.shapes["text/layers/mlp/up/kernel"].dtype
    assert text == ("bfloat16" if rank else "float32")


def test_a_slice_without_a_layout_is_refused_with_those_that_have_one():
    with pytest.raises(ValueError, match=r"slice 'v5e:1x1': expected one of v5e:4x4, v5e:2x4, v5p:2x2x4, h100:1"):
        load_config(f"{CONFIGS}/omni_3b.py:v5e:1x1")
