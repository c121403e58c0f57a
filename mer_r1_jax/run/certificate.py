"""What can be said of a model's directory before anybody trusts it, and what cannot: one page and one JSON file.

Everything is looked at in the order in which a mistake would show: the files, their description, the tokenizer, the
numbers the model computes, its answers. What rests on something that failed is not tried, and is said not to be
certified; so is whatever had nothing to be compared with.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mer_r1_jax import __version__
from mer_r1_jax.data.records import Record, read_records
from mer_r1_jax.evaluation.answering import LENGTH_STEP, AnsweringPolicy
from mer_r1_jax.evaluation.bootstrap import intervals, mean_of, paired_difference
from mer_r1_jax.evaluation.evaluate import Evaluation, Evaluator
from mer_r1_jax.evaluation.report_kit import counted, percent, write_page
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.media.collate import prompt_shape
from mer_r1_jax.media.prompt import Prompt
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.hf.foreign import path_problem
from mer_r1_jax.omni.hf.load import load_params
from mer_r1_jax.omni.hf.sums import SUMS_FILE
from mer_r1_jax.parallel.mesh import row_cut
from mer_r1_jax.parallel.rows import local_rows
from mer_r1_jax.parity import self_checks
from mer_r1_jax.parity.self_checks import LIMITS, Agreement
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.run import folder_checks
from mer_r1_jax.run.asking import eval_length, load_prompts, make_answerer, make_evaluator
from mer_r1_jax.run.folder_checks import CertificateError
from mer_r1_jax.run.model_memory import BFLOAT16, thinker_tensors
from mer_r1_jax.run.policy import PolicyError, extra_columns_of, open_model
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.training.state import Params, nest

CERTIFIED, FAILED, NOT_CERTIFIED = "certified", "failed", "not certified"
# What is looked at, in this order.
DESCRIPTION = "The description is one of a Thinker"
WRITTEN = "The files are as they were written"
WEIGHTS = "Every weight has its place"
TOKENS = "Words and special tokens"
ENDS = "Answers end"
LOADED = "The weights can be loaded"
AGAINST_TRANSFORMERS = "The numbers are transformers' own"
CACHE = "The cache changes nothing"
BATCH = "A batch changes nothing"
SAMPLER = "The sampler's probabilities are the trainer's"
GAP = "Answers on the given records"
RESTS_ON_A_FAILURE = "something above failed, and this rests on it: mend that first"
_QUESTION, _SUBTITLE = "What does the person feel?", "I never wanted it to end."


class NothingToCompareError(ValueError):
    """A check that could not be made; the message says why, and how it could be."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at: its name, one of the three states, and what was found, with how to mend it."""

    name: str
    state: str
    found: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be certified.

    Attributes:
        model: Hugging Face directory.
        data: records with solutions, to measure answers on; "" for none.
        media_root: folder of their media; "" for that of the file.
        limit: the first so many records; 0 for all.
        overrides: dotted configuration fields to change.
        reference: compares with transformers where torch is installed.
    """

    model: Path
    data: str = ""
    media_root: str = ""
    limit: int = 0
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    reference: bool = True


@dataclasses.dataclass
class Certificate:
    """The checks in their order, the files with sizes and sums, and what was measured and judged by nobody."""

    model: str
    checks: list[Check] = dataclasses.field(default_factory=list)
    files: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    figures: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def of(self, state: str) -> list[Check]:
        """The checks that came out so."""
        return [check for check in self.checks if check.state == state]

    @property
    def verdict(self) -> str:
        """One sentence: whether anything failed, and how much is left open."""
        held, failed, left = (len(self.of(state)) for state in (CERTIFIED, FAILED, NOT_CERTIFIED))
        first = (
            f"{failed} of {len(self.checks)} checks failed: do not use this model yet." if failed else "Nothing failed."
        )
        return f"{first} {held} certified, {left} not certified."

    def attempt(self, name: str, make: Callable[[], str]) -> bool:
        """Adds a check; what `make` raises of this package's own errors is a failure. Returns whether it came out."""
        try:
            self.checks.append(Check(name, CERTIFIED, make()))
        except Exception as error:
            if not type(error).__module__.startswith("mer_r1_jax."):
                raise  # a bug of ours
            state = NOT_CERTIFIED if isinstance(error, NothingToCompareError) else FAILED
            self.checks.append(Check(name, state, str(error)))
        return self.checks[-1].state == CERTIFIED

    def leave(self, why: str, *names: str) -> None:
        """Adds checks that were not made, and why."""
        self.checks += [Check(name, NOT_CERTIFIED, why) for name in names]


