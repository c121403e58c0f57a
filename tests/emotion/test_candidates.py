"""Candidate first tokens against a plain loop, under a tokenizer small enough to read."""

import numpy as np
import pytest

from mer_r1_jax.emotion.candidates import NO_SET, CandidateTable, WordTable, spellings
from mer_r1_jax.emotion.wheels import load_wheels

WHEELS = load_wheels()


class PrefixTokenizer:
    """Splits a text into pieces of `width` characters, a leading space joined to the first; ids are given as met."""

    def __init__(self, width: int):
        self.width = width
        self.vocabulary: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert add_special_tokens is False
        lead = self.width + text.startswith(" ")
        pieces = [text[:lead], *(text[i : i + self.width] for i in range(lead, len(text), self.width))]
        return [self.vocabulary.setdefault(piece, len(self.vocabulary)) for piece in pieces if piece]


def brute_force(tokenizer, wheel: int) -> dict[str, set[int]]:
    tokens = {
        category: {tokenizer.encode(text, add_special_tokens=False)[0] for form in forms for text in spellings(form)}
        for category, forms in WHEELS.forms(wheel).items()
    }
    return {
        category: own - set().union(*(other for name, other in tokens.items() if name != category))
        for category, own in tokens.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 3, 40])
def test_sets_agree_with_a_plain_loop(width):
    tokenizer = PrefixTokenizer(width)
    table = CandidateTable(tokenizer, WHEELS)
    assert table.ids_ZY.dtype == np.int32 and table.ids_ZY.shape[0] == sum(len(WHEELS.groups(k)) for k in range(5))
    z = 0
    for wheel in range(5):
        for category, tokens in brute_force(tokenizer, wheel).items():
            row = table.ids_ZY[z]
            assert set(row[row >= 0].tolist()) == tokens
            assert (row >= 0).sum() == table.size_Z[z] == len(tokens)
            assert (table.names[z], table.wheel_Z[z]) == (category, wheel)
            assert table.set_of(category, wheel) == (z if tokens else NO_SET)
            z += 1


@pytest.mark.slow
def test_share_of_forms_lost_agrees_with_a_plain_loop():
    tokenizer = PrefixTokenizer(3)
    lost = total = 0
    for wheel in range(5):
        kept = brute_force(tokenizer, wheel)
        for category, forms in WHEELS.forms(wheel).items():
            for form in forms:
                own = {tokenizer.encode(text, add_special_tokens=False)[0] for text in spellings(form)}
                total += 1
                lost += not own & kept[category]
    assert CandidateTable(tokenizer, WHEELS).share_lost == lost / total > 0


@pytest.mark.slow
def test_sharing_falls_with_longer_tokens():
    losses = [CandidateTable(PrefixTokenizer(width), WHEELS).share_lost for width in (1, 3, 40)]
    assert 1.0 >= losses[0] > losses[1] > losses[2] == 0.0


def test_a_words_sets_are_its_categories_sets():
    table = CandidateTable(PrefixTokenizer(40), WHEELS)
    found = table.word(" Happy ")
    assert [table.names[z] for z in found] == [WHEELS.category("happy", k) for k in range(5)]
    assert [int(table.wheel_Z[z]) for z in found] == [0, 1, 2, 3, 4]
    assert table.word("xyzzy") == (NO_SET,) * 5
    assert table.word("serious")[2] == NO_SET and table.word("serious")[0] != NO_SET


def test_an_empty_set_makes_the_word_invalid_on_that_wheel():
    table = CandidateTable(PrefixTokenizer(1), WHEELS)
    empty = [z for z in range(len(table.names)) if table.size_Z[z] == 0]
    assert empty, "one-letter tokens are shared by nearly all categories"
    z = empty[0]
    wheel, category = int(table.wheel_Z[z]), table.names[z]
    word = WHEELS.forms(wheel)[category][0]
    assert table.word(word)[wheel] == NO_SET


def test_spellings_of_a_form():
    assert spellings("let down") == ("let down", " let down", "Let down", " Let down")


def test_own_tokens_of_a_word():
    tokenizer = PrefixTokenizer(2)
    table = WordTable(tokenizer, WHEELS)
    (z,) = set(table.word("happy"))
    assert set(table.ids_ZY[z].tolist()) == {tokenizer.vocabulary[t] for t in ("ha", " ha", "Ha", " Ha")}
    assert table.word("serious")[2] == NO_SET and table.word("xyzzy") == (NO_SET,) * 5


def test_a_batch_tokenizer_gives_the_same_sets():
    class Batched(PrefixTokenizer):
        def __call__(self, texts, add_special_tokens=True):
            return {"input_ids": [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]}

    one, other = CandidateTable(PrefixTokenizer(4), WHEELS), CandidateTable(Batched(4), WHEELS)
    np.testing.assert_array_equal(one.ids_ZY, other.ids_ZY)
