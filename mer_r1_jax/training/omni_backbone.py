"""The backbone there is, the Thinker of Qwen2.5-Omni, and the architecture that a configuration asks for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mer_r1_jax.config.schema import ConfigError, LoraConfig, ModelConfig
from mer_r1_jax.media.tokenizer import PAD_TOKEN, SPECIAL_TOKENS, TURN_END
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.hf.export import ExportSettings, export_model
from mer_r1_jax.omni.hf.load import load_params
from mer_r1_jax.omni.hf.peft_folder import load_adapters
from mer_r1_jax.omni.layers import axis_rules
from mer_r1_jax.omni.lora import AdapterConfig, fresh_adapters, is_adapter, without_adapters
from mer_r1_jax.omni.thinker import Thinker, abstract_thinker, bind, init_params
from mer_r1_jax.parallel import SPARSE_CORE_KINDS
from mer_r1_jax.parallel.rules import DECODE_RULES, TRAIN_RULES, on, param_shardings
from mer_r1_jax.training.backbone import Backbone
from mer_r1_jax.training.state import Params, flatten, nest

# Schema field -> (part of the architecture, its field there).
_SIZES = {
    "text_hidden_size": ("text", "hidden_size"),
    "text_layers": ("text", "num_hidden_layers"),
    "text_heads": ("text", "num_attention_heads"),
    "text_kv_heads": ("text", "num_key_value_heads"),
    "text_mlp_size": ("text", "intermediate_size"),
    "text_rope_theta": ("text", "rope_theta"),
    "vision_hidden_size": ("vision", "hidden_size"),
    "vision_layers": ("vision", "depth"),
    "vision_heads": ("vision", "num_heads"),
    "vision_mlp_size": ("vision", "intermediate_size"),
    "audio_hidden_size": ("audio", "d_model"),
    "audio_layers": ("audio", "encoder_layers"),
    "audio_heads": ("audio", "encoder_attention_heads"),
    "audio_mlp_size": ("audio", "encoder_ffn_dim"),
}

_PRESETS = {
    "tiny": ThinkerConfig.tiny,
    "3b": ThinkerConfig.qwen2_5_omni_3b,
    "7b": ThinkerConfig.qwen2_5_omni_7b,
}

_VOCAB_MULTIPLE = 64
_ADAPTER_STREAM = 1  # folded into a run's seed for the random half of new adapters


@dataclasses.dataclass(frozen=True)
class OmniBackbone(Backbone):
    """The Thinker of Qwen2.5-Omni.

    Attributes:
        config, mesh, shapes, shardings, decode_shardings, packed_rows, sparse_core_collectives: as of `Backbone`.
        graphdef: the NNX structure, hashable, with adapters where the architecture has them.
    """

    config: ThinkerConfig
    mesh: Mesh
    shapes: Params
    shardings: Params
    decode_shardings: Params
    packed_rows: bool
    graphdef: Any
    sparse_core_collectives: bool = False

    @classmethod
    def create(
        cls,
        config: ThinkerConfig,
        mesh: Mesh,
        packed_rows: bool = False,
        dtypes: Callable[[str], Any] | None = None,
        sparse_core_collectives: bool = False,
    ) -> OmniBackbone:
        """Lays the architecture out on a mesh without allocating anything.

        Args:
            config: the architecture.
            mesh: where it will live.
            packed_rows: as of `Backbone`.
            dtypes: the dtype of each parameter by its name; None keeps all in the architecture's `param_dtype`.
            sparse_core_collectives: as of `Backbone`.

        Raises:
            ConfigError: sparse cores on a device that has none, or that nothing was compiled for with them.
            ShardingError: a parameter that the mesh cannot cut as training, or as decoding, wants it.
        """
        kind = mesh.devices.flat[0].device_kind
        if sparse_core_collectives and kind not in SPARSE_CORE_KINDS:
            raise ConfigError(
                f"mesh.sparse_core_collectives: got True on {kind!r}, expected a chip of TPU v5p, the only one that "
                "programs were compiled for with it; leave it at False"
            )
        graphdef, shapes, axes = abstract_thinker(config)
        shardings = param_shardings(shapes, axes, mesh)
        # Completions are sampled by the text decoder alone, from features that are there already.
        decoded = param_shardings({"text": shapes["text"]}, {"text": axes["text"]}, mesh, DECODE_RULES)
        flat = flatten(shapes)
        if dtypes is not None:
            flat = {name: jax.ShapeDtypeStruct(leaf.shape, dtypes(name)) for name, leaf in flat.items()}
        placed = flatten(shardings), flatten(decoded)
        return cls(config, mesh, flat, *placed, packed_rows, graphdef, sparse_core_collectives)

    def bind(self, params: Params) -> Thinker:
        """As of `Backbone`; parameters without adapters give the model with its adapters switched off."""
        # The reference of RL may come without adapters, and nnx cannot merge the adapted structure with fewer leaves.
        off = self.config.adapters is not None and not any(map(is_adapter, params))
        return bind(abstract_thinker(self.config.base)[0] if off else self.graphdef, nest(params))

    def init(self, seed: int) -> Params:
        """As of `Backbone`, without adapters."""
        shardings = without_adapters(self.shardings)

        def make(key: jax.Array) -> Params:
            params = flatten(init_params(self.config.base, key))
            # Everything is made in `model.param_dtype`, while frozen parameters may be kept in `model.frozen_dtype`.
            return {name: leaf.astype(self.shapes[name].dtype) for name, leaf in params.items()}

        return jax.jit(make, out_shardings=shardings)(jax.random.key(seed))

    def load(self, path: str | os.PathLike) -> Params:
        """As of `Backbone`, without adapters."""
        shardings = without_adapters(self.shardings)
        dtypes = {name: self.shapes[name].dtype for name in shardings}
        return flatten(load_params(path, self.config.base, shardings=nest(shardings), dtypes=nest(dtypes)))

    def adapters(self, seed: int, path: str | os.PathLike = "") -> Params:
        """Adapters of a PEFT folder, or, without a path, new ones that change nothing yet.

        Raises:
            WeightError: a folder of other adapters.
        """
        shapes = {name: shape for name, shape in self.shapes.items() if is_adapter(name)}
        if path:

            def place(name: str, stack: np.ndarray) -> jax.Array:
                return jax.device_put(stack.astype(shapes[name].dtype), self.shardings[name])

            return load_adapters(path, self.config, place)
        make = functools.partial(fresh_adapters, shapes)
        # Bits of their own: those of the base follow from the seed alone, with and without adapters.
        key = jax.random.fold_in(jax.random.key(seed), _ADAPTER_STREAM)
        return jax.jit(make, out_shardings={name: self.shardings[name] for name in shapes})(key)

    def save(
        self, path: str | os.PathLike, params: Params, source: str | os.PathLike, asked: Callable[[], bool]
    ) -> None:
        export_model(path, self.config, nest(params), ExportSettings(source=source, overwrite=True), asked=asked)

    def rules(self, *, decode: bool = False) -> contextlib.AbstractContextManager[None]:
        return axis_rules(on(self.mesh, DECODE_RULES if decode else TRAIN_RULES), self.mesh)


def thinker_config(model: ModelConfig, tokenizer: Any | None) -> ThinkerConfig:
    """The architecture a run trains: a checkpoint's own, or a preset with the sizes given and the tokenizer's ids.

    Args:
        model: the configuration.
        tokenizer: None keeps the preset's own vocabulary and ids (a plan needs no more than their number).

    Raises:
        ConfigError: when sizes are given beside a checkpoint, which has its own.
    """
    sizes = {name: getattr(model, name) for name in _SIZES if getattr(model, name)}
    common = {
        "param_dtype": model.param_dtype,
        "compute_dtype": model.compute_dtype,
        "remat": model.remat,
        "adapters": _adapters(model.lora),
    }
    if model.path:
        if sizes:
            raise ConfigError(f"model.path is {model.path!r}, whose sizes are its own: leave {', '.join(sizes)} at 0")
        # A checkpoint's config.json gives vocabulary and special ids, so only what training decides is put over it.
        return dataclasses.replace(load_config(model.path), **common)
    # Only the smallest preset takes its vocabulary from the tokenizer: no released weights fix it.
    if model.preset == "tiny" and tokenizer is not None:
        preset = _sized_for(ThinkerConfig.tiny(), len(tokenizer))
    else:
        preset = _PRESETS[model.preset]()
    ids = {} if tokenizer is None else special_ids(tokenizer)
    return dataclasses.replace(_resized(preset, sizes), initializer_range=model.initializer_range, **ids, **common)


def _adapters(lora: LoraConfig) -> AdapterConfig | None:
    """The adapters that a configuration asks for."""
    if not lora.rank:
        return None
    return AdapterConfig(
        rank=lora.rank,
        alpha=lora.alpha,
        attention=lora.targets != "mlp",
        mlp=lora.targets != "attention",
        dropout=lora.dropout,
    )


def special_ids(tokenizer: Any) -> dict[str, Any]:
    """The special ids an architecture takes from its tokenizer (`load_tokenizer` has checked that it has them)."""
    ids = {field: tokenizer.convert_tokens_to_ids(token) for field, token in SPECIAL_TOKENS.items()}
    return ids | {
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD_TOKEN),
        "eos_token_ids": (tokenizer.convert_tokens_to_ids(TURN_END),),
    }


def _sized_for(config: ThinkerConfig, tokens: int) -> ThinkerConfig:
    """The architecture with a vocabulary that holds `tokens` ids, rounded up so that a mesh axis can cut it."""
    vocab_size = -(-tokens // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=max(vocab_size, 512)))


def _resized(config: ThinkerConfig, sizes: dict[str, int | float]) -> ThinkerConfig:
    """A preset with other sizes; what follows from them (rotary sections, output widths) follows."""
    parts: dict[str, dict[str, Any]] = {"text": {}, "vision": {}, "audio": {}}
    for name, size in sizes.items():
        part, field = _SIZES[name]
        parts[part][field] = size
    text = parts["text"]
    width = text.get("hidden_size", config.text.hidden_size)
    half_head = width // text.get("num_attention_heads", config.text.num_attention_heads) // 2
    # Qwen gives a quarter of the frequencies to time and the rest to height and width in equal parts.
    spatial = half_head * 3 // 8
    text["mrope_section"] = (half_head - 2 * spatial, spatial, spatial)
    # Features stand in for token embeddings, so both towers have to end at the language model's width.
    parts["vision"]["out_hidden_size"] = parts["audio"]["output_dim"] = width
    if depth := parts["vision"].get("depth"):
        # Every fourth layer sees the whole frame pair, the last one among them; a preset's own depth has its own list.
        parts["vision"]["fullatt_block_indexes"] = tuple(range(depth - 1, -1, -4))[::-1]
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in parts.items()}
    )