def certify(asked: Asked) -> Certificate:
    """Looks at everything that can be looked at, and says of the rest that it was not.

    Raises:
        PolicyError: there is no Hugging Face directory to certify.
        RecordError: the records cannot be used.
    """
    if (asked.model / "checkpoints").is_dir():
        raise PolicyError(
            f"{asked.model}: got a run's folder, expected a Hugging Face directory: certify its export, "
            f"{asked.model / 'export/hf'}, or make one with `mer-r1 export --run={asked.model}`"
        )
    if problem := path_problem(asked.model):
        raise PolicyError(problem)
    if asked.data:  # a mistake in them shows before hours have gone into the numbers
        _records_of(asked, _QUESTION)
    begun = time.monotonic()
    certificate = Certificate(printable(asked.model))
    if _certify_folder(certificate, asked.model):
        _certify_numbers(certificate, asked)
    else:
        certificate.leave(RESTS_ON_A_FAILURE, LOADED, AGAINST_TRANSFORMERS, CACHE, BATCH, SAMPLER, GAP)
    certificate.seconds = time.monotonic() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    certificate.figures["most memory of this process"] = f"{peak / 1e9:.2f} GB"
    certificate.figures["the whole took"] = f"{certificate.seconds:.0f} s, compiling included"
    return certificate


def _records_of(asked: Asked, question: str) -> list[Record]:
    return read_records(
        asked.data,
        asked.media_root,
        question=question,
        require=("solution",),
        extra_columns=extra_columns_of(asked.model, asked.overrides),
    )


def _certify_folder(certificate: Certificate, model: Path) -> bool:
    """Looks at what can be read without computing anything; returns whether all of it is in order."""
    files = certificate.files
    sound = certificate.attempt(DESCRIPTION, lambda: folder_checks.describe(load_config(model)))
    if (model / SUMS_FILE).exists():
        sound &= certificate.attempt(WRITTEN, lambda: folder_checks.compare_files(model, files))
    else:
        # Without a list the files are read all the same: the page shows their sums, for a comparison by hand.
        sound &= certificate.attempt("The files can be read", lambda: folder_checks.compare_files(model, files))
        why = f"there is no {SUMS_FILE} beside them: compare the sums below with those where the model is from"
        certificate.leave(why, WRITTEN)
    if not sound:
        certificate.leave(RESTS_ON_A_FAILURE, WEIGHTS, TOKENS, ENDS)
        return False
    # All three are looked at, whichever fails: none of them rests on another.
    config = load_config(model)
    sound &= certificate.attempt(WEIGHTS, lambda: folder_checks.match(model, config))
    sound &= certificate.attempt(TOKENS, lambda: folder_checks.look_at_tokens(model, config))
    sound &= certificate.attempt(ENDS, lambda: folder_checks.look_at_ends(model, config))
    return sound


def _certify_numbers(certificate: Certificate, asked: Asked) -> None:
    """Opens the model and holds it against transformers, against itself, and its answers against the records'."""
    # Untempered, as the sampler reports its probabilities.
    overrides = {"rl.temperature": 1.0, "data.media_root": asked.media_root, "media.missing_audio": "skip"}
    opened: list[tuple[Setup, Params]] = []

    def load() -> str:
        begun = time.monotonic()
        opened.append(open_model(asked.model, overrides | asked.overrides))
        config: Any = opened[0][0].backbone.config
        taken = f"{time.monotonic() - begun:.1f} s"
        return f"as {config.param_dtype}, every number finite, to compute in {config.compute_dtype}; it took {taken}"

    if not certificate.attempt(LOADED, load):
        certificate.leave(RESTS_ON_A_FAILURE, AGAINST_TRANSFORMERS, CACHE, BATCH, SAMPLER, GAP)
        return
    setup, params = opened[0]
    try:
        config: Any = setup.backbone.config
        nested, where = nest(params), f"in {config.compute_dtype}"
        _certify_against_transformers(certificate, asked, nested, config)
        certificate.attempt(
            CACHE, lambda: _agreed(where, self_checks.cached_against_uncached(nested, config), "the cache")
        )
        certificate.attempt(BATCH, lambda: _agreed(where, self_checks.batch_against_single(nested, config), "padding"))
        _certify_answers(certificate, asked, setup, params)
    finally:
        setup.close()


