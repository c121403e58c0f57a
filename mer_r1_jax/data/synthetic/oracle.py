"""The ceiling: what somebody who sees the cues themselves, and knows the world's probabilities, would answer.

The posterior over all sets of one to five categories is exact (the clip's distractor is summed out). The answer is the
set of the largest expected F1, scored as the rewards score it: per emotion wheel, then averaged over the wheels.

The same posterior scores anybody's answer: by what it can expect, over all that may be true given the cues. The mean
over clips is that of the scores themselves, and the draw of the truth, half of their noise, is out of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mer_r1_jax.data.synthetic.world import (
    CATEGORIES,
    MODALITIES,
    NEUTRAL,
    SECOND,
    SETTINGS,
    SLOTS,
    WorldConfig,
    load_lexicon,
)

COUNT = len(CATEGORIES)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Mean precision, recall and F1 of answers, each averaged over the wheels first."""

    precision: float
    recall: float
    f1: float


class Oracle:
    """Bayes-optimal answers.

    Args:
        config: the world.
        lexicon: its words, which the wheels turn into groups.
        wheels: emotion wheels (`mer_r1_jax.emotion.wheels.Wheels`); a category's word stands for all its words.

    Attributes:
        sets: bool[n, 9], every set of categories that can be true.
        precision, recall, f1: float64[n truths, n answers], averaged over the wheels on which the truth has a group.
    """

    def __init__(self, config: WorldConfig, lexicon: dict, wheels):
        self.config = config
        sizes = range(1, len(config.category_counts) + 1)
        members = [m for size in sizes for m in itertools.combinations(range(COUNT), size)]
        self.sets = np.zeros((len(members), COUNT), bool)
        for row, member in enumerate(members):
            self.sets[row, list(member)] = True
        self._row = {member: row for row, member in enumerate(members)}
        size = self.sets.sum(1)
        with np.errstate(divide="ignore"):
            self.log_prior = np.log(np.asarray(config.category_counts)[size - 1] / np.bincount(size)[size])
        self._likelihoods()
        self._wheels = wheels
        groups = _groups(lexicon, wheels)
        # Per wheel, float[n, groups]: the groups of every set.
        self._shown = [(self.sets.astype(int) @ table.astype(int) > 0).astype(float) for table in groups]
        self._against: dict[tuple[frozenset[str], ...], np.ndarray] = {}  # answers that were scored before
        self.precision, self.recall, self.f1 = _score_table(self.sets, groups)

    def posterior(self, cues, modality: str | None = None) -> np.ndarray:
        """Probability of each set of categories given the cues (of one modality, or of all).

        Args:
            cues: display of each slot.
            modality: one of MODALITIES, or None.

        Returns:
            float64[n], aligned with `sets`.

        Raises:
            ValueError: unknown modality.
        """
        if modality is not None and modality not in MODALITIES:
            raise ValueError(f"unknown modality {modality!r}, expected one of {MODALITIES}")
        log_pair = -np.log(COUNT - self.sets[self._pair_set].sum(1))
        for slot, display in enumerate(cues):
            if display != NEUTRAL and modality in (None, MODALITIES[slot // 3]):
                log_pair = log_pair + self._log_display[:, slot, display]
        pair = np.exp(log_pair - log_pair.max())
        weight = np.bincount(self._pair_set, pair, minlength=len(self.sets)) * np.exp(self.log_prior)
        return weight / weight.sum()

    def answer(self, cues, modality: str | None = None) -> int:
        """Row in `sets` of the answer with the largest expected F1."""
        return int(np.argmax(self.posterior(cues, modality) @ self.f1))

    def constant_answer(self) -> int:
        """Row in `sets` of the best answer of somebody who sees nothing: the floor."""
        return int(np.argmax(np.exp(self.log_prior) @ self.f1))

    def categories(self, row: int) -> tuple[int, ...]:
        """The categories of a row of `sets`."""
        return tuple(int(c) for c in np.flatnonzero(self.sets[row]))

    def row(self, categories) -> int:
        """The row in `sets` of some categories.

        Raises:
            KeyError: a set no clip can have.
        """
        return self._row[tuple(sorted(categories))]

    def score(self, truths, answers) -> Scores:
        """Mean scores of answers, both given as rows of `sets`."""
        truths, answers = np.asarray(truths), np.asarray(answers)
        return Scores(*(float(table[truths, answers].mean()) for table in (self.precision, self.recall, self.f1)))

    def expected(self, cues: Iterable[int], words: Iterable[str]) -> Scores:
        """The scores that an answer can expect: their means under the posterior given the cues.

        Args:
            cues: display of each slot.
            words: of the answer, any words; those without a group on a wheel do not count there, as in the rewards.
        """
        words = tuple(words)
        said = tuple(frozenset(self._wheels.categories(words, wheel)) for wheel in range(len(self._wheels)))
        if said not in self._against:
            self._against[said] = self._scores_against_all(said)
        return Scores(*map(float, self._against[said] @ self.posterior(cues)))

    def _scores_against_all(self, said: tuple[frozenset[str], ...]) -> np.ndarray:
        """float64[3, n]: precision, recall and F1 of an answer against every set."""
        totals, scorable = np.zeros((3, len(self.sets))), np.zeros(len(self.sets))
        for wheel, (shown, answer) in enumerate(zip(self._shown, said, strict=True)):
            named = np.array([group in answer for group in self._wheels.groups(wheel)], float)
            common, size = shown @ named, shown.sum(1)
            parts = [common / max(len(answer), 1), common / np.maximum(size, 1)]
            parts.append(2 * common / np.maximum(size + len(answer), 1))
            totals += np.stack(parts) * (size > 0)
            scorable += size > 0
        return totals / np.maximum(scorable, 1)

    def _likelihoods(self) -> None:
        """Log-likelihood of every display in every slot, for every (set, distractor) pair."""
        pairs = [(row, d) for row in range(len(self.sets)) for d in np.flatnonzero(~self.sets[row])]
        self._pair_set = np.array([row for row, _ in pairs])
        distractor = np.eye(COUNT)[[d for _, d in pairs]]
        true = self.sets[self._pair_set] / self.sets[self._pair_set].sum(1, keepdims=True)
        share, second = self.config.distractor, self.config.second_meaning
        wrong = share * distractor + (1 - share) / COUNT
        self._log_display = np.empty((len(pairs), len(SLOTS), COUNT))
        for slot, reliability in enumerate(self.config.slot_reliability):
            category = reliability * true + (1 - reliability) * wrong
            self._log_display[:, slot] = np.log((1 - second) * category + second * category[:, SECOND[slot]])


def oracle_of(folder: str | Path, wheels) -> Oracle | None:
    """The oracle of the world whose data set lies in a folder; None where there is none.

    Args:
        folder: with the `settings.json` that `make_world` writes.
        wheels: emotion wheels, those that answers are scored by.
    """
    try:
        settings = json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8"))
        # Lists of a JSON file are tuples of the configuration.
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in settings["world"].items()}
        return Oracle(WorldConfig(**fields), load_lexicon(), wheels)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # records of one's own, beside which there is no world, or another file of that name


def _groups(lexicon: dict, wheels) -> list[np.ndarray]:
    """Per wheel, bool[9, groups]: the group each category's first word is in (no group: a row of zeros)."""
    tables = []
    for wheel in range(len(wheels.names)):
        names = list(wheels.groups(wheel))
        table = np.zeros((COUNT, len(names)), bool)
        for number, category in enumerate(CATEGORIES):
            group = wheels.category(lexicon["words"][category][0], wheel)
            if group is not None:
                table[number, names.index(group)] = True
        tables.append(table)
    return tables


def _score_table(sets: np.ndarray, groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of every answer (columns) to every truth (rows), averaged over the scorable wheels."""
    totals, scorable = np.zeros((3, len(sets), len(sets))), np.zeros((len(sets), 1))
    for table in groups:
        shown = (sets.astype(int) @ table.astype(int) > 0).astype(float)
        common, size = shown @ shown.T, shown.sum(1)
        truth, answer = np.maximum(size[:, None], 1), np.maximum(size[None, :], 1)
        valid = (size > 0)[:, None]
        both = np.maximum(size[:, None] + size[None, :], 1)
        totals += np.stack([common / answer, common / truth, 2 * common / both]) * valid
        scorable += valid
    return tuple(totals / np.maximum(scorable, 1))
