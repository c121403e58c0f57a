"""MME-Emotion: mer-r1 evaluate-mme --model=HF_DIR_OR_RUN --benchmark_root=DIR --out=DIR
    --judge_url=https://host/v1 --judge_model=NAME

A model answers (or --responses names answers made elsewhere), an extractor turns answers into steps, a judge rates
them. Extractor and judge are any OpenAI-compatible chat endpoints; their key comes from $JUDGE_API_KEY and is kept
nowhere. The same command goes on where an earlier one was interrupted. --rescore scores a folder again without model
and judge.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import ended, explained
from mer_r1_jax.evaluation.mme.mme_tasks import MmeError
from mer_r1_jax.faults import StopRequested
from mer_r1_jax.training.signals import EXIT_SAVED, GRACE_SECONDS, StopSignals

if TYPE_CHECKING:
    from mer_r1_jax.evaluation.judge.client import ChatClient

_MODEL = flags.DEFINE_string("model", "", "a run's folder, its export, or a Hugging Face directory")
_RESPONSES = flags.DEFINE_string("responses", "", "instead: folder of response files in the official form")
_ROOT = flags.DEFINE_string("benchmark_root", "", "MME-Emotion's folder, with <task>/question/<task_>.json")
_OUT = flags.DEFINE_string("out", None, "folder of everything that is written", required=True)
_MODE = flags.DEFINE_enum("mode", "slow", ("slow", "fast", "both"), "answer after reasoning, at once, or both")
_TASKS = flags.DEFINE_list("tasks", [], "some of the eight tasks; empty = all that are there")
_LIMIT = flags.DEFINE_integer("limit", 0, "first so many items of each task; 0 = all", lower_bound=0)
_RESCORE = flags.DEFINE_bool("rescore", False, "score what is in --out, without model and judge")
_EXAMPLES = flags.DEFINE_integer("num_examples", 8, "items shown in the report", lower_bound=0)
_JUDGE_URL = flags.DEFINE_string("judge_url", "", "the judge's endpoint, up to /v1; empty = only answer")
_JUDGE_MODEL = flags.DEFINE_string("judge_model", "", "its model's name")
_KEY_ENV = flags.DEFINE_string("judge_key_env", "JUDGE_API_KEY", "environment variable that holds its key")
_EXTRACTOR_URL = flags.DEFINE_string("extractor_url", "", "the extractor's endpoint; empty = the judge's")
_EXTRACTOR_MODEL = flags.DEFINE_string("extractor_model", "", "its model's name; empty = the judge's")
_EXTRACTOR_ENV = flags.DEFINE_string("extractor_key_env", "", "its key's environment variable; empty = the judge's")
_IMAGES = flags.DEFINE_bool("images", True, "show the judge frames")
_CONCURRENCY = flags.DEFINE_integer("concurrency", 4, "questions to the judge at once", 1, 1024)
_TIMEOUT = flags.DEFINE_float("timeout", 120.0, "seconds one request may take", 0.1, 86_400.0)
_RETRIES = flags.DEFINE_integer("max_retries", 5, "further attempts at a request that may succeed then", 0, 100)
_REASKS = flags.DEFINE_integer("reasks", 2, "further attempts at a reply that cannot be read", lower_bound=0)
_FAILED = flags.DEFINE_float("max_failed_frac", 0.1, "share of the questions that may fail before it stops", 0.0, 1.0)
_BUDGET = flags.DEFINE_integer("token_budget", 0, "tokens extractor and judge may spend, each; 0: no limit", 0)
_TOKENS_FIELD = flags.DEFINE_string("max_tokens_field", "max_tokens", "what the endpoint calls its answer's limit")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --out=DIR")
    from mer_r1_jax.evaluation.mme.mme_folder import MmeFolder
    from mer_r1_jax.evaluation.mme.mme_pipeline import rescore

    with explained():
        code, scores = (0, rescore(_OUT.value, _EXAMPLES.value)) if _RESCORE.value else _stoppable()
    if code:
        return ended(code)
    for line in MmeFolder.of(_OUT.value).told(scores):
        screen.say(line)
    return 0


def _stoppable() -> tuple[int, list[dict]]:
    """The exit status, and the scores; a signal leaves the evaluation, whose answers so far are kept."""
    try:
        with StopSignals(GRACE_SECONDS) as stop:
            return 0, _evaluate(stop)
    except StopRequested:
        screen.say("stopped; the same command goes on from there", error=True)
        return EXIT_SAVED, []


def _evaluate(stop: StopSignals) -> list[dict]:
    from mer_r1_jax.evaluation.mme.mme_pipeline import Judges, Responses, run
    from mer_r1_jax.evaluation.mme.mme_reader import read_benchmark

    _check_flags()
    benchmark = read_benchmark(_ROOT.value, _TASKS.value, _LIMIT.value)
    with contextlib.ExitStack() as stack:
        judge = extractor = None
        if _JUDGE_URL.value:
            judge = stack.enter_context(_client(_JUDGE_URL.value, _JUDGE_MODEL.value, _KEY_ENV.value))
        if judge and (_EXTRACTOR_URL.value or _EXTRACTOR_MODEL.value):
            url = _EXTRACTOR_URL.value or _JUDGE_URL.value
            env = _EXTRACTOR_ENV.value or _KEY_ENV.value
            extractor = stack.enter_context(_client(url, _EXTRACTOR_MODEL.value or _JUDGE_MODEL.value, env))
        predictor = (
            Responses(_RESPONSES.value, benchmark)
            if _RESPONSES.value
            else stack.enter_context(_policy(benchmark, stop))
        )
        show = stack.enter_context(screen.stage_bar("item"))

        def progress(stage: str, done: int, total: int) -> None:
            show(stage, done, total)
            stop.check()

        judges = judge and Judges(judge=judge, extractor=extractor, images=_IMAGES.value, reasks=_REASKS.value)
        return run(benchmark, predictor, _OUT.value, judges, num_examples=_EXAMPLES.value, progress=progress)


def _check_flags() -> None:
    problems = []
    if not _ROOT.value:
        problems.append("--benchmark_root is empty; it names MME-Emotion's folder")
    if bool(_MODEL.value) == bool(_RESPONSES.value):
        problems.append("expected one of --model and --responses")
    if bool(_JUDGE_URL.value) != bool(_JUDGE_MODEL.value):
        problems.append("--judge_url and --judge_model go together")
    if problems:
        raise MmeError("; ".join(problems))


def _client(url: str, model: str, key_env: str) -> ChatClient:
    from mer_r1_jax.evaluation.judge.client import ChatClient
    from mer_r1_jax.evaluation.mme.mme_folder import MmeFolder

    return ChatClient(
        base_url=url,
        model=model,
        api_key_env=key_env,
        cache_dir=MmeFolder.of(_OUT.value).cache,
        concurrency=_CONCURRENCY.value,
        timeout=_TIMEOUT.value,
        max_retries=_RETRIES.value,
        max_failed_frac=_FAILED.value,
        token_budget=_BUDGET.value,
        max_tokens_field=_TOKENS_FIELD.value,
    )


@contextlib.contextmanager
def _policy(benchmark, stop: StopSignals) -> Iterator:
    # Imported here: rating answers made elsewhere needs no JAX.
    from mer_r1_jax.emotion.answer_form import MODES
    from mer_r1_jax.run.asking import open_policy
    from mer_r1_jax.run.benchmark import PolicyAnswers
    from mer_r1_jax.run.policy import refuse_in_run
    from mer_r1_jax.training.stopping import Stop

    refuse_in_run(_OUT.value)
    policy = open_policy(_MODEL.value)
    try:
        yield PolicyAnswers(policy, benchmark, MODES if _MODE.value == "both" else (_MODE.value,), Stop(stop))
    finally:
        policy.setup.source.close()
