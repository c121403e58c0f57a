"""Rewards of one answer, recall, precision and F1 of emotion categories, and the best constant answer as their floor.

MER-R1, rewards: R_R = |Y & G| / |G|, R_P = |Y & G| / |Y| with Y the predicted and G the true set of level-1 categories
of a wheel. Each is computed on every wheel on which the truth has a category, then averaged over those wheels.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from mer_r1_jax.emotion import answer_form
from mer_r1_jax.emotion.wheels import Wheels


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Rewards of one answer.

    Attributes:
        recall, precision, f1: in [0, 1] without a word penalty; 0 when nothing can be scored.
        n_words: distinct words of the answer.
        n_unknown: those among them that have no category on any wheel.
        n_categories: predicted categories, averaged over the scored wheels.
        scorable: the truth has a category on at least one wheel.
        n_repeats: words whose category an earlier one has named, averaged over the scored wheels.
    """

    recall: float
    precision: float
    f1: float
    n_words: int
    n_unknown: int
    n_categories: float
    scorable: bool
    n_repeats: float = 0.0

    def score(self, name: str) -> float | None:
        """Precision, recall or f1; None where the truth is on no wheel, which is not the same as 0."""
        return getattr(self, name) if self.scorable else None


def category_sets(words: Iterable[str], wheels: Wheels) -> tuple[frozenset[str], ...]:
    """The set of categories of `words` on each wheel."""
    words = tuple(words)
    return tuple(frozenset(wheels.categories(words, wheel)) for wheel in range(len(wheels)))


def is_scorable(truth_words: Iterable[str], wheels: Wheels) -> bool:
    """Whether a truth has a category on at least one wheel. One that has none ("neutral") is in no mean."""
    return any(category_sets(truth_words, wheels))


def answer_rewards(
    words: Iterable[str],
    truth_words: Iterable[str],
    wheels: Wheels,
    *,
    word_penalty: float = 0.0,
    all_wheels: bool = False,
) -> Rewards:
    """Scores the words of one answer against the true words.

    Args:
        words: the answer's words; repeats do not count.
        truth_words: the true words.
        wheels: the wheels.
        word_penalty: taken off recall, precision and F1 for every distinct word beyond the number of distinct true
            words (off by default); the rewards may then be negative.
        all_wheels: a wheel on which the truth has no category counts 0, rather than being left out of the mean. Within
            a group that scales every reward alike, so its z stays (up to the constant beside the std).

    Returns:
        Rewards. An answer without a category on a wheel has precision, recall and F1 0 there. A truth without a
        category on any wheel ("neutral") gives zeros and `scorable` False.
    """
    words, truth_words = answer_form.distinct_words(words), answer_form.distinct_words(truth_words)
    predicted, true = category_sets(words, wheels), category_sets(truth_words, wheels)
    unknown = sum(not wheels.is_known(word) for word in words)
    scored = set_rewards(predicted, true)
    if scored is None:
        return Rewards(0.0, 0.0, 0.0, len(words), unknown, 0.0, False)
    counted = sum(map(bool, true)) / len(true) if all_wheels else 1.0
    recall, precision, f1 = (value * counted - word_penalty * max(len(words) - len(truth_words), 0) for value in scored)
    known = [q for q, categories in enumerate(true) if categories]
    n_categories = _mean(len(predicted[q]) for q in known)
    placed = _mean(sum(wheels.category(word, q) is not None for word in words) for q in known)
    return Rewards(recall, precision, f1, len(words), unknown, n_categories, True, placed - n_categories)


def set_rewards(
    predicted: Sequence[frozenset[str]], true: Sequence[frozenset[str]]
) -> tuple[float, float, float] | None:
    """Recall, precision and F1 of category sets, averaged over the wheels with a true category; None without any.

    Args:
        predicted: categories of the answer on each wheel.
        true: true categories on each wheel.
    """
    scored = [(y, g) for y, g in zip(predicted, true, strict=True) if g]
    if not scored:
        return None
    return (
        _mean(len(y & g) / len(g) for y, g in scored),
        _mean(len(y & g) / len(y) if y else 0.0 for y, g in scored),
        _mean(2 * len(y & g) / (len(y) + len(g)) for y, g in scored),
    )


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


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
            candidates.setdefault(category_sets([word], wheels), word)
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
    distinct = collections.Counter(category_sets(truth, wheels) for truth in truths)
    predicted = category_sets(words, wheels)
    sums, n = [0.0, 0.0, 0.0], 0
    for true, count in distinct.items():
        scored = set_rewards(predicted, true)
        if scored is None:
            continue
        n += count
        sums = [total + count * value for total, value in zip(sums, scored, strict=True)]
    recall, precision, f1 = (total / n if n else 0.0 for total in sums)
    return Floor(tuple(words), precision, recall, f1, n)
