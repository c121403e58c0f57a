"""A policy is asked the clips of benchmarks, slow and fast; every answer is kept as it comes."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mer_r1_jax.config.bounds import is_bucket
from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.data.records import Record, dataset_hash
from mer_r1_jax.data.threads import map_ordered
from mer_r1_jax.emotion.candidates import CandidateTable
from mer_r1_jax.evaluation.benchmarks.benchmark_folder import BenchmarkFolder
from mer_r1_jax.evaluation.benchmarks.benchmark_reader import BenchmarkData, read_set, read_synthetic, truth_of
from mer_r1_jax.evaluation.benchmarks.sets import SYNTHETIC, BenchmarkError, Request, title_of
from mer_r1_jax.evaluation.benchmarks.word_protocol import wheels_digest
from mer_r1_jax.evaluation.evaluate import AnswerOf, Evaluator
from mer_r1_jax.evaluation.result_log import ResultLog
from mer_r1_jax.evaluation.summary import ORACLE_COLUMN
from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.media.prompt import Prompt, PromptError
from mer_r1_jax.run.answering import eval_length, make_evaluator
from mer_r1_jax.run.policy import RUN_MARKER, ReadStep, open_step, require_model, saved_config
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.storage import durable
from mer_r1_jax.training.prompts import PromptSource
from mer_r1_jax.training.state import Params
from mer_r1_jax.training.stopping import NEVER, Stop

_DECODING_ASIDE = ("decode_timeout", "decode_memory_mb", "decode_workers")  # media settings that no answer depends on
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")

log = logging.getLogger(__name__)


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


def open_policy(path: str, config: RunConfig | None = None, devices: Any = None) -> Policy:
    """Opens a run's folder, an export or a Hugging Face directory for benchmarks.

    Args:
        path: the folder.
        config: how clips and prompts are prepared and answers decoded; None = as the model remembers.
        devices: where the policy lives; all there are when None.

    Raises:
        PolicyError and the errors of the parts: the folder holds no policy, or cannot be used so.
    """
    require_model(path)
    # A clip without sound is answered from its frames, and counted.
    overrides = _overrides(config, is_run=(pathlib.Path(path) / RUN_MARKER).is_dir())
    if overrides.get("media.missing_audio", "error") == "error":
        overrides["media.missing_audio"] = "skip"
    setup, params, read = open_step(path, overrides, devices)
    return Policy(setup, params, model_fingerprint(path, setup.tokenizer_path, read), _held_out(path, config))


def _overrides(config: RunConfig | None, is_run: bool) -> dict[str, Any]:
    """The fields of a configuration that matter when a policy is used, dotted."""
    if config is None:
        return {}
    values = dataclasses.asdict(config)
    used = {section: tuple(values[section]) for section in ("media", "emotion", "eval", "mesh")}
    used["data"] = ("system_prompt", "question", "max_prompt_length", "prompt_buckets")
    used["rl"] = ("max_completion_length", "max_fast_context", "max_answer_words")
    if not is_run:
        used["model"] = ("param_dtype", "compute_dtype")
    return {f"{section}.{name}": values[section][name] for section, names in used.items() for name in names}


def _held_out(path: str, config: RunConfig | None) -> tuple[str, str]:
    """Where the embedded world's held-out clips are: of the configuration, the run, or the run an export lies in."""
    folders = (pathlib.Path(path), pathlib.Path(path).resolve().parent.parent)
    for found in (config, *(saved_config(folder) for folder in folders if (folder / RUN_MARKER).is_dir())):
        if found is None or is_bucket(found.data.eval_path) or is_bucket(found.data.media_root):
            continue
        if found.data.eval_path:
            return found.data.eval_path, found.data.media_root
        if found.data.synthetic_dir:
            return str(pathlib.Path(found.data.synthetic_dir) / "eval.jsonl"), found.data.synthetic_dir
    return "", ""


