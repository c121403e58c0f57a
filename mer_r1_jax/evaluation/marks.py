"""How the reports mark single emotion words against the other side's."""

from __future__ import annotations

import dataclasses

from mer_r1_jax.emotion.wheels import Wheels


@dataclasses.dataclass(frozen=True)
class Word:
    """An emotion word and its mark: right, wrong or unknown (answers), found or missed (truth), "" when not marked."""

    text: str
    mark: str


def _shares_category(word: str, others: list[str], wheels: Wheels) -> bool:
    """Whether `word` has a category of `others` on at least half of the wheels it is on."""
    hits = [
        category in wheels.categories(others, wheel)
        for wheel in range(len(wheels.names))
        if (category := wheels.category(word, wheel)) is not None
    ]
    return bool(hits) and 2 * sum(hits) >= len(hits)


def answer_mark(word: str, truth: list[str], wheels: Wheels | None) -> str:
    """right, wrong or unknown; "" without wheels."""
    if wheels is None:
        return ""
    if all(wheels.category(word, wheel) is None for wheel in range(len(wheels.names))):
        return "unknown"
    return "right" if _shares_category(word, truth, wheels) else "wrong"


def truth_mark(word: str, answer: list[str], wheels: Wheels | None) -> str:
    """found or missed; "" without wheels."""
    return "" if wheels is None else "found" if _shares_category(word, answer, wheels) else "missed"
