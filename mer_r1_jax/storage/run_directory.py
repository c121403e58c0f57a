"""One run, one folder: where everything is, what it was started with, and who may write.

<output_dir>/<run_name>/
    config.json          the configuration, plain JSON
    env.json             versions and platform of the first attempt, fingerprints of the data
    metrics.jsonl        one line a logging step
    completions/         sampled completions, parquet
    tensorboard/<phase>/
    checkpoints/<step>/
    eval/                <benchmark>_<step>.json and .samples.jsonl
    export/hf/
    report.html
    logs/attempt_<n>/    config.json, env.json and log.txt of each start of the command; log_<p>.txt of process p
"""

from __future__ import annotations

import contextlib
import fcntl
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

from mer_r1_jax import screen
from mer_r1_jax.storage import durable, run_lock
from mer_r1_jax.storage.checkpoints import Checkpoints
from mer_r1_jax.storage.durable import WriteError, writing

PROGRAM = "mer_r1_jax"
LIBRARIES = (
    "mer-r1-jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers",
    "tokenizers", "safetensors", "av", "soxr", "ml-collections", "pyarrow",
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
    "train.export", "train.local_dir", "data.cache_dir", "media.decode_workers", "rl.reward_timeout",
    "rl.max_faulty_rollouts", "train.preemption_grace_seconds",
    # What a worker may use: a clip that decodes within it is the same clip, and one that is quarantined stays so.
    "media.decode_timeout", "media.decode_memory_mb",
)  # fmt: skip
# Settings that name where something lies -> fingerprints of what lies there: where these agree it has only moved.
MAY_MOVE = {
    "model.path": ("model",),
    "model.tokenizer_path": ("tokenizer",),
    "emotion.wheel_dir": ("wheels",),
    "data.sft_path": ("sft", "clips"),
    "data.rl_path": ("rl", "clips"),
    "data.eval_path": ("eval", "clips"),
    "data.media_root": ("clips",),
    "data.synthetic_dir": ("sft", "rl", "eval", "tokenizer", "clips"),
}
_ABSENT = object()

log = logging.getLogger(__name__)


class RunDirectoryError(RuntimeError):
    """The output folder cannot be used for this run; the message says why and what to do."""


class RunDirectory:
    """A run's folder, held by a lock from `open` to `close`.

    Attributes:
        path: the folder.
        attempt: how often the command was started on it, this time included; from 1.
        resumed: whether an earlier attempt had begun.
        log_file: what this process says is written here as well.
    """

    _held = run_lock.HELD

    def __init__(self, path: Path, lock_file: Any):
        self.path = path
        self._lock_file = lock_file
        self.attempt = 0
        self.resumed = False
        self.log_file: Path | None = None
        self._log_handler: logging.Handler | None = None

    config_file = property(lambda self: self.path / "config.json")
    env_file = property(lambda self: self.path / "env.json")
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    report_file = property(lambda self: self.path / "report.html")
    completions = property(lambda self: self.path / "completions")
    tensorboard = property(lambda self: self.path / "tensorboard")
    checkpoints = property(lambda self: self.path / "checkpoints")
    eval = property(lambda self: self.path / "eval")
    export = property(lambda self: self.path / "export" / "hf")
    attempt_logs = property(lambda self: self.path / "logs" / f"attempt_{self.attempt}")

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        config: Mapping[str, Any],
        *,
        may_change: Iterable[str] = MAY_CHANGE,
        fingerprints: Mapping[str, Any] | None = None,
        resume: bool = True,
    ) -> RunDirectory:
        """Makes the folder, or takes an earlier attempt up again.

        Args:
            path: `<output_dir>/<run_name>`.
            config: the run's configuration as nested mappings of JSON values.
            may_change: dotted fields, or sections, that may differ from the earlier attempt's.
            fingerprints: names and hashes of what the configuration points at (data sets, model); compared as well.
            resume: False refuses a folder in which a run has begun.

        Raises:
            RunDirectoryError: the folder holds something else, is in use by another process, belongs to a run with
                another configuration (every differing field is listed), or cannot be written.
        """
        path = Path(os.path.abspath(path))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirectoryError(f"{path} cannot be made: {error}. Choose another train.output_dir.") from error
        _refuse_foreign(path)
        run = cls(path, _take_lock(path))
        try:
            run._begin(_plain(config), tuple(may_change), _plain(fingerprints or {}), resume)
        except OSError as error:
            run.close()
            raise RunDirectoryError(f"{path} cannot be written: {error}") from error
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def join(cls, path: str | os.PathLike, attempt: int, resumed: bool, process: int) -> RunDirectory:
        """The folder that the first process of this run has opened, for one of the others, which only logs there.

        Raises:
            RunDirectoryError: this process does not see it.
        """
        run = cls(Path(os.path.abspath(path)), None)
        run.attempt, run.resumed = attempt, resumed
        if not run.attempt_logs.is_dir():
            raise RunDirectoryError(
                f"process {process} does not see {run.attempt_logs}, which process 0 has made: expected "
                "train.output_dir on a file system that every host of the run has mounted at the same place, or gs://"
            )
        run._log_to(f"log_{process}.txt")
        return run

    def open_checkpoints(self, name: str, max_to_keep: int) -> Checkpoints:
        """The checkpoints in a folder of the run's, cleared of what an earlier attempt has left half-made."""
        checkpoints = Checkpoints(self.path / name, max_to_keep=max_to_keep)
        checkpoints.clear()
        return checkpoints

    def publish(self) -> None:
        """Puts what was written so far where the run's folder is kept: here, where it lies already."""

    def close(self) -> None:
        """Releases the lock and the log file. Closing twice does no harm."""
        if self._log_handler is not None:
            logging.getLogger().removeHandler(self._log_handler)
            self._log_handler.close()
            self._log_handler = None
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None
            self._held.discard(self.path)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _begin(
        self, config: dict[str, Any], may_change: tuple[str, ...], fingerprints: dict[str, Any], resume: bool
    ) -> None:
        environment = describe_environment() | {"fingerprints": fingerprints}
        relaid: list[str] = []
        self.resumed = self.config_file.exists()
        if self.resumed:
            if not resume:
                raise RunDirectoryError(
                    f"{self.path} holds a run already, and train.resume_from_checkpoint is 'never': "
                    "choose another train.run_name, or set it to 'auto' to go on with that run"
                )
            earlier = _read_json(self.env_file)
            before, kept = _read_json(self.config_file), _kept_fingerprints(earlier, fingerprints)
            moved = [name for name, what in MAY_MOVE.items() if all(kept.get(one, _ABSENT) != _ABSENT for one in what)]
            differences = config_differences(before, config, (*may_change, *moved))
            others = [name for name in _flat(config) if not name.startswith(LAYOUT)]
            relaid = config_differences(before, config, others)
            now = {name: value for name, value in fingerprints.items() if name in kept}
            differences += config_differences({"fingerprint": kept}, {"fingerprint": now})
            if differences:
                raise RunDirectoryError(
                    f"{self.path} holds a run with another configuration, which cannot be gone on with:\n  "
                    + "\n  ".join(differences)
                    + "\nSet these back (a fingerprint: put the files back) to go on with that run, or choose another "
                    "train.run_name for a new one."
                )
            _warn_of_other_versions(earlier, environment)
        for folder in (self.completions, self.tensorboard, self.checkpoints, self.eval, self.path / "logs"):
            folder.mkdir(exist_ok=True)
        self.attempt = 1 + max(
            (int(p.name.removeprefix("attempt_")) for p in self.path.glob("logs/attempt_*") if p.name[8:].isdigit()),
            default=0,
        )
        self.attempt_logs.mkdir()
        durable.write_json(self.attempt_logs / "env.json", environment)
        durable.write_json(self.attempt_logs / "config.json", config)
        if not self.resumed:
            durable.write_json(self.env_file, environment)
        durable.write_json(self.config_file, config)  # last: from now on the folder is a run's
        self._log_to("log.txt")
        if relaid:
            log.warning("laid out otherwise; from here on it need not be equal bit for bit:\n  %s", "\n  ".join(relaid))

    def _log_to(self, name: str) -> None:
        self.log_file = self.attempt_logs / name
        self._log_handler = screen.log_file(self.log_file)
        logging.getLogger().addHandler(self._log_handler)


