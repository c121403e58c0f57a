"""The one table that ties our parameters to Hugging Face's tensors, read in both directions.

A row names a parameter of the tree (`text/layers/attn/q/kernel`), the tensor in transformers 4 naming
(`model.layers.{i}.self_attn.q_proj.weight`; `{i}` marks a leaf that stacks all layers) and how one becomes the other.
Nothing else in the package knows a tensor name. Torch keeps linear weights as (out, in), we keep them as
(in..., out...) with heads apart.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Same:
    """The same array on both sides."""

    def stored_shape(self, shape: Shape, config: Any) -> Shape:
        return shape

    def to_ours(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        return stored

    def to_stored(self, ours: np.ndarray, stored_shape: Shape) -> np.ndarray:
        return ours


@dataclasses.dataclass(frozen=True)
class Flat(Same):
    """Ours keeps heads apart, (H, h); the stored bias is (H*h,)."""

    def stored_shape(self, shape: Shape, config: Any) -> Shape:
        return (math.prod(shape),)

    def to_ours(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        return stored.reshape(shape)

    def to_stored(self, ours: np.ndarray, stored_shape: Shape) -> np.ndarray:
        return ours.reshape(stored_shape)


@dataclasses.dataclass(frozen=True)
class Linear(Same):
    """Ours is (in..., out...), the first `input_axes` axes being the input; stored is (out, in), both flattened."""

    input_axes: int = 1

    def stored_shape(self, shape: Shape, config: Any) -> Shape:
        return math.prod(shape[self.input_axes :]), math.prod(shape[: self.input_axes])

    def to_ours(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        return stored.T.reshape(shape)

    def to_stored(self, ours: np.ndarray, stored_shape: Shape) -> np.ndarray:
        return ours.reshape(stored_shape[::-1]).T


@dataclasses.dataclass(frozen=True)
class Conv1d(Same):
    """Ours is (time, in, out); stored is (out, in, time)."""

    def stored_shape(self, shape: Shape, config: Any) -> Shape:
        return shape[::-1]

    def to_ours(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        return stored.transpose(2, 1, 0)

    def to_stored(self, ours: np.ndarray, stored_shape: Shape) -> np.ndarray:
        return ours.transpose(2, 1, 0)


@dataclasses.dataclass(frozen=True)
class Patches(Same):
    """Ours is (channel * time * y * x, out), a matrix over flattened patches; stored is (out, channel, time, y, x)."""

    def stored_shape(self, shape: Shape, config: Any) -> Shape:
        vision = config.vision
        side = vision.patch_size
        channels = shape[0] // (vision.temporal_patch_size * side * side)
        return shape[1], channels, vision.temporal_patch_size, side, side

    def to_ours(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        return stored.reshape(shape[::-1]).T

    def to_stored(self, ours: np.ndarray, stored_shape: Shape) -> np.ndarray:
        return ours.T.reshape(stored_shape)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: our leaf, the stored tensor's name, and the change of shape between them."""

    path: str
    name: str
    transform: Same = Same()

    @property
    def stacked(self) -> bool:
        """Whether the leaf stacks one stored tensor per layer along its first axis."""
        return "{i}" in self.name


def _linear(path: str, name: str, *, bias: bool, input_axes: int = 1) -> tuple[Row, ...]:
    kernel = Row(f"{path}/kernel", f"{name}.weight", Linear(input_axes))
    return (kernel, Row(f"{path}/bias", f"{name}.bias", Flat())) if bias else (kernel,)


def _norm(path: str, name: str, *, bias: bool) -> tuple[Row, ...]:
    scale = Row(f"{path}/scale", f"{name}.weight")
    return (scale, Row(f"{path}/bias", f"{name}.bias")) if bias else (scale,)


