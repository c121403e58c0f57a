"""A policy with the held-out records it is asked about: those of its own run, or a file of one's own."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.data.records import Record, read_records
from mer_r1_jax.evaluation.probes import Prober
from mer_r1_jax.media.clips import interleaves
from mer_r1_jax.run.asking import load_prompts, make_evaluator
from mer_r1_jax.run.inputs import require_files
from mer_r1_jax.run.policy import (
    PolicyError,
    configs_of,
    extra_columns_of,
    held_out_of,
    open_model,
    require_model,
)
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.training.state import Params


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """A policy and its held-out records.

    Attributes:
        setup, params: the policy; close `setup.source` when done.
        records: with a solution each.
    """

    setup: Setup
    params: Params
    records: tuple[Record, ...]

    def prober(self, seed: int = 0) -> Prober:
        """The policy as the probes take it."""
        return Prober(
            evaluator=make_evaluator(self.setup, self.records),
            params=self.params,
            load=functools.partial(load_prompts, self.setup),
            wheels=self.setup.wheels,
            interleaved=any(self._interleaved()),
            seed=seed,
        )

    def interleaved_alike(self) -> bool:
        """Whether all records' videos bring their own sound, interleaved.

        Raises:
            PolicyError: some do and some do not.
        """
        found = set(self._interleaved())
        if len(found) > 1:
            raise PolicyError(
                "use_audio_in_video: got records that have it true and false; expected one of them for all cases of a "
                "check; to mend it, give --data=FILE with records of one kind"
            )
        return found == {True}

    def _interleaved(self) -> list[bool]:
        return [interleaves(record, self.setup.config.media) for record in self.records]


def open_held_out(
    path: str | pathlib.Path,
    data: str = "",
    media_root: str = "",
    limit: int = 0,
    overrides: dict[str, Any] | None = None,
) -> HeldOut:
    """Opens a run's folder, an export or a Hugging Face directory, and held-out records for it.

    Args:
        path: the folder.
        data: data file; "" takes what the run was evaluated on (of an export: the run whose folder it lies in).
        media_root: folder the media paths are relative to; "" means the run's own or, with `data`, that file's folder.
        limit: takes the first so many records; 0 takes as many as the run did, or all of `data`.
        overrides: dotted configuration fields to change.

    Raises:
        PolicyError: the folder holds no policy, or names no held-out records while `data` is empty.
        RecordError: the records cannot be used.
    """
    require_model(path)
    if not data:
        config = _evaluated_config(pathlib.Path(path))
        data, media_root = config.data.eval_path, media_root or config.data.media_root
        limit = limit or config.eval.limit
    read = functools.partial(
        read_records, data, media_root, require=("solution",), extra_columns=extra_columns_of(path, overrides)
    )
    read()  # what is wrong with them shows before a model is loaded, which may take minutes
    setup, params = open_model(path, {"data.media_root": media_root, **(overrides or {})})
    # Only the model says what records without a question of their own are asked.
    records = read(question=setup.config.data.question)
    return HeldOut(setup, params, tuple(records[: limit or None]))


def _evaluated_config(path: pathlib.Path) -> RunConfig:
    """The configuration, with its held-out file, of a run's folder or of the run that an export lies in."""
    for config in configs_of(path):
        # Nothing is fetched here, so clips in a bucket are refused rather than passed over.
        require_files(config, ("data.eval_path", "data.media_root"))
        if file := held_out_of(config)[0]:
            return dataclasses.replace(config, data=dataclasses.replace(config.data, eval_path=file))
    raise PolicyError(f"{path}: names no held-out records; give a data file (--data) with a `solution` in every record")
