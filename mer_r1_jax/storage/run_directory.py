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

In a bucket the folder is the same, and is worked on in a local copy (`working_copy`), which is given back at every
checkpoint and at the end; checkpoints are written to the bucket directly.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from mer_r1_jax import screen
from mer_r1_jax.config.bounds import is_bucket
from mer_r1_jax.storage import atomic_files, run_lock
from mer_r1_jax.storage.bucket import BucketError
from mer_r1_jax.storage.checkpoints import Checkpoints
from mer_r1_jax.storage.run_lock import RunDirectoryError
from mer_r1_jax.storage.run_settings import (
    MAY_CHANGE,
    PROGRAM,
    describe_environment,
    plain,
    refused_changes,
    warn_of_changes,
)
from mer_r1_jax.storage.working_copy import WorkingCopy

log = logging.getLogger(__name__)


class RunDirectory:
    """A run's folder, held by a lock from `open` to `close`.

    Attributes:
        path: the folder, or its local copy.
        attempt: how often the command was started on it, this time included; from 1.
        resumed: whether an earlier attempt had begun.
        log_file: what this process says is written here as well.
    """

    def __init__(self, path: Path, copy: WorkingCopy | None, lock_file: TextIO | None):
        self.path = path
        self._copy = copy
        self._lock_file = lock_file
        self._owns = lock_file is not None  # and goes on owning the run when the lock is released
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
        local_dir: str | os.PathLike = "",
    ) -> RunDirectory:
        """Makes the folder, or takes an earlier attempt up again. In a bucket, this start owns the run from now on.

        Args:
            path: `<output_dir>/<run_name>`, on a disk or at a `gs://` address.
            config: the run's configuration as nested mappings of JSON values.
            may_change: dotted fields, or sections, that may differ from the earlier attempt's.
            fingerprints: names and hashes of what the configuration points at (data sets, model); compared as well.
            resume: False refuses a folder in which a run has begun.
            local_dir: folder of local copies, for an address.

        Raises:
            RunDirectoryError: the folder holds something else, is in use by another process, belongs to a run with
                another configuration (every differing field is listed), or cannot be written.
            BucketError: the bucket cannot be read or written.
        """
        copy = WorkingCopy(str(path), os.fspath(local_dir)) if is_bucket(path) else None
        with _naming(copy):
            if copy is not None:
                if run_lock.is_in_use(copy.local):  # which bringing it up to date would replace
                    raise RunDirectoryError(
                        f"{path} is being written by another process of this host (its copy in {local_dir} is locked): "
                        "wait for it to end, or choose another train.run_name"
                    )
                copy.bring_up_to_date(lambda names: _refuse_foreign(path, names, maybe_ours=True))
            run = cls._locked(Path(os.path.abspath(copy.local if copy else path)), copy)
            try:
                run._begin(plain(config), may_change, plain(fingerprints or {}), resume)
            except OSError as error:
                run.close()
                raise RunDirectoryError(f"{run.path} cannot be written: {error}") from error
            except BaseException:
                run.close()
                raise
        if copy is not None:
            try:
                copy.take_over(run.attempt)
                run.publish()
            except BaseException:
                run.close()
                raise
        return run

    @classmethod
    def join(
        cls,
        path: str | os.PathLike,
        attempt: int,
        resumed: bool,
        process: int,
        local_dir: str | os.PathLike = "",
    ) -> RunDirectory:
        """The folder that the first process of this run has opened, for one of the others, which only logs there.

        Raises:
            RunDirectoryError: this process does not see it.
        """
        copy = WorkingCopy(str(path), os.fspath(local_dir)) if is_bucket(path) else None
        run = cls(Path(os.path.abspath(copy.local if copy else path)), copy, None)
        run.attempt, run.resumed = attempt, resumed
        with _naming(copy):
            if copy is not None:  # of a host that may have no copy yet
                run.attempt_logs.mkdir(parents=True, exist_ok=True)
            if not run.attempt_logs.is_dir():
                raise RunDirectoryError(
                    f"process {process} does not see {run.attempt_logs}, which process 0 has made: expected "
                    "train.output_dir on a file system that every host of the run has mounted at the same place, or "
                    "gs://"
                )
            run._log_to(f"log_{process}.txt")
        return run

    def open_checkpoints(self, name: str, max_to_keep: int) -> Checkpoints:
        """The checkpoints in a folder of the run's, cleared of what an earlier attempt has left half-made."""
        if self._copy is None:
            checkpoints = Checkpoints(self.path / name, max_to_keep=max_to_keep)
        else:
            address = f"{self._copy.address}/{name}"
            checkpoints = Checkpoints(address, max_to_keep=max_to_keep, before_commit=self._copy.check_owner)
        checkpoints.clear()
        return checkpoints

    def publish(self) -> None:
        """Gives the bucket what is new: everything from the process that owns the run, its log from another.

        Raises:
            BucketError
        """
        if self._copy is None:
            return
        if self._owns:
            self._copy.give_back()
        else:
            assert self.log_file is not None
            self._copy.give_back_one(self.log_file)

    def close(self) -> None:
        """Releases the lock and the log file. Closing twice does no harm."""
        if self._log_handler is not None:
            logging.getLogger().removeHandler(self._log_handler)
            self._log_handler.close()
            self._log_handler = None
        if self._lock_file is not None:
            run_lock.release(self.path, self._lock_file)
            self._lock_file = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close()  # the log is complete then
        try:
            self.publish()
        except BucketError as failure:
            if error is None:
                raise
            log.warning("the last files of the run are not in the bucket: %s", failure)

    @classmethod
    def _locked(cls, path: Path, copy: WorkingCopy | None) -> RunDirectory:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirectoryError(f"{path} cannot be made: {error}. Choose another train.output_dir.") from error
        _refuse_foreign(path, set(os.listdir(path)), _is_ours(path))
        return cls(path, copy, run_lock.take(path))

    def _begin(
        self, config: dict[str, Any], may_change: Iterable[str], fingerprints: dict[str, Any], resume: bool
    ) -> None:
        environment = describe_environment() | {"fingerprints": fingerprints}
        before: dict[str, Any] = {}
        earlier: dict[str, Any] = {}
        self.resumed = self.config_file.exists()
        if self.resumed:
            if not resume:
                raise RunDirectoryError(
                    f"{self.path} holds a run already, and train.resume_from_checkpoint is 'never': "
                    "choose another train.run_name, or set it to 'auto' to go on with that run"
                )
            earlier, before = _read_json(self.env_file), _read_json(self.config_file)
            if differences := refused_changes(before, config, earlier, fingerprints, may_change):
                raise RunDirectoryError(
                    f"{self.path} holds a run with another configuration, which cannot be gone on with:\n  "
                    + "\n  ".join(differences)
                    + "\nSet these back (a fingerprint: put the files back) to go on with that run, or choose another "
                    "train.run_name for a new one."
                )
        for folder in (self.completions, self.tensorboard, self.checkpoints, self.eval, self.path / "logs"):
            folder.mkdir(exist_ok=True)
        self.attempt = 1 + run_lock.attempt_of(self.path)
        self.attempt_logs.mkdir()
        atomic_files.write_json(self.attempt_logs / "env.json", environment)
        atomic_files.write_json(self.attempt_logs / "config.json", config)
        if not self.resumed:
            atomic_files.write_json(self.env_file, environment)
        atomic_files.write_json(self.config_file, config)  # last: from now on the folder is a run's
        self._log_to("log.txt")
        if self.resumed:
            warn_of_changes(before, config, earlier, environment)

    def _log_to(self, name: str) -> None:
        self.log_file = self.attempt_logs / name
        handler = self._log_handler = screen.log_file(self.log_file)
        logging.getLogger().addHandler(handler)


@contextlib.contextmanager
def _naming(copy: WorkingCopy | None) -> Iterator[None]:
    """Names the address, which the user gave, in place of its local copy."""
    try:
        yield
    except RunDirectoryError as error:
        if copy is None:
            raise
        raise RunDirectoryError(str(error).replace(str(copy.local), copy.address)) from error
    except OSError as error:
        if copy is None:
            raise
        raise RunDirectoryError(
            f"{copy.local}, the local copy of {copy.address}, cannot be written: {error}. Choose another "
            "train.local_dir."
        ) from error


def _refuse_foreign(path: str | os.PathLike, names: set[str], maybe_ours: bool) -> None:
    """Refuses a folder with content that no attempt of ours has begun.

    Args:
        names: of what lies in the folder.
        maybe_ours: whether its files of settings, where it has any, may be a run's.
    """
    if maybe_ours and names & {"config.json", "env.json"}:
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


def _is_ours(path: Path) -> bool:
    try:
        return json.loads((path / "env.json").read_text()).get("program") == PROGRAM
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


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
