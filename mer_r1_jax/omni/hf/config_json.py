"""ThinkerConfig from and to Hugging Face's `config.json`, in the key styles of transformers 4 and 5.

Read: a standalone Thinker's file or a full Omni one, whose `thinker_config` is taken. Rotary settings come as
`rope_theta` + `rope_scaling` (version 4) or as `rope_parameters` (version 5), placeholder ids as `*_token_index` or
`*_token_id`. Absent fields take the defaults of transformers' classes, except special ids, which take the released ones
where the vocabulary has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mer_r1_jax.foreign_text import printable
from mer_r1_jax.omni.architecture_checks import MOST_OF_A_NUMBER, ConfigError, is_int
from mer_r1_jax.omni.config import AudioConfig, TextConfig, ThinkerConfig, VisionConfig
from mer_r1_jax.omni.hf.foreign import family, path_problem, quantisation_problem, read_json_object

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
MODEL_TYPE = "qwen2_5_omni_thinker"
OMNI_MODEL_TYPE = "qwen2_5_omni"
ARCHITECTURE = "Qwen2_5OmniThinkerForConditionalGeneration"
STYLES = ("v4", "v5")

_AUDIO_FIELDS = (
    *("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim"),
    *("num_mel_bins", "n_window", "max_source_positions", "output_dim"),
)
_VISION_FIELDS = (
    *("depth", "hidden_size", "intermediate_size", "num_heads", "in_channels", "patch_size", "spatial_merge_size"),
    *("temporal_patch_size", "window_size", "out_hidden_size", "fullatt_block_indexes"),
)
_TEXT_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "max_position_embeddings"),
)
_THINKER_FIELDS = (
    "user_token_id",
    "position_id_per_seconds",
    "seconds_per_chunk",
    "tie_word_embeddings",
    "initializer_range",
)
# What transformers assumes for absent fields where the released models, and so our defaults, differ.
_HF_DEFAULTS = {("vision", "hidden_size"): 3584}
# Our field -> the spellings config files use, the one we write first.
_SPECIAL_IDS = {
    "audio_token_id": ("audio_token_index", "audio_token_id"),
    "image_token_id": ("image_token_index", "image_token_id"),
    "video_token_id": ("video_token_index", "video_token_id"),
    "audio_start_token_id": ("audio_start_token_id",),
    "audio_end_token_id": ("audio_end_token_id",),
    "vision_start_token_id": ("vision_start_token_id",),
    "vision_end_token_id": ("vision_end_token_id",),
    "pad_token_id": ("pad_token_id",),
    "eos_token_ids": ("eos_token_id",),
}
# Settings transformers has and this port does not: anything but these values would be silently computed otherwise.
_FIXED = {
    "audio": {"activation_function": "gelu", "scale_embedding": False},
    "vision": {"hidden_act": "silu"},
    "text": {"hidden_act": "silu", "use_sliding_window": False},
}
_DEFAULT_SECTION = (16, 24, 24)


def load_config(path: str | Path, **overrides: Any) -> ThinkerConfig:
    """Reads a ThinkerConfig from a Hugging Face directory or its `config.json`.

    Args:
        path: directory or JSON file, of a Thinker or of a full Omni model. The directory's `generation_config.json`
            fills in end and padding ids that `config.json` leaves out.
        overrides: fields of ThinkerConfig to set instead, e.g. `param_dtype="bfloat16"`.

    Raises:
        ConfigError: no such file, no JSON, or as config_from_hf.
    """
    path = Path(path)
    if path.suffix != ".json" and (problem := path_problem(path)):
        raise ConfigError(problem)
    file = path / CONFIG_FILE if path.is_dir() else path
    mapping = read_json_object(file, ConfigError, "the config.json of a Qwen2.5-Omni directory")
    generation_file = file.with_name(GENERATION_FILE)
    expected = "the settings of generation beside config.json"
    generation = read_json_object(generation_file, ConfigError, expected) if generation_file.exists() else {}
    return config_from_hf(mapping, generation=generation, where=str(file), **overrides)


def config_from_hf(
    mapping: Mapping[str, Any],
    *,
    generation: Mapping[str, Any] | None = None,
    where: str = CONFIG_FILE,
    **overrides: Any,
) -> ThinkerConfig:
    """Makes a ThinkerConfig of a parsed `config.json`.

    Args:
        mapping: the JSON object; one with `thinker_config` is a full Omni model's.
        generation: parsed `generation_config.json`, if any.
        where: what error messages call the file.
        overrides: fields of ThinkerConfig to set instead.

    Raises:
        ConfigError: listing every field that is missing, contradicts another or asks for what the port does not have.
    """
    problems: list[str] = []
    thinker = _thinker_part(mapping, where)
    parts: dict[str, Any] = {name: thinker.get(f"{name}_config") for name in ("audio", "vision", "text")}
    absent = [f"{name}_config" for name, part in parts.items() if not isinstance(part, Mapping)]
    if absent:
        raise ConfigError(
            f"{where}: expected the objects {', '.join(absent)}, as a Qwen2.5-Omni Thinker has them; copy config.json "
            "again from where the model is from"
        )
    if problem := quantisation_problem(mapping, thinker, parts["text"]):
        raise ConfigError(f"{where}: {problem}")
    for name, fixed in _FIXED.items():
        for field, value in fixed.items():
            if parts[name].get(field, value) != value:
                got = printable(repr(parts[name][field]), 100)
                problems.append(f"{name}_config.{field} is {got}: only {value!r} is supported")

    fields: dict[str, Any] = {name: thinker[name] for name in _THINKER_FIELDS if name in thinker}
    fields |= _special_ids(thinker, parts["text"], generation or {}, problems)
    text = _select(parts["text"], _TEXT_FIELDS, "text")
    text |= _rope(parts["text"], problems)
    if text.get("num_key_value_heads", 0) is None:
        text["num_key_value_heads"] = text.get("num_attention_heads", TextConfig.num_attention_heads)
    vision = _select(parts["vision"], _VISION_FIELDS, "vision")
    for name in ("patch_size", "temporal_patch_size"):
        vision[name] = _one_number(vision.get(name, getattr(VisionConfig, name)), f"vision_config.{name}", problems)
    audio = _select(parts["audio"], _AUDIO_FIELDS, "audio")
    for name, cls, values in (
        ("audio", AudioConfig, audio),
        ("vision", VisionConfig, vision),
        ("text", TextConfig, text),
    ):
        try:
            fields[name] = cls(**values)
        except (ConfigError, TypeError) as error:
            problems.append(str(error))
    if not problems:
        try:
            return ThinkerConfig(**(fields | overrides))
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError(f"{where} describes no Thinker this port can run:\n  " + "\n  ".join(problems))


def config_to_hf(config: ThinkerConfig, *, style: str = "v4", dtype: str | None = None) -> dict[str, Any]:
    """The `config.json` of a standalone Thinker.

    transformers 4 and 5 both load the "v4" style. It spells out what either would guess wrongly: the rotary sections,
    `vision_start_token_id`, and the tie flag on both levels (version 5 obeys the outer one, version 4 the inner one).

    Args:
        config: the architecture.
        style: "v4" writes `rope_theta` and `rope_scaling`, "v5" writes `rope_parameters`.
        dtype: of the weights beside it; None says nothing about it.

    Raises:
        ValueError: another style.
    """
    if style not in STYLES:
        raise ValueError(f"style is {style!r}: expected one of {', '.join(STYLES)}")
    section = list(config.text.mrope_section)
    if style == "v4":
        scaling = {"mrope_section": section, "rope_type": "default", "type": "default"}
        rope = {"rope_theta": config.text.rope_theta, "rope_scaling": scaling}
    else:
        rope = {
            "rope_parameters": {"mrope_section": section, "rope_theta": config.text.rope_theta, "rope_type": "default"}
        }
    common = {"initializer_range": config.initializer_range}
    text = {name: getattr(config.text, name) for name in _TEXT_FIELDS}
    vision = {name: getattr(config.vision, name) for name in _VISION_FIELDS}
    vision["fullatt_block_indexes"] = list(config.vision.fullatt_block_indexes)
    result = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{name: getattr(config, name) for name in _THINKER_FIELDS},
        **{spellings[0]: getattr(config, field) for field, spellings in _SPECIAL_IDS.items()},
        "eos_token_id": plain_ids(config.eos_token_ids),
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            **{name: getattr(config.audio, name) for name in _AUDIO_FIELDS},
            **_FIXED["audio"],
            **common,
        },
        "vision_config": {"model_type": "qwen2_5_omni_vision_encoder", **vision, **_FIXED["vision"], **common},
        "text_config": {
            "model_type": "qwen2_5_omni_text",
            **text,
            **rope,
            **_FIXED["text"],
            **common,
            "tie_word_embeddings": config.tie_word_embeddings,
        },
    }
    if dtype is not None:
        result["torch_dtype"] = dtype
    return result


def generation_to_hf(config: ThinkerConfig) -> dict[str, Any]:
    """A minimal `generation_config.json`: the ids that end and pad a completion."""
    return {"eos_token_id": plain_ids(config.eos_token_ids), "pad_token_id": config.pad_token_id}


def plain_ids(ids: tuple[int, ...]) -> int | list[int]:
    """Token ids as configuration files spell them: one of them is a number, several are a list."""
    return ids[0] if len(ids) == 1 else list(ids)


def _thinker_part(mapping: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    thinker = mapping.get("thinker_config", mapping)
    if not isinstance(thinker, Mapping):
        raise ConfigError(f"{where}: thinker_config is a {type(thinker).__name__}; expected an object")
    types = (
        [(mapping.get("model_type", OMNI_MODEL_TYPE), (OMNI_MODEL_TYPE, MODEL_TYPE))] if thinker is not mapping else []
    )
    for model_type, allowed in (*types, (thinker.get("model_type", MODEL_TYPE), (MODEL_TYPE,))):
        if model_type not in allowed:
            raise ConfigError(
                f"{where}: model_type is {family(model_type)}; expected {MODEL_TYPE!r}, or {OMNI_MODEL_TYPE!r} with a "
                "thinker_config: use a Qwen2.5-Omni model"
            )
    return thinker


def _select(part: Mapping[str, Any], names: tuple[str, ...], which: str) -> dict[str, Any]:
    defaults = {name: _HF_DEFAULTS[which, name] for name in names if (which, name) in _HF_DEFAULTS}
    return defaults | {name: part[name] for name in names if name in part}


def _one_number(value: Any, field: str, problems: list[str]) -> Any:
    """transformers 5 allows a size per axis; only equal ones make sense here."""
    if not isinstance(value, (list, tuple)):
        return value
    if any(not is_int(one) for one in value) or len(set(value)) != 1:
        problems.append(f"{field} is {printable(repr(value), 100)}: expected one number, or equal ones")
        return 1
    return value[0]


def _rope(text: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Rotary base and sections from either key style; a file with both has to agree with itself."""
    scaling, new = (text.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    for name, part in (("rope_scaling", scaling), ("rope_parameters", new)):
        if not isinstance(part, Mapping):
            problems.append(f"text_config.{name} is {printable(repr(part), 100)}: expected an object")
            return {}
    theta = [part["rope_theta"] for part in (new, text) if "rope_theta" in part]
    sections = [part["mrope_section"] for part in (scaling, new) if part.get("mrope_section")]
    kinds = [part.get("rope_type", part.get("type", "default")) for part in (scaling, new)]
    for kind in kinds:
        if kind not in ("default", "mrope"):
            problems.append(
                f"text_config: rotary type {printable(repr(kind), 100)} is not supported; expected 'default'"
            )
    for name, values in (("rope_theta", theta), ("mrope_section", sections)):
        if any(value != values[0] for value in values):
            shown = printable(repr(values), 100)
            problems.append(f"text_config: rope_parameters and the older keys disagree on {name}: {shown}")
    base = theta[0] if theta else TextConfig.rope_theta
    return {
        "rope_theta": float(base) if is_int(base) and base <= MOST_OF_A_NUMBER else base,
        "mrope_section": sections[0] if sections else _DEFAULT_SECTION,
    }


def _special_ids(
    thinker: Mapping[str, Any], text: Mapping[str, Any], generation: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    """Ids from the Thinker, then its text part, then the generation settings, then the released ones."""
    vocab_size = text.get("vocab_size", TextConfig.vocab_size)
    found: dict[str, Any] = {}
    for field, spellings in _SPECIAL_IDS.items():
        values = [part[key] for part in (thinker, text, generation) for key in spellings if part.get(key) is not None]
        value = values[0] if values else getattr(ThinkerConfig, field)
        ids = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not values and is_int(vocab_size) and max(ids) >= vocab_size:
            problems.append(
                f"{spellings[0]} is missing, and the released id {max(ids)} is not below vocab_size={vocab_size}: "
                "add it"
            )
        found[field] = ids if field == "eos_token_ids" else value
    return found
