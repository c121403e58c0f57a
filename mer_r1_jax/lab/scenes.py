"""Scenes of the synthetic world as arrays: what the tiny policy sees, what it is shown to say, how it is scored.

Shape letters: N records, P places of a completion (its reasoning, then its answer), M sets of categories.

There is one wheel, of the world's nine categories. A set of categories is a number of nine bits (its *code*), so every
score is a row of a table: of `SCORES` where the truth is known, of `Clips.expected_3NM` where the cues are.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from mer_r1_jax.data.synthetic.oracle import Oracle
from mer_r1_jax.data.synthetic.wording import plain_word, reasoning, slow_answer
from mer_r1_jax.data.synthetic.world import (
    CATEGORIES,
    MODALITIES,
    NEUTRAL,
    SLOTS,
    Scene,
    draw_scene,
    load_lexicon,
    random_stream,
)
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.lab.worlds import ANSWER_WORDS, CONCLUSION, SUGGESTIONS, LabConfig

LEXICON = load_lexicon()
COUNT = len(CATEGORIES)
WORDS_EACH = len(LEXICON["words"][CATEGORIES[0]])
DISPLAYS = COUNT + 1  # the last one is the neutral display

# Tokens: those of a reasoning (a category, or that there is none), then those of an answer.
NOTHING, SKIPPED = COUNT, COUNT + 1  # SKIPPED stands at every place of a fast answer's reasoning, and is never sampled
FIRST_WORD = SKIPPED + 1
STOP = FIRST_WORD + COUNT * WORDS_EACH
VOCABULARY = STOP + 1
WORD_TOKEN = {
    word: FIRST_WORD + WORDS_EACH * category + place
    for category, name in enumerate(CATEGORIES)
    for place, word in enumerate(LEXICON["words"][name])
}

SETS = (np.arange(1 << COUNT)[:, None] >> np.arange(COUNT) & 1).astype(bool)  # [M, 9], row = code
MISREAD_STREAM = 6  # of random numbers: what the policy sees wrongly; the world's own are below
_SUGGESTED = re.compile(rf"({'|'.join(MODALITIES)}): .*? seem (\w+)(?: or (\w+))?\.", re.IGNORECASE)
_CONCLUDED = re.compile(r"So ([\w, ]+)\.$")


def _score_tables() -> np.ndarray:
    """float32 [3, M truths, M answers]: recall, precision and F1; 0 where there is nothing to divide by."""
    size = SETS.sum(axis=1)
    common = SETS.astype(int) @ SETS.T.astype(int)
    recall = common / np.maximum(size[:, None], 1)
    precision = common / np.maximum(size[None, :], 1)
    f1 = 2 * common / np.maximum(size[:, None] + size[None, :], 1)
    return np.stack([recall, precision, f1]).astype(np.float32)


SCORES = _score_tables()


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """Targets of SFT, with the slips of the annotators: displays as seen, int32 [N, 9]; tokens, int32 [N, P]."""

    display_N9: np.ndarray
    slow_NP: np.ndarray
    fast_NP: np.ndarray


@dataclasses.dataclass(frozen=True)
class Clips:
    """Clips with their truths.

    Attributes:
        display_N9: int32, displays as seen.
        truth_N: int32, codes of the true categories.
        expected_3NM: float32, recall, precision and F1 of each answer, expected under the exact posterior over truths
            given the cues; only of clips that are held out. Of the noise of a score half is the draw of the truth.
    """

    display_N9: np.ndarray
    truth_N: np.ndarray
    expected_3NM: np.ndarray | None = None

    @property
    def ceiling(self) -> float:
        """Expected F1 of one who knows the cues and the world's probabilities, and names the best set."""
        assert self.expected_3NM is not None
        return float(self.expected_3NM[2].max(axis=-1).mean())


@dataclasses.dataclass(frozen=True)
class Scenes:
    """What an experiment is made with: nothing of a split is in another."""

    sft: Demonstrations
    rl: Clips
    held_out: Clips


def draw_scenes(config: LabConfig) -> Scenes:
    """Draws every split of a world."""
    sft = [
        draw_scene(config.data_seed, "sft", index, LEXICON, config.world, annotator)
        for index in range(config.sft_clips)
        for annotator in range(config.world.annotators)
    ]
    targets = [_targets(scene, config) for scene in sft]
    demonstrations = Demonstrations(
        display_N9=_seen(sft, config),
        slow_NP=np.array([slow for slow, _ in targets], np.int32),
        fast_NP=np.array([fast for _, fast in targets], np.int32),
    )
    return Scenes(demonstrations, _clips("rl", config.rl_clips, config), _clips("eval", config.eval_clips, config))


def _clips(split: str, count: int, config: LabConfig) -> Clips:
    scenes = [draw_scene(config.data_seed, split, index, LEXICON, config.world) for index in range(count)]
    expected = _expected_scores(scenes, config) if split == "eval" else None
    truths = np.array([sum(1 << category for category in scene.truth) for scene in scenes], np.int32)
    return Clips(_seen(scenes, config), truths, expected)


def _expected_scores(scenes: list[Scene], config: LabConfig) -> np.ndarray:
    oracle = Oracle(config.world, LEXICON, load_wheels())
    posterior_NS = np.stack([oracle.posterior(scene.cues) for scene in scenes]).astype(np.float32)
    code_S = oracle.sets @ (1 << np.arange(COUNT))  # the oracle counts the sets that can be true, in its own order
    return posterior_NS @ SCORES[:, code_S]


def _seen(scenes: list[Scene], config: LabConfig) -> np.ndarray:
    """int32 [N, 9], displays as the policy sees them. All annotators of a clip have seen the same one."""
    rows = []
    for scene in scenes:
        rng = random_stream(scene.key, MISREAD_STREAM)
        shown = np.where(np.array(scene.cues) == NEUTRAL, DISPLAYS - 1, scene.cues)
        rows.append(np.where(rng.random(len(SLOTS)) < config.misread, rng.integers(0, DISPLAYS, len(SLOTS)), shown))
    return np.array(rows, np.int32)


def _targets(scene: Scene, config: LabConfig) -> tuple[list[int], list[int]]:
    """Tokens of the slow and the fast demonstration, read off the ones that the rendered world is trained with."""
    text, kept = reasoning(scene, LEXICON, config.world)
    trace = [NOTHING] * config.trace_length
    for modality, *suggested in _SUGGESTED.findall(text):
        first = SUGGESTIONS * MODALITIES.index(modality.lower())
        named = [_PLAIN[word] for word in suggested if word]
        trace[first : first + len(named)] = named
    if config.world.concludes and (concluded := _CONCLUDED.search(text)):
        named = [_PLAIN[word] for word in concluded.group(1).split(", ")][:CONCLUSION]
        first = SUGGESTIONS * len(MODALITIES)
        trace[first : first + len(named)] = named
    slow, fast = slow_answer(scene, kept), scene.label_words
    return trace + _answer(slow), [SKIPPED] * config.trace_length + _answer(fast)


def _answer(words: tuple[str, ...]) -> list[int]:
    said = [WORD_TOKEN[word] for word in words[:ANSWER_WORDS]]
    return said + [STOP] * (ANSWER_WORDS - len(said))


_PLAIN = {plain_word(category, LEXICON): category for category in range(COUNT)}
