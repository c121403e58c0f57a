"""What an evaluation can ask beyond greedy answers: samples of each answer, and how sure the policy is of fixed words.

Samples, because the paper scores sampled answers (T 0.9, top-p 0.9): a policy whose answers hang on its reasoning can
gain there and not where it decodes greedily.

Fixed words, because the confidence in the words that a policy chooses itself changes with which and how many it
chooses. The words here are the fast answers of the evaluation before RL, the same for every later one: they are put
behind the policy's own reasoning (slow) and behind an empty think block (fast), and read right and wrong apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from mer_r1_jax.evaluation.answering import AnsweringPolicy, Answers
from mer_r1_jax.omni.batch import Prompts
from mer_r1_jax.rl.confidence import NO_SET, AskedWords
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.rl.rollout import STOP_EOS, Completions
from mer_r1_jax.rl.scoring import ScoredAnswer
from mer_r1_jax.rl.tags import TagError
from mer_r1_jax.training.stopping import Stop

SAMPLES_KEY = 0  # samples are a function of parameters, clip and this number, as greedy answers are of the first two


@dataclasses.dataclass(frozen=True, eq=False)
class SecondLooks:
    """What is asked besides.

    Attributes:
        num_samples: sampled answers a clip and mode; 0 = none.
        temperature, top_p: of these.
        fixed_words: clip -> words; None takes each evaluation's own fast answers, as before RL.
    """

    num_samples: int = 0
    temperature: float = 0.9
    top_p: float = 0.9
    fixed_words: Mapping[str, Sequence[str]] | None = None


@dataclasses.dataclass(frozen=True)
class FixedConfidence:
    """Mean probability given to the categories of fixed words, None where there is no such word.

    Attributes:
        correct, wrong: of the words whose category is (is not) one of the truth's.
    """

    correct: float | None
    wrong: float | None


def sampled_answers(
    policy: AnsweringPolicy,
    prompts: Prompts,
    mode: str,
    truths: Sequence[Sequence[str]],
    looks: SecondLooks,
    stop: Stop,
) -> list[tuple[ScoredAnswer, ...]]:
    """Samples answers to every prompt and scores them against the truths, row by row."""
    sampling = dataclasses.replace(
        policy.answerer.sampling,
        temperature=looks.temperature,
        top_p=looks.top_p,
        num_generations=looks.num_samples,
    )
    host = policy.answer(prompts, mode, stop, sampling=sampling, key=jax.random.key(SAMPLES_KEY)).host
    score = policy.answerer.scorer.answer
    return [
        tuple(
            score(host.id_BGC[row, g], int(host.length_BG[row, g]), bool(host.truncated_BG[row, g]), truth)
            for g in range(looks.num_samples)
        )
        for row, truth in enumerate(truths)
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class FixedWords:
    """The fixed words of a batch, ready to be asked about.

    Attributes:
        asked: mode -> the words behind the policy's own reasoning (slow), and at once (fast).
        correct_BWQ: bool, the word's category is one of the truth's.
    """

    asked: dict[str, AskedWords]
    correct_BWQ: np.ndarray

    def confidences(self, probabilities: dict[str, np.ndarray], rows: int) -> list[dict[str, FixedConfidence] | None]:
        """Mode -> confidence of each row; None where the slow answer has no reasoning or there is no word to ask about.

        Args:
            probabilities: mode -> float32 [B, W, Q], what `AnsweringPolicy.probabilities` gives for these texts.
            rows: that are no padding.
        """
        held_BWQ = self.asked["slow"].set_BGWQ[:, 0] != NO_SET
        return [
            {
                mode: FixedConfidence(
                    correct=_mean(probability_BWQ[row][held_BWQ[row] & self.correct_BWQ[row]]),
                    wrong=_mean(probability_BWQ[row][held_BWQ[row] & ~self.correct_BWQ[row]]),
                )
                for mode, probability_BWQ in probabilities.items()
            }
            if held_BWQ[row].any()
            else None
            for row in range(rows)
        ]


def fixed_words(
    policy: AnsweringPolicy,
    slow: Answers,
    reasonings: Sequence[str | None],
    words: Sequence[Sequence[str]],
    truths: Sequence[Sequence[str]],
) -> FixedWords:
    """Puts given words behind the policy's own reasonings, and at once.

    Args:
        policy: the policy.
        slow: its slow answers, whose prompts are asked again.
        reasonings: of these, row by row; None where an answer has none.
        words: to be asked about, row by row.
        truths: words.
    """
    scorer, host = policy.answerer.scorer, slow.host
    # Room for the longest reasoning plus an answer keeps the texts in one shape, so no batch compiles anew for them.
    rows, longest = len(host.length_BG), host.id_BGC.shape[-1] + scorer.longest_answer
    ids = [_spliced(policy, reasoning, given, longest) for reasoning, given in zip(reasonings, words, strict=True)]
    id_BGC = np.zeros((rows, 1, longest), np.int32)
    length_BG = np.zeros((rows, 1), np.int32)
    for row, own in enumerate(ids):
        length_BG[row] = len(own)
        id_BGC[row, 0, : len(own)] = own
    exists_BGC = np.arange(longest) < length_BG[..., None]
    nothing = np.zeros((rows, 1, longest), np.float32)
    # The texts take the form of completions, so that the scorer locates words as in sampled answers; it reads neither
    # of the log-probabilities.
    made = Completions(
        id_BGC=id_BGC,
        length_BG=length_BG,
        mask_BGC=exists_BGC,
        stop_BG=np.full((rows, 1), STOP_EOS, np.int32),
        logprob_BGC=nothing,
        sampling_logprob_BGC=nothing,
    )
    # The scorer takes a row without a truth for padding, so a row without a text has no word to ask about.
    padded = [truth if own else None for truth, own in zip(truths, ids, strict=True)]
    anchors = scorer.groups(made, [*padded, *[None] * (rows - len(padded))]).anchors

    behind_reasoning = AskedWords(
        continuation=Continuations(id_BGC=id_BGC, exists_BGC=exists_BGC),
        index_BGW=anchors.slow_BGW,
        set_BGWQ=anchors.set_BGWQ,
    )
    at_once = AskedWords(continuation=anchors.fast, index_BGW=anchors.fast_BGW, set_BGWQ=anchors.set_BGWQ)
    return FixedWords({"slow": behind_reasoning, "fast": at_once}, anchors.correct_BGWQ[:, 0])


def _spliced(policy: AnsweringPolicy, reasoning: str | None, words: Sequence[str], longest: int) -> list[int]:
    """A slow answer with this reasoning and these words, as SFT would write it; empty where it cannot be written."""
    if not reasoning or not words:
        return []
    try:
        ids = policy.answerer.scorer.tags.slow_target(reasoning, ", ".join(words))[0].tolist()
    except TagError:  # a reasoning of tags or special tokens
        return []
    return ids if len(ids) <= longest else []


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None
