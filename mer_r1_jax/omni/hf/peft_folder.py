"""Adapters out to a PEFT folder and back: `adapter_config.json` and `adapter_model.safetensors`.

A module of the base has A as (rank, inputs) and B as (outputs, rank), both torch's (out, in), so they are two further
rows for each row of the weight table. Names are `base_model.model.` and the module's in the base. They follow
transformers 4, whose spelling peft turns into that of transformers 5 by itself; all spellings are read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from mer_r1_jax.foreign_text import printable
from mer_r1_jax.omni.architecture_checks import is_int
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf import table
from mer_r1_jax.omni.hf.export import stored_chunks
from mer_r1_jax.omni.hf.foreign import read_json_object
from mer_r1_jax.omni.hf.staging import staged
from mer_r1_jax.omni.hf.tensor_files import (
    NUMPY_DTYPES,
    StoredTensor,
    WeightError,
    read_header,
    spec,
    write_tensor_file,
)
from mer_r1_jax.omni.lora import PROJECTIONS, AdapterConfig
from mer_r1_jax.omni.thinker import abstract_thinker

log = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LISTED = 10  # names that an error shows
_SETTINGS = "peft's settings of an adapter"

# Our leaf -> peft's name for it.
_LEAVES = {"lora_a": "lora_A", "lora_b": "lora_B"}
# Settings of a PEFT folder that would change what is computed, and their only value that this port has.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "use_rslora": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    # The others (pissa, olora, corda, loftq, ...) change the base as well, and say True where that was undone.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None, {}),
}


def rows(adapters: AdapterConfig) -> tuple[table.Row, ...]:
    """The lines that adapters would have in the weight table, two for each adapted projection."""
    kernels = {f"text/layers/{group}/{name}/kernel" for group in adapters.groups for name in PROJECTIONS[group]}
    made = []
    for row in table.ROWS:
        if row.path not in kernels:
            continue
        assert isinstance(row.transform, table.Linear)
        module, place = _PREFIX + row.name.removesuffix(".weight"), row.path.removesuffix("kernel")
        made.append(table.Row(f"{place}lora_a", f"{module}.lora_A.weight", row.transform))
        made.append(table.Row(f"{place}lora_b", f"{module}.lora_B.weight", table.Linear()))
    return tuple(made)


def entries(config: ThinkerConfig) -> list[table.Entry]:
    """Every tensor of the PEFT folder of a Thinker with adapters."""
    assert config.adapters is not None
    shapes = {path: leaf for path, leaf in table.leaves(abstract_thinker(config)[1]).items() if path[-1] in _LEAVES}
    return table.entries_of(rows(config.adapters), shapes, config)


def save_adapters(
    directory: str | os.PathLike,
    config: ThinkerConfig,
    params: Mapping[str, Any],
    *,
    base: str = "",
    overwrite: bool = False,
) -> int:
    """Writes a PEFT folder.

    Args:
        directory: where it goes; must not exist, or be empty, unless `overwrite`.
        config: the architecture, with its adapters.
        params: flat parameters, of which the adapters are written as they are kept.
        base: what `base_model_name_or_path` says: where the model lies that the adapters belong to.
        overwrite: replace an earlier folder of adapters.

    Returns:
        Number of tensors.

    Raises:
        ExportError: a target that exists, or values that are not finite.
    """
    assert config.adapters is not None
    found = {entry.name: (entry, params["/".join(entry.path)]) for entry in entries(config)}
    specs = [spec(name, entry.stored_shape, np.dtype(leaf.dtype)) for name, (entry, leaf) in found.items()]
    with staged(Path(directory), overwrite=overwrite, marker=CONFIG_FILE) as staging:
        write_tensor_file(staging / WEIGHTS_FILE, specs, lambda tensor: stored_chunks(tensor, found[tensor.name]))
        text = json.dumps(peft_config(config.adapters, base), indent=2) + "\n"
        (staging / CONFIG_FILE).write_text(text, encoding="utf-8")
    return len(specs)


def peft_config(adapters: AdapterConfig, base: str) -> dict[str, Any]:
    """The `adapter_config.json` of these adapters."""
    parts = {"attn": r"self_attn\.[qkvo]_proj", "mlp": r"mlp\.(gate|up|down)_proj"}
    chosen = "|".join(parts[group] for group in adapters.groups)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": adapters.dropout,
        # A pattern for the whole name: the towers' projections end in the same words. The text decoder lies at
        # `model.layers` (transformers 4) or `model.language_model.layers` (5). Below `thinker.`, in an Omni model, peft
        # finds no module and says so; it would only warn that no tensor has a place, and leave the base as it is.
        "target_modules": rf"model\.(language_model\.)?layers\.\d+\.({chosen})",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def adapters_of(directory: str | os.PathLike) -> AdapterConfig:
    """The size and place of the adapters in a PEFT folder, as its settings and the names of its tensors tell them.

    Raises:
        WeightError: settings without a rank or alpha.
    """
    folder = Path(directory)
    described = read_json_object(folder / CONFIG_FILE, WeightError, _SETTINGS)
    rank, alpha = described.get("r"), described.get("lora_alpha")
    if not is_int(rank) or rank < 1 or not (is_int(alpha) or isinstance(alpha, float)) or not alpha > 0:
        raise WeightError(
            f"{folder / CONFIG_FILE}: got r={printable(repr(rank), 100)}, lora_alpha={printable(repr(alpha), 100)}, "
            "expected a whole number and a number above 0; copy the folder again from where it is from"
        )
    names = list(read_header(folder / WEIGHTS_FILE))
    attention, mlp = (any(f".{part}." in name for name in names) for part in ("self_attn", "mlp"))
    return AdapterConfig(rank=rank, alpha=float(alpha), attention=attention, mlp=mlp)


def load_adapters(
    directory: str | os.PathLike,
    config: ThinkerConfig,
    place: Callable[[str, np.ndarray], Any],
    *,
    partly: bool = False,
) -> dict[str, Any]:
    """Reads the adapters of a PEFT folder.

    Args:
        directory: written by `save_adapters`, or by peft around a Qwen2.5-Omni model.
        config: the architecture, whose adapters must be those of the folder.
        place: (flat name, stacked array) -> the array where it will live.
        partly: projections that have no adapter in any layer get one of zeros, which adds nothing. Otherwise they are
            refused: a run trains all projections of a group.

    Returns:
        Adapters by their flat names.

    Raises:
        WeightError: another rank, alpha or kind of adapter; tensors that are missing, too many, misshapen or not
            finite; all of them in one message.
    """
    found, wanted = _checked(directory, config, partly=partly), entries(config)
    loaded = {}
    for path, group in table.by_leaf(wanted).items():
        stack = np.stack([entry.to_ours(found[entry.name]()).astype(np.float32) for entry in group])
        name = "/".join(path)
        loaded[name] = place(name, stack)
    return loaded


def check_adapters(directory: str | os.PathLike, config: ThinkerConfig) -> None:
    """Raises as `load_adapters`, but for numbers that are not finite: only settings and names are read."""
    _checked(directory, config)


def _checked(
    directory: str | os.PathLike, config: ThinkerConfig, *, partly: bool = False
) -> dict[str, Callable[[], Any]]:
    """Name -> what reads its tensor, of every tensor that the adapters have; arguments are `load_adapters`' own."""
    assert config.adapters is not None
    folder, problems = Path(directory), []
    described = read_json_object(folder / CONFIG_FILE, WeightError, _SETTINGS)
    for name, mine in (("r", config.adapters.rank), ("lora_alpha", config.adapters.alpha)):
        if described.get(name) != mine:
            setting = {"r": "rank", "lora_alpha": "alpha"}[name]
            problems.append(
                f"{name}: got {printable(repr(described.get(name)), 100)}, expected model.lora.{setting}={mine:g}"
            )
    for name, plain in _PLAIN.items():
        if name in described and described[name] not in plain:
            problems.append(f"{name}: got {printable(repr(described[name]), 100)}, expected {plain[0]!r}")
    wanted = entries(config)
    stored = {_plain_name(name): tensor for name, tensor in read_header(folder / WEIGHTS_FILE).items()}
    unadapted = _unadapted(stored, wanted)
    if partly:
        wanted = [entry for entry in wanted if _projection(entry.name) not in unadapted]
        if unadapted:
            log.warning("%s: %s have no adapter there and stay as the base has them", folder, ", ".join(unadapted))
    elif unadapted:
        problems.append(
            f"{', '.join(unadapted)}: got no adapter, expected one for each projection of model.lora.targets; such a "
            "folder can be merged (mer-r1 export --model=BASE --merge=FOLDER) but not trained on"
        )
    problems += _differences(stored, wanted)
    if problems:
        raise WeightError(
            f"{folder}: its adapters are not those that model.lora asks for:\n  "
            + "\n  ".join(problems)
            + "\nSet model.lora as the folder has it, or name another folder"
        )
    read: dict[str, Callable[[], Any]] = {entry.name: stored[entry.name].read for entry in wanted}
    for entry in entries(config) if partly else ():
        read.setdefault(entry.name, functools.partial(np.zeros, entry.stored_shape, np.float32))
    return read


