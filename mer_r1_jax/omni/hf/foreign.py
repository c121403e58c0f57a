"""What a path is when it is no plain Qwen2.5-Omni folder, and how to make one of it.

People bring adapters, quantised models, names on a hub, pointers that git-lfs left behind, and the folder beside the
right one. Each is recognised by its names and first bytes; nothing in it is executed or unpacked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mer_r1_jax.foreign_text import printable

MAX_JSON_BYTES = 200_000_000  # tokenizer.json of a large vocabulary has 20 MB, the index of a large model 1 MB
_NAME_CHARACTERS = 200  # of a foreign name in a message

_FIRST_BYTES = (
    (b"version https://git-lfs", "a pointer that git-lfs left in place of the file; run `git lfs pull` in the folder"),
    (b"GGUF", "a GGUF file (llama.cpp's format); use the safetensors weights it was made from"),
    (b"PK\x03\x04", "a zip, such as torch.save writes; convert it with transformers' save_pretrained"),
    (b"\x80\x02", "a pickle; it is not opened, convert it with transformers' save_pretrained"),
    (b"\x89HDF", "an HDF5 file; convert it with transformers' save_pretrained"),
    (b"<!DOCTYPE", "a web page, often that of a login in place of the file; download it again"),
    (b"<!doctype", "a web page, often that of a login in place of the file; download it again"),
    (b"<html", "a web page, often that of a login in place of the file; download it again"),
)
# Names of files that hold weights in a way this project does not read -> what they are, how to mend it.
_OTHER_WEIGHTS = (
    ("*.gguf", "GGUF files (llama.cpp's format)", "use the safetensors weights they were made from"),
    ("*.bin", "PyTorch's .bin files", "convert the .bin files with transformers' save_pretrained (safetensors)"),
    ("*.pt", "PyTorch's .pt files", "convert them with transformers' save_pretrained (safetensors)"),
    ("*.pth", "PyTorch's .pth files", "convert them with transformers' save_pretrained (safetensors)"),
    ("*.ckpt", "PyTorch's .ckpt files", "convert them with transformers' save_pretrained (safetensors)"),
    ("*.distcp", "shards of torch.distributed", "merge them with the tool that saved them, into safetensors"),
    ("global_step*", "shards of DeepSpeed", "merge them with its zero_to_fp32.py, into safetensors"),
    ("*.h5", "TensorFlow's .h5 files", "convert them with transformers' save_pretrained (safetensors)"),
    ("*.msgpack", "Flax's .msgpack files", "convert them with transformers' save_pretrained (safetensors)"),
    ("*.onnx", "ONNX files", "use the safetensors weights they were made from"),
)
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json")
_FAMILIES = {
    "qwen2_audio": "Qwen2-Audio",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL",
    "qwen3_omni_moe": "Qwen3-Omni",
    "qwen3_omni_moe_thinker": "Qwen3-Omni's Thinker",
    "qwen2": "Qwen2, text only",
    "qwen3": "Qwen3, text only",
    "qwen2_5_omni_talker": "Qwen2.5-Omni's talker alone",
    "qwen2_5_omni_text": "Qwen2.5-Omni's text decoder alone",
}


def family(model_type: object) -> str:
    """A `model_type` of a config.json with the name people know the model by."""
    shown = repr(printable(model_type, _NAME_CHARACTERS))
    return f"{shown} ({_FAMILIES[model_type]})" if isinstance(model_type, str) and model_type in _FAMILIES else shown


def path_problem(path: str | Path) -> str | None:
    """Why a path is no folder of a model: it is not there, a file, or a folder of another kind. None if it may be one.

    A folder with a config.json may be one, unless an adapter lies there.
    """
    text, path = str(path), Path(path)
    shown = printable(text, _NAME_CHARACTERS)
    try:
        return _path_problem(text, path, shown)
    except OSError as error:
        return f"{shown}: cannot be looked at ({error.strerror}); expected the path of a folder that may be read"


def content_problem(file: Path) -> str | None:
    """What a file is by its kind and first bytes, if that is known not to be what its name says; else None."""
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "no plain file" if file.exists() else "not there"
        return f"is {kind}; put the file itself in its place"
    try:
        with open(file, "rb") as opened:
            head = opened.read(64)
    except OSError as error:
        return f"cannot be read ({error.strerror}); make it readable, or copy it again"
    return next((f"is {what}" for first, what in _FIRST_BYTES if head.startswith(first)), None)


def other_weights(directory: Path) -> str:
    """A hint, led by a semicolon, on weights that lie in the folder in another format; empty without any."""
    hints = [f"{what}: {mend}" for pattern, what, mend in _OTHER_WEIGHTS if any(directory.glob(pattern))]
    return "".join(f"; it holds {hint}" for hint in hints)


def read_json_object(file: Path, error: type[Exception], expected: str) -> dict[str, Any]:
    """The JSON object in a file that somebody else wrote.

    Args:
        file: to read.
        error: raised with a message.
        expected: what the file should be, for the message.
    """
    if problem := content_problem(file):
        raise error(f"{file}: {problem}; expected {expected}")
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise error(f"{file}: {size} bytes, expected {expected} of at most {MAX_JSON_BYTES}; copy it again")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise error(f"{file}: nested too deep to be {expected}; copy it again from where the model is from") from None
    except (OSError, ValueError) as reason:
        raise error(f"{file}: cannot be read as JSON ({reason}); expected {expected}; copy it again") from reason
    if not isinstance(value, dict):
        raise error(f"{file}: holds a JSON {type(value).__name__}; expected an object, {expected}; copy it again")
    return value


def quantisation_problem(*parts: Mapping[str, Any]) -> str | None:
    """Names the quantisation that one of the parts of a config.json speaks of; None without any."""
    for part in parts:
        settings = part.get("quantization_config") or part.get("compression_config")
        if not settings:
            continue
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        method = printable(method or "in a way it does not name", _NAME_CHARACTERS)
        return (
            f"the weights are quantised ({method}); expected plain float weights: use the original model, or save this "
            "one dequantised"
        )
    return None


def _path_problem(text: str, path: Path, shown: str) -> str | None:
    if not path.exists():
        if repository := _hub_name(text):
            repository = printable(repository, _NAME_CHARACTERS)
            return (
                f"{shown}: not a folder here; nothing is downloaded. If it is a name on a hub, fetch it first "
                f"(hf download {repository} --local-dir DIR) and give DIR"
            )
        return f"{shown}: no such folder; expected a run's folder, or a Hugging Face directory, nothing is downloaded"
    if not path.is_dir():
        return f"{shown}: {_file_problem(path)}"
    return _folder_problem(path, shown)


def _hub_name(text: str) -> str | None:
    """`owner/name` if a text can be a repository on a hub, also given as an address (whose // a Path makes one /)."""
    match = re.fullmatch(
        r"(?:https?:/+[^/]+/|hf:/+|hf\.co/|huggingface\.co/)?([\w-][\w.-]*/[\w.-]+?)(?:/tree/.*)?/?", text
    )
    return match[1] if match else None


def _file_problem(path: Path) -> str:
    problem = content_problem(path)
    if problem is None and path.suffix.lower() == ".gguf":
        problem = "is a GGUF file (llama.cpp's format); use the safetensors weights it was made from"
    parent = printable(path.parent, _NAME_CHARACTERS)
    return problem or f"is a file; expected a folder: give the one it lies in, {parent}"


def _folder_problem(path: Path, shown: str) -> str | None:
    if (path / "adapter_config.json").is_file() or any(path.glob("adapter_model.*")):
        base = _base_of_adapter(path)
        return (
            f"{shown}: an adapter (LoRA or another of PEFT's), which only works on top of its base {base}; expected a "
            "whole model: merge the two first (PEFT's merge_and_unload, then save_pretrained; or mer-r1 export "
            "--model=BASE --merge=ADAPTER) and give that folder. To train it on, name it in model.adapter_path"
        )
    if any((path / name).is_file() for name in _QUANTISED_FILES):
        return f"{shown}: {quantisation_problem({'quantization_config': True})}"
    if (path / "config.json").exists():
        return None
    if not any(path.iterdir()):
        return f"{shown}: an empty folder; expected a run's folder, or a Hugging Face directory: copy the model into it"
    inside = _models_inside(path)
    mend = f"; give one of the models inside: {', '.join(inside)}" if inside else ""
    return (
        f"{shown}: expected a run's folder, or a Hugging Face directory with config.json"
        f"{mend or other_weights(path) or '; copy config.json from where the model is from'}"
    )


def _base_of_adapter(path: Path) -> str:
    try:
        settings = read_json_object(path / "adapter_config.json", ValueError, "an adapter's settings")
    except ValueError:
        return "(it does not say which)"
    return printable(settings.get("base_model_name_or_path") or "(it does not say which)", _NAME_CHARACTERS)


def _models_inside(path: Path, most: int = 3) -> list[str]:
    """Folders with a config.json one, two or three levels down, such as a hub's cache or a list of checkpoints has."""
    found: list[str] = []
    for pattern in ("*/config.json", "snapshots/*/config.json", "*/snapshots/*/config.json", "*/hf/config.json"):
        found += [printable(file.parent, _NAME_CHARACTERS) for file in sorted(path.glob(pattern))]
    return found[:most]
