"""MME-Emotion from questions to scores: predict, extract steps, judge, score. Every stage can be killed and goes on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mer_r1_jax.evaluation.clip_frames import Pictures
from mer_r1_jax.evaluation.judge.client import ChatClient
from mer_r1_jax.evaluation.mme.judging import Protocol
from mer_r1_jax.evaluation.mme.mme_folder import RESULTS, MmeFolder
from mer_r1_jax.evaluation.mme.mme_reader import Benchmark, read_responses, response_files
from mer_r1_jax.evaluation.mme.mme_report import make_mme_report
from mer_r1_jax.evaluation.mme.mme_tasks import MmeError
from mer_r1_jax.evaluation.mme.stages import (
    Asked,
    Asking,
    Failure,
    Predictor,
    Progress,
    asked_of,
    extract,
    judge,
    predict,
)
from mer_r1_jax.evaluation.result_log import ResultLog
from mer_r1_jax.storage import atomic_files

RESPONSE = "response"  # the mode of answers that were made elsewhere


class Responses:
    """Answers of a model that was asked elsewhere, from files in the official form.

    Args:
        folder: of the files.
        benchmark: what they answer.

    Raises:
        MmeError: the files cannot be used.
    """

    modes: tuple[str, ...] = (RESPONSE,)

    def __init__(self, folder: str | Path, benchmark: Benchmark):
        files = response_files(folder)
        self._texts = read_responses(files, benchmark.items)
        hashes = {task: atomic_files.sha256_of(file) for task, file in files.items()}
        self.fingerprint: Mapping[str, Any] = {"responses": hashes}

    def answers(self, asked: Sequence[Asked]) -> Iterator[tuple[Asked, Mapping[str, Any] | Failure]]:
        """The response to each, or that there is none."""
        for one in asked:
            text = self._texts.get(one.item.key)
            if text is None:
                yield one, Failure("no_response", f"there is no response to {one.item.key}")
            else:
                yield one, {"text": text}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judges:
    """Who turns answers into scores, and what the judge is shown.

    Attributes:
        judge: rates the steps.
        extractor: turns answers into steps; None = the judge.
        images, max_frames, frame_side, reasks: as in `Protocol`.
    """

    judge: ChatClient
    extractor: ChatClient | None = None
    images: bool = True
    max_frames: int = 10
    frame_side: int = 512
    reasks: int = 2

    @property
    def protocol(self) -> Protocol:
        """What the scores follow from."""
        return Protocol(
            extractor=(self.extractor or self.judge).model,
            judge=self.judge.model,
            images=self.images,
            max_frames=self.max_frames,
            frame_side=self.frame_side,
            reasks=self.reasks,
        )


def run(
    benchmark: Benchmark,
    predictor: Predictor,
    out: str | Path,
    judges: Judges | None,
    *,
    num_examples: int = 6,
    progress: Progress = lambda *_: None,
) -> list[dict[str, Any]]:
    """Evaluates, going on from whatever the folder holds already, and writes scores and report.

    Args:
        benchmark: what is asked.
        predictor: who answers: `Responses`, or a policy (`mer_r1_jax.run.benchmark`).
        out: folder of everything that is written.
        judges: who rates; None only answers, for a judge later.
        num_examples: items of each mode shown in the report, the first ones.
        progress: called between results with (stage, results there, results in all); may raise to stop.

    Returns:
        The scores of every protocol in the folder; none without a judge.

    Raises:
        MmeError: data, answers or earlier results that cannot be used.
        JudgeAbortedError: the judge cannot go on; what it answered is kept.
    """
    folder = MmeFolder.of(out)
    folder.write_items(benchmark, tuple(predictor.modes))
    asked = asked_of(benchmark, predictor.modes)

    with ResultLog(folder.predictions, RESULTS, predictor.fingerprint) as predictions:
        predict(predictions, asked, predictor, progress)
        if not any(predictions.done(one.key) for one in asked):
            first = next(iter(predictions.rows.values()), {"message": "there is none"})
            raise MmeError(f"none of {len(asked)} items could be answered; the first: {first['message']}")
        if judges is None:
            return []
        protocol, judge_client = judges.protocol, judges.judge
        extractor = judges.extractor or judge_client
        with (
            ResultLog(folder.steps(protocol), RESULTS, protocol.steps_fingerprint()) as steps,
            ResultLog(folder.judged(protocol), RESULTS, protocol.fingerprint()) as judged,
            _pictures(protocol) as pictures,
        ):
            try:
                extract(steps, predictions, asked, Asking(extractor, judges.reasks, progress))
                judge(judged, steps, benchmark, asked, Asking(judge_client, judges.reasks, progress), pictures)
            finally:
                folder.write_metrics({"extractor": extractor.metrics(), "judge": judge_client.metrics()})
    return rescore(out, num_examples)


def rescore(out: str | Path, num_examples: int = 6) -> list[dict[str, Any]]:
    """Scores and reports what is in a folder, without model and judge.

    Raises:
        MmeError: there is nothing to score, or a file is damaged.
    """
    scores = MmeFolder.of(out).score()
    make_mme_report(out, num_examples)
    return scores


@contextlib.contextmanager
def _pictures(protocol: Protocol) -> Iterator[Pictures | None]:
    if not protocol.images:
        yield None
        return
    pictures = Pictures(protocol.max_frames, protocol.frame_side)
    try:
        yield pictures
    finally:
        pictures.close()
