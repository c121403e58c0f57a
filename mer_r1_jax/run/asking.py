"""How a policy, in a run or opened from a folder, is asked about records: shapes, prompts, and who answers."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from mer_r1_jax.config.bounds import is_bucket
from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.data.records import Record
from mer_r1_jax.data.threads import map_ordered
from mer_r1_jax.emotion.candidates import CandidateTable
from mer_r1_jax.evaluation.answering import Answerer
from mer_r1_jax.evaluation.benchmarks.word_protocol import wheels_digest
from mer_r1_jax.evaluation.evaluate import AnswerOf, Evaluator
from mer_r1_jax.evaluation.second_looks import SecondLooks
from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.media.prompt import Prompt, PromptError
from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.parallel.mesh import for_devices, row_cut
from mer_r1_jax.rl.sampling import greedy
from mer_r1_jax.run.policy import (
    RUN_MARKER,
    ReadStep,
    configs_of,
    held_out_of,
    open_step,
    remembered,
    require_model,
)
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.training.prompts import PromptSource, plan_buckets
from mer_r1_jax.training.state import Params
from mer_r1_jax.training.stopping import NEVER, Stop

_DECODING_ASIDE = ("decode_timeout", "decode_memory_mb", "decode_workers")  # media settings that no answer depends on
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")

log = logging.getLogger(__name__)


def eval_length(config: RunConfig) -> int:
    """Tokens an answer may have in evaluation."""
    return config.eval.max_completion_length or config.rl.max_completion_length


def eval_buckets(setup: Setup, records: tuple[Record, ...] | None = None) -> list[BatchShape]:
    """Shapes of evaluation batches: the rows asked for, rounded up to what the devices can share."""
    cut = row_cut(setup.backbone.mesh)
    rows = -(-setup.config.eval.prompts_per_batch // cut) * cut
    return plan_buckets(setup.config, setup.backbone.config, records or setup.data.eval, setup.share.of(rows))


def make_answerer(setup: Setup, max_completion_length: int) -> Answerer:
    """Who answers, greedily, with the programs of a run."""
    sampling = dataclasses.replace(greedy(setup.programs.sampling), max_completion_length=max_completion_length)
    return Answerer(setup.programs, setup.eval_scorer, setup.candidates.ids_ZY, sampling)


def make_evaluator(
    setup: Setup, records: tuple[Record, ...] | None = None, looks: SecondLooks | None = None
) -> Evaluator:
    """An evaluator with the settings of the run, for its held-out records or for others."""
    return Evaluator(make_answerer(setup, eval_length(setup.config)), eval_buckets(setup, records), looks)


def load_prompts(setup: Setup, records: Iterable[Record]) -> Iterator[tuple[Record, Prompt | str]]:
    """Prompts of records; a clip that cannot be used comes as the reason, and is counted by whoever asked.

    The next clips are decoded while whoever asked works on the ones before.

    Raises:
        PromptError: for a record that cannot become a prompt, with its file and line.
    """

    def load(record: Record) -> Prompt | str:
        try:
            return setup.source.load(record).prompt
        except MediaError as error:
            log.warning("%s: %s: left out: %s", record.where, record.id, error)
            return error.reason
        except PromptError as error:
            raise PromptError(f"{record.where}: {error}") from error

    return decoded_ahead(load, records, setup.config.media.decode_workers)


def decoded_ahead(
    load: Callable[[Record], Prompt | str], records: Iterable[Record], workers: int
) -> Iterator[tuple[Record, Prompt | str]]:
    """(record, what `load` gives) in order, loaded in as many threads as there are processes that decode."""
    return map_ordered(load, records, workers) if workers else ((record, load(record)) for record in records)


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A model that can be asked.

    Attributes:
        setup, params: the model; its own data paths are not used.
        fingerprint: what identifies its weights and tokenizer.
        held_out: (file, media root) of the held-out clips its run named; empty strings without one.
    """

    setup: Setup
    params: Params
    fingerprint: dict[str, Any]
    held_out: tuple[str, str]


