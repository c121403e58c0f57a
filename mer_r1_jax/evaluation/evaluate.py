"""Slow and fast answers on held-out clips, scored against the truth.

Decoding is greedy, so an evaluation is a function of parameters and clips alone; samples asked for besides come
from a fixed key. Slow and fast share a clip's media features; they differ in what the assistant's turn starts with.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mer_r1_jax import faults
from mer_r1_jax.data.records import Record
from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.evaluation.answering import Answerer, AnsweringPolicy, Answers, beside, own_words
from mer_r1_jax.evaluation.gate import mean_confidence
from mer_r1_jax.evaluation.second_looks import FixedConfidence, FixedWords, SecondLooks, fixed_words, sampled_answers
from mer_r1_jax.media.prompt import Prompt
from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.parallel import processes
from mer_r1_jax.parallel.rows import row_share
from mer_r1_jax.rl.confidence import NO_SET
from mer_r1_jax.rl.scoring import ScoredAnswer, ScoredGroups
from mer_r1_jax.training.prompts import uid_of
from mer_r1_jax.training.state import Params
from mer_r1_jax.training.stopping import NEVER, Stop


class EvaluationError(ValueError):
    """Clips that no evaluation can be made of."""


@dataclasses.dataclass(frozen=True)
class AnswerOf:
    """One mode's answer to one clip.

    Attributes:
        answer: text, words and rewards.
        ids: int32 [length], its own token ids, a forced prefix included.
        confidence_correct, confidence_wrong: mean probability given to the categories of its correct (wrong) words,
            None where it has none with a confidence.
        confidence_WQ: float32, probability given to the category of each of its words (at most `rl.max_answer_words`)
            on each wheel; NaN where the word, or the truth, has none there.
        confidence: how sure the policy is of the answer (`gate.mean_confidence`), whatever the truth has: what a gate
            goes by. None where no word has a confidence.
        sampled: answers of the same mode that were sampled besides.
        fixed: how sure the policy is, in this mode, of the words that every evaluation of a run is asked about.
    """

    answer: ScoredAnswer
    ids: np.ndarray
    confidence_correct: float | None
    confidence_wrong: float | None
    confidence_WQ: np.ndarray
    confidence: float | None = None
    sampled: tuple[ScoredAnswer, ...] = ()
    fixed: FixedConfidence | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Answers to every clip.

    Attributes:
        records: the clips, in order.
        answers: mode -> one answer per clip.
        skipped: records whose media could not be used, with the reason; they are in no score.
    """

    records: tuple[Record, ...]
    answers: dict[str, tuple[AnswerOf, ...]]
    skipped: tuple[tuple[Record, str], ...] = ()

    @property
    def scored(self) -> tuple[int, ...]:
        """Places of the clips that count in means: those whose truth has a category on some wheel."""
        answers = next(iter(self.answers.values()))
        return tuple(place for place, answer in enumerate(answers) if answer.answer.rewards.scorable)

    def scores(self, mode: str, name: str) -> np.ndarray:
        """float64 [clips]: precision, recall or f1 of each clip's answer; NaN where its truth cannot be scored."""
        return np.asarray([answer.answer.rewards.score(name) for answer in self.answers[mode]], np.float64)


