"""The folder of an evaluation: answers, what was missing, scores. Scoring from it touches no model.

<out>/
    answers/<benchmark>.jsonl           one line a clip and mode, appended; an interrupted evaluation goes on from it
    answers/<benchmark>.coverage.json   what the data folder held and what could not be asked, by name
    scores/<benchmark>.<protocol>.json  scores, intervals and analysis under one protocol
    extractor/                          replies of the extractor LLM, where one is used
    report.html                         everything in scores/
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.evaluation.benchmarks.benchmark_reader import BenchmarkData, truth_of
from mer_r1_jax.evaluation.benchmarks.benchmark_scores import Scorer, score_benchmark
from mer_r1_jax.evaluation.benchmarks.sets import BenchmarkError, Request
from mer_r1_jax.evaluation.benchmarks.word_protocol import Extractor, make_scoring
from mer_r1_jax.evaluation.result_log import LogForm, ResultFolder, ResultLog, check_fingerprint, read_log

# A line of answers holds everything a score needs: clip, truth, the raw text, its words and their confidences.
ANSWERS = LogForm(key=("id", "mode"), lines="answers", error=BenchmarkError)


@dataclasses.dataclass(frozen=True)
class BenchmarkFolder(ResultFolder):
    """Where everything of an evaluation on benchmarks is."""

    error = BenchmarkError
    kept_scores = "scores/*.json"

    def answers(self, benchmark: str) -> pathlib.Path:
        """A benchmark's answer file."""
        return self.path / "answers" / f"{benchmark}.jsonl"

    def open_answers(self, benchmark: str, fingerprint: Mapping[str, Any]) -> ResultLog:
        """A benchmark's answers, to add to; see `ResultLog`."""
        return ResultLog(self.answers(benchmark), ANSWERS, fingerprint)

    def read_answers(self, benchmark: str) -> tuple[dict[str, Any], dict[tuple[str, str], dict[str, Any]]]:
        """The header of a benchmark's answers, with `fingerprint`, and (clip, mode) -> answer.

        Raises:
            BenchmarkError: there are none, or a line is damaged or stands twice.
        """
        return read_log(self.answers(benchmark), ANSWERS)

    def check_model(self, model: Any) -> None:
        """Refuses a folder in which another model has answered some benchmark.

        Args:
            model: what the fingerprints say under `model`.

        Raises:
            BenchmarkError: naming the file and what differs.
        """
        for path in sorted((self.path / "answers").glob("*.jsonl")):
            check_fingerprint(path, ANSWERS, {"model": model})

    def coverage(self, benchmark: str) -> pathlib.Path:
        """What its data folder held."""
        return self.path / "answers" / f"{benchmark}.coverage.json"

    def kept_threshold(self, benchmark: str) -> float | None:
        """The threshold that a benchmark's answers were gated by the last time they were; None where they never were.

        Raises:
            BenchmarkError: the coverage is damaged.
        """
        try:
            return json.loads(self.coverage(benchmark).read_text(encoding="utf-8")).get("threshold")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise BenchmarkError(
                f"{self.coverage(benchmark)}: cannot be read ({error}), expected what answers were asked with; delete "
                "it, and where they were gated, evaluate with --mode=auto and their --threshold first"
            ) from error

    @property
    def extractor_cache(self) -> pathlib.Path:
        """Replies of the extractor."""
        return self.path / "extractor"

    def write_coverage(
        self,
        data: BenchmarkData,
        *,
        wheels: Mapping[str, str],
        unusable: Mapping[str, str],
        silent: Sequence[str],
        threshold: float | None = None,
    ) -> None:
        """Keeps what was asked and what could not be.

        Args:
            data: the benchmark.
            wheels: `wheel_dir` and `variant` of the model's own wheels, which score where no others are named.
            unusable: clip -> why it could not be asked.
            silent: clips without a sound track.
            threshold: where answers were gated by one.
        """
        truths = {record.id: truth_of(record, data.metric) for record in data.records}
        content = dataclasses.asdict(data.coverage) | {
            "benchmark": data.name,
            "media_root": str(data.media_root),
            **wheels,
            "unusable": dict(unusable),
            "silent_audio": sorted(set(silent)),
            "limited": data.limited,
            "threshold": threshold,
            "truths": truths | ({} if data.limited else data.absent),
        }
        self.keep(f"answers/{self.coverage(data.name).name}", content)

    def score(self, name: str, request: Request, extractor: Extractor | None = None) -> dict[str, Any]:
        """Scores a benchmark's answers under the request's protocol and keeps the result.

        Raises:
            BenchmarkError: there are no answers, or they cannot be scored so.
            WheelError: the wheels cannot be read.
        """
        header, answers = self.read_answers(name)
        try:
            coverage = json.loads(self.coverage(name).read_text(encoding="utf-8"))
            truths = coverage.pop("truths")
        except (OSError, ValueError, KeyError) as error:
            raise BenchmarkError(f"{self.coverage(name)}: cannot be read ({error}); evaluate again") from error
        folder = request.wheel_dir or coverage["wheel_dir"]
        wheels = load_wheels(folder, request.variant or coverage["variant"])
        scoring = make_scoring(request.words, request.polarity, wheels, folder, extractor)
        answer_wheels = header["fingerprint"]["confidence"]["wheels"]
        # What gated answers were asked for with, unless others are wanted of the answers that are there.
        threshold = coverage.get("threshold") if request.threshold is None else request.threshold
        scorer, unusable = Scorer(scoring, wheels, extractor), coverage.get("unusable", {})
        scores = score_benchmark(name, answers, truths, scorer, answer_wheels, threshold, unusable)
        scores |= {"coverage": coverage, "answers": header, "wheel_dir": folder}
        self.keep(f"scores/{name}.{scoring.key}.json", scores)
        return scores
