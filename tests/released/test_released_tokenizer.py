"""The vocabulary of 151,643 tokens through everything that reads tokens: what small tokenizers cannot show.

Each number is held as it was measured with the wheels that are shipped; docs/status.md tells them.
"""

from __future__ import annotations

import numpy as np
import pytest
import regex
from support.answer_words import COMMON_WORDS, REASONINGS, SUBTITLES
from support.prompts import ask
from support.released_tokenizer import ranks_file, released_tokenizer_folder, tool

from mer_r1_jax.config.schema import DataConfig, MediaConfig, RlConfig
from mer_r1_jax.emotion.candidates import NO_SET, CandidateTable
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.media.clips import Clips
from mer_r1_jax.media.prompt import PromptBuilder
from mer_r1_jax.media.tokenizer import check_special_tokens
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.planning.workload import PrefixTokens
from mer_r1_jax.rl.confidence import MERGED_TAG, TOO_LONG, UNLOCATED_WORDS, AnswerToScore, build_anchors
from mer_r1_jax.rl.tags import AnswerTags
from mer_r1_jax.training.phase import banned_ids_of

WHEELS = load_wheels()
FORMS = sorted({form for levels in WHEELS.levels[0] for form in levels})
MIXED_TEXT = (
    *SUBTITLES,
    *REASONINGS,
    "<think></think>\n<answer>furious, sad</answer>",
    "I'M 12 years\r\n\r\n  old\t— naïve, Ångström, e\u0301 🙂👩‍👩‍👧 ١٢٣  \n x",
)


@pytest.fixture(scope="module")
def table(released_tokenizer):
    return CandidateTable(released_tokenizer, WHEELS)


@pytest.fixture(scope="module")
def tags(released_tokenizer):
    return AnswerTags(released_tokenizer)


