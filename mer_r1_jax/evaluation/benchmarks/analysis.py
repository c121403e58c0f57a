"""Where answers are right and how sure the model is of them: categories, confusion, calibration.

All of it is about one mode's answers to one benchmark, and small: it is kept with the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mer_r1_jax.emotion.official_scores import SENTIMENTS
from mer_r1_jax.emotion.wheels import Wheels

WHEEL = 0  # whose categories are shown one by one
BINS = 10  # of the calibration curve
NONE = "none"  # column of the confusion: nothing else was answered


def confidences(
    lines: Sequence[Mapping[str, Any]], truths: Sequence[Sequence[str]], wheels: Wheels
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each answer: the probabilities of its words' categories, one for each word and wheel, and which are correct.

    Args:
        lines: of an answer file, made under the same wheels.
        truths: true words of each.
        wheels: the wheels.
    """
    found = []
    for line, truth in zip(lines, truths, strict=True):
        true = [wheels.categories(truth, wheel) for wheel in range(len(wheels))]
        pairs = [
            (probability, wheels.category(word, wheel) in true[wheel])
            for word, row in zip(line["words"], line["confidences"], strict=False)
            for wheel, probability in enumerate(row)
            if probability is not None
        ]
        found.append((np.asarray([p for p, _ in pairs], float), np.asarray([c for _, c in pairs], bool)))
    return found


def mean_confidence(pairs: Sequence[tuple[np.ndarray, np.ndarray]], correct: bool) -> list[float | None]:
    """Of each answer, the mean probability of its correct (or wrong) categories; None where it has none."""
    picked = [probability[is_correct == correct] for probability, is_correct in pairs]
    return [float(values.mean()) if values.size else None for values in picked]


def calibration(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """The calibration curve over ten even bins, and the expected calibration error (None without confidences).

    Returns:
        `confidence` and `correct` (means of each bin that has any), `count`, and `ece`.
    """
    probability = np.concatenate([p for p, _ in pairs]) if pairs else np.zeros(0)
    correct = np.concatenate([c for _, c in pairs]) if pairs else np.zeros(0, bool)
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    curve: dict[str, Any] = {"confidence": [], "correct": [], "count": []}
    gap = 0.0
    for number in range(BINS):
        inside = place == number
        if inside.any():
            sure, right = float(probability[inside].mean()), float(correct[inside].mean())
            curve["confidence"].append(sure)
            curve["correct"].append(right)
            curve["count"].append(int(inside.sum()))
            gap += abs(sure - right) * int(inside.sum())
    return curve | {"ece": gap / probability.size if probability.size else None}


def by_category(
    predictions: Sequence[Sequence[str]], truths: Sequence[Sequence[str]], wheels: Wheels
) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each category of the first wheel, over the clips whose truth is on it."""
    counts = {category: [0, 0, 0] for category in wheels.groups(WHEEL)}  # right, predicted, true
    for predicted, true in _sets(predictions, truths, wheels):
        for category in predicted | true:
            counts[category][0] += category in predicted & true
            counts[category][1] += category in predicted
            counts[category][2] += category in true
    return [
        {
            "category": category,
            "precision": right / predicted if predicted else None,
            "recall": right / true if true else None,
            "f1": 2 * right / (predicted + true) if predicted + true else None,
            "predicted": predicted,
            "true": true,
        }
        for category, (right, predicted, true) in counts.items()
    ]


def confusion(predictions: Sequence[Sequence[str]], truths: Sequence[Sequence[str]], wheels: Wheels) -> dict[str, Any]:
    """What is answered where a category of the first wheel is true.

    A true category that is answered counts on the diagonal. One that is missed is shared out over the clip's wrong
    categories, or counts under "none" where the answer has no other.

    Returns:
        `rows` (true), `columns` (answered), and `counts`, a list of rows.
    """
    rows = wheels.groups(WHEEL)
    columns = (*rows, NONE)
    counts = {category: dict.fromkeys(columns, 0.0) for category in rows}
    for predicted, true in _sets(predictions, truths, wheels):
        wrong = sorted(predicted - true) or [NONE]
        for category in true:
            for answered in [category] if category in predicted else wrong:
                counts[category][answered] += 1 if category in predicted else 1 / len(wrong)
    return _table(rows, columns, counts)


def polarity_confusion(polarities: Sequence[str], labels: Sequence[float]) -> dict[str, Any]:
    """What polarity is answered where the label is positive or negative; label 0 is left out, as in the score."""
    rows, columns = ("positive", "negative"), ("positive", "neutral", "negative")
    counts = {row: dict.fromkeys(columns, 0.0) for row in rows}
    for polarity, label in zip(polarities, labels, strict=True):
        if label:
            counts["positive" if label > 0 else "negative"][polarity if polarity in SENTIMENTS else "neutral"] += 1
    return _table(rows, columns, counts)


def _sets(predictions, truths, wheels: Wheels) -> list[tuple[set[str], set[str]]]:
    """(answered, true) categories of the first wheel, of the clips whose truth has one there."""
    pairs = (
        (wheels.categories(words, WHEEL), wheels.categories(truth, WHEEL))
        for words, truth in zip(predictions, truths, strict=True)
    )
    return [(predicted, true) for predicted, true in pairs if true]


def _table(rows: Sequence[str], columns: Sequence[str], counts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    return {"rows": list(rows), "columns": list(columns), "counts": [[counts[r][c] for c in columns] for r in rows]}
