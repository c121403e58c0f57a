"""What a configuration names in a bucket, as files: fetched once on each host, and again when it changes there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from mer_r1_jax.config.bounds import is_bucket
from mer_r1_jax.config.checks import lookup
from mer_r1_jax.config.schema import ConfigError, DataConfig, RunConfig
from mer_r1_jax.data.records import Record
from mer_r1_jax.storage import bucket, copies

FOLDERS = ("model.path", "model.tokenizer_path", "emotion.wheel_dir")
FILES = ("data.sft_path", "data.rl_path", "data.eval_path")
MEDIA = "data.media_root"  # of which only the clips that records name are fetched
_KIND = "files"


def with_local_inputs(config: RunConfig) -> RunConfig:
    """The configuration with local copies in place of `gs://` addresses, all of them fetched but clips.

    Raises:
        BucketError: there is nothing at an address, or it cannot be read.
    """
    for dotted in (*FOLDERS, *FILES, MEDIA):
        address = lookup(config, dotted)
        if not is_bucket(address):
            continue
        copy = copy_of(config, address)
        if dotted in FOLDERS:
            copies.fetch_folder(address, copy)
        elif dotted in FILES:
            copies.fetch_file(address, copy)
        section, _, name = dotted.partition(".")
        changed = dataclasses.replace(getattr(config, section), **{name: str(copy)})
        config = dataclasses.replace(config, **{section: changed})
    return config


def require_files(config: RunConfig, fields: Iterable[str] = (*FOLDERS, *FILES, MEDIA)) -> None:
    """For a command that fetches nothing.

    Raises:
        ConfigError: naming every field that is a `gs://` address.
    """
    problems = [
        f"{dotted}: got {lookup(config, dotted)!r}, expected a path of a file system"
        for dotted in fields
        if is_bucket(lookup(config, dotted))
    ]
    if problems:
        raise ConfigError(
            "this command reads files only:\n  "
            + "\n  ".join(problems)
            + "\nCopy what it needs with `gcloud storage cp -r`, and name the copy."
        )


def copy_of(config: RunConfig, address: str) -> Path:
    """Where the local copy of an address lies; those of a data file and of the clips beside it keep their places."""
    return copies.local_path(config.train.local_dir, _KIND, address)


def fetch_clips(config: RunConfig, records: Iterable[Record]) -> None:
    """Fetches the clips that records name. One that is not there is met, and counted, when its turn comes.

    Args:
        config: as it was before `with_local_inputs`.
        records: read from the local copies.

    Raises:
        BucketError: the bucket cannot be read.
    """
    wanted: dict[str, set[str]] = {}
    addresses = {str(copy_of(config, address)): address for address in _data_files(config.data)}
    for record in records:
        root = config.data.media_root or addresses.get(record.file, "").rpartition("/")[0]
        if is_bucket(root):
            wanted.setdefault(root.rstrip("/"), set()).update((*record.videos, *record.audios, *record.images))
    for root, names in wanted.items():
        there = bucket.listing(root)
        folder = copy_of(config, root)
        for name in names - there.keys():
            (folder / name).unlink(missing_ok=True)  # a copy of what was there once
        found = {f"{root}/{name}": there[name] for name in names & there.keys()}
        copies.fetch_all(found, {f"{root}/{name}": folder / name for name in names & there.keys()})


def _data_files(data: DataConfig) -> list[str]:
    return [path for path in (data.sft_path, data.rl_path, data.eval_path) if is_bucket(path)]