class Evaluator:
    """Answers and scores held-out clips, batch by batch.

    Args:
        answerer: decodes and scores.
        buckets: shapes of evaluation batches.
        looks: what is asked beyond greedy answers; None = nothing.
    """

    def __init__(self, answerer: Answerer, buckets: Sequence[BatchShape], looks: SecondLooks | None = None):
        self.answerer = answerer
        self.buckets = buckets
        self.looks = looks

    def run(
        self,
        params: Params,
        prompts: Iterator[tuple[Record, Prompt | str]],
        modes: Sequence[str] = MODES,
        stop: Stop = NEVER,
        at_least: int = 0,
    ) -> Evaluation:
        """Answers every prompt in every mode.

        In a run of several processes each of them brings its own share of the prompts, and gets all answers.

        Args:
            params: of the policy.
            prompts: records with their prompt, or the reason why there is none.
            modes: slow, fast or both.
            stop: asked between batches and inside them; raises StopRequested.
            at_least: batches to go through, the last ones empty: every process must take part in as many.

        Raises:
            EvaluationError: when there is not one prompt.
        """
        records: list[Record] = []
        answers: dict[str, list[AnswerOf]] = {mode: [] for mode in modes}
        skipped: list[tuple[Record, str]] = []
        for rows, batch_answers in self.batches(params, prompts, modes, skipped, stop, at_least):
            records += rows
            for mode in modes:
                answers[mode] += batch_answers[mode]
        # The exchange comes before the check, so that a process without a usable clip takes part and all fail alike.
        records, answers, skipped = self._of_all(records, answers, skipped)
        if not records:
            raise EvaluationError(
                f"none of the {len(skipped)} held-out clips can be used, the first for: "
                f"{skipped[0][1] if skipped else 'there is none'}; look at them with `mer-r1 validate`"
            )
        return Evaluation(tuple(records), {mode: tuple(listed) for mode, listed in answers.items()}, tuple(skipped))

    def batches(
        self,
        params: Params,
        prompts: Iterator[tuple[Record, Prompt | str]],
        modes: Sequence[str],
        skipped: list[tuple[Record, str]],
        stop: Stop = NEVER,
        at_least: int = 0,
    ) -> Iterator[tuple[list[Record], dict[str, list[AnswerOf]]]]:
        """The same batch by batch, for whoever keeps answers as they come.

        Args:
            params, prompts, modes, stop, at_least: as of `run`.
            skipped: records that have no prompt are added to it, with the reason.

        Yields:
            the records of a batch, and mode -> their answers.
        """
        with self.answerer.holding(params) as policy:
            for batch in self._batches_of(prompts, skipped, at_least):
                stop.check()
                yield [record for record, _ in batch], self._answer(policy, batch, modes, stop)

    def _batches_of(
        self, prompts: Iterator[tuple[Record, Prompt | str]], skipped: list[tuple[Record, str]], at_least: int
    ) -> Iterator[list[tuple[Record, Prompt]]]:
        rows = self.buckets[0].rows
        if processes.count() > row_share(self.answerer.programs.backbone.mesh).count:
            return agreed_batches(prompts, rows, skipped, at_least)
        return filled_up(batched(prompts, rows, skipped), at_least)

    def _of_all(self, *own: Any) -> tuple[list[Record], dict[str, list[AnswerOf]], list[tuple[Record, str]]]:
        """Records, answers and skipped records of all processes, in their order."""
        leader = row_share(self.answerer.programs.backbone.mesh).leader
        parts = [part for part in processes.exchange("the answers of an evaluation", own if leader else None) if part]
        return (
            [record for records, _, _ in parts for record in records],
            {mode: [answer for _, answers, _ in parts for answer in answers[mode]] for mode in own[1]},
            [entry for _, _, skipped in parts for entry in skipped],
        )

    def _answer(
        self, policy: AnsweringPolicy, batch: Sequence[tuple[Record, Prompt]], modes: Sequence[str], stop: Stop
    ) -> dict[str, list[AnswerOf]]:
        prompts = policy.encode(
            [prompt for _, prompt in batch], self.buckets, [uid_of(record.id) for record, _ in batch]
        )
        records = [record for record, _ in batch]
        truths = [record.solution for record in records]
        given, groups = {}, {}
        for mode in modes:
            given[mode] = policy.answer(prompts, mode, stop)
            faults.here("evaluation_scores", mode)
            groups[mode] = policy.read(given[mode], truths)
        # Words are asked about on all wheels they are on, as where nobody knows a truth: read once more with its own
        # words for the truth, an answer has them all. Which of them are right or wrong the first reading says.
        said = {mode: [group[0].parsed.words for group in groups[mode].answers[: len(batch)]] for mode in modes}
        # All words are asked about in one forward pass behind the prompts, whichever answer they stand in.
        asked = {mode: own_words(given[mode], policy.read(given[mode], said[mode])) for mode in modes}
        fixed = self._fixed_words(policy, given, groups, records)
        if fixed is not None:
            asked = {mode: beside(asked[mode], fixed.asked[mode]) for mode in modes}
        probability = dict(zip(asked, policy.probabilities(prompts, list(asked.values())), strict=True))
        results = {
            mode: [_answer_of(given[mode], groups[mode], probability[mode], row) for row in range(len(batch))]
            for mode in modes
        }
        if fixed is not None:
            found = fixed.confidences({mode: probability[mode][:, 1] for mode in modes}, len(batch))
            for mode in modes:
                results[mode] = [
                    dataclasses.replace(answer, fixed=of_it and of_it[mode])
                    for answer, of_it in zip(results[mode], found, strict=True)
                ]
        if self.looks is not None and self.looks.num_samples:
            for mode in modes:
                sampled = sampled_answers(policy, prompts, mode, truths, self.looks, stop)
                results[mode] = [
                    dataclasses.replace(answer, sampled=of_it)
                    for answer, of_it in zip(results[mode], sampled, strict=True)
                ]
        return results

    def _fixed_words(
        self,
        policy: AnsweringPolicy,
        given: dict[str, Answers],
        groups: dict[str, ScoredGroups],
        records: Sequence[Record],
    ) -> FixedWords | None:
        """The fixed words of a batch; None where nobody asks, or one mode alone is answered."""
        if self.looks is None or set(given) != set(MODES):
            return None  # fixed words are those of fast answers, behind the reasoning of slow ones
        parsed = {mode: [group[0].parsed for group in groups[mode].answers[: len(records)]] for mode in MODES}
        of_clips = self.looks.fixed_words
        words = [
            answer.words if of_clips is None else of_clips.get(record.id, ())
            for record, answer in zip(records, parsed["fast"], strict=True)
        ]
        reasonings = [answer.reasoning for answer in parsed["slow"]]
        return fixed_words(policy, given["slow"], reasonings, words, [record.solution for record in records])