def _certify_against_transformers(certificate: Certificate, asked: Asked, params: Any, config: ThinkerConfig) -> None:
    if not asked.reference or importlib.util.find_spec("torch") is None:
        why = "it was not asked for" if not asked.reference else "torch is not installed here: pip install torch"
        certificate.leave(f"{why}. The checks below compare the model with itself only", AGAINST_TRANSFORMERS)
        return

    def compare() -> str:
        # Both compute in float32: a small mistake would be lost among the roundings of bfloat16.
        exact = dataclasses.replace(config, param_dtype="float32", compute_dtype="float32")
        # Weights are cast where they are used, so those of a bfloat16 file are its own numbers already.
        stored = {tensor.dtype for tensor in thinker_tensors(asked.model).values()}
        is_exact = config.param_dtype == "float32" or stored == {BFLOAT16}
        whole = params if is_exact else load_params(asked.model, exact)
        try:
            found = self_checks.against_transformers(str(asked.model), whole, exact)
        except ImportError as error:  # a transformers from before this model
            raise NothingToCompareError(
                f"got {printable(error, 200)} from transformers; expected 4.57 or later: install it"
            ) from error
        return _agreed("in float32", found, "this port")

    certificate.attempt(AGAINST_TRANSFORMERS, compare)


def _agreed(where: str, found: Agreement | list[Agreement] | None, doubtful: str) -> str:
    """What agrees, in words. Raises CertificateError naming what does not."""
    if found is None:
        raise NothingToCompareError(
            "got an answer that ends before its first word, expected one of a few tokens; look at the model's answers "
            "with `mer-r1 infer`"
        )
    found = [found] if isinstance(found, Agreement) else found
    if wrong := [str(one) for one in found if not one.agrees]:
        raise CertificateError(
            f"{where}: {'; '.join(wrong)}; expected none above its limit. The weights or {doubtful} are wrong: "
            "copy the model again, and if that does not help report it with this page"
        )
    return f"{where}: {'; '.join(map(str, found))}"


