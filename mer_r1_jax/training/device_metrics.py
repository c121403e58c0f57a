"""What a step took of its devices: memory, where they tell it, and the share of their speed that was put to use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from mer_r1_jax.config.schema import RlConfig, SftConfig
from mer_r1_jax.omni.lora import is_adapter
from mer_r1_jax.training.state import Params

# Dense bf16 operations a second of one device, by jax's name for it; from its maker's data sheet.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}
_GIB = 2**30
# Passes' worth of operations: forward, and twice as much backward; half of that where weights get no gradient.
_UPDATE, _UPDATE_OF_FROZEN = 3, 2


def memory_metrics(devices: Sequence[Any] | None = None) -> dict[str, float]:
    """GiB in use and at the highest so far, of the fullest device of this process; nothing where none tells (CPUs)."""
    told = [stats for device in devices or jax.local_devices() if (stats := device.memory_stats())]
    names = {"perf/memory_gib": "bytes_in_use", "perf/peak_memory_gib": "peak_bytes_in_use"}
    return {
        name: max(stats[key] for stats in told) / _GIB
        for name, key in names.items()
        if told and all(key in stats for stats in told)
    }


class Utilisation:
    """Model-FLOP utilisation of whole steps, by the rule of 2 operations a parameter, token and pass.

    Counted are the decoder's layers alone, without attention between tokens, towers and the vocabulary, so the figure
    is a little low. The passes of an RL step are its update (3; about 2 where adapters alone are trained), sampling,
    scoring, and log-probabilities of the reference and of the old policy where they are computed; recomputation in the
    backward pass does not count. The time is that of the whole step: most of an RL step is decoding, which is bound by
    memory and uses little of the speed.

    Args:
        shapes: of all parameters.
        devices: of the mesh.
        config: of the phase.
    """

    def __init__(self, shapes: Params, devices: Iterable[Any], config: SftConfig | RlConfig):
        sizes = {name: math.prod(shape.shape) for name, shape in shapes.items() if name.startswith("text/layers/")}
        adapters = sum(size for name, size in sizes.items() if is_adapter(name))
        layers = sum(sizes.values())
        self._operations = 2.0 * layers  # a token and pass
        # Under adapters the rest is frozen. In passes over all layers.
        self._update = _UPDATE - (_UPDATE - _UPDATE_OF_FROZEN) * (layers - adapters) / layers if adapters else _UPDATE
        self._peak = sum(PEAK_FLOPS.get(device.device_kind, math.nan) for device in devices)
        self._rollout, self._minibatches = 0, 1
        if isinstance(config, RlConfig):
            self._rollout = 2 + bool(config.beta) + (config.updates_per_rollout > 1)
            self._minibatches = config.steps_per_generation
        self._tokens = 0  # of the rollout that later updates are made from

    def of_step(self, tokens: int, seconds: float) -> dict[str, float]:
        """`perf/mfu`, in [0, 1]; nothing where a device is not in PEAK_FLOPS.

        Args:
            tokens: of all processes, that the step is the first to see; 0 for a further update of a rollout.
            seconds: of the step.
        """
        if math.isnan(self._peak):
            return {}
        self._tokens = tokens or self._tokens
        # An update sees its own part of the rollout; parts are taken to be equally long.
        seen = self._update * self._tokens / self._minibatches + self._rollout * tokens
        return {"perf/mfu": seen * self._operations / (seconds * self._peak)}
