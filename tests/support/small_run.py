"""A whole run small enough for tests: a dozen real clips, records, a tokenizer, and its configuration."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
from support import small_config
from support.clips import make_clip
from support.compile_flags import QUICK_COMPILES
from support.tiny_tokenizer import tiny_tokenizer

from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.data.pipeline import Item
from mer_r1_jax.data.prefetch import LoadedItem
from mer_r1_jax.run.setup import Setup, make_setup
from mer_r1_jax.training.rl_step import RlPrograms

REPOSITORY = Path(__file__).parents[2]
CONFIG_FILE = Path(small_config.__file__)
ANSWERS = (("happy",), ("sad", "afraid"), ("angry",), ("surprised", "happy"), ("disgusted", "angry"), ("calm", "sad"))
TRAINED, HELD_OUT = len(ANSWERS), 4


def make_data(folder: Path) -> Path:
    """Writes clips, sft.jsonl, rl.jsonl, eval.jsonl and the tokenizer into a folder and returns it.

    The last record of sft.jsonl and of eval.jsonl has a clip that is broken: an empty file.
    """
    for number in range(TRAINED + HELD_OUT):
        make_clip(folder / f"clips/{number}.mp4", seconds=0.6, size=(56, 56), frequency=200 + 100 * number, seed=number)
    trained = [_record(number) for number in range(TRAINED)]
    held_out = [_record(number) for number in range(TRAINED, TRAINED + HELD_OUT)]
    _write(folder / "rl.jsonl", trained)
    demonstrated = [*trained, _broken(folder, "broken")]
    _write(folder / "sft.jsonl", [_demonstration(record) for record in demonstrated])
    _write(folder / "eval.jsonl", [*held_out, _broken(folder, "broken held-out")])
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def _record(number: int) -> dict:
    clip = f"clips/{number}.mp4"
    answer = ANSWERS[number % len(ANSWERS)]
    return {
        "id": f"clip-{number}",
        "question": "Feel?",
        "videos": [clip],
        "audios": [clip],
        "subtitle": "I never" if number % 2 else None,
        "solution": list(answer),
    }


def _broken(folder: Path, name: str) -> dict:
    clip = f"clips/{name}.mp4"
    (folder / clip).write_bytes(b"")
    return _record(0) | {"id": name, "videos": [clip], "audios": [clip]}


def _demonstration(record: dict) -> dict:
    answer = ", ".join(record["solution"])
    target = f"<think>The voice</think>\n<answer>{answer}</answer>"
    row = {name: value for name, value in record.items() if name != "question"}
    row["messages"] = [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": target}]
    return row


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def small_config_of(folder: Path, **changes) -> RunConfig:
    """The small run's configuration; `changes` are sections, each a dict of fields: `rl={"beta": 0.0}`."""
    config = small_config.get_config(str(folder))
    for section, fields in changes.items():
        target = getattr(config, section)
        for name, value in fields.items():
            *sections, field = name.split(".")
            holder = target
            for part in sections:
                holder = getattr(holder, part)
            setattr(holder, field, value)
    return from_mapping(config)


def small_setup(folder: Path, devices=None, **changes) -> Setup:
    """The parts of the small run on one device, or on `devices`."""
    return make_setup(small_config_of(folder, **changes), devices=jax.devices()[:1] if devices is None else devices)


def with_config(setup: Setup, **sections) -> Setup:
    """The same setup under other settings; programs are made anew. `sections` are dicts of fields."""
    replaced = {name: dataclasses.replace(getattr(setup.config, name), **fields) for name, fields in sections.items()}
    config = dataclasses.replace(setup.config, **replaced)
    programs = RlPrograms(setup.backbone, config.rl, setup.programs.sampling)
    return dataclasses.replace(setup, config=config, programs=programs)


def visits_of(setup: Setup, records, numbers) -> list[LoadedItem]:
    """What the prefetcher hands out for records by number; None stands for a clip that broke."""
    visits = []
    for place, number in enumerate(numbers):
        item = Item(records[0 if number is None else number], epoch=0, global_index=place)
        visits.append(LoadedItem(item, None if number is None else setup.source.load(item.record), None, 0.0))
    return visits


def environment(cache: Path | None = None) -> dict[str, str]:
    """The environment of a command: one CPU device, compiled programs shared through a folder (None: the tests')."""
    # Commands run as where torch is not installed, which the package must not need.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent / "no_torch"), os.environ.get("PYTHONPATH")]))
    values = os.environ | {
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "XLA_FLAGS": QUICK_COMPILES,
        "COLUMNS": "200",
    }
    if cache is not None:
        values["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    # Also small programs: a command has hundreds, and each of them has its own.
    return values | {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def command(script: str, *arguments: str) -> list[str]:
    """A command under experiments/."""
    return [sys.executable, str(REPOSITORY / "experiments" / script), *arguments]


def run_command(
    script: str, *arguments: str, cache: Path | None = None, cwd=None, seconds: int = 500
) -> subprocess.CompletedProcess:
    """Runs it to its end."""
    return subprocess.run(
        command(script, *arguments), env=environment(cache), cwd=cwd, capture_output=True, text=True, timeout=seconds
    )
