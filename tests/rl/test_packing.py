"""Packed rows against one row per completion."""

import numpy as np
import pytest
from support.rl_policy import bound, packed_hidden, policy, prompts, row_logits

from mer_r1_jax.rl.packing import Continuations, pack

LENGTHS, WIDTH = (7, 9, 0), 9


def continuations(generations, length, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, length + 1, (len(LENGTHS), generations))
    lengths[0, 0], lengths[0, -1] = length, 0
    lengths[2] = 0
    return Continuations(
        id_BGC=rng.integers(0, 256, (len(LENGTHS), generations, length)).astype(np.int32),
        exists_BGC=np.arange(length) < lengths[..., None],
    )


@pytest.mark.parametrize("packed", (True, False))
def test_packed_continuations_see_their_prompt_and_themselves_only(packed):
    """Two sets of different size in one row predict what each sequence alone predicts, media in the prompt included."""
    tokens, features, next_position = prompts(LENGTHS, WIDTH)
    sets = continuations(3, 6, 0), continuations(2 if packed else 3, 4, 1)
    hidden = packed_hidden(policy()[2], tokens, features, next_position, *sets, packed=packed)
    checked = 0
    for own, h_BGCD in zip(sets, hidden, strict=True):
        logits = np.asarray(bound().logits(h_BGCD))
        for row in (0, 1):
            for generation in range(own.id_BGC.shape[1]):
                exists = own.exists_BGC[row, generation]
                expected = row_logits(tokens, features, next_position, row, own.id_BGC[row, generation][exists])
                np.testing.assert_allclose(logits[row, generation][exists], expected[:-1], atol=2e-4)
                checked += int(exists.sum())
    assert checked > 20


def test_packed_rows_have_separate_segments_and_text_positions():
    tokens, _, next_position = prompts(LENGTHS, WIDTH)
    first, second = continuations(3, 6, 0), continuations(2, 4, 1)
    packed = pack(tokens, next_position, first, second)
    assert packed.id_BT.shape == (3, WIDTH + 3 * 6 + 2 * 4)
    segment = np.asarray(packed.segment_BT[:, WIDTH:])
    for offset, length, own, start in ((0, 6, first, 2), (18, 4, second, 5)):
        for generation in range(own.id_BGC.shape[1]):
            at = slice(offset + generation * length, offset + (generation + 1) * length)
            exists = own.exists_BGC[:, generation]
            np.testing.assert_array_equal(segment[:, at], np.where(exists, start + generation, 0))
            expected = np.where(exists, next_position[:, None] + np.arange(length), 1)
            for axis in range(3):
                np.testing.assert_array_equal(packed.position_3BT[axis, :, WIDTH:][:, at], expected)
    np.testing.assert_array_equal(packed.source_BT2[:, :WIDTH], tokens.source_BT2)
    assert (np.asarray(packed.source_BT2[:, WIDTH:, 0]) == -1).all()


def test_sets_beside_each_other_have_as_many_continuations_a_prompt():
    tokens, features, next_position = prompts(LENGTHS, WIDTH)
    sets = continuations(3, 6, 0), continuations(2, 4, 1)
    with pytest.raises(ValueError, match=r"sets of \[2, 3\] continuations a prompt: .*packed=True"):
        packed_hidden(policy()[2], tokens, features, next_position, *sets, packed=False)


def test_packing_refuses_other_rows():
    tokens, _, next_position = prompts(LENGTHS, WIDTH)
    wrong = Continuations(id_BGC=np.zeros((2, 1, 3), np.int32), exists_BGC=np.ones((2, 1, 3), bool))
    with pytest.raises(ValueError, match="2 rows of continuations for 3 prompts"):
        pack(tokens, next_position, wrong)