def open_policy(
    path: str,
    config: RunConfig | None = None,
    devices: Sequence[Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Policy:
    """Opens a run's folder, an export or a Hugging Face directory for benchmarks.

    Args:
        path: the folder.
        config: how clips and prompts are prepared and answers decoded; None = as the model remembers.
        devices: where the policy lives; all there are when None.
        changes: dotted configuration fields that go before all that.

    Raises:
        PolicyError and the errors of the parts: the folder holds no policy, or cannot be used so.
    """
    require_model(path)
    # A clip without sound is answered from its frames, and counted.
    count = jax.device_count() if devices is None else len(devices)
    overrides = _overrides(config, is_run=(pathlib.Path(path) / RUN_MARKER).is_dir(), devices=count)
    said = config or remembered(path)
    if said is None or said.media.missing_audio == "error":
        overrides["media.missing_audio"] = "skip"
    setup, params, read = open_step(path, overrides | dict(changes or {}), devices)
    return Policy(setup, params, model_fingerprint(path, setup.tokenizer_path, read), _held_out(path, config))


def _overrides(config: RunConfig | None, is_run: bool, devices: int) -> dict[str, Any]:
    """The fields of a configuration that matter when a policy is used, dotted."""
    if config is None:
        return {}
    values = dataclasses.asdict(dataclasses.replace(config, mesh=for_devices(config.mesh, devices)))
    used = {section: tuple(values[section]) for section in ("media", "emotion", "eval")}
    # How sums of gradients travel is a matter of training, and refused on chips without sparse cores.
    used["mesh"] = tuple(name for name in values["mesh"] if name != "sparse_core_collectives")
    used["data"] = ("system_prompt", "question", "max_prompt_length", "prompt_buckets")
    used["rl"] = ("max_completion_length", "max_fast_context", "max_answer_words")
    # A checkpoint can be restored in the dtypes it was saved in; a Hugging Face directory is cast as it is read.
    if not is_run:
        used["model"] = ("param_dtype", "compute_dtype")
    return {f"{section}.{name}": values[section][name] for section, names in used.items() for name in names}


def _held_out(path: str, config: RunConfig | None) -> tuple[str, str]:
    """Where the synthetic world's held-out clips are: of the configuration, the run, or the run an export lies in."""
    for found in (config, *configs_of(path)):
        # Benchmarks are read from a disk, so held-out clips in a bucket are passed over.
        if found is None or is_bucket(found.data.eval_path) or is_bucket(found.data.media_root):
            continue
        if (held_out := held_out_of(found))[0]:
            return held_out
    return "", ""


def model_fingerprint(path: str, tokenizer_path: pathlib.Path, read: ReadStep | None) -> dict[str, Any]:
    """Hashes of what a policy's answers follow from, wherever it lies: weights, architecture, tokenizer.

    Args:
        read: the checkpoint that its weights came from, which a run that goes on may have removed since; None where
            they are no run's.
    """
    folder = pathlib.Path(path)
    if read is not None:
        # A manifest has the checksum of every file of its step, so its hash stands for the weights.
        found: dict[str, Any] = {"checkpoint": read.step, "weights": read.manifest_sha256}
    else:
        files = sorted(folder.glob("*.safetensors"))
        found = {"weights": {file.name: atomic_files.sha256_of(file) for file in files}}
        found["config"] = atomic_files.sha256_of(folder / "config.json")
    names = [name for name in _TOKENIZER_FILES if (tokenizer_path / name).is_file()]
    return found | {"tokenizer": {name: atomic_files.sha256_of(tokenizer_path / name) for name in names}}


def answer_fingerprint(policy: Policy, benchmark: str) -> dict[str, Any]:
    """Everything besides clips that the answers and their confidences follow from."""
    config = policy.setup.config
    media = {n: v for n, v in dataclasses.asdict(config.media).items() if n not in _DECODING_ASIDE}
    return {
        "benchmark": benchmark,
        "model": policy.fingerprint,
        "prompt": {n: getattr(config.data, n) for n in ("question", "system_prompt", "max_prompt_length")},
        "media": media,
        "decoding": {
            "strategy": "greedy",
            "max_completion_length": eval_length(config),
            "param_dtype": config.model.param_dtype,
            "compute_dtype": config.model.compute_dtype,
        },
        "confidence": {
            "wheels": wheels_digest(policy.setup.wheels),
            "of": "category" if isinstance(policy.setup.candidates, CandidateTable) else "word",
            "max_answer_words": config.rl.max_answer_words,
        },
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Reply:
    """What became of one question.

    Attributes:
        record, mode: the question.
        outcome: the answer, or why the record could not be asked.
        silent: its clip has no sound track.
    """

    record: Record
    mode: str
    outcome: AnswerOf | MediaError | PromptError  # an evaluator of another kind gives its own kind of answer
    silent: bool = False


def ask(
    policy: Policy,
    evaluator: Evaluator,
    media_root: str | pathlib.Path,
    wanted: Iterable[tuple[Record, str]],
    stop: Stop = NEVER,
) -> Iterator[list[Reply]]:
    """Asks a policy records of another folder than its own, in the modes wanted of each.

    Records that want the same modes are asked together, so that a clip is encoded once for both; the next clips are
    decoded while the model answers.

    Args:
        policy: the model.
        evaluator: of the policy, for these records.
        media_root: folder their paths are relative to.
        wanted: (record, mode) pairs.
        stop: asked between batches and inside them; raises StopRequested.

    Yields:
        the replies of a batch, and after those of a set of modes its records that could not be asked.
    """
    records, modes_of = {}, {}
    for record, mode in wanted:
        records[record.id] = record
        modes_of.setdefault(record.id, []).append(mode)
    by_modes: dict[tuple[str, ...], list[Record]] = {}
    for name, modes in modes_of.items():
        by_modes.setdefault(tuple(modes), []).append(records[name])
    errors: dict[str, MediaError | PromptError] = {}
    silent: set[str] = set()

    # It is called in several threads, so what becomes of a record is kept under its id.
    def load(record: Record) -> Prompt | str:
        try:
            prompt = source.load(record).prompt
        except (MediaError, PromptError) as error:
            log.warning("%s: not asked: %s", record.id, error)
            errors[record.id] = error
            return str(error)
        if prompt.stats["silent_audio"]:
            silent.add(record.id)
        return prompt

    setup = policy.setup
    data, workers = (
        dataclasses.replace(setup.config.data, media_root=str(media_root)),
        setup.config.media.decode_workers,
    )
    # It gets a source of its own: the policy's looks for clips below another folder.
    source = PromptSource(dataclasses.replace(setup.config, data=data), setup.tokenizer, setup.backbone.config)
    try:
        for modes, asked in by_modes.items():
            prompts = decoded_ahead(load, asked, workers)
            # Nobody reads the list of skipped records: `errors` holds the exceptions themselves.
            for batch, answers in evaluator.batches(policy.params, prompts, modes, [], stop):
                yield [
                    Reply(record, mode, answers[mode][row], record.id in silent)
                    for row, record in enumerate(batch)
                    for mode in modes
                ]
            yield [Reply(record, mode, errors[record.id]) for record in asked if record.id in errors for mode in modes]
    finally:
        source.close()