def _answer_of(answers: Answers, groups: ScoredGroups, probability_BGWQ: np.ndarray, row: int) -> AnswerOf:
    (answer,), anchors, own_WQ = groups.answers[row], groups.anchors, probability_BGWQ[row, 0]
    # A wheel on which the truth has no category can tell neither right from wrong.
    probability_WQ = np.where(anchors.set_BGWQ[row, 0] != NO_SET, own_WQ, np.nan)
    held_WQ, correct_WQ = ~np.isnan(probability_WQ), anchors.correct_BGWQ[row, 0]
    means = [
        float(probability_WQ[kind_WQ].mean()) if kind_WQ.any() else None
        for kind_WQ in (held_WQ & correct_WQ, held_WQ & ~correct_WQ)
    ]
    return AnswerOf(
        answer=answer,
        ids=np.asarray(answers.host.id_BGC[row, 0, : answer.length]),
        confidence_correct=means[0],
        confidence_wrong=means[1],
        confidence_WQ=probability_WQ[: len(answer.parsed.words)],
        confidence=mean_confidence(own_WQ),
    )


def batched(
    prompts: Iterator[tuple[Record, Prompt | str]], rows: int, skipped: list[tuple[Record, str]]
) -> Iterator[list[tuple[Record, Prompt]]]:
    """Groups prompts into batches, setting aside the records that have none."""
    batch: list[tuple[Record, Prompt]] = []
    for record, prompt in prompts:
        if isinstance(prompt, str):
            skipped.append((record, prompt))
            continue
        batch.append((record, prompt))
        if len(batch) == rows:
            yield batch
            batch = []
    if batch:
        yield batch


def agreed_batches(
    prompts: Iterator[tuple[Record, Prompt | str]], rows: int, skipped: list[tuple[Record, str]], at_least: int
) -> Iterator[list[tuple[Record, Prompt]]]:
    """Batches for processes of which some load the same rows: a clip that one of them cannot use, none uses.

    Where a time limit passes in one alone, they would otherwise put different clips into one row. Each batch is what is
    left of `rows` records, so that all processes ask each other equally often, whatever they skip.

    Args:
        prompts, rows, skipped: as of `batched`.
        at_least: batches to go through, the last ones empty; processes with other rows may have more records.
    """
    made = 0
    while (visits := list(itertools.islice(prompts, rows))) or made < at_least:
        made += 1
        own = {record.id: prompt for record, prompt in visits if isinstance(prompt, str)}
        said = processes.exchange("the clips of a batch", own)
        unusable = {name: why for one in said for name, why in one.items()}
        skipped += [(record, unusable[record.id]) for record, _ in visits if record.id in unusable]
        kept = [visit for visit in visits if visit[0].id not in unusable]
        yield [(record, prompt) for record, prompt in kept if not isinstance(prompt, str)]


def filled_up(batches: Iterator[list[Any]], at_least: int) -> Iterator[list[Any]]:
    """The batches, with empty ones after them until there are `at_least`."""
    there = 0
    for batch in batches:
        there += 1
        yield batch
    for _ in range(at_least - there):
        yield []
