"""What a run stands on besides its settings, as hashes: a run is gone on with only where none of them has changed.

Folders may have moved since: what counts is what lies in them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.media.seen_clips import ClipChangedError, in_words, of_ends
from mer_r1_jax.parallel import processes
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.run_directory import RunDirectory, RunDirectoryError

CLIPS_FILE = "clips.json"
CLIPS_RULE = f"by size and both ends, in {CLIPS_FILE}"  # of media/seen_clips.py; another one begins anew
# What decides which tokens a text becomes, and how clips are cut for the model.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "tokenizer_config.json", "chat_template.json", "chat_template.jinja", "preprocessor_config.json",
)  # fmt: skip
MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json")  # and the weights


def of_inputs(setup: Setup) -> dict[str, Any]:
    """Fingerprints of the records, tokenizer, wheels, model, reward functions; clips have theirs as they are seen."""
    config = setup.config
    return setup.data.fingerprints() | {
        "tokenizer": _of_files(setup.tokenizer_path, TOKENIZER_FILES),
        "wheels": _of_content(dataclasses.asdict(setup.wheels)),
        "model": of_model(Path(config.model.path)) if config.model.path else "random weights",
        **({"adapters": of_model(Path(config.model.adapter_path))} if config.model.adapter_path else {}),
        "reward_funcs": {path: of_source(path) for path in config.rl.reward_funcs},
        "clips": CLIPS_RULE,
        # An arm and a loss type of the user's; those with a name belong to this program.
        **{path: of_source(path) for path in (config.rl.arm, config.rl.loss_type) if "." in path},
    }


def of_source(function: str) -> str:
    """Hash of the file that a function of the user's, `package.module.function`, is written in; no module is imported.

    Modules that this one imports are not looked at.
    """
    module, paths, spec = "", [os.getcwd(), *sys.path], None
    for part in function.split(".")[:-1]:
        module = f"{module}.{part}".lstrip(".")
        # Found as the process that runs the functions finds them; the other finders know installed packages.
        found = importlib.machinery.PathFinder.find_spec(module, paths)
        if found is None and "." not in module:
            found = importlib.util.find_spec(module)
        if found is None:
            break
        spec, paths = found, found.submodule_search_locations or []
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        return "no source file"
    return atomic_files.sha256_of(Path(spec.origin))


def clip_label(config: RunConfig) -> Callable[[str], str]:
    """What tells equal names of clips apart: the data set, where each lies beside its own file."""
    if config.data.media_root:
        return lambda file: ""
    # Two data sets may call different clips 1.mp4.
    sets = {str(Path(getattr(config.data, f"{name}_path"))): f"{name}:" for name in ("eval", "rl", "sft")}
    folders = {str(Path(path).parent): label for path, label in sets.items()}  # data sets side by side share theirs
    return lambda file: folders.get(str(Path(file).parent), "")


def read_clips(folder: RunDirectory) -> dict[str, str]:
    """What the run has seen of its clips, on every process.

    Raises:
        RunDirectoryError: the list is damaged.
    """
    return processes.from_first("the clips that this run has seen", lambda: _read(folder.path / CLIPS_FILE))


def write_clips(setup: Setup, folder: RunDirectory) -> None:
    """Keeps what was newly seen of clips, on any process, in the run's folder; all processes call it.

    Raises:
        ClipChangedError: two processes have seen other bytes under one name.
    """
    # Each process has opened the clips of its own rows only.
    told = processes.gather("the clips that were seen", setup.source.clips.take_new())
    if told is None or not any(told):
        return
    path = folder.path / CLIPS_FILE
    kept = _read(path)
    for process, seen in enumerate(told):
        for name, value in seen.items():
            if kept.setdefault(name, value) != value:
                raise ClipChangedError(
                    f"{name}: process {process} has another clip under that name than the run has seen elsewhere: got "
                    f"{in_words(value)}, expected {in_words(kept[name])}. Put the same files on every host."
                )
    setup.source.clips.restore(kept)
    atomic_files.write_json(path, kept)


def _read(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    else:
        if isinstance(content, dict) and all(isinstance(value, str) for value in content.values()):
            return content
        problem = "it is no list of clips"
    raise RunDirectoryError(
        f"{path}: cannot be read ({problem}), so it cannot be told whether the clips are those this run has seen: "
        "expected names and fingerprints. Remove it, if they are, to go on with the run."
    )


def of_model(folder: Path) -> str:
    # By size and both ends: reading every byte of a 7B model would take a minute at each start.
    weights = {file.name: of_ends(file) for file in sorted(folder.glob("*.safetensors"))}
    return _of_content([_of_files(folder, MODEL_FILES), weights])


def _of_files(folder: Path, names: Iterable[str]) -> str:
    return _of_content({name: atomic_files.sha256_of(folder / name) for name in names if (folder / name).is_file()})


def _of_content(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