ROWS: tuple[Row, ...] = (
    # audio tower: pre-norm layers with biases everywhere but on the key
    Row("audio/conv1/kernel", "audio_tower.conv1.weight", Conv1d()),
    Row("audio/conv1/bias", "audio_tower.conv1.bias"),
    Row("audio/conv2/kernel", "audio_tower.conv2.weight", Conv1d()),
    Row("audio/conv2/bias", "audio_tower.conv2.bias"),
    Row("audio/bos_eos/embedding", "audio_tower.audio_bos_eos_token.weight"),  # never used, kept for the export
    *_norm("audio/layers/attn_norm", "audio_tower.layers.{i}.self_attn_layer_norm", bias=True),
    *_linear("audio/layers/attn/q", "audio_tower.layers.{i}.self_attn.q_proj", bias=True),
    *_linear("audio/layers/attn/k", "audio_tower.layers.{i}.self_attn.k_proj", bias=False),
    *_linear("audio/layers/attn/v", "audio_tower.layers.{i}.self_attn.v_proj", bias=True),
    *_linear("audio/layers/attn/o", "audio_tower.layers.{i}.self_attn.out_proj", bias=True, input_axes=2),
    *_norm("audio/layers/mlp_norm", "audio_tower.layers.{i}.final_layer_norm", bias=True),
    *_linear("audio/layers/mlp/up", "audio_tower.layers.{i}.fc1", bias=True),
    *_linear("audio/layers/mlp/down", "audio_tower.layers.{i}.fc2", bias=True),
    *_norm("audio/out_norm", "audio_tower.ln_post", bias=True),
    *_linear("audio/proj", "audio_tower.proj", bias=True),
    # vision tower
    Row("vision/patch/kernel", "visual.patch_embed.proj.weight", Patches()),
    *_norm("vision/layers/norm1", "visual.blocks.{i}.norm1", bias=False),
    *_linear("vision/layers/attn/q", "visual.blocks.{i}.attn.q", bias=True),
    *_linear("vision/layers/attn/k", "visual.blocks.{i}.attn.k", bias=True),
    *_linear("vision/layers/attn/v", "visual.blocks.{i}.attn.v", bias=True),
    *_linear("vision/layers/attn/o", "visual.blocks.{i}.attn.proj", bias=True, input_axes=2),
    *_norm("vision/layers/norm2", "visual.blocks.{i}.norm2", bias=False),
    *_linear("vision/layers/mlp/gate", "visual.blocks.{i}.mlp.gate_proj", bias=True),
    *_linear("vision/layers/mlp/up", "visual.blocks.{i}.mlp.up_proj", bias=True),
    *_linear("vision/layers/mlp/down", "visual.blocks.{i}.mlp.down_proj", bias=True),
    *_norm("vision/merger/norm", "visual.merger.ln_q", bias=False),
    *_linear("vision/merger/up", "visual.merger.mlp.0", bias=True),
    *_linear("vision/merger/down", "visual.merger.mlp.2", bias=True),
    # text decoder
    Row("text/embed/embedding", "model.embed_tokens.weight"),
    *_norm("text/layers/attn_norm", "model.layers.{i}.input_layernorm", bias=False),
    *_linear("text/layers/attn/q", "model.layers.{i}.self_attn.q_proj", bias=True),
    *_linear("text/layers/attn/k", "model.layers.{i}.self_attn.k_proj", bias=True),
    *_linear("text/layers/attn/v", "model.layers.{i}.self_attn.v_proj", bias=True),
    *_linear("text/layers/attn/o", "model.layers.{i}.self_attn.o_proj", bias=False, input_axes=2),
    *_norm("text/layers/mlp_norm", "model.layers.{i}.post_attention_layernorm", bias=False),
    *_linear("text/layers/mlp/gate", "model.layers.{i}.mlp.gate_proj", bias=False),
    *_linear("text/layers/mlp/up", "model.layers.{i}.mlp.up_proj", bias=False),
    *_linear("text/layers/mlp/down", "model.layers.{i}.mlp.down_proj", bias=False),
    *_norm("text/norm", "model.norm", bias=False),
    *_linear("text/head", "lm_head", bias=False),
)

