"""One tiny Thinker on both sides: transformers' torch model, and the port with its weights."""

from __future__ import annotations

import functools
import types
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import torch
from support.tiny_hf import make_tiny_thinker

from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.hf.load import load_params

# Largest absolute differences allowed in float32; positions and greedy tokens are equal.
LOGITS, AUDIO, VISION = 2e-3, 1e-6, 2e-6


class TinyPort(NamedTuple):
    """A checkpoint and what both sides made of it."""

    reference: Any
    config: ThinkerConfig
    params: dict
    directory: str


@functools.cache
def tiny_port() -> TinyPort:
    """The tiny Thinker of these tests.

    The towers' last projections are made 16 times smaller than the other weights: features are then of size 0.3, where
    the absolute limits lie above float32's own rounding (torch itself is off by more at size 6) and below any mistake.
    """
    torch.set_num_threads(1)
    folder = TemporaryDirectory()
    _folders.append(folder)
    reference = make_tiny_thinker(None)
    with torch.no_grad():
        for layer in (reference.model.audio_tower.proj, reference.model.visual.merger.mlp[2]):
            layer.weight /= 16
            layer.bias /= 16
    reference.save_pretrained(folder.name)
    config = load_config(folder.name)
    return TinyPort(reference, config, load_params(folder.name, config), folder.name)


_folders: list[TemporaryDirectory] = []


def mutant(module: types.ModuleType, *changes: tuple[str, str]) -> types.ModuleType:
    """The module with pieces of its source replaced: a port that makes a mistake on purpose.

    Every piece has to occur exactly once, so a test that plants a mistake fails when the code it meant has moved on.
    """
    source = Path(module.__file__).read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{module.__name__} has {source.count(old)} times: {old}"
        source = source.replace(old, new)
    made = types.ModuleType(f"mutant_of_{module.__name__.rsplit('.', 1)[-1]}")
    made.__file__ = module.__file__
    import sys

    sys.modules[made.__name__] = made  # dataclasses look their module up
    exec(compile(source, module.__file__, "exec"), made.__dict__)
    return made


def quick_jit(function, **arguments):
    """jax.jit without the compiler's slow optimisations: these tests compile for seconds and run for milliseconds."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **arguments)
