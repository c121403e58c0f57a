"""Checks data before a run: mer-r1 validate --data=a.jsonl,b.jsonl [--model=HF_DIR] [--config=FILE.py]

Every record and clip is checked, and every fault listed with file and line. With `--model`, or a `--config` that names
a tokenizer, prompts and targets are measured against the caps too; with `--config` alone the data files are those it
names. Ends with status 0 when the data can be used, 1 when it has errors, 2 when it could not be checked, be it by a
fault of this program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import traceback
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from mer_r1_jax import screen
from mer_r1_jax.cli import EXIT_ERROR, explained
from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.config.schema import ConfigError, RunConfig
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.atomic_files import writing

if TYPE_CHECKING:
    from mer_r1_jax.data.records import Record
    from mer_r1_jax.data.validation import Checks, DataFile
    from mer_r1_jax.rl.tags import AnswerTags

_DATA = flags.DEFINE_list("data", [], "Data files of any kind (docs/data.md); empty = those of --config.")
_MEDIA_ROOT = flags.DEFINE_string("media_root", "", "Folder the media paths are relative to; empty = as configured.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "Run configuration; its caps apply.", lock_config=True)
_MODEL = flags.DEFINE_string("model", "", "Hugging Face directory whose tokenizer measures prompts and targets.")
_WHEELS = flags.DEFINE_string("wheel_dir", "", "Folder with emotion wheels; empty = as configured.")
_EXTRA = flags.DEFINE_list("extra_columns", [], "Columns that only reward functions read; empty = as configured.")
_DECODE = flags.DEFINE_boolean("decode", True, "Decode every clip; without it prompts are not measured either.")
_JSON = flags.DEFINE_string("json", "", "Write the whole report to this file as JSON.")


def main(argv: list[str]) -> int:
    """Checks the data; status 1 says that it has errors, so nothing else may end with it."""
    try:
        return _check(argv)
    except Exception:
        screen.say(traceback.format_exc().rstrip(), error=True)
        screen.say(
            "error: the data could not be checked; this is a fault of this program: please report it", error=True
        )
        return EXIT_ERROR


def _check(argv: list[str]) -> int:
    from mer_r1_jax.data.report import print_report
    from mer_r1_jax.data.validation import validate

    with explained(), contextlib.ExitStack() as stack:
        if len(argv) > 1:
            raise ConfigError(f"unexpected arguments {argv[1:]}; data files are given as --data=FILE,FILE")
        config = _config()
        files = _files(config)
        checks = _checks(config, stack)
        bar = stack.enter_context(screen.bar(unit="record", desc="checked"))
        report = validate(
            files,
            config.data.media_root,
            checks,
            question=config.data.question,
            extra_columns=config.data.extra_columns,
            progress=lambda: bar.update(),
        )
        bar.close()
        print_report(report, screen.console())
        if _JSON.value:
            with writing("the report", _JSON.value):
                atomic_files.write_json(pathlib.Path(_JSON.value), report.to_json())
        return 1 if report.errors else 0


def _config() -> RunConfig:
    """The configuration with the flags applied on top, its places resolved."""
    from mer_r1_jax.run.inputs import require_files, resolve_here

    config = from_mapping(_CONFIG.value) if _CONFIG.value is not None else RunConfig()
    if _MODEL.value:
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, path=_MODEL.value, tokenizer_path="")
        )
    if _MEDIA_ROOT.value:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, media_root=_MEDIA_ROOT.value))
    if _EXTRA.value:
        data = dataclasses.replace(config.data, extra_columns=tuple(_EXTRA.value))
        config = dataclasses.replace(config, data=data)
    if _WHEELS.value:
        config = dataclasses.replace(config, emotion=dataclasses.replace(config.emotion, wheel_dir=_WHEELS.value))
    if _DATA.value:
        require_files(config)
        return config  # files of the user's own; what the configuration's world holds is not asked for
    return resolve_here(config)


def _files(config: RunConfig) -> list[DataFile]:
    from mer_r1_jax.data.validation import DataFile

    if _DATA.value:
        return [DataFile(path=path) for path in _DATA.value]
    data = config.data
    needs = [(data.sft_path, ("target",)), (data.rl_path, ("solution",)), (data.eval_path, ("solution",))]
    files = [DataFile(path=path, require=require) for path, require in needs if path]
    if not files:
        raise ConfigError("no data to check: give --data=FILE[,FILE], or a --config whose data.*_path name files")
    return files


def _checks(config: RunConfig, stack: contextlib.ExitStack) -> Checks:
    """Everything that can be checked with what was given."""
    from mer_r1_jax.data.validation import Checks
    from mer_r1_jax.media.loader import ClipLoader
    from mer_r1_jax.media.prompt import PromptBuilder
    from mer_r1_jax.media.tokenizer import load_tokenizer
    from mer_r1_jax.omni.config import ThinkerConfig
    from mer_r1_jax.rl.tags import AnswerTags
    from mer_r1_jax.training.omni_backbone import thinker_config

    wheels = load_wheels(config.emotion.wheel_dir, config.emotion.variant)
    checks = Checks(wheels=wheels, threads=max(1, config.media.decode_workers))
    thinker = ThinkerConfig.qwen2_5_omni_7b()
    tokenizer_path = config.model.tokenizer_path or config.model.path
    if tokenizer_path:
        tokenizer = load_tokenizer(tokenizer_path)
        thinker = thinker_config(config.model, tokenizer)
        tags = AnswerTags(tokenizer)
        data = config.data
        builder = PromptBuilder(tokenizer, config.media, thinker, data.system_prompt, data.max_prompt_length)
        checks = dataclasses.replace(
            checks,
            build=builder.build,
            target_length=lambda record: _target_length(tags, record),
            max_target_length=config.sft.max_completion_length,
        )
    if not _DECODE.value:
        return checks
    mel_bins = thinker.audio.num_mel_bins
    loader = ClipLoader(config.media, thinker.vision, mel_bins, config.data.cache_dir, config.data.media_root)
    return dataclasses.replace(checks, load=stack.enter_context(loader).load)


def _target_length(tags: AnswerTags, record: Record) -> int:
    """Tokens of the longer of a record's two SFT targets."""
    slow, _ = tags.slow_target(record.target_reasoning or "", record.target_answer or "")
    fast, _ = tags.fast_target(", ".join(record.solution))
    return max(len(slow), len(fast))