EMBEDDING_NAME = "model.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"

# Spellings of the same tensor: full Omni directories prefix `thinker.`, transformers 5 regroups its modules in memory.
_SPELLINGS = (
    (re.compile(r"^thinker\."), ""),
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^model\.(visual|audio_tower)\."), r"\1."),
)
# Parts of a full Omni directory that are no part of the Thinker.
KNOWN_EXTRAS = ("talker.", "token2wav.")


def plain_name(name: str) -> str:
    """A stored tensor's name in bare transformers 4 spelling, whichever of the three spellings it comes in."""
    for pattern, replacement in _SPELLINGS:
        name = pattern.sub(replacement, name)
    return name


def known_extra(name: str) -> str | None:
    """ "talker" or "token2wav" when the tensor belongs to that part of a full Omni directory, else None."""
    return next((prefix[:-1] for prefix in KNOWN_EXTRAS if name.startswith(prefix)), None)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored tensor and its place in our tree.

    Attributes:
        path: keys of the leaf.
        layer: index along the leaf's first axis; None for a leaf that is one tensor.
        name: the stored name, bare transformers 4 spelling.
        shape: of our leaf, without the layer axis.
        stored_shape: of the stored tensor.
        transform: between the two.
    """

    path: tuple[str, ...]
    layer: int | None
    name: str
    shape: Shape
    stored_shape: Shape
    transform: Same

    def to_ours(self, stored: np.ndarray) -> np.ndarray:
        """The stored array in our shape (a view where possible)."""
        return self.transform.to_ours(stored, self.shape)

    def to_stored(self, ours: np.ndarray) -> np.ndarray:
        """Our array (of one layer) in the stored shape (a view where possible)."""
        return self.transform.to_stored(ours, self.stored_shape)


def leaves(tree: Mapping, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The leaves of a nested dict by their path of keys."""
    found = {}
    for key, value in tree.items():
        found.update(leaves(value, (*prefix, key)) if isinstance(value, Mapping) else {(*prefix, key): value})
    return found


def entries(abstract_params: Mapping, config: Any) -> list[Entry]:
    """Every stored tensor of a Thinker, in the table's order, layer by layer within a row.

    Args:
        abstract_params: nested dict whose leaves have `.shape`, as `abstract_thinker(config)` gives.
        config: its ThinkerConfig (patch sizes, whether the head is tied).

    Raises:
        ValueError: the tree and the table disagree; the table then needs a row.
    """
    table = [row for row in ROWS if not (row.name == HEAD_NAME and config.tie_word_embeddings)]
    return entries_of(table, leaves(abstract_params), config)


def entries_of(table: Iterable[Row], tree: Mapping[tuple[str, ...], Any], config: Any) -> list[Entry]:
    """The same of any rows, for the leaves of `tree` by their path; raises as `entries`."""
    tree, found = dict(tree), []
    for row in table:
        path = tuple(row.path.split("/"))
        if path not in tree:
            raise ValueError(f"the weight table has a row for {row.path}, which the parameter tree lacks")
        shape = tuple(tree.pop(path).shape)
        one = shape[1:] if row.stacked else shape
        stored = row.transform.stored_shape(one, config)
        for layer in range(shape[0]) if row.stacked else (None,):
            found.append(Entry(path, layer, row.name.replace("{i}", str(layer)), one, stored, row.transform))
    if tree:
        raise ValueError(f"no row of the weight table for {', '.join('/'.join(path) for path in tree)}")
    return found


def by_leaf(all_entries: Iterable[Entry]) -> dict[tuple[str, ...], list[Entry]]:
    """The entries grouped by the leaf they belong to, layers in order."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in all_entries:
        groups.setdefault(entry.path, []).append(entry)
    return groups
