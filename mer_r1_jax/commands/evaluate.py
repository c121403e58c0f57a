"""Benchmarks of a model, slow and fast.

    mer-r1 evaluate --model=HF_DIR_OR_RUN --benchmark=NAME[,NAME] --mode=slow|fast|both|auto --out=DIR
        [--benchmark_root=DIR] [--config=FILE.py] [--limit=N] [--threshold=P] [--rescore]

Benchmarks: mer_unibench (all nine sets), or ovmerd_plus, mer2023, mer2024, meld, iemocap, cmu_mosi, cmu_mosei, ch_sims,
ch_sims_v2 one by one, from their official folders below --benchmark_root; synthetic, the synthetic world's held-out
clips; mme_emotion, from --benchmark_root/MME-Emotion, rated by --judge_url and --judge_model (`mer-r1 evaluate-mme` has
more settings). docs/benchmarks.md says how to lay the data out and what the scores are.

Answers go to DIR/answers as they come: the same command goes on where it was stopped. --rescore scores what is there,
without the model. The report is DIR/report.html. Without --config clips are prepared as the model remembers.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import app, flags
from ml_collections import config_flags

from mer_r1_jax import screen
from mer_r1_jax.cli import ended, explained
from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.emotion.answer_form import AUTO, MODES
from mer_r1_jax.evaluation.benchmarks.sets import BenchmarkError, Request, benchmark_names, title_of
from mer_r1_jax.evaluation.benchmarks.word_protocol import POLARITY_CHOICES, WORDS_CHOICES
from mer_r1_jax.faults import StopRequested
from mer_r1_jax.training.signals import EXIT_SAVED, GRACE_SECONDS, StopSignals

if TYPE_CHECKING:
    from mer_r1_jax.evaluation.benchmarks.benchmark_folder import BenchmarkFolder
    from mer_r1_jax.evaluation.benchmarks.word_protocol import Extractor
    from mer_r1_jax.run.asking import Policy

MME_EMOTION = "mme_emotion"
MME_FOLDER = "MME-Emotion"  # below --benchmark_root

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "How clips are prepared and answers decoded.", lock_config=True
)
_MODEL = flags.DEFINE_string("model", "", "A run's folder, its export, or a Hugging Face directory.")
_BENCHMARK = flags.DEFINE_list("benchmark", [], "What to evaluate.")
_MODE = flags.DEFINE_enum(
    "mode",
    "both",
    (*MODES, "both", AUTO),
    "Answer after reasoning, at once, or both; auto: at once, and after reasoning where the model is less sure of that "
    "than the threshold.",
)
_THRESHOLD = flags.DEFINE_float(
    "threshold",
    None,
    "--mode=auto: confidence from which on a fast answer stands; empty = what the model's run fitted.",
    0,
    1,
)
_OUT = flags.DEFINE_string("out", None, "Folder of answers, scores and report.", required=True)
_ROOT = flags.DEFINE_string("benchmark_root", "", "Folder that holds the sets' official folders.")
_LIMIT = flags.DEFINE_integer("limit", 0, "First so many clips of each benchmark; 0 = all.", lower_bound=0)
_RESCORE = flags.DEFINE_boolean("rescore", False, "Score the answers in --out again; touches no model.")
_WORDS = flags.DEFINE_enum("words", "answer", WORDS_CHOICES, "Answer to words: its answer tag, or an extractor LLM.")
_POLARITY = flags.DEFINE_enum("polarity", "wheels", POLARITY_CHOICES, "Words to polarity: a rule, or the extractor.")
_URL = flags.DEFINE_string("extractor_url", "", "Base URL of an OpenAI-compatible endpoint, such as http://host/v1.")
_NAME = flags.DEFINE_string("extractor_model", "", "The extractor's name there. Its key: the variable JUDGE_API_KEY.")
_JUDGE_URL = flags.DEFINE_string("judge_url", "", "mme_emotion: the judge's endpoint; empty = answers only.")
_JUDGE_NAME = flags.DEFINE_string("judge_model", "", "Its name there. Its key: the variable JUDGE_API_KEY.")
_WHEELS = flags.DEFINE_string("wheel_dir", "", "Folder with emotion wheels to score with; empty = the model's own.")
_VARIANT = flags.DEFINE_enum("variant", "", ("", "unibench", "mer2026"), "Of the wheels; empty = the model's own.")
_EXAMPLES = flags.DEFINE_integer("num_examples", 6, "Clips of each benchmark in the report.", lower_bound=0)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --benchmark=synthetic")
    from mer_r1_jax.run.policy import refuse_in_run

    with explained():
        refuse_in_run(_OUT.value)
        code = _evaluate()
    return ended(code)


def _evaluate() -> int:
    from mer_r1_jax.evaluation.benchmarks.benchmark_folder import BenchmarkFolder
    from mer_r1_jax.evaluation.benchmarks.benchmark_report import make_benchmark_report
    from mer_r1_jax.evaluation.mme import mme_pipeline as mme

    with contextlib.ExitStack() as stack:
        request = _request()
        folder = BenchmarkFolder(request.out)
        extractor = stack.enter_context(_extractor(folder))
        scored: list[dict[str, Any]] = []
        rated: list[dict[str, Any]] = []

        def write_report() -> None:
            make_benchmark_report(request.out, _EXAMPLES.value)

        def score(name: str) -> None:
            scored.append(folder.score(name, request, extractor))

        def score_and_show(name: str) -> None:
            score(name)
            write_report()  # answers to the next benchmark take hours

        try:
            if _RESCORE.value:
                # Seconds a benchmark, and one that cannot be scored ends the command: the page comes once, at the end.
                try:
                    for name in request.benchmarks:
                        score(name)
                finally:
                    if scored:
                        write_report()
                if _asks_mme():
                    rated = mme.rescore(request.out / MME_EMOTION, _EXAMPLES.value)
            else:
                stop = stack.enter_context(StopSignals(GRACE_SECONDS))
                policy = _policy(stack)
                if request.benchmarks:
                    _answer(policy, request, score_and_show, stack, stop)
                if _asks_mme():
                    rated = _rate_mme(policy, request, stack, stop)
        except StopRequested:
            screen.say("stopped; the same command goes on from there", error=True)
            return EXIT_SAVED
        _print(scored, folder)
        _print_mme(rated, request.out / MME_EMOTION)
    return 0


def _asks_mme() -> bool:
    return MME_EMOTION in _BENCHMARK.value


def _request() -> Request:
    """What the flags ask for besides MME-Emotion, which has scores of its own kind."""
    if bool(_JUDGE_URL.value) != bool(_JUDGE_NAME.value):
        raise BenchmarkError("--judge_url and --judge_model go together")
    names = [name for name in _BENCHMARK.value if name != MME_EMOTION]
    return Request(
        benchmarks=benchmark_names(names) if names or not _asks_mme() else (),
        modes={"both": MODES, AUTO: ("fast",)}.get(_MODE.value, (_MODE.value,)),
        threshold=_threshold(),
        out=pathlib.Path(_OUT.value),
        root=_ROOT.value,
        limit=_LIMIT.value,
        words=_WORDS.value,
        polarity=_POLARITY.value,
        wheel_dir=_WHEELS.value,
        variant=_VARIANT.value,
    )


def _threshold() -> float | None:
    """Of gated answers; None where none are asked for, or --rescore takes what they were asked with."""
    from mer_r1_jax.run.fitted_gate import threshold_of

    if _MODE.value != AUTO:
        if _THRESHOLD.value is not None:
            raise BenchmarkError(
                f"--threshold: got it beside --mode={_MODE.value}, expected --mode=auto, which alone compares with it; "
                "change the mode, or leave it out"
            )
        return None
    if _asks_mme():
        raise BenchmarkError(
            "--mode: got auto for mme_emotion, expected slow, fast or both: its answers have no confidence; ask it "
            "by a command of its own"
        )
    if _THRESHOLD.value is None and not _MODEL.value:
        raise BenchmarkError(
            "--mode=auto: got neither --threshold nor --model, expected one of them: a model's run may have fitted a "
            "threshold; give one (answers asked with --mode=auto are scored again by their own without this flag)"
        )
    return threshold_of(_MODEL.value, _THRESHOLD.value)


def _policy(stack: contextlib.ExitStack) -> Policy:
    from mer_r1_jax.run.asking import open_policy

    if not _MODEL.value:
        raise BenchmarkError("--model is empty; give a run's folder, its export or a Hugging Face directory")
    policy = open_policy(_MODEL.value, from_mapping(_CONFIG.value) if _CONFIG.value is not None else None)
    stack.callback(policy.setup.source.close)
    return policy


def _answer(policy: Policy, request: Request, score: Any, stack: contextlib.ExitStack, stop: StopSignals) -> None:
    from mer_r1_jax.run.benchmark import answer_benchmarks, read_benchmarks
    from mer_r1_jax.training.stopping import Stop

    benchmarks = read_benchmarks(request, policy.setup.config.data.question, policy.held_out)
    show = stack.enter_context(screen.stage_bar("answer"))

    def progress(name: str, there: int, total: int) -> None:
        show(title_of(name), there, total)

    answer_benchmarks(policy, request, benchmarks, lambda data: score(data.name), Stop(stop), progress)


def _rate_mme(policy: Policy, request: Request, stack: contextlib.ExitStack, stop: StopSignals) -> list[dict[str, Any]]:
    """MME-Emotion's answers and, with a judge, their scores."""
    from mer_r1_jax.evaluation.judge.client import ChatClient
    from mer_r1_jax.evaluation.mme import mme_pipeline as mme
    from mer_r1_jax.evaluation.mme.mme_folder import MmeFolder
    from mer_r1_jax.evaluation.mme.mme_reader import read_benchmark
    from mer_r1_jax.run.benchmark import PolicyAnswers
    from mer_r1_jax.training.stopping import Stop

    benchmark = read_benchmark(pathlib.Path(request.root) / MME_FOLDER, limit=request.limit)
    out = request.out / MME_EMOTION
    judge = None
    if _JUDGE_URL.value:
        cache = MmeFolder.of(out).cache
        judge = stack.enter_context(ChatClient(base_url=_JUDGE_URL.value, model=_JUDGE_NAME.value, cache_dir=cache))
    show = stack.enter_context(screen.stage_bar("item"))

    def progress(stage: str, there: int, total: int) -> None:
        show(f"{MME_FOLDER}, {stage}", there, total)
        stop.check()

    return mme.run(
        benchmark,
        PolicyAnswers(policy, benchmark, request.modes, Stop(stop)),
        out,
        judge and mme.Judges(judge=judge),
        num_examples=_EXAMPLES.value,
        progress=progress,
    )


