"""What a scene says: the subtitle, the reasoning that names its cues, and the answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mer_r1_jax.data.synthetic.world import (
    CATEGORIES,
    MODALITIES,
    NEUTRAL,
    SLOTS,
    SLOTS_PER_MODALITY,
    Scene,
    WorldConfig,
    evidence,
    random_stream,
)
from mer_r1_jax.emotion.answer_form import format_answer

QUESTION = "Look at the face, listen to the voice and read the words. What does the person feel?"
TEXT_STREAM, SHORTENING_STREAM = 1, 4  # random streams of the subtitle's wording, and of what a long trace leaves out
SPOKEN_SLOTS = SLOTS[2 * SLOTS_PER_MODALITY :]


def subtitle(scene: Scene, lexicon: dict) -> tuple[str, tuple[str, ...]]:
    """The clip's subtitle, and for each of the three spoken slots the words a reasoning quotes of it.

    Returns:
        The subtitle, one or two short sentences, and three quotations ("" where the cue is missing).
    """
    rng = random_stream(scene.key, TEXT_STREAM)
    phrases, quotes = [], []
    for slot, display in zip(SPOKEN_SLOTS, scene.cues[-SLOTS_PER_MODALITY:], strict=True):
        if display == NEUTRAL:
            neutral = lexicon["neutral_phrases"][slot]
            phrases.append(neutral[rng.integers(len(neutral))])
            quotes.append("")
        else:
            variants = lexicon["phrases"][slot][display]
            phrase, quote = variants[rng.integers(len(variants))]
            phrases.append(phrase)
            quotes.append(quote)
    event, remark, wish = phrases
    return f"{event[0].upper()}{event[1:]}, {remark}. {wish}.", tuple(quotes)


def reasoning(
    scene: Scene, lexicon: dict, config: WorldConfig, skipped: np.ndarray | None = None
) -> tuple[str, tuple[int, ...]]:
    """The reasoning of a slow answer and the categories it leads to.

    Each modality's named cues are followed by the one or two categories they suggest most. Kept are those categories of
    the label that the named cues speak for, strongest first (the label's first one if there are none); only a world
    that `concludes` has the reasoning say them.

    Args:
        skipped: bool[9], the cues the reasoning passes over; None takes the scene's.

    Returns:
        The reasoning text (without tags), and the kept categories.
    """
    skipped = np.asarray(scene.skipped if skipped is None else skipped)
    shown = np.asarray(scene.cues) != NEUTRAL
    named = shown & ~skipped
    if not named.any():
        named = shown  # a trace of nothing would be no trace
    quotes = subtitle(scene, lexicon)[1]
    sentences = []
    for number, modality in enumerate(MODALITIES):
        first = number * SLOTS_PER_MODALITY
        slots = [slot for slot in range(first, first + SLOTS_PER_MODALITY) if named[slot]]
        if not slots:
            continue
        cues = ", ".join(_describe(slot, scene.cues[slot], quotes, lexicon) for slot in slots)
        seem = [plain_word(category, lexicon) for category in _suggested(slots, scene.cues)]
        sentences.append(f"{modality.capitalize()}: {cues} seem {' or '.join(seem)}.")
    score = evidence(scene.cues, config, named)
    kept = [c for c in scene.label if score[c] >= config.evidence] or [scene.label[0]]
    kept = tuple(sorted(kept, key=lambda c: (-score[c], c)))
    if config.concludes:
        sentences.append(f"So {', '.join(plain_word(c, lexicon) for c in kept)}.")
    return " ".join(sentences), kept


def short_reasoning(
    scene: Scene, lexicon: dict, config: WorldConfig, count_tokens: Callable[[str], int], most: int
) -> tuple[str, tuple[int, ...]]:
    """As `reasoning`, but passes over further cues, chosen at random, until the text has at most `most` tokens."""
    rng = random_stream((*scene.key, scene.annotator), SHORTENING_STREAM)
    skipped = np.array(scene.skipped)
    for slot in (None, *rng.permutation(len(SLOTS))):
        if slot is not None:
            skipped[slot] = True
        trace, kept = reasoning(scene, lexicon, config, skipped)
        if count_tokens(trace) <= most:
            break
    return trace, kept


def plain_word(category: int, lexicon: dict) -> str:
    """The word a reasoning uses for a category: its most frequent one, so that answers mostly repeat what it says."""
    return lexicon["words"][CATEGORIES[category]][0]


def slow_answer(scene: Scene, kept: tuple[int, ...]) -> tuple[str, ...]:
    """The label's words of the kept categories, in their order."""
    word = dict(zip(scene.label, scene.label_words, strict=True))
    return tuple(word[c] for c in kept)


def slow_target(text: str, words: tuple[str, ...]) -> str:
    """The assistant turn of a slow demonstration."""
    return format_answer(text, ", ".join(words))


def all_texts(lexicon: dict) -> list[str]:
    """Every text piece of the world, for the tokenizer's training corpus."""
    texts = [QUESTION, *(f" {plain_word(c, lexicon)}" for c in range(len(CATEGORIES)))]
    for modality in MODALITIES:
        texts.append(f"{modality.capitalize()}: seem or. So")
        texts.append(f" {modality.capitalize()}:")
    for descriptions in lexicon["descriptions"].values():
        texts += [f": {d}, {d} seem" for d in descriptions]
    for displays in lexicon["phrases"].values():
        for variants in displays:
            for phrase, quote in variants:
                texts += [f"{phrase[0].upper()}{phrase[1:]}, {phrase}. {phrase}.", f": {quote}, {quote}"]
    for neutral in lexicon["neutral_phrases"].values():
        texts += [f"{phrase[0].upper()}{phrase[1:]}, {phrase}. {phrase}." for phrase in neutral]
    return texts


def _describe(slot: int, display: int, quotes: tuple[str, ...], lexicon: dict) -> str:
    if slot < 2 * SLOTS_PER_MODALITY:
        return lexicon["descriptions"][SLOTS[slot]][display]
    return quotes[slot - 2 * SLOTS_PER_MODALITY]


def _suggested(slots: list[int], cues: tuple[int, ...]) -> list[int]:
    """The one or two categories that these slots show most often by their first meanings; earlier cues win ties."""
    shown = [cues[slot] for slot in slots]
    ranked = sorted(dict.fromkeys(shown), key=lambda c: -shown.count(c))  # sorted is stable
    return ranked[:2]
