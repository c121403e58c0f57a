"""A trained policy from where it lies: a run's folder, an exported one, or any Hugging Face directory."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from mer_r1_jax.config.bounds import is_bucket
from mer_r1_jax.config.build import from_mapping, of_its_time
from mer_r1_jax.config.checks import PATHS
from mer_r1_jax.config.schema import ConfigError, MeshConfig, RunConfig
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.omni.hf.foreign import path_problem
from mer_r1_jax.omni.lora import is_adapter
from mer_r1_jax.parallel.mesh import for_devices, mesh_sizes
from mer_r1_jax.run.fingerprints import of_model
from mer_r1_jax.run.model_memory import (
    MemoryNeed,
    ModelMemoryError,
    check_memory,
    free_bytes,
    kept_dtype,
    need_of_backbone,
    need_of_files,
    thinker_tensors,
)
from mer_r1_jax.run.setup import Setup, make_setup
from mer_r1_jax.run.stored_base import BASE_FOLDER, restore_base
from mer_r1_jax.storage import atomic_files, bucket, run_lock
from mer_r1_jax.storage.checkpoints import CheckpointError, Checkpoints
from mer_r1_jax.training.state import (
    Params,
    as_stored,
    check_host,
    check_numbers,
    left_out_of_checkpoints,
    nest,
    stored_params,
    tower_flags,
)

SETTINGS_FILE = "mer_r1.json"  # the run's configuration, beside an export: how its prompts and clips were made
RUN_MARKER = "checkpoints"  # folder that a run has and an export has not
# What a run writes in its folder, or takes for its own when it goes on.
RUN_PLACES = (
    RUN_MARKER,
    BASE_FOLDER,
    "reference",
    "export",
    "eval",
    "completions",
    "tensorboard",
    "logs",
    "report.html",
)

log = logging.getLogger(__name__)


class PolicyError(ValueError):
    """A folder that holds no policy; the message says what was expected there."""


def write_settings(directory: pathlib.Path, config: RunConfig) -> None:
    """Puts a run's configuration beside its export, without the run's paths; it says that the export is complete."""
    values = dataclasses.asdict(config)
    for dotted in PATHS:
        section, _, field = dotted.partition(".")
        values[section][field] = ""
    atomic_files.write_json(directory / SETTINGS_FILE, values)


def load_policy(run_dir: str | pathlib.Path) -> tuple[Any, dict[str, Any], pathlib.Path]:
    """The newest valid checkpoint of a run, which may lie at a `gs://` address.

    Returns:
        (architecture, nested parameters, folder of the tokenizer and processor files).

    Raises:
        PolicyError, CheckpointError: nothing there to load.
    """
    setup = make_setup(_without_data(_run_config(run_dir), None))
    try:
        params, _ = checkpoint_params(setup, run_dir)
    finally:
        setup.source.close()
    return setup.backbone.config, nest(params), setup.tokenizer_path


def load_run_adapters(run_dir: str | pathlib.Path) -> tuple[Any, Params, str]:
    """The adapters of a run's newest valid checkpoint; the base is not read.

    Returns:
        (architecture, flat adapters, what the run's configuration calls the base: `model.path`, or "").

    Raises:
        PolicyError: a run without adapters.
        CheckpointError: nothing there to load.
    """
    config = _run_config(run_dir)
    if not config.model.lora.rank:
        raise PolicyError(
            f"{printable(run_dir)}: got a run with model.lora.rank=0, expected one that trained adapters: leave the "
            "flag out, and the whole model is exported"
        )
    # A phase of 0 steps trains nothing, whatever its flags say.
    phases = [phase for phase in ("sft", "rl") if getattr(config, phase).max_steps]
    if trained := sorted({name for phase in phases for name, on in tower_flags(config, phase).items() if on}):
        raise PolicyError(
            f"{printable(run_dir)}: got a run that trained media towers too ({', '.join(trained)}), expected one that "
            "trained adapters alone, as a PEFT folder holds nothing else: leave the flag out, and the whole model is "
            "exported"
        )
    setup = make_setup(_without_data(config, None))
    try:
        params, _ = _restored(setup, run_dir, is_adapter)
    finally:
        setup.source.close()
    return setup.backbone.config, params, config.model.path


class ReadStep(NamedTuple):
    """Which checkpoint of a run was read.

    Attributes:
        step: over both phases.
        manifest_sha256: identifies its content.
    """

    step: int
    manifest_sha256: str


def checkpoint_params(setup: Setup, run_dir: str | pathlib.Path) -> tuple[Params, ReadStep]:
    """All parameters of a run's newest valid checkpoint, and which that is.

    The run may be going on: nothing is changed in its folder, and it is said that it is live.

    Raises:
        CheckpointError: there is none, or its parameters are not finite; or the base of its adapters is gone, or
            another one lies in its place.
    """
    params, read = _restored(setup, run_dir, lambda name: True)
    if (path := setup.config.model.path) and setup.config.model.lora.rank:
        _check_base(run_dir, path)
    return params | restore_base(setup, lambda: Checkpoints(_join(run_dir, BASE_FOLDER))), read


def _check_base(run_dir: str | pathlib.Path, path: str) -> None:
    """Refuses a base that is another one than the run's adapters were trained on: its shapes would fit all the same."""
    file = _join(run_dir, "env.json")
    try:
        content = bucket.read(file) if is_bucket(file) else pathlib.Path(file).read_bytes()
        kept = json.loads(content or b"")["fingerprints"]["model"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        # Earlier versions kept no such hash, and checkpoints may have been copied without the files beside them.
        log.warning("%s: it cannot be told whether %s is the base of this run (%s)", printable(file), path, error)
        return
    if kept != of_model(pathlib.Path(path)):
        raise CheckpointError(
            f"{printable(path)}: got another model than {printable(run_dir)} began with, expected the base that its "
            "adapters belong to; put that one back at model.path"
        )


def _restored(setup: Setup, run_dir: str | pathlib.Path, wanted: Callable[[str], bool]) -> tuple[Params, ReadStep]:
    """Those parameters of the newest valid checkpoint whose names are wanted; raises as `checkpoint_params`."""

    def parameters(step: int, host: dict[str, Any]) -> dict[str, Params]:
        check_host(host)
        stored = as_stored(setup.abstract_state_of(host["phase"]), left_out_of_checkpoints(setup.config))
        # Nobody asks for the optimizer's moments.
        return {
            kind: {name: leaf for name, leaf in stored[kind].items() if wanted(name)}
            for kind in ("trainable", "frozen")
        }

    where = _join(run_dir, RUN_MARKER)
    restored = Checkpoints(where).restore(parameters, part=True)
    if restored is None:
        raise CheckpointError(f"{where} holds no valid checkpoint: let the run save one first")
    params = stored_params(restored.arrays)
    check_numbers(params, _join(where, str(restored.step)))
    if live := run_lock.liveness(run_dir):
        log.warning("%s %s; what is read is its checkpoint %d", printable(run_dir), live, restored.step)
    return params, ReadStep(restored.step, restored.manifest_sha256)


def refuse_in_run(out: str | pathlib.Path, flag: str = "--out") -> None:
    """Keeps what a command makes out of the places where a run keeps its own, where it would be taken for the run's.

    Raises:
        PolicyError: naming the run.
    """
    place = pathlib.Path(out).resolve()
    # The nearest run above the place decides; beside what a run writes itself, its folder is free.
    for folder in (place, *place.parents):
        if (folder / RUN_MARKER).is_dir() and (folder / "config.json").is_file():
            if folder == place or place.relative_to(folder).parts[0] in RUN_PLACES:
                raise PolicyError(
                    f"{flag}: got {printable(out)}, where the run {printable(folder)} keeps what it writes itself; "
                    "expected a folder or file of its own, such as one beside that run"
                )
            return


def open_model(
    path: str | pathlib.Path, overrides: dict[str, Any] | None = None, devices: Sequence[Any] | None = None
) -> tuple[Setup, Params]:
    """The policy of a run's folder, of its export, or of a Hugging Face directory, ready to answer; see `open_step`."""
    setup, params, _ = open_step(path, overrides, devices)
    return setup, params


def open_step(
    path: str | pathlib.Path, overrides: dict[str, Any] | None = None, devices: Sequence[Any] | None = None
) -> tuple[Setup, Params, ReadStep | None]:
    """The same, and of a run's folder also which of its checkpoints that is.

    Args:
        path: the folder. A run's newest checkpoint is taken. A Hugging Face directory without `mer_r1.json` is used
            with the default media settings.
        overrides: dotted configuration fields to change, such as media limits.
        devices: where the policy lives; all there are when None.

    Raises:
        PolicyError: the folder is neither.
        ModelMemoryError: it takes more memory than there is.
    """
    path = pathlib.Path(path)
    require_model(path)
    if _is_run(path):
        setup = make_setup(_without_data(_run_config(path), overrides, devices), devices=devices)
        # A set-up allocates no weights, so a model that does not fit is refused before its checkpoint is read.
        need = need_of_backbone(setup.backbone, setup.config.model.param_dtype)
        try:
            _check_memory(path, need, setup.config, devices)
        except ModelMemoryError:
            setup.close()
            raise
        return setup, *checkpoint_params(setup, path)
    values = dataclasses.asdict(saved_config(path) or RunConfig())
    # An export has sizes of its own, and adapters merged in: of the run's model settings only the dtypes apply.
    dtypes = {name: values["model"][name] for name in ("param_dtype", "compute_dtype")}
    values["model"] = {"path": str(path), **dtypes}
    config = _without_data(from_mapping(values), overrides, devices)
    tensors = thinker_tensors(path)
    kept = kept_dtype(tensors.values(), config.model)
    model = dataclasses.replace(config.model, param_dtype=kept)
    _check_memory(path, need_of_files(tensors, model), config, devices)
    setup = make_setup(config, devices=devices, kept_dtype=kept)
    return setup, setup.initial_params(), None


def _check_memory(
    path: pathlib.Path, need: MemoryNeed, config: RunConfig, devices: Sequence[Any] | None = None
) -> None:
    """Says what a model takes and refuses one that does not fit; raises ModelMemoryError."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config.mesh, len(devices))
    if devices[0].platform != "cpu":
        need = dataclasses.replace(need, tensor=0)  # a tensor is read and cast on the host
    if sizes is not None:  # otherwise the mesh is refused when it is made
        check_memory(path, need, sizes, config.eval.memory_check, free_bytes(devices))


def saved_config(path: str | pathlib.Path) -> RunConfig | None:
    """The configuration of a run's folder (or `gs://` address) or beside an export; None where there is none.

    Raises:
        PolicyError, ConfigError: there is one that cannot be read.
    """
    if is_bucket(path):
        return _run_config(path)
    path = pathlib.Path(path)
    if _is_run(path):
        return _run_config(path)
    settings = path / SETTINGS_FILE
    return _read_config(settings) if settings.is_file() else None


def configs_of(path: str | pathlib.Path) -> list[RunConfig]:
    """The configuration of the run in a folder, or of the run whose export lies there; none of another folder.

    Only a run's own says where its data are; the settings that went with an export, `remembered` has.
    """
    folder = pathlib.Path(path)
    # An export lies in <run>/export/hf, so its run is two folders up.
    found = (saved_config(place) for place in (folder, folder.resolve().parent.parent) if _is_run(place))
    return [config for config in found if config is not None]


def extra_columns_of(path: str | pathlib.Path, changes: dict[str, Any] | None = None) -> tuple[str, ...]:
    """`data.extra_columns` before a model is open: a command's own, or that of the run that the model is or lies in."""
    names = (changes or {}).get("data.extra_columns")
    if names is not None:
        return (names,) if isinstance(names, str) else tuple(names)
    config = remembered(path)
    return () if config is None else config.data.extra_columns


def remembered(path: str | pathlib.Path) -> RunConfig | None:
    """The settings a model was trained with: of its run, those beside an export wherever it was copied, or None."""
    return saved_config(path) or next(iter(configs_of(path)), None)


def held_out_of(config: RunConfig) -> tuple[str, str]:
    """(file, media root) of the held-out clips a configuration names; empty strings where it names none."""
    data = config.data
    if not data.eval_path and data.synthetic_dir:
        return str(pathlib.Path(data.synthetic_dir) / "eval.jsonl"), data.synthetic_dir
    return data.eval_path, data.media_root


def require_model(path: str | pathlib.Path) -> None:
    """Raises PolicyError for a path that is neither a run's folder nor one that may hold a model, saying what it is."""
    if not _is_run(pathlib.Path(path)) and (problem := path_problem(path)):
        raise PolicyError(problem)


def _is_run(path: pathlib.Path) -> bool:
    try:
        return (path / RUN_MARKER).is_dir()
    except OSError:  # a path too long to be one
        return False


def _run_config(run_dir: str | pathlib.Path) -> RunConfig:
    return _read_config(_join(run_dir, "config.json"))


def _join(run_dir: str | pathlib.Path, name: str) -> str:
    return f"{str(run_dir).rstrip('/')}/{name}"


def _read_config(file: str | pathlib.Path) -> RunConfig:
    try:
        content = bucket.read(str(file)) if is_bucket(file) else pathlib.Path(file).read_bytes()
        return from_mapping(of_its_time(json.loads(content or b"")))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise PolicyError(f"{file}: no run's configuration can be read there ({error})") from error


def _without_data(
    config: RunConfig, overrides: dict[str, Any] | None, devices: Sequence[Any] | None = None
) -> RunConfig:
    """The configuration without what only training needs: a policy is used on other clips."""
    values = dataclasses.asdict(config)
    for name in ("sft_path", "rl_path", "eval_path", "media_root", "cache_dir"):
        values["data"][name] = ""
    if not values["model"]["path"] and not values["model"]["tokenizer_path"] and values["data"]["synthetic_dir"]:
        # The synthetic world's tokenizer was made with it.
        values["model"]["tokenizer_path"] = str(pathlib.Path(values["data"]["synthetic_dir"]) / "tokenizer")
    values["data"]["synthetic_dir"] = ""
    count = jax.device_count() if devices is None else len(devices)
    mesh = for_devices(config.mesh, count)
    if mesh_sizes(mesh, count) is None:
        mesh = MeshConfig()  # trained on another number of devices
    values["mesh"] = dataclasses.asdict(mesh)
    values["mesh"]["sparse_core_collectives"] = False  # of gradients, which there are none of; refused elsewhere
    values["sft"]["max_steps"] = values["rl"]["max_steps"] = 0
    values["model"]["adapter_path"] = ""  # where training began; the checkpoint has what became of it
    values["train"]["report_to"] = ()  # what training told of itself may not be installed where a policy is asked
    # Overrides come last, or data.media_root, which was just emptied, could not be set.
    for dotted, value in (overrides or {}).items():
        section, _, field = dotted.partition(".")
        values.setdefault(section, {})[field] = value
    return from_mapping(values)
