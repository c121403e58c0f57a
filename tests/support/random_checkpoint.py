"""Checkpoints of random weights in the layout of the released ones: their widths, bfloat16 shards, an index."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf import table
from mer_r1_jax.omni.hf.export import ExportReport, ExportSettings, export_model
from mer_r1_jax.omni.thinker import abstract_thinker

DEVIATION = 0.02  # of kernels and embeddings; about 1 / sqrt(width) at the widths of the release


@dataclasses.dataclass(frozen=True, eq=False)
class DrawnLeaf:
    """A parameter whose values are drawn when they are asked for, so that no more than a layer is ever held."""

    shape: tuple[int, ...]
    path: tuple[str, ...]
    seed: int
    dtype: Any = np.dtype(jnp.bfloat16)

    def __getitem__(self, layer: int) -> np.ndarray:
        """One layer of a stacked leaf."""
        return self._drawn(self.shape[1:], layer)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self._drawn(self.shape, 0)

    def _drawn(self, shape: tuple[int, ...], layer: int) -> np.ndarray:
        noise = np.random.default_rng((self.seed, layer)).standard_normal(shape, np.float32)
        noise *= 0.1 if len(shape) == 1 else DEVIATION
        if self.path[-1] == "scale":  # a norm's, around 1
            noise += 1
        return noise.astype(self.dtype)


def cut_3b(text_layers: int = 2, tower_layers: int = 4) -> ThinkerConfig:
    """The released 3B Thinker with fewer layers and all of its widths."""
    whole = ThinkerConfig.qwen2_5_omni_3b()
    full_attention = (tower_layers // 2 - 1, tower_layers - 1)
    return dataclasses.replace(
        whole,
        text=dataclasses.replace(whole.text, num_hidden_layers=text_layers),
        vision=dataclasses.replace(whole.vision, depth=tower_layers, fullatt_block_indexes=full_attention),
        audio=dataclasses.replace(whole.audio, encoder_layers=tower_layers),
    )


def write_random_checkpoint(folder: Path, config: ThinkerConfig, tokenizer: Path, shard: str = "1GB") -> ExportReport:
    """Writes a full Omni directory without a voice: `thinker.` names, nested config, shards, the tokenizer's files.

    Args:
        folder: must not exist, or be empty.
        config: the architecture.
        tokenizer: folder of its tokenizer.
        shard: most bytes of a file.
    """
    params: dict[str, Any] = {}
    for seed, (path, leaf) in enumerate(table.leaves(abstract_thinker(config)[1]).items()):
        place = params
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = DrawnLeaf(tuple(leaf.shape), path, seed)
    settings = ExportSettings(layout="omni", source=tokenizer, dtype="bfloat16", max_shard_size=shard)
    return export_model(folder, config, params, settings)
