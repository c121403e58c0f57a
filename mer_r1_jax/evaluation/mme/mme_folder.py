"""The folder of an MME-Emotion evaluation. Scoring from it asks neither model nor judge.

<out>/
    items.json                  what was asked: items, labels, clues
    predictions.jsonl           one line an item and mode
    steps.<extractor>.jsonl     their steps, by the fingerprint of what made them
    judge.<protocol>.jsonl      the ratings of these
    scores.<protocol>.json      the scores
    judge_cache/                every reply of extractor and judge
    judge_metrics.json          latency, failures, requests and tokens of the last attempt
    report.html                 all scores.*.json
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mer_r1_jax.evaluation.mme.judging import Protocol, describe
from mer_r1_jax.evaluation.mme.mme_reader import Benchmark, Item
from mer_r1_jax.evaluation.mme.mme_scores import lines_of, paired_modes, score_mode
from mer_r1_jax.evaluation.mme.mme_tasks import MmeError
from mer_r1_jax.evaluation.mme.stages import asked_of
from mer_r1_jax.evaluation.result_log import LogForm, ResultFolder, read_log

NAME = "mme_emotion"
RESULTS = LogForm(key=("key",), lines="results", error=MmeError, last_counts=True)  # of every stage


@dataclasses.dataclass(frozen=True)
class MmeFolder(ResultFolder):
    """Where everything of an evaluation on MME-Emotion is."""

    error = MmeError
    kept_scores = "scores.*.json"

    @property
    def predictions(self) -> Path:
        """The answers."""
        return self.path / "predictions.jsonl"

    @property
    def cache(self) -> Path:
        """Replies of extractor and judge."""
        return self.path / "judge_cache"

    def steps(self, protocol: Protocol) -> Path:
        """The steps under a protocol."""
        return self.path / f"steps.{protocol.steps_key}.jsonl"

    def judged(self, protocol: Protocol) -> Path:
        """The ratings under a protocol."""
        return self.path / f"judge.{protocol.key}.jsonl"

    def write_items(self, benchmark: Benchmark, modes: tuple[str, ...]) -> None:
        """Keeps what is asked. Items and modes may be added to, not changed.

        Raises:
            MmeError: an item that is there already has other labels, or another clip.
        """
        if (self.path / "items.json").is_file():
            earlier, earlier_modes = self.read_items()
            known = {item.key: item for item in benchmark.items}
            changed = [
                item.key
                for item in earlier.items
                if item.key in known
                and (item.labels, item.label_set) != (known[item.key].labels, known[item.key].label_set)
            ]
            if changed:
                raise MmeError(
                    f"{self.path}: {len(changed)} items have other labels in the data folder now, such as "
                    f"{changed[0]}; choose another --out, or use the earlier data"
                )
            modes = tuple(dict.fromkeys((*earlier_modes, *modes)))
            kept = [item for item in earlier.items if item.key not in known]
            benchmark = dataclasses.replace(benchmark, items=(*benchmark.items, *kept))
        content = dataclasses.asdict(benchmark) | {"root": str(benchmark.root), "modes": list(modes)}
        self.keep("items.json", content)

    def write_metrics(self, metrics: dict[str, dict[str, float]]) -> None:
        """Keeps what the judge's clients counted."""
        self.keep("judge_metrics.json", metrics)

    def read_items(self) -> tuple[Benchmark, tuple[str, ...]]:
        """What was asked, and in which modes.

        Raises:
            MmeError: there is none, or it cannot be read.
        """
        path = self.path / "items.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            lists = ("labels", "label_set")
            items = tuple(Item(**row | {name: tuple(row[name]) for name in lists}) for row in content["items"])
            benchmark = Benchmark(Path(content["root"]), items, tuple(content["absent"]), content["limit"])
            return benchmark, tuple(content["modes"])
        except FileNotFoundError:
            raise MmeError(f"{path}: not there; evaluate something into this folder first") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MmeError(f"{path}: cannot be read ({error}); choose another --out") from error

    def told(self, scores: list[dict[str, Any]]) -> list[str]:
        """Scores in lines for a console, and where the report is; without any, where the answers are."""
        if not scores:
            return [f"answers: {self.predictions}; add --judge_url and --judge_model to rate them"]
        return [*(line for score in scores for line in lines_of(score)), f"report: {self.report}"]

    def score(self) -> list[dict[str, Any]]:
        """Scores the ratings of every protocol in the folder, and keeps the scores.

        Raises:
            MmeError: there are no ratings, or a file is damaged.
        """
        benchmark, modes = self.read_items()
        header, predictions = read_log(self.predictions, RESULTS)
        judged_files = sorted(self.path.glob("judge.*.jsonl"))
        if not judged_files:
            raise MmeError(f"{self.path}: no ratings there; run with a judge first")
        return [self._score(file, benchmark, modes, header["fingerprint"], predictions) for file in judged_files]

    def _score(self, file, benchmark, modes, made_by, predictions) -> dict[str, Any]:
        header, judged = read_log(file, RESULTS)
        protocol = header["fingerprint"]
        _, steps = read_log(self.path / f"steps.{protocol['steps_key']}.jsonl", RESULTS)
        logs = {"predict": predictions, "steps": steps, "judge": judged}
        asked = asked_of(benchmark, modes)
        scores = {
            "benchmark": NAME,
            "protocol": protocol | {"key": file.name.split(".")[1], "description": describe(protocol)},
            "predictions": made_by,
            "absent_tasks": list(benchmark.absent),
            "limit": benchmark.limit,
            "without_clue": benchmark.clueless,
            "without_clip": benchmark.clipless,
            "modes": {mode: score_mode([one for one in asked if one.mode == mode], logs) for mode in modes},
            "slow_minus_fast": paired_modes(asked, judged),
        }
        self.keep(f"scores.{scores['protocol']['key']}.json", scores)
        return scores