def model_fingerprint(path: str, tokenizer_path: pathlib.Path, read: ReadStep | None) -> dict[str, Any]:
    """Hashes of what a policy's answers follow from, wherever it lies: weights, architecture, tokenizer.

    Args:
        read: the checkpoint that its weights came from, which a run that goes on may have removed since; None where
            they are no run's.
    """
    folder = pathlib.Path(path)
    if read is not None:
        found = {"checkpoint": read.step, "weights": read.manifest_sha256}
    else:
        files = sorted(folder.glob("*.safetensors"))
        found = {"weights": {file.name: durable.sha256_of(file) for file in files}}
        found["config"] = durable.sha256_of(folder / "config.json")
    names = [name for name in _TOKENIZER_FILES if (tokenizer_path / name).is_file()]
    return found | {"tokenizer": {name: durable.sha256_of(tokenizer_path / name) for name in names}}


def read_benchmarks(request: Request, question: str, held_out: tuple[str, str] = ("", "")) -> list[BenchmarkData]:
    """Reads every benchmark that is asked for, with the limit applied.

    Raises:
        BenchmarkError, RecordError: one cannot be read.
    """
    found = []
    for name in request.benchmarks:
        if name == SYNTHETIC:
            data = read_synthetic(*_synthetic_file(request.root, held_out), question=question)
        else:
            if not request.root:
                raise BenchmarkError(f"{title_of(name)}: --benchmark_root is empty; it names the folder of the sets")
            data = read_set(name, request.root, question=question)
        found.append(data.first(request.limit))
    return found


def _synthetic_file(root: str, held_out: tuple[str, str]) -> tuple[str, str]:
    own = pathlib.Path(root, SYNTHETIC, "eval.jsonl") if root else None
    if own is not None and own.is_file():
        return str(own), str(own.parent)
    if not held_out[0]:
        raise BenchmarkError(
            "synthetic: the model's run names no embedded world; give a --config with data.synthetic_dir, or "
            f"--benchmark_root with {SYNTHETIC}/eval.jsonl in it"
        )
    return held_out


