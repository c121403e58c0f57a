"""Slices and cards by name, the table of their figures, and what XLA is told of a GPU."""

from pathlib import Path

import pytest
from jax.experimental import topologies

from mer_r1_jax.parallel import GPU_MEMORY_SHARE
from mer_r1_jax.planning.chips import CHIPS, GB, GIB, TopologyError, chip_of, gpu_count, topology_devices
from mer_r1_jax.training.device_metrics import PEAK_FLOPS

PAGE = Path(__file__).parents[2] / "docs/plans/README.md"
GPUS = [name for name, chip in CHIPS.items() if chip.cuda]
TPU_KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite"}


def test_the_cards_people_have_are_there():
    assert GPUS == ["h100", "a100", "l4", "rtx4090"]
    assert {chip_of(f"{name}:1").platform for name in GPUS} == {"cuda"}
    assert {chip_of(f"{name}:2x2").platform for name in TPU_KINDS} == {"tpu"}


@pytest.mark.parametrize(("topology", "count"), [("h100:1", 1), ("l4:4", 4), ("a100:8", 8)])
def test_cards_are_counted(topology, count):
    assert gpu_count(topology) == count


@pytest.mark.parametrize("topology", ["h100", "h100:", "h100:0", "h100:9", "h100:2x2", "h100:²", "h100:-1", "h100: 2"])
def test_a_number_of_cards_no_host_has_is_refused(topology):
    with pytest.raises(TopologyError, match=r"got .* expected 1 to 8.* write h100:1 or h100:8"):
        gpu_count(topology)


def test_an_unknown_chip_is_refused_with_those_there_are():
    with pytest.raises(TopologyError, match="v100:1.*expected a chip of v4, .*rtx4090; name one"):
        chip_of("v100:1")


def test_a_machine_without_the_gpu_compiler_is_told_what_to_install(monkeypatch):
    def missing(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")  # as jax says it

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(TopologyError, match=r"h100:1.*not implemented for cuda.*expected jax's CUDA plugin.*plan-gpu"):
        topology_devices("h100:1")


def test_every_chip_has_its_figures_and_says_where_they_stand():
    for name, chip in CHIPS.items():
        figures = (chip.flops, chip.hbm_bytes, chip.hbm_bandwidth, chip.link_bandwidth)
        assert all(figure > 0 for figure in figures), name
        assert chip.source, name
        assert bool(chip.clock) != bool(chip.cuda), name  # the GPU compiler makes no estimates in cycles


def test_plans_and_metrics_divide_by_the_same_peak():
    for name, chip in CHIPS.items():
        assert PEAK_FLOPS[chip.cuda.name if chip.cuda else TPU_KINDS[name]] == chip.flops, name


def test_a_run_has_what_jax_reserves_of_a_card():
    h100 = CHIPS["h100"]
    assert h100.hbm_bytes == int(GPU_MEMORY_SHARE * 84_942_979_072)
    assert h100.hbm_bytes / 2**30 == pytest.approx(72.8, abs=0.05)


# What XLA's own descriptions of these two cards say.
KNOWN = {
    "h100": {
        "shared_memory_per_core": 233472,
        "shared_memory_per_block_optin": 232448,
        "threads_per_core_limit": 2048,
        "core_count": 132,
        "fpus_per_core": 128,
        "l2_cache_size": 52428800,
        "clock_rate_ghz": 1.98,
        "device_memory_size": 84942979072,
    },
    "a100": {
        "shared_memory_per_core": 167936,
        "shared_memory_per_block_optin": 166912,
        "threads_per_core_limit": 2048,
        "core_count": 108,
        "fpus_per_core": 64,
        "l2_cache_size": 41943040,
        "clock_rate_ghz": 1.41,
        "device_memory_size": 85100068864,
    },
}


@pytest.mark.parametrize("name", KNOWN)
def test_xla_is_told_what_it_says_of_the_card_itself(name):
    chip = CHIPS[name]
    lines = [line.strip() for line in chip.cuda.text(chip.hbm_bandwidth).splitlines()]
    assert {f"{field}: {value}" for field, value in KNOWN[name].items()} <= set(lines)
    assert f"memory_bandwidth: {int(chip.hbm_bandwidth)}" in lines
    assert f"cuda_compute_capability {{ major: {chip.cuda.capability[0]} minor: 0 }}" in lines


def test_the_page_of_plans_has_the_same_figures():
    rows = [line.split("|")[1:-1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    told = {
        cells[0].strip(" `").partition(":")[0]: [cell.strip() for cell in cells[1:]]
        for cells in rows
        if ":" in cells[0]
    }
    assert list(told) == list(CHIPS)
    for name, chip in CHIPS.items():
        memory = chip.hbm_bytes / GIB
        sizes = [f"{chip.flops / 1e12:.0f}", f"{memory:.1f}" if chip.cuda else f"{memory:.4g}"]
        rates = [f"{chip.hbm_bandwidth / GB:.0f}", f"{chip.link_bandwidth / GB:.0f}"]
        assert told[name] == [*sizes, *rates, chip.source], name
