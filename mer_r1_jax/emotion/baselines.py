"""What needs no model: the best constant answer, which is the floor any trained answer has to beat."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from mer_r1_jax.emotion import answer_form, rewards
from mer_r1_jax.emotion.wheels import Wheels

_CANDIDATES = 40  # most frequent true words tried


@dataclasses.dataclass(frozen=True)
class Floor:
    """A constant answer and its mean rewards over the scorable samples (0 when there are none)."""

    words: tuple[str, ...]
    precision: float
    recall: float
    f1: float
    n_scored: int


def majority_answer(truths: Sequence[Sequence[str]], wheels: Wheels) -> tuple[str, ...]:
    """The constant answer found greedily: words are added, most helpful first, while the mean F1 over `truths` rises.

    Only the most frequent true words are tried; of words in the same categories, the most frequent one.
    """
    counts = collections.Counter(word for truth in truths for word in answer_form.distinct_words(truth))
    candidates: dict[tuple, str] = {}
    for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if wheels.is_known(word):
            candidates.setdefault(rewards.category_sets([word], wheels), word)
    words: tuple[str, ...] = ()
    best = 0.0
    tried = list(candidates.values())[:_CANDIDATES]
    while True:
        scored = [(constant_floor((*words, word), truths, wheels).f1, word) for word in tried if word not in words]
        if not scored or max(scored)[0] <= best:
            return words
        best = max(score for score, _ in scored)
        words += (next(word for score, word in scored if score == best),)


def constant_floor(words: Sequence[str], truths: Sequence[Sequence[str]], wheels: Wheels) -> Floor:
    """Scores one constant answer against every truth.

    The floor of an evaluation is `constant_floor(majority_answer(training truths), held-out truths)`.
    """
    distinct = collections.Counter(rewards.category_sets(truth, wheels) for truth in truths)
    predicted = rewards.category_sets(words, wheels)
    sums, n = [0.0, 0.0, 0.0], 0
    for true, count in distinct.items():
        scored = rewards.set_rewards(predicted, true)
        if scored is None:
            continue
        n += count
        sums = [total + count * value for total, value in zip(sums, scored, strict=True)]
    recall, precision, f1 = (total / n if n else 0.0 for total in sums)
    return Floor(tuple(words), precision, recall, f1, n)
