"""What an export has beside its weights, so that other programs load it and stop in time.

transformers and vLLM learn from files alone which tokens end an answer: from `generation_config.json` and from the
Thinker's part of `config.json`. A file that says nothing of them lets every answer run into its length cap, so the
end tokens of the policy are put into each, whatever the source's files said.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mer_r1_jax.foreign_text import printable
from mer_r1_jax.omni.architecture_checks import is_int
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf.config_json import (
    CONFIG_FILE,
    GENERATION_FILE,
    OMNI_MODEL_TYPE,
    config_to_hf,
    generation_to_hf,
    plain_ids,
)
from mer_r1_jax.omni.hf.foreign import read_json_object
from mer_r1_jax.omni.hf.staging import ExportError
from mer_r1_jax.omni.hf.sums import SUMS_FILE

LAYOUTS = ("thinker", "omni")
# The class that released directories name, which every vLLM that serves this model has in its registry.
OMNI_ARCHITECTURE = "Qwen2_5OmniModel"
SPEAKERS_FILE = "spk_dict.pt"
SPEAKER = "Chelsie"  # the one transformers' generate() asks for when told nothing
# Tokenizer, processor and generation files, of which a source directory has some.
COPIED_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *(
        "added_tokens.json",
        "tokenizer.model",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
    ),
    *("chat_template.json", "chat_template.jinja", GENERATION_FILE),
)
_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
_JSON_OBJECT = "a JSON object of settings"


def write_config(staging: Path, config: ThinkerConfig, layout: str, dtype: str | None) -> None:
    """Writes `config.json`: the Thinker's own, or with the layout "omni" one that has it inside and no voice."""
    thinker = config_to_hf(config, dtype=dtype)
    if layout == "thinker":
        write_json(staging / CONFIG_FILE, thinker)
        return
    whole: dict[str, Any] = {
        "architectures": [OMNI_ARCHITECTURE],
        "model_type": OMNI_MODEL_TYPE,
        "enable_audio_output": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "thinker_config": thinker,
    }
    write_json(staging / CONFIG_FILE, whole if dtype is None else whole | {"torch_dtype": dtype})
    (staging / SPEAKERS_FILE).write_bytes(empty_speakers())


def empty_speakers() -> bytes:
    """The bytes of a `spk_dict.pt` that names one speaker and knows nothing of it.

    transformers reads this file of every full Omni directory, also of one without a voice, and looks the speaker up
    before it writes a word. It is what torch.save makes of {"Chelsie": {}}: a zip of a pickle and a version; no torch
    is needed to write it, and the same bytes come every time.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as file:
        entries = {"data.pkl": pickle.dumps({SPEAKER: {}}, protocol=2), "byteorder": b"little", "version": b"3\n"}
        for name, data in entries.items():
            file.writestr(zipfile.ZipInfo(f"spk_dict/{name}"), data)  # with a fixed date
    return content.getvalue()


def write_end_tokens(staging: Path, config: ThinkerConfig) -> None:
    """Makes `generation_config.json`, and a full Omni directory's `config.json`, say what ends an answer.

    Whatever else a copied file says stays, and a file that says it already stays as it is, byte for byte.

    Raises:
        ExportError: a copied file that is no JSON object, or whose end tokens are no ids.
    """
    generation = staging / GENERATION_FILE
    if generation.exists():
        source = read_json_object(generation, ExportError, _JSON_OBJECT)
        merged = merged_generation(config, source)
        if merged != source:
            write_json(generation, merged)
    else:
        write_json(generation, generation_to_hf(config))
    whole = read_json_object(staging / CONFIG_FILE, ExportError, _JSON_OBJECT)
    thinker = whole.get("thinker_config")
    # transformers makes the Thinker inside an Omni model stop by this field, and never looks at the other file.
    if isinstance(thinker, dict):
        ids = _with_ids(thinker.get("eos_token_id"), config, f"{CONFIG_FILE}: thinker_config")
        if ids != thinker.get("eos_token_id"):
            write_json(staging / CONFIG_FILE, whole | {"thinker_config": thinker | {"eos_token_id": ids}})


def merged_generation(config: ThinkerConfig, source: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a source's `generation_config.json`, with the policy's end tokens among its own.

    Raises:
        ExportError: its end tokens are no ids.
    """
    merged = {**source, "eos_token_id": _with_ids(source.get("eos_token_id"), config, GENERATION_FILE)}
    return merged if source.get("pad_token_id") is not None else merged | {"pad_token_id": config.pad_token_id}


def _with_ids(given: Any, config: ThinkerConfig, where: str) -> int | list[int]:
    """The end tokens a file gives, and after them those of the policy that are missing."""
    theirs = [] if given is None else given if isinstance(given, list) else [given]
    if not all(is_int(one) for one in theirs):
        raise ExportError(
            f"{where}: eos_token_id is {printable(repr(given), 100)}; expected a token id or a list of them: correct "
            "the file in the source directory"
        )
    missing = [one for one in config.eos_token_ids if one not in theirs]
    return given if given is not None and theirs and not missing else plain_ids((*theirs, *missing))


def copy_files(source: Path, staging: Path, names: Iterable[str]) -> tuple[str, ...]:
    """Copies those of the named files that `source` has; returns their names."""
    present = [name for name in names if (source / name).is_file()]
    for name in present:
        shutil.copyfile(source / name, staging / name)
    return tuple(present)


def copy_rest(base: Path, staging: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copies whatever is not a weight file and not hidden; returns the names copied and those left out."""
    copied, left_out = [], []
    for path in sorted(base.iterdir()):
        if path.name.startswith(".") or path.name == SUMS_FILE:  # the base's own sums, of other weights
            continue
        if any(path.match(pattern) for pattern in _WEIGHT_PATTERNS):
            if not (staging / path.name).exists():
                left_out.append(path.name)
        elif path.is_dir():
            shutil.copytree(path, staging / path.name)
            copied.append(path.name)
        else:
            shutil.copyfile(path, staging / path.name)
            copied.append(path.name)
    return tuple(copied), tuple(left_out)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file in one spelling: indented, keys in order."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
