"""From sampled token ids to rewards and anchors: the host's part of a step, where strings are handled.

Only arrays leave it: rewards, masks, word positions and candidate sets go on into jitted programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mer_r1_jax import faults
from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.emotion.answer_form import ParsedAnswer, is_well_formed, parse_answer
from mer_r1_jax.emotion.candidates import CandidateTable, WordTable
from mer_r1_jax.emotion.rewards import Rewards as AnswerRewards
from mer_r1_jax.emotion.rewards import answer_rewards
from mer_r1_jax.emotion.wheels import Wheels
from mer_r1_jax.rl.advantage import Rewards
from mer_r1_jax.rl.confidence import Anchors, AnswerToScore, build_anchors
from mer_r1_jax.rl.rollout import STOP_LENGTH, Completions
from mer_r1_jax.rl.tags import AnswerTags


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredAnswer:
    """One sampled answer, read and scored.

    Attributes:
        text: the completion's text, without the end of the turn.
        parsed: its reasoning, words and format.
        rewards: recall, precision and F1 against the truth.
        length: tokens, a forced prefix included.
        truncated: it hit the length cap.
    """

    text: str
    parsed: ParsedAnswer
    rewards: AnswerRewards
    length: int
    truncated: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredGroups:
    """A batch of sampled groups, scored.

    Attributes:
        answers: B rows of G answers; an empty row where there is no prompt.
        rewards: arrays [B, G] for the advantages, without confidences.
        anchors: where the answers' words are predicted, for the confidences.
        counts: how often a word or completion got no confidence, by reason.
    """

    answers: tuple[tuple[ScoredAnswer, ...], ...]
    rewards: Rewards
    anchors: Anchors
    counts: dict[str, int]


class AnswerScorer:
    """Scores completions under one tokenizer and one set of wheels.

    Args:
        tags: the answer tags under the tokenizer.
        wheels: the emotion wheels.
        candidates: first tokens of the categories' words.
        config: how many words get a confidence, how long a fast scoring context is, and how answers are read and
            rewarded.
    """

    def __init__(self, tags: AnswerTags, wheels: Wheels, candidates: CandidateTable | WordTable, config: RlConfig):
        self.tags = tags
        self.wheels = wheels
        self.candidates = candidates
        self.longest_answer = config.max_fast_context  # tokens that words behind a reasoning may take
        self._config = config

    def answer(self, ids_C: np.ndarray, length: int, truncated: bool, truth: Sequence[str]) -> ScoredAnswer:
        """Reads one completion and scores it against the truth's words."""
        faults.here("answer_scored")
        text = self.tags.completion_text(ids_C, length)
        config = self._config
        parsed = parse_answer(
            text, untagged=config.untagged_answer == "split", lenient=config.format_reward == "lenient"
        )
        rewards = answer_rewards(
            parsed.words,
            truth,
            self.wheels,
            word_penalty=config.word_penalty,
            all_wheels=config.wheels_without_truth == "zero",
        )
        return ScoredAnswer(text=text, parsed=parsed, rewards=rewards, length=length, truncated=truncated)

    def groups(
        self,
        completions: Completions,
        truths: Sequence[Sequence[str] | None],
        *,
        require_format: bool = True,
        fast_contexts: bool = True,
    ) -> ScoredGroups:
        """Scores a batch.

        Args:
            completions: with numpy leaves.
            truths: words of each row's truth; None for a row without a prompt.
            require_format: confidences only for well-formed answers. False when fast answers themselves are scored:
                their think block is empty by construction.
            fast_contexts: whether words are asked about at once as well, or behind their own reasoning alone: then an
                answer that is too long for a fast context has confidences too.
        """
        answers = tuple(
            ()
            if truth is None
            else tuple(
                self.answer(ids_C, int(length), bool(stop == STOP_LENGTH), truth)
                for ids_C, length, stop in zip(ids_GC, length_G, stop_G, strict=True)
            )
            for ids_GC, length_G, stop_G, truth in zip(
                completions.id_BGC, completions.length_BG, completions.stop_BG, truths, strict=True
            )
        )
        # From here on there are only arrays; the strings stay behind for the log.
        anchors, counts = self._anchors(completions, answers, truths, require_format, fast_contexts)
        return ScoredGroups(
            answers=answers,
            rewards=self._rewards(answers, completions.length_BG.shape),
            anchors=anchors,
            counts=counts,
        )

    def _rewards(self, answers: tuple[tuple[ScoredAnswer, ...], ...], shape_BG: tuple[int, int]) -> Rewards:
        def gather(value, dtype) -> np.ndarray:
            array_BG = np.zeros(shape_BG, dtype)
            for row, group in enumerate(answers):
                for column, answer in enumerate(group):
                    array_BG[row, column] = value(answer)
            return array_BG

        return Rewards(
            recall_BG=gather(lambda answer: answer.rewards.recall, np.float32),
            precision_BG=gather(lambda answer: answer.rewards.precision, np.float32),
            f1_BG=gather(lambda answer: answer.rewards.f1, np.float32),
            format_BG=gather(lambda answer: answer.parsed.format_reward, np.float32),
            valid_BG=gather(lambda answer: True, bool),
            scored_BG=gather(lambda answer: answer.rewards.scorable, bool),
            categories_BG=gather(lambda answer: answer.rewards.n_categories, np.float32),
        )

    def _anchors(
        self,
        completions: Completions,
        answers: tuple[tuple[ScoredAnswer, ...], ...],
        truths: Sequence[Sequence[str] | None],
        require_format: bool,
        fast_contexts: bool,
    ) -> tuple[Anchors, dict[str, int]]:
        generations = completions.length_BG.shape[1]
        # Rows without a prompt keep their place, empty, so that arrays stay [B, G, ...].
        absent = AnswerToScore(ids=np.zeros(0, np.int32), length=0, words=(), usable=False)
        rows = [
            [
                AnswerToScore(
                    ids=completions.id_BGC[row, column],
                    length=answer.length,
                    words=answer.parsed.words,
                    # However lenient the reward is: a fast context is cut out of one whole answer block.
                    usable=not require_format or is_well_formed(answer.text),
                )
                for column, answer in enumerate(group)
            ]
            or [absent] * generations
            for row, group in enumerate(answers)
        ]
        # Empty on a wheel where no true word has a category: words are neither right nor wrong there.
        categories = [
            [frozenset(self.wheels.categories(truth or (), wheel)) for wheel in range(len(self.wheels))]
            for truth in truths
        ]
        return build_anchors(
            rows,
            categories,
            tags=self.tags,
            category=self.wheels.category,
            candidate_sets=self.candidates.word,
            config=self._config,
            fast_contexts=fast_contexts,
        )
