"""Words to polarity by a rule over the wheels, in place of the official second LLM call. A protocol of its own."""

from __future__ import annotations

from collections.abc import Iterable

from mer_r1_jax.emotion import answer_form
from mer_r1_jax.emotion.wheels import Wheels

# Valence of level-1 categories, of our wheels and of the official ones; a category that is not here is negative.
POSITIVE = frozenset(
    "enjoyment contentment pride affection interest joy trust love optimism anticipation happy excited fond romantic "
    "kind liked interested touched sure joyful powerful peaceful genius".split()
) | {"positive and lively", "positive thoughts", "quiet positive", "caring"}
NEUTRAL = frozenset("surprise surprised awe reactive thinking wanting unsure submission".split())


def polarity(words: Iterable[str], wheels: Wheels) -> str:
    """One of positive, negative, neutral, by the majority of the words' categories.

    Every distinct word votes with the mean valence (+1, 0, -1) of its categories over the wheels that have one; the
    sign of the votes' sum decides. No known word, or a tie: neutral.
    """
    total = 0.0
    for word in answer_form.distinct_words(words):
        found = [wheels.category(word, wheel) for wheel in range(len(wheels))]
        votes = [_valence(category) for category in found if category is not None]
        total += sum(votes) / len(votes) if votes else 0.0
    return "positive" if total > 1e-9 else "negative" if total < -1e-9 else "neutral"


def _valence(category: str) -> int:
    return 1 if category in POSITIVE else 0 if category in NEUTRAL else -1