def _certify_answers(certificate: Certificate, asked: Asked, setup: Setup, params: Params) -> None:
    """The sampler beside the trainer, and where there are records slow beside fast on them."""
    if not asked.data:

        def compare_on_a_probe() -> str:
            record = Record(id="probe", messages=({"role": "user", "content": _QUESTION},), subtitle=_SUBTITLE)
            prompt = setup.source.load(record).prompt
            # Buckets are planned for records; this prompt has a shape of its own, in as many rows as the devices share.
            shape, cut = prompt_shape(prompt), row_cut(setup.backbone.mesh)
            bucket = dataclasses.replace(shape, rows=cut, tokens=-(-shape.tokens // LENGTH_STEP) * LENGTH_STEP)
            answerer = make_answerer(setup, eval_length(setup.config))
            return _compare_sampler(certificate, Evaluator(answerer, [bucket]), params, [prompt])

        certificate.attempt(SAMPLER, compare_on_a_probe)
        certificate.leave("no records were given: --data=FILE, with a solution in each", GAP)
        return
    # They are read once more: only the model says what records without a question of their own are asked.
    records = tuple(_records_of(asked, setup.config.data.question))[: asked.limit or None]
    evaluator = make_evaluator(setup, records)
    evaluation: list[Evaluation] = []

    def answer() -> str:
        evaluation.append(evaluator.run(params, load_prompts(setup, records)))
        return _gap(certificate, evaluation[0])

    if not certificate.attempt(GAP, answer):
        certificate.leave("there are no answers to compare", SAMPLER)
        return
    # Clips that could not be used are not among these records, so the first of them are the first batch.
    first = evaluation[0].records[: evaluator.buckets[0].rows]
    prompts = [prompt for _, prompt in load_prompts(setup, first) if isinstance(prompt, Prompt)]
    certificate.attempt(SAMPLER, lambda: _compare_sampler(certificate, evaluator, params, prompts))


def _gap(certificate: Certificate, evaluation: Evaluation) -> str:
    """Slow and fast F1 with intervals. It certifies that answers can be made and scored, not that they are good."""
    scored = list(evaluation.scored)
    figures = certificate.figures
    for mode in evaluation.answers:
        values = [float(evaluation.scores(mode, "f1")[place]) for place in scored]
        f1 = intervals(mean_of(values))["score"]
        bounds = "" if f1.low is None else f" (95% interval {percent(f1.low)} to {percent(f1.high)})"
        figures[f"F1 of {mode} answers"] = f"{percent(f1.value)} points{bounds}"
        cut = sum(answer.answer.truncated for answer in evaluation.answers[mode])
        figures[f"{mode} answers cut at the length cap"] = f"{cut} of {len(evaluation.records)}"
    if len(scored) > 1:
        slow, fast = (evaluation.scores(mode, "f1")[scored] for mode in ("slow", "fast"))
        figures["slow minus fast F1"] = str(paired_difference(slow, fast))
    left = f", {len(evaluation.skipped)} could not be used" if evaluation.skipped else ""
    return (
        f"{counted(len(evaluation.records), 'clip')} answered slow and fast, {len(scored)} scored{left}; figures below"
    )


def _compare_sampler(certificate: Certificate, evaluator: Evaluator, params: Params, prompts: list[Prompt]) -> str:
    """Log-probabilities of sampled tokens, as the sampler gave them and as a training step computes them."""
    programs = evaluator.answerer.programs
    mesh, dtype = programs.backbone.mesh, programs.backbone.config.compute_dtype
    with evaluator.answerer.holding(params) as policy:
        encoded = policy.encode(prompts, evaluator.buckets, list(range(len(prompts))))
        answers = policy.answer(encoded)
        certificate.figures["speed of slow answers"] = _speed(policy, encoded, len(prompts))
        completion = Continuations(id_BGC=answers.completions.id_BGC, exists_BGC=answers.completions.exists_BGC)
        trained = programs.logprobs(params, encoded, completion)
    host = answers.host
    # Rows after the prompts only fill up the batch; K counts the tokens that were sampled in all others.
    trained_BGC = local_rows({"trained": trained}, mesh)["trained"]
    mask_BGC = np.asarray(host.mask_BGC)[: len(prompts)]
    sampled_K, trained_K = (np.asarray(one)[: len(prompts)][mask_BGC] for one in (host.logprob_BGC, trained_BGC))
    gap_K = np.abs(sampled_K.astype(np.float64) - trained_K)
    certificate.figures["mean difference of sampler and trainer"] = f"{gap_K.mean():.2g} nats a token, in {dtype}"
    largest_number = float(np.abs(trained_K).max(initial=0))
    # The rule is that of the parity checks: a share of the largest number, or of 10 where that is less.
    limit = LIMITS[dtype] * max(10.0, largest_number)
    name = f"log-probabilities of {gap_K.size} tokens"
    return _agreed(f"in {dtype}", Agreement(name, float(gap_K.max(initial=0)), largest_number, limit), "the sampler")


def _speed(policy: AnsweringPolicy, encoded: Any, prompts: int) -> str:
    """Tokens a second, with everything compiled."""
    begun = time.monotonic()
    host = policy.answer(encoded).host
    seconds = time.monotonic() - begun
    tokens = int(np.asarray(host.length_BG)[:prompts].sum())
    device = jax.devices()[0]
    where = f"{jax.device_count()} x {device.device_kind}"
    return f"{tokens / seconds:.1f} tokens/s, {counted(prompts, 'clip')} at once, on {where}"


def write_certificate(folder: Path, certificate: Certificate) -> tuple[Path, Path]:
    """Writes `certificate.html` and `certificate.json`, and returns their paths."""
    with atomic_files.writing("the certificate", folder):
        folder.mkdir(parents=True, exist_ok=True)
    content = dataclasses.asdict(certificate) | {"verdict": certificate.verdict, "mer_r1_jax": __version__}
    page = write_page(
        folder / "certificate.html",
        "certificate.html.jinja",
        title="Certificate of a model",
        certificate=certificate,
        parts=[(state, certificate.of(state)) for state in (FAILED, NOT_CERTIFIED, CERTIFIED)],
    )
    atomic_files.write_json(folder / "certificate.json", content)
    return page, folder / "certificate.json"