def with_adapters(
    config: ThinkerConfig, params: Mapping[str, Any], directory: str | os.PathLike
) -> tuple[ThinkerConfig, dict[str, Any]]:
    """The architecture and nested parameters of a base with the adapters of a PEFT folder beside its kernels.

    Args:
        config: of the base.
        params: of the base; they may still be in their files.
        directory: the PEFT folder.

    Raises:
        WeightError: as `load_adapters`.
    """
    config = dataclasses.replace(config, adapters=adapters_of(directory))
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    flat |= load_adapters(directory, config, lambda name, stack: stack, partly=True)
    return config, traverse_util.unflatten_dict(flat, sep="/")


def _plain_name(name: str) -> str:
    """A stored name in the spelling of `rows`; peft may add the adapter's own name, `default`."""
    name = re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1.weight", name)
    return _PREFIX + table.plain_name(name.removeprefix(_PREFIX))


def _projection(name: str) -> str:
    """The projection that a tensor of `rows` belongs to, such as q_proj."""
    return name.split(".lora_")[0].rpartition(".")[2]


def _unadapted(stored: Mapping[str, StoredTensor], wanted: list[table.Entry]) -> list[str]:
    """Projections without a tensor in any layer."""
    there = {_projection(name) for name in stored}
    return sorted({_projection(entry.name) for entry in wanted} - there)


def _differences(stored: Mapping[str, StoredTensor], wanted: list[table.Entry]) -> list[str]:
    expected = {entry.name: entry.stored_shape for entry in wanted}
    lines = [f"missing: {name}" for name in expected if name not in stored]
    lines += [f"surplus: {printable(name, 200)}" for name in stored if name not in expected]
    for name in expected.keys() & stored.keys():
        tensor = stored[name]
        if tensor.shape != expected[name]:
            lines.append(f"misshapen: {name}: got {tensor.shape}, expected {expected[name]}")
        elif tensor.dtype not in NUMPY_DTYPES:
            lines.append(f"not a float: {name}: got {printable(tensor.dtype, 100)}")
    more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return sorted(lines)[:_LISTED] + more
