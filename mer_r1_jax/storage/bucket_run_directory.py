"""A run's folder in a bucket: worked on in a local copy, which is given back at every checkpoint and at the end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from mer_r1_jax.storage.bucket import BucketError
from mer_r1_jax.storage.checkpoints import Checkpoints
from mer_r1_jax.storage.run_directory import RunDirectory, RunDirectoryError
from mer_r1_jax.storage.run_lock import is_in_use
from mer_r1_jax.storage.working_copy import WorkingCopy

log = logging.getLogger(__name__)


class BucketRunDirectory(RunDirectory):
    """The local copy of a run's folder, which is `path`; see `working_copy`.

    Attributes:
        copy: what lies where.
        owns: whether this is the process that the run's files are written by.
    """

    copy: WorkingCopy
    owns = False

    @classmethod
    def open_in_bucket(cls, address: str, local_dir: str, config: Mapping[str, Any], **options: Any) -> RunDirectory:
        """As `RunDirectory.open`, at a `gs://` address; this start owns the run from now on.

        Args:
            local_dir: folder of local copies.
            **options: of `RunDirectory.open`.

        Raises:
            RunDirectoryError, BucketError
        """
        copy = WorkingCopy(address, local_dir)
        if is_in_use(copy.local):
            raise RunDirectoryError(
                f"{address} is being written by another process of this host ({copy.local} is locked): wait for it to "
                "end, or choose another train.run_name"
            )
        with _naming(copy):
            copy.bring_up_to_date()
            run = cls.open(copy.local, config, **options)
        run.copy, run.owns = copy, True
        try:
            copy.take_over(run.attempt)
            run.publish()
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def join_in_bucket(cls, address: str, local_dir: str, attempt: int, resumed: bool, process: int) -> RunDirectory:
        """As `RunDirectory.join`: a process that only logs, in a local copy of its host's."""
        copy = WorkingCopy(address, local_dir)
        with _naming(copy):
            (copy.local / "logs" / f"attempt_{attempt}").mkdir(parents=True, exist_ok=True)
            run = cls.join(copy.local, attempt, resumed, process)
        run.copy = copy
        return run

    def open_checkpoints(self, name: str, max_to_keep: int) -> Checkpoints:
        """Checkpoints in the bucket, below this folder's address."""
        address = f"{self.copy.address}/{name}"
        checkpoints = Checkpoints(address, max_to_keep=max_to_keep, before_commit=self.copy.check_owner)
        checkpoints.clear()
        return checkpoints

    def publish(self) -> None:
        """Gives the bucket what is new: everything from the process that owns the run, its log from another."""
        if self.owns:
            self.copy.give_back()
        else:
            self.copy.give_back_one(self.log_file)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close()  # the log is complete then
        try:
            self.publish()
        except BucketError as failure:
            if error is None:
                raise
            log.warning("the last files of the run are not in the bucket: %s", failure)


@contextlib.contextmanager
def _naming(copy: WorkingCopy) -> Iterator[None]:
    """Names the address, which the user gave, in place of the copy."""
    try:
        yield
    except RunDirectoryError as error:
        raise RunDirectoryError(str(error).replace(str(copy.local), copy.address)) from error
    except OSError as error:
        raise RunDirectoryError(
            f"{copy.local}, the local copy of {copy.address}, cannot be written: {error}. Choose another "
            "train.local_dir."
        ) from error
