"""Memory, utilisation and traces of steps: counted by hand, on devices that tell and on those that do not."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from support.small_run import environment

from mer_r1_jax.config.schema import RlConfig, SftConfig
from mer_r1_jax.training.device_metrics import Utilisation, memory_metrics
from mer_r1_jax.training.profiling import StepProfiler

GIB = 2**30
SHAPES = {
    "text/layers/attn/q/kernel": jax.ShapeDtypeStruct((4, 10, 25), jnp.float32),  # 1,000 parameters in layers
    "text/embed/kernel": jax.ShapeDtypeStruct((500, 10), jnp.float32),
    "audio/layers/q": jax.ShapeDtypeStruct((99,), jnp.float32),
}


def device(kind="NVIDIA L4", **stats):
    return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats or None)


def test_memory_is_that_of_the_fullest_device_that_tells():
    devices = [
        device(bytes_in_use=1 * GIB, peak_bytes_in_use=7 * GIB),
        device(),
        device(bytes_in_use=3 * GIB, peak_bytes_in_use=4 * GIB),
    ]
    assert memory_metrics(devices) == {"perf/memory_gib": 3.0, "perf/peak_memory_gib": 7.0}
    assert memory_metrics([device()]) == {} and memory_metrics() == {}  # CPUs tell nothing


@pytest.mark.parametrize(
    ("config", "passes"),
    [
        (SftConfig(), 3),
        (RlConfig(), 6),  # update, sampling, scoring, reference
        (RlConfig(beta=0.0), 5),
        (RlConfig(num_iterations=2), 7),
        (RlConfig(steps_per_generation=2), 5.5),  # an update sees half of what is sampled and scored
    ],
)
def test_utilisation_counts_two_operations_a_parameter_token_and_pass(config, passes):
    told = Utilisation(SHAPES, [device(), device()], config)
    expected = passes * 2 * 1000 * 50 / (2.0 * 2 * 121e12)
    assert told.of_step(50, 2.0)["perf/mfu"] == pytest.approx(expected)
    # The second update of a rollout samples and scores nothing.
    if config in (RlConfig(num_iterations=2), RlConfig(steps_per_generation=2)):
        update = 3 / config.steps_per_generation
        assert told.of_step(0, 2.0)["perf/mfu"] == pytest.approx(expected * update / passes)


def test_frozen_layers_under_adapters_count_one_pass_less():
    shapes = SHAPES | {"text/layers/attn/q/lora_a": jax.ShapeDtypeStruct((4, 10, 2), jnp.float32)}
    told = Utilisation(shapes, [device()], SftConfig()).of_step(50, 2.0)
    assert told["perf/mfu"] == pytest.approx((2 * 1000 + 3 * 80) * 2 * 50 / (2.0 * 121e12))


def test_a_device_nobody_has_a_data_sheet_of_gives_no_utilisation():
    assert Utilisation(SHAPES, jax.devices(), SftConfig()).of_step(50, 2.0) == {}


TRACED = """
import pathlib, sys
import jax.numpy as jnp
from mer_r1_jax.training.profiling import StepProfiler

profiler, waited = StepProfiler(pathlib.Path(sys.argv[1]), "rl", (2,)), []
for step in (1, 2, 3, 4):
    profiler.begin(step, lambda: waited.append(step))
    jnp.ones(3).block_until_ready()
profiler.end()
assert waited == [3], waited  # before the trace of step 2 was written
"""


def test_the_steps_asked_for_are_traced_and_no_others(tmp_path):
    # In a process of its own: jax.profiler can end one that has compiled for TPUs without having any.
    subprocess.run([sys.executable, "-c", TRACED, str(tmp_path)], env=environment(), check=True, timeout=600)
    assert [path.name for path in tmp_path.iterdir()] == ["rl_00002"]
    assert any(path.name.endswith(".xplane.pb") and path.stat().st_size for path in tmp_path.rglob("*"))


def test_processes_wait_for_each_other_wherever_a_trace_was_asked_for(tmp_path, monkeypatch):
    """Also where it could not be begun: another process may have begun its own, and all have to come."""

    def broken(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr(jax.profiler, "start_trace", broken)
    profiler, waited = StepProfiler(tmp_path, "rl", (2,)), []
    for step in (1, 2, 3, 4):
        profiler.begin(step, lambda: waited.append(step))  # noqa: B023
    assert waited == [3]


def test_a_trace_that_cannot_be_made_is_a_warning(tmp_path, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no room")

    profiler = StepProfiler(tmp_path, "sft", (1, 2))
    monkeypatch.setattr(jax.profiler, "start_trace", broken)
    profiler.begin(1)
    assert "sft step 1 cannot be profiled: no room" in caplog.text
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", broken)
    profiler.begin(2)
    profiler.end()
    profiler.end()
    assert caplog.text.count("the profile of sft step 2 cannot be written: no room") == 1