@contextlib.contextmanager
def _extractor(folder: BenchmarkFolder) -> Iterator[Extractor | None]:
    """The chat client, where one is named."""
    from mer_r1_jax.evaluation.judge.client import ChatClient

    if not _URL.value and not _NAME.value:
        yield None
        return
    with ChatClient(base_url=_URL.value, model=_NAME.value, cache_dir=folder.extractor_cache) as client:
        yield client


def _print(scored: list[dict[str, Any]], folder: BenchmarkFolder) -> None:
    if not scored:
        return
    from rich.table import Table

    from mer_r1_jax.evaluation.benchmarks.tables import METRIC_TITLES, percent, ungated
    from mer_r1_jax.evaluation.bootstrap import signed

    console = screen.console()
    table = Table("benchmark", "metric", "mode", "score", "95% interval", "scored", "labelled", "slow − fast")
    for score in scored:
        difference = score["slow_minus_fast"].get("headline", {}).get("score")
        for mode, values in score["modes"].items():
            interval = values["headline"]["score"]
            bounds = "–" if interval["low"] is None else f"{percent(interval['low'])} to {percent(interval['high'])}"
            against = "" if difference is None or mode != "slow" else signed(difference["points"])
            counts = (str(values["n_scored"]), str(values["n_labelled"]))
            metric = METRIC_TITLES[score["metric"]]
            table.add_row(
                title_of(score["benchmark"]), metric, mode, percent(interval["value"]), bounds, *counts, against
            )
    console.print(table)
    for description in dict.fromkeys(score["protocol"]["description"] for score in scored):
        console.print(description, highlight=False, soft_wrap=True)
    for score in scored:
        if said := ungated(score):
            screen.say(said)
    screen.say(f"report: {folder.report}")


def _print_mme(rated: list[dict[str, Any]], out: pathlib.Path) -> None:
    if not _asks_mme():
        return
    from mer_r1_jax.evaluation.mme.mme_folder import MmeFolder

    for line in MmeFolder.of(out).told(rated):
        screen.say(line)