def _kept_fingerprints(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprints that an earlier start has kept; those it did not know of are named in the log."""
    kept = earlier.get("fingerprints", {})
    if unknown := sorted(now.keys() - kept.keys()):
        log.warning(
            "this run was started by a version that kept no fingerprint of %s: whether they are the same as then is "
            "not checked",
            ", ".join(unknown),
        )
    return kept


def config_differences(was: Mapping[str, Any], now: Mapping[str, Any], may_change: Iterable[str] = ()) -> list[str]:
    """Lines such as `rl.beta: 0.04 in the run, 0.1 now` for every field that differs, `may_change` left out."""
    before, after = _flat(_plain(was)), _flat(_plain(now))
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


def _refuse_foreign(path: Path) -> None:
    """Refuses a folder with content that no attempt of ours has begun."""
    names = {entry.name for entry in path.iterdir()}
    if "config.json" in names or "env.json" in names:
        try:
            ours = json.loads((path / "env.json").read_text()).get("program") == PROGRAM
        except (OSError, ValueError, AttributeError, RecursionError):
            ours = False
        if ours:
            return
    # A start that was killed before config.json was written has left only these.
    begun = {"completions", "tensorboard", "checkpoints", "eval", "logs", run_lock.NAME}
    begun |= {".config.json.new", ".env.json.new"}
    if foreign := sorted(names - begun):
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise RunDirectoryError(
            f"{path} is not a run of {PROGRAM} but holds {shown}: nothing was touched. "
            "Choose another train.output_dir or train.run_name."
        )


def _take_lock(path: Path) -> Any:
    """An open file with a record lock: gone with its process, however that ends, and not inherited by workers."""
    if path in RunDirectory._held:
        raise RunDirectoryError(f"{path} is already open in this process: close that RunDirectory first")
    try:
        file = open(path / run_lock.NAME, "a+")
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be written: {error}. Choose another train.output_dir.") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RunDirectoryError(
            f"{path} is being written by {holder}: wait for it to end, or choose another train.run_name"
        ) from error
    try:
        with writing("the run's lock", path / run_lock.NAME):
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})")
            file.flush()
    except WriteError:
        with contextlib.suppress(OSError):  # what could not be written cannot be flushed either
            file.close()
        raise
    RunDirectory._held.add(path)
    return file


def _warn_of_other_versions(earlier: dict[str, Any], now: dict[str, Any]) -> None:
    before = {**earlier.get("libraries", {}), "python": earlier.get("python"), "machine": earlier.get("machine")}
    after = {**now["libraries"], "python": now["python"], "machine": now["machine"]}
    if changed := config_differences(before, after):
        log.warning(
            "this run was started with other versions; from here on it need not be equal bit for bit:\n  %s",
            "\n  ".join(changed),
        )


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
        problem = f"it holds a {type(content).__name__} instead of an object"
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    raise RunDirectoryError(
        f"{path} of the earlier attempt cannot be read: {problem}. "
        "Restore it from logs/attempt_1/, or choose another train.run_name."
    )


def _plain(mapping: Mapping[str, Any]) -> dict[str, Any]:
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
