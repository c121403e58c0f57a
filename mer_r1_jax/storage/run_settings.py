"""What a run was started with, and whether another start may go on with it: settings, fingerprints, versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mer_r1_jax.config.build import BEFORE
from mer_r1_jax.config.schema import RunConfig

PROGRAM = "mer_r1_jax"
LIBRARIES = (
    "mer-r1-jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "grain", "numpy",
    "transformers", "tokenizers", "safetensors", "av", "soxr", "ml-collections", "pyarrow",
)  # fmt: skip
# Settings that may change between two attempts of one run: none of them touches what is learnt.
LAYOUT = (  # of these, how the work is laid out over devices and batches: sums are rounded otherwise, no more
    "mesh", "model.remat", "model.packed_rows", "data.prompt_buckets", "sft.gradient_accumulation_steps",
    "rl.gradient_accumulation_steps", "rl.decode_chunk", "eval.prompts_per_batch",
)  # fmt: skip
MAY_CHANGE = (
    *LAYOUT,
    "train.output_dir", "train.run_name", "train.save_steps", "train.save_total_limit", "train.logging_steps",
    "train.log_completions", "train.num_completions_to_print", "train.report_to", "train.resume_from_checkpoint",
    "train.export", "train.local_dir", "train.compilation_cache_dir", "data.cache_dir", "media.decode_workers",
    "rl.reward_timeout", "rl.max_faulty_rollouts", "train.preemption_grace_seconds", "train.profile_steps",
    "eval.clip_megabytes", "train.warm_up_longest",
    # What a worker may use: a clip that decodes within it is the same clip, and one that is quarantined stays so.
    "media.decode_timeout", "media.decode_memory_mb", "eval.memory_check",
)  # fmt: skip
# Settings that name where something lies -> fingerprints of what lies there: where these agree it has only moved.
MAY_MOVE = {
    "model.path": ("model",),
    "model.tokenizer_path": ("tokenizer",),
    "model.adapter_path": ("adapters",),
    "emotion.wheel_dir": ("wheels",),
    "data.sft_path": ("sft", "clips"),
    "data.rl_path": ("rl", "clips"),
    "data.eval_path": ("eval", "clips"),
    "data.media_root": ("clips",),
    "data.synthetic_dir": ("sft", "rl", "eval", "tokenizer", "clips"),
}
_ABSENT = object()

log = logging.getLogger(__name__)


def config_differences(was: Mapping[str, Any], now: Mapping[str, Any], may_change: Iterable[str] = ()) -> list[str]:
    """Lines such as `rl.beta: 0.04 in the run, 0.1 now` for every field that differs, `may_change` left out."""
    before, after = _flat(plain(was)), _flat(plain(now))
    allowed = tuple(may_change)
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if any(name == field or name.startswith(f"{field}.") for field in allowed):
            continue
        old, new = before.get(name, _ABSENT), after.get(name, _ABSENT)
        # 1 and 1.0 are the same setting, 1 and True are not.
        if old != new or isinstance(old, bool) != isinstance(new, bool):
            lines.append(f"{name}: {_shown(old)} in the run, {_shown(new)} now")
    return lines


def refused_changes(
    was: Mapping[str, Any],
    now: Mapping[str, Any],
    earlier: Mapping[str, Any],
    fingerprints: Mapping[str, Any],
    may_change: Iterable[str] = MAY_CHANGE,
) -> list[str]:
    """Lines of `config_differences` that keep a run from being gone on with; none when it may.

    Args:
        was, now: configurations of the earlier start and of this one.
        earlier: the earlier start's `describe_environment`, with its fingerprints.
        fingerprints: of what this start's configuration points at.
        may_change: dotted fields, or sections, that may differ.
    """
    kept = earlier.get("fingerprints", {})
    if unknown := sorted(fingerprints.keys() - kept.keys()):
        log.warning(
            "this run was started by a version that kept no fingerprint of %s: whether they are the same as then is "
            "not checked",
            ", ".join(unknown),
        )
    # What lies somewhere else now has only moved where its fingerprint is known, and compared below.
    moved = [name for name, what in MAY_MOVE.items() if all(kept.get(one, _ABSENT) != _ABSENT for one in what)]
    known = {name: value for name, value in fingerprints.items() if name in kept}
    differences = config_differences(was, now, (*may_change, *moved, *_newer(was, now)))
    return differences + config_differences({"fingerprint": kept}, {"fingerprint": known})


def _newer(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that the run's version did not have yet and that are at their default, which is how it behaved."""
    before, after, defaults = _flat(plain(was)), _flat(plain(now)), _flat(plain(dataclasses.asdict(RunConfig())))
    defaults |= BEFORE
    return [name for name in after.keys() - before.keys() if name in defaults and after[name] == defaults[name]]


def warn_of_changes(
    was: Mapping[str, Any], now: Mapping[str, Any], earlier: Mapping[str, Any], environment: Mapping[str, Any]
) -> None:
    """Names what makes a run that is gone on with differ from one left alone: other versions, another layout.

    Args:
        was, now, earlier: as for `refused_changes`.
        environment: this start's `describe_environment`.
    """
    before = {**earlier.get("libraries", {}), "python": earlier.get("python"), "machine": earlier.get("machine")}
    after = {**environment["libraries"], "python": environment["python"], "machine": environment["machine"]}
    if changed := config_differences(before, after):
        log.warning(
            "this run was started with other versions; from here on it need not be equal bit for bit:\n  %s",
            "\n  ".join(changed),
        )
    others = [name for name in _flat(now) if not name.startswith(LAYOUT)]
    if relaid := config_differences(was, now, (*others, *_newer(was, now))):
        log.warning("laid out otherwise; from here on it need not be equal bit for bit:\n  %s", "\n  ".join(relaid))


def describe_environment() -> dict[str, Any]:
    """Versions, platform and commit. Nothing of the environment's variables, the command line, user or host name."""
    return {
        "program": PROGRAM,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "libraries": {name: version for name in LIBRARIES if (version := _version_of(name))},
        "commit": _commit(),
    }


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree this package runs from, with "+changes" when files differ; None outside git."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(source), *words], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+changes" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def plain(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(mapping))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