def answer_benchmarks(
    policy: Policy,
    request: Request,
    datas: Sequence[BenchmarkData],
    finished: Callable[[BenchmarkData], None],
    stop: Stop = NEVER,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> None:
    """Asks every clip that has no answer yet, benchmark by benchmark.

    Args:
        policy: the model.
        request: modes and folder.
        datas: the benchmarks.
        finished: called with each that has all its answers.
        stop: asked between batches and inside them; raises StopRequested, and every answer so far is kept.
        progress: called with (benchmark, answers there, answers in all).

    Raises:
        BenchmarkError: the answers there are another model's, or of other settings or clips.
    """
    folder = BenchmarkFolder(request.out)
    folder.check_model(policy.fingerprint)
    evaluator = make_evaluator(policy.setup, tuple(record for data in datas for record in data.records))
    emotion = policy.setup.config.emotion
    wheels = {"wheel_dir": emotion.wheel_dir, "variant": emotion.variant}
    for data in datas:
        with folder.open_answers(data.name, answer_fingerprint(policy, data.name)) as answers:
            _check_records(answers, data)
            asking = _Asking(policy, evaluator, data, answers, request.modes)
            # Before the first answer as well: what a kill leaves can be scored.
            folder.write_coverage(data, wheels=wheels, unusable={}, silent=())
            with _source(policy.setup, data) as source:
                asking.run(source, stop, progress)
            folder.write_coverage(data, wheels=wheels, unusable=asking.unusable, silent=asking.silent)
        finished(data)


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


def _check_records(answers: ResultLog, data: BenchmarkData) -> None:
    """Refuses to go on where a clip's question, subtitle, files or truth have changed since it was answered."""
    digests = {record.id: dataset_hash([record]) for record in data.records}
    changed = [
        line["id"] for line in answers.rows.values() if digests.get(line["id"], line["record"]) != line["record"]
    ]
    if changed:
        raise BenchmarkError(
            f"{answers.path}: {len(changed)} answers are to other questions, subtitles, files or labels than the data "
            f"folder has now, such as that of {changed[0]}; choose another --out, or use the earlier data"
        )


@contextlib.contextmanager
def _source(setup: Setup, data: BenchmarkData) -> Iterator[PromptSource]:
    """Decodes the benchmark's clips: paths are relative to its own folder."""
    config = dataclasses.replace(
        setup.config, data=dataclasses.replace(setup.config.data, media_root=str(data.media_root))
    )
    source = PromptSource(config, setup.tokenizer, setup.backbone.config)
    try:
        yield source
    finally:
        source.close()


class _Asking:
    """Asks one benchmark's clips what they have no answer to yet."""

    def __init__(
        self, policy: Policy, evaluator: Evaluator, data: BenchmarkData, answers: ResultLog, modes: Sequence[str]
    ):
        self.policy, self.evaluator, self.data, self.answers, self.modes = policy, evaluator, data, answers, modes
        self.unusable: dict[str, str] = {}  # clip -> why it was not asked
        self._silent: set[str] = set()  # clips loaded now that have no sound track

    @property
    def silent(self) -> list[str]:
        """Clips without a sound track among all that have an answer."""
        return sorted({line["id"] for line in self.answers.rows.values() if line["silent_audio"]})

    def run(self, source: PromptSource, stop: Stop, progress: Callable[[str, int, int], None]) -> None:
        """Asks; see `answer_benchmarks`."""
        data, there = self.data, self.answers.rows
        wanted = {(record.id, mode) for record in data.records for mode in self.modes}
        progress(data.name, len(wanted & there.keys()), len(wanted))
        for modes, records in self._lacking().items():
            skipped: list[tuple[Record, str]] = []
            prompts = self._prompts(source, records)
            for batch, by_mode in self.evaluator.batches(self.policy.params, prompts, modes, skipped, stop):
                self.answers.append(
                    answer_line(record, mode, by_mode[mode][row], data.metric, silent=record.id in self._silent)
                    for row, record in enumerate(batch)
                    for mode in modes
                )
                progress(data.name, len(wanted & there.keys()), len(wanted))
            self.unusable |= {record.id: reason for record, reason in skipped}
        if not there:
            reason = next(iter(self.unusable.values()), "there is none")
            raise BenchmarkError(
                f"{title_of(data.name)}: none of {len(data.records)} clips can be asked; the first: {reason}"
            )

    def _lacking(self) -> dict[tuple[str, ...], list[Record]]:
        """Records by the modes in which they have no answer: a clip that lacks both is encoded once for both."""
        lacking: dict[tuple[str, ...], list[Record]] = {}
        for record in self.data.records:
            missing = tuple(mode for mode in self.modes if (record.id, mode) not in self.answers.rows)
            if missing:
                lacking.setdefault(missing, []).append(record)
        return lacking

    def _prompts(self, source: PromptSource, records: Sequence[Record]) -> Iterator[tuple[Record, Prompt | str]]:
        """Prompts in order, or why there is none; the next clips are decoded while the model answers."""

        def load(record: Record) -> Prompt | str:
            try:
                prompt = source.load(record).prompt
            except (MediaError, PromptError) as error:
                log.warning("%s: %s: not asked: %s", self.data.name, record.id, error)
                return str(error)
            if prompt.stats["silent_audio"]:
                self._silent.add(record.id)
            return prompt

        workers = self.policy.setup.config.media.decode_workers
        return map_ordered(load, records, workers) if workers else ((record, load(record)) for record in records)


def answer_line(record: Record, mode: str, answer: AnswerOf, metric: str, *, silent: bool) -> dict[str, Any]:
    """An answer as it is kept: everything that scores, reports and a second look need.

    Args:
        record: the clip.
        mode: slow or fast.
        answer: the model's.
        metric: of the benchmark; it decides the form of the truth.
        silent: the clip has no sound track.
    """
    scored = answer.answer
    line = {
        "id": record.id,
        "mode": mode,
        "record": dataset_hash([record]),
        "video": record.videos[0] if record.videos else None,
        "subtitle": record.subtitle,
        "truth": truth_of(record, metric),
        "text": scored.text,
        "reasoning": scored.parsed.reasoning,
        "answer": scored.parsed.answer_text,
        "words": list(scored.parsed.words),
        "confidences": [[_rounded(p) for p in row_Q] for row_Q in answer.confidence_WQ],
        "tokens": scored.length,
        "truncated": scored.truncated,
        "well_formed": bool(scored.parsed.format_reward),
        "silent_audio": silent,
    }
    if ORACLE_COLUMN in record.extra:
        line[ORACLE_COLUMN] = record.extra[ORACLE_COLUMN]
    return line


def _rounded(probability: np.floating) -> float | None:
    return None if np.isnan(probability) else round(float(probability), 6)