def pieces_by_rank(text: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding from its definition: the neighbours that make the token of lowest rank are joined first."""
    parts = [text[i : i + 1] for i in range(len(text))]
    while pairs := [
        (ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks
    ]:
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


def test_it_is_the_released_one_as_far_as_that_is_known(released_tokenizer):
    assert len(released_tokenizer) == 151_643 + 22
    for thinker in (ThinkerConfig.qwen2_5_omni_3b(), ThinkerConfig.qwen2_5_omni_7b()):
        check_special_tokens(released_tokenizer, thinker)
        assert released_tokenizer.encode("user") == [thinker.user_token_id]  # an ordinary id that the release names
        assert released_tokenizer.pad_token_id == thinker.pad_token_id
        assert (released_tokenizer.eos_token_id,) == thinker.eos_token_ids


def test_texts_are_cut_as_the_ranks_say(released_tokenizer):
    module = tool()
    ranks = module.read_ranks(ranks_file())
    for text in MIXED_TEXT:
        normal = tool().normalizers.NFC().normalize_str(text)
        expected = [i for piece in regex.findall(module.SPLIT, normal) for i in pieces_by_rank(piece.encode(), ranks)]
        assert released_tokenizer.encode(text) == expected
        assert released_tokenizer.decode(expected) == normal


def test_damaged_ranks_are_refused(tmp_path):
    lines = ranks_file().read_bytes().splitlines()
    for damaged, reason in ((lines[:-1], "151642 ranks"), (lines[1:], "do not count"), ([b"%%% 0"], ":1: got")):
        file = tmp_path / "ranks"
        file.write_bytes(b"\n".join(damaged))
        with pytest.raises(ValueError, match=reason):
            tool().write_folder(file, tmp_path / "out")


def test_a_quarter_of_the_forms_loses_its_first_tokens(released_tokenizer, table):
    print(f"\nforms without a first token of their own: {table.share_lost:.1%}; table {table.ids_ZY.shape}")
    assert table.share_lost == pytest.approx(0.241, abs=0.001)
    assert table.size_Z.min() == 20  # no category is left without a set
    assert table.ids_ZY.shape == (69, 2017)


def own_tokens(table, tokenizer, words, lead: str) -> tuple[int, int]:
    """(word, wheel) pairs whose word's own first token is in the set of its category, and all pairs with a set."""
    own = pairs = 0
    for word in words:
        token = tokenizer.encode(lead + word)[0]
        sets = [z for z in table.word(word) if z != NO_SET]
        pairs += len(sets)
        own += sum(token in table.ids_ZY[z] for z in sets)
    return own, pairs


def test_the_first_word_of_an_answer_mostly_opens_with_a_token_of_no_category(released_tokenizer, table):
    """Behind `<answer>` no space stands, and without one Qwen has few whole words: `f` + `urious`, `dis` + `gusted`."""
    first, pairs = own_tokens(table, released_tokenizer, COMMON_WORDS, "")
    later, _ = own_tokens(table, released_tokenizer, COMMON_WORDS, " ")
    print(f"\ncommon words whose own token counts: {first} of {pairs} as an answer's first, {later} as a later one")
    assert (first, later, pairs) == (102, 340, 353)
    all_first, pairs = own_tokens(table, released_tokenizer, FORMS, "")
    all_later, _ = own_tokens(table, released_tokenizer, FORMS, " ")
    print(f"all forms: {all_first / pairs:.1%} and {all_later / pairs:.1%} of {pairs}")
    assert (all_first / pairs, all_later / pairs) == (pytest.approx(0.372, abs=0.001), pytest.approx(0.740, abs=0.001))


def merged(tags, ids) -> bool:
    located = tags.locate(ids, len(ids))
    return located is None or located.merged


def test_a_target_of_pieces_has_no_merged_tag_and_a_text_cut_as_a_whole_often_has(tags):
    """A model taught elsewhere, on texts cut as a whole, writes `>f` + `urious`; its fast context cannot be cut out."""
    assert not any(merged(tags, tags.slow_target("Why.", form)[0]) for form in FORMS)

    def lost(words):
        return [word for word in words if merged(tags, tags.ids(f"<think>Why.</think>\n<answer>{word}</answer>"))]

    common, lower, capital = lost(COMMON_WORDS), lost(FORMS), lost(map(str.capitalize, FORMS))
    print(f"\n`>` with a letter: {len(common)} of {len(COMMON_WORDS)} common words {common}")
    print(f"of {len(FORMS)} forms {len(lower)}, capitalised {len(capital)}")
    assert (len(common), len(lower), len(capital)) == (16, 2183, 4945)


def test_a_sampled_answer_is_read_back_from_its_own_tokens(tags):
    """As a model may cut it that learnt from texts cut as a whole: words are found where they stand, in bytes."""
    for answer in ("furious, 悲伤, naïve", " sad,happy", "[Happy, 🙂glad]"):
        text = f"<think>a</think>\n<answer>{answer}</answer>"
        ids = tags.ids(text)
        located = tags.locate(ids, len(ids))
        for word, at in located.first_token.items():
            starts = np.cumsum([0, *(len(tags.token_bytes(i)) for i in ids)])
            place = len(text[: text.lower().index(word, text.index("<answer>"))].encode())
            assert starts[at] <= place < starts[at + 1]


def test_lengths_of_real_sentences(released_tokenizer, tags):
    text, media = " ".join(REASONINGS), DataConfig().question
    per_word = len(released_tokenizer.encode(text)) / len(text.split())
    slow = [len(tags.slow_target(reasoning, "sad, disappointed, hurt")[0]) for reasoning in REASONINGS]
    fast = [len(tags.fast_target(", ".join(COMMON_WORDS[:count]))[0]) for count in (1, 3, 8)]
    said = [len(released_tokenizer.encode(subtitle)) for subtitle in SUBTITLES]
    print(f"\n{per_word:.2f} tokens a word; slow targets {slow}, fast ones of 1, 3, 8 words {fast}, subtitles {said}")
    print(f"question {len(released_tokenizer.encode(media))} tokens")
    assert 1.1 < per_word < 1.3
    assert max(slow) < RlConfig().max_completion_length / 4


def test_the_text_of_a_prompt(released_tokenizer):
    thinker = ThinkerConfig.qwen2_5_omni_3b()
    data = DataConfig()
    builder = PromptBuilder(released_tokenizer, MediaConfig(), thinker, data.system_prompt, data.max_prompt_length)
    lengths = [
        builder.build(ask(data.question, subtitle=subtitle), Clips((), (), (), ())).stats["text"]
        for subtitle in SUBTITLES
    ]
    print(f"\ntext of a prompt with a subtitle: {min(lengths)} to {max(lengths)} tokens")
    assert max(lengths) < 100


def test_the_fast_context_has_room_for_sixteen_words_that_people_say(tags, table):
    rng, config = np.random.default_rng(0), RlConfig()
    counts, longest = {}, {}
    for name, vocabulary in (("common", COMMON_WORDS), ("any form", FORMS)):
        said = [tuple(rng.choice(vocabulary, 24, replace=False)) for _ in range(500)]
        ids = [tags.slow_target(REASONINGS[0], ", ".join(words))[0] for words in said]
        answers = [
            AnswerToScore(ids=row, length=len(row), words=words, usable=True)
            for row, words in zip(ids, said, strict=True)
        ]
        truth = [[frozenset({WHEELS.groups(wheel)[0]}) for wheel in range(len(WHEELS))]]
        anchors, counts[name] = build_anchors(
            [answers], truth, tags=tags, category=WHEELS.category, candidate_sets=table.word, config=config
        )
        longest[name] = int(anchors.fast.exists_BGC.sum(-1).max())
    print(f"\nlongest fast contexts {longest} of {config.max_fast_context}; {counts}")
    assert counts["common"][TOO_LONG] == counts["common"][MERGED_TAG] == counts["common"][UNLOCATED_WORDS] == 0
    assert longest["common"] <= 50
    # Sixteen of the rarest derivations ("abandonedness") do not always fit; they are counted.
    assert 0 < counts["any form"][TOO_LONG] < 25


def test_a_plans_table_is_as_wide_as_the_real_one(table):
    thinker = ThinkerConfig.qwen2_5_omni_3b()
    planned = CandidateTable(PrefixTokens(thinker.text.vocab_size), WHEELS)
    assert planned.ids_ZY.shape[0] == table.ids_ZY.shape[0]
    assert planned.ids_ZY.shape[1] == pytest.approx(table.ids_ZY.shape[1], rel=0.05)


def test_what_may_not_be_sampled(tags):
    for thinker in (ThinkerConfig.qwen2_5_omni_3b(), ThinkerConfig.qwen2_5_omni_7b()):
        banned = set(banned_ids_of(tags, thinker))
        kept = [i for i in range(151_643, len(tags.tokenizer)) if i not in banned]
        assert kept == [151_645, *range(151_657, 151_665)]  # the turn's end; tool calls and code are plain text
        assert set(range(len(tags.tokenizer), thinker.text.vocab_size)) <= banned
        assert not any(i < 151_643 for i in banned)


def test_it_loads_in_transformers_by_itself():
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(released_tokenizer_folder(), local_files_only=True)
    assert loaded.audio_bos_token == "<|audio_bos|>" and loaded.image_token == "<|IMAGE|>"
    assert loaded.encode("<|im_start|>user\n<|AUDIO|>") == [151_644, 872, 198, 151_646]
