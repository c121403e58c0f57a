"""The door of a command: a configuration whose places are resolved, once, to files that are there.

What it names in a bucket is fetched, once on each host and again when it changes there. The synthetic world is made,
and paths that are empty then point into it. After `resolve` nothing changes a configuration; a run's folder keeps the
one that came to the door, so that a run can move between machines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mer_r1_jax.config.bounds import SCHEME, is_bucket
from mer_r1_jax.config.checks import lookup
from mer_r1_jax.config.schema import ConfigError, RunConfig
from mer_r1_jax.data.records import Record
from mer_r1_jax.data.synthetic.make import WorldPaths, WorldSettings, make_world
from mer_r1_jax.data.synthetic.world import WORLDS
from mer_r1_jax.parallel import processes
from mer_r1_jax.storage import bucket

FOLDERS = ("model.path", "model.tokenizer_path", "model.adapter_path", "emotion.wheel_dir")
FILES = ("data.sft_path", "data.rl_path", "data.eval_path")
MEDIA = "data.media_root"  # of which only the clips that records name are fetched
_KIND = "files"
_SAID_EVERY = 512  # clips of a world between two lines about it, which come after tasks of 32

Say = Callable[[str], Any]


def resolve(config: RunConfig, say: Say = lambda line: None) -> RunConfig:
    """The configuration with every place it names on a disk of this host, made or fetched where it was not.

    Clips in a bucket are fetched when it is known which ones (`fetch_clips`). Resolving again changes nothing.

    Args:
        config: as it was given.
        say: prints a line about clips that are made.

    Raises:
        BucketError: there is nothing at an address, or it cannot be read.
        WorldError: the world's folder holds another one.
    """
    return _with_world(_on_disk(config), say)


def resolve_here(config: RunConfig) -> RunConfig:
    """The same for a command that makes and fetches nothing.

    Raises:
        ConfigError: a place in a bucket, or a world that has not been made.
    """
    require_files(config)
    if not config.data.synthetic_dir:
        return config
    world = WorldPaths(Path(config.data.synthetic_dir))
    if not world.manifest.is_file():
        raise ConfigError(
            f"data.synthetic_dir: got {config.data.synthetic_dir!r}, which holds no finished data set; make it with "
            f"mer-r1 make-synthetic --out={config.data.synthetic_dir}, or start the run, which makes it"
        )
    return _in_world(config, world)


def _on_disk(config: RunConfig) -> RunConfig:
    """Local copies in place of `gs://` addresses, all of them fetched but clips."""
    changed: dict[str, dict[str, str]] = {}
    for dotted in (*FOLDERS, *FILES, MEDIA):
        address = lookup(config, dotted)
        if not is_bucket(address):
            continue
        # Every process sees to its own copies: hosts need not share a disk, and what is there already is kept.
        copy = bucket.local_path(config.train.local_dir, _KIND, address)
        if dotted in FOLDERS:
            bucket.fetch_folder(address, copy)
        elif dotted in FILES:
            bucket.fetch_file(address, copy)
        section, _, name = dotted.partition(".")
        changed.setdefault(section, {})[name] = str(copy)
    return _with(config, changed)


def _with_world(config: RunConfig, say: Say) -> RunConfig:
    data = config.data
    if not data.synthetic_dir:
        return config

    def progress(done: int, total: int) -> None:
        if done == total or done % _SAID_EVERY < 32:
            say(f"clips of the synthetic world: {done} of {total}")

    # The first process makes it alone: several at once would write the same clips to the same files.
    with processes.one_after_first("the synthetic world"):
        world = make_world(
            data.synthetic_dir,
            WorldSettings(
                sft_clips=data.synthetic_sft_clips,
                rl_clips=data.synthetic_rl_clips,
                eval_clips=data.synthetic_eval_clips,
                seed=data.synthetic_seed,
                config=WORLDS[data.synthetic_world],
                wheel_dir=config.emotion.wheel_dir,
            ),
            progress=progress,
        )
    return _in_world(config, world)


def _in_world(config: RunConfig, world: WorldPaths) -> RunConfig:
    """The world's files for paths that are empty; a model that is given brings its own tokenizer."""
    found = {"sft_path": world.sft, "rl_path": world.rl, "eval_path": world.eval, "media_root": world.media_root}
    paths = {name: getattr(config.data, name) or str(path) for name, path in found.items()}
    tokenizer_path = config.model.tokenizer_path or config.model.path or str(world.tokenizer)
    return _with(config, {"data": paths, "model": {"tokenizer_path": tokenizer_path}})


def _with(config: RunConfig, changed: dict[str, dict[str, str]]) -> RunConfig:
    """Sections with other values of some fields."""
    sections = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in changed.items()}
    return dataclasses.replace(config, **sections)


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


def fetch_clips(config: RunConfig, records: Iterable[Record]) -> None:
    """Fetches the clips that records name. One that is not there is met, and counted, when its turn comes.

    Args:
        config: resolved.
        records: read from its files.

    Raises:
        BucketError: the bucket cannot be read.
    """
    copied = bucket.local_path(config.train.local_dir, _KIND, "")
    wanted: dict[Path, set[str]] = {}
    for record in records:
        # Clips lie in a bucket where their root, or the file that names them, is a copy.
        root = Path(config.data.media_root or Path(record.file).parent)
        if root.is_relative_to(copied):
            wanted.setdefault(root, set()).update((*record.videos, *record.audios, *record.images))
    for folder, names in wanted.items():
        address = SCHEME + folder.relative_to(copied).as_posix()
        there = bucket.listing(address)
        for name in names - there.keys():
            (folder / name).unlink(missing_ok=True)  # a copy of what was there once
        found = {f"{address}/{name}": there[name] for name in names & there.keys()}
        bucket.fetch_all(found, {f"{address}/{name}": folder / name for name in names & there.keys()})
