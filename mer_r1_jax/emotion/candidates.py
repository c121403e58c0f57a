"""Candidate first tokens of emotion categories: what counts as "naming" a category at the position before a word.

V(c) of MER-R1's slow-fast confidence calibration: every surface form of category c, lower-case and capitalised, reduced
to its first token with and without a leading space. A token that two categories of the same wheel share is dropped,
even when it opens the very word that was sampled. A category left with no token has no set.

Shape letters: Z candidate sets, all wheels together; Y tokens of a set.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable

import numpy as np

from mer_r1_jax.emotion.wheels import Wheels

NO_SET = -1  # the word has no category on the wheel, or its category no candidate
NO_TOKEN = -1  # padding of a set with fewer tokens than the largest


class CandidateTable:
    """V(c) for every wheel and category under one tokenizer, as arrays that can enter jit.

    Attributes:
        ids_ZY: int32, token ids of each set in ascending order, padded with -1. Sets stand in the order of the wheels
            and of `Wheels.groups`.
        size_Z: int32, tokens of each set.
        wheel_Z: int32, the wheel of each set.
        names: the category of each set.
        share_lost: share of the wheels' surface forms that lost the first tokens of all their spellings to sharing.
    """

    def __init__(self, tokenizer, wheels: Wheels):
        """Tokenises every surface form of the wheels.

        Args:
            tokenizer: a transformers tokenizer, or anything with `encode(text, add_special_tokens=False)`.
            wheels: the wheels.
        """
        self._wheels = wheels
        forms = sorted({form for levels in wheels.levels[0] for form in levels})
        opening = dict(zip(forms, _first_tokens(tokenizer, forms), strict=True))
        sets: list[list[int]] = []
        self.names: tuple[str, ...] = ()
        wheel_Z: list[int] = []
        total = lost = 0
        for wheel in range(len(wheels)):
            by_category = wheels.forms(wheel)
            owners = collections.defaultdict(set)
            for category, members in by_category.items():
                for form in members:
                    for token in opening[form]:
                        owners[token].add(category)
            shared = {token for token, categories in owners.items() if len(categories) > 1}
            for members in by_category.values():
                total += len(members)
                lost += sum(set(opening[form]) <= shared for form in members)
                sets.append(sorted({token for form in members for token in opening[form]} - shared))
                wheel_Z.append(wheel)
            self.names += tuple(by_category)
        self.share_lost: float = lost / total if total else 0.0
        self.ids_ZY = _padded(sets)
        self.size_Z = np.asarray([len(tokens) for tokens in sets], np.int32)
        self.wheel_Z = np.asarray(wheel_Z, np.int32)
        self._index = {(int(wheel), name): z for z, (wheel, name) in enumerate(zip(wheel_Z, self.names, strict=True))}

    def set_of(self, category: str | None, wheel: int) -> int:
        """Index of a category's candidate set, or NO_SET."""
        z = NO_SET if category is None else self._index.get((wheel, category), NO_SET)
        return z if z != NO_SET and self.size_Z[z] > 0 else NO_SET

    def word(self, word: str) -> tuple[int, ...]:
        """The candidate set of a word's category on each wheel, NO_SET where there is none."""
        return tuple(self.set_of(self._wheels.category(word, wheel), wheel) for wheel in range(len(self._wheels)))


class WordTable:
    """The same for single words: V is the first tokens of the word's own four spellings (the arm `sfcc_word`).

    Attributes:
        ids_ZY: int32 [Z, 4], one set for each surface form that has a category on some wheel, padded with -1.
        size_Z: int32, tokens of each set.
        names: the surface form of each set.
    """

    def __init__(self, tokenizer, wheels: Wheels):
        """Arguments as `CandidateTable`."""
        self._wheels = wheels
        self.names = tuple(sorted({form for levels in wheels.levels[0] for form in levels}))
        sets = [sorted(set(tokens)) for tokens in _first_tokens(tokenizer, self.names)]
        self.ids_ZY = _padded(sets)
        self.size_Z = np.asarray([len(tokens) for tokens in sets], np.int32)
        self._index = {name: z for z, name in enumerate(self.names)}

    def word(self, word: str) -> tuple[int, ...]:
        """The word's own set on each wheel on which it has a category, NO_SET elsewhere."""
        z = self._index.get(word.strip().lower(), NO_SET)
        if z != NO_SET and self.size_Z[z] == 0:
            z = NO_SET
        known = (self._wheels.category(word, wheel) is not None for wheel in range(len(self._wheels)))
        return tuple(z if held else NO_SET for held in known)


def spellings(form: str) -> tuple[str, ...]:
    """Lower-case and capitalised, each without and with a leading space."""
    return tuple(lead + text for text in (form.lower(), form[:1].upper() + form[1:].lower()) for lead in ("", " "))


def _first_tokens(tokenizer, forms: Iterable[str]) -> list[list[int]]:
    """First tokens of the spellings of each form; a spelling that gives no token is left out."""
    texts = [spellings(form) for form in forms]
    flat = [text for group in texts for text in group]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and flat:  # a batch, and only the ids of it: many times faster
        encoded = [encoding.ids for encoding in backend.encode_batch_fast(flat, add_special_tokens=False)]
    else:
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text in flat]
    tokens = iter(encoded)
    return [[ids[0] for ids in (next(tokens) for _ in group) if len(ids)] for group in texts]


def _padded(sets: list[list[int]]) -> np.ndarray:
    """int32 [Z, Y], at least one column wide."""
    width = max([1, *(len(tokens) for tokens in sets)])
    ids_ZY = np.full((len(sets), width), NO_TOKEN, np.int32)
    for z, tokens in enumerate(sets):
        ids_ZY[z, : len(tokens)] = tokens
    return ids_ZY
