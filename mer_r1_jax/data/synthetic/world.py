"""The synthetic world's cue model: which emotions a clip is about, what its face, voice and words show of them.

A clip has one to five true categories and nine cue slots, three per modality. A slot shows one of nine displays, or the
neutral one when its cue is missing. A display is ambiguous: most often it stands for its first meaning, sometimes for
its second. A cue stems from a true category with the modality's reliability, else from the clip's distractor (one
wrong category that returns in several slots, so that modalities conflict) or from any category at all.

Labels for supervised fine-tuning are what careless annotators would write: true categories go missing, a wrong one
often joins them. Several annotate each clip, each with slips of their own; with a single label per clip a model soon
learns the slips by heart. Records for reinforcement learning and evaluation carry the truth.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import resources

import numpy as np

CATEGORIES = ("joy", "sadness", "anger", "fear", "disgust", "surprise", "love", "pride", "shame")
MODALITIES = ("face", "voice", "words")
SLOTS = ("eyes", "mouth", "colour", "pitch", "tempo", "timbre", "event", "remark", "wish")
SLOTS_PER_MODALITY = 3
NEUTRAL = -1  # display of a slot whose cue is missing

SETTINGS = "settings.json"  # of a data set, beside its records: what it follows from
SPLITS = ("sft", "rl", "eval")  # clips of different splits never share a seed

# Second meaning of each slot's displays, in the order of CATEGORIES (the display's first meaning). Every row is a
# permutation without fixed points: each category is some display's second meaning, none its own.
_SECOND_MEANINGS = {
    "eyes": ("shame", "love", "disgust", "surprise", "pride", "fear", "sadness", "anger", "joy"),
    "mouth": ("pride", "anger", "fear", "sadness", "joy", "love", "shame", "disgust", "surprise"),
    "colour": ("surprise", "shame", "love", "disgust", "pride", "anger", "joy", "fear", "sadness"),
    "pitch": ("disgust", "shame", "pride", "anger", "joy", "fear", "sadness", "surprise", "love"),
    "tempo": ("anger", "shame", "pride", "surprise", "sadness", "joy", "fear", "disgust", "love"),
    "timbre": ("surprise", "anger", "disgust", "sadness", "fear", "love", "shame", "joy", "pride"),
    "event": ("surprise", "fear", "shame", "disgust", "anger", "pride", "sadness", "love", "joy"),
    "remark": ("pride", "disgust", "sadness", "shame", "surprise", "fear", "joy", "anger", "love"),
    "wish": ("love", "surprise", "joy", "anger", "sadness", "disgust", "pride", "shame", "fear"),
}
SECOND = np.array([[CATEGORIES.index(name) for name in _SECOND_MEANINGS[slot]] for slot in SLOTS])


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """How the synthetic world is drawn, mostly probabilities.

    The defaults are world U: clips show many emotions by weak cues, so that a policy, after fine-tuning, answers
    broadly when fast and too narrowly when slow (MER-R1's finding), with room for RL above both.
    """

    category_counts: tuple[float, ...] = (0.1, 0.25, 0.3, 0.2, 0.15)  # of one, two, ... true categories
    reliability: tuple[float, ...] = (0.75, 0.6, 0.7)  # a cue stems from a true category: face, voice, words
    distractor: float = 0.5  # a cue without a true category stems from the clip's distractor, else from any
    missing: float = 0.15  # a slot shows the neutral display
    second_meaning: float = 0.25  # a cue is shown by the display whose second meaning it is
    annotators: int = 4  # labels, and so records for fine-tuning, of one clip
    label_gain: float = 0.8  # a label gains one wrong category
    label_gain_distractor: float = 0.5  # ... which is the clip's distractor rather than any wrong category
    label_loss: float = 0.1  # a label loses a true category, each for itself (never the last one)
    trace_skip: float = 0.15  # the reasoning passes over a cue
    evidence: float = 2.0  # what named cues must say for a category to stay in the slow answer (a first meaning: 1)
    concludes: bool = False  # the reasoning ends with its conclusion ("So sad, angry."), which the answer then copies
    word_weights: tuple[float, ...] = (0.6, 0.25, 0.1, 0.05)  # of a category's words, most frequent first

    def __post_init__(self):
        for name in ("category_counts", "word_weights"):
            if abs(sum(getattr(self, name)) - 1) > 1e-9:
                raise ValueError(f"WorldConfig.{name} must sum to 1, got {getattr(self, name)}")
        if len(self.reliability) != len(MODALITIES):
            raise ValueError(
                f"WorldConfig.reliability needs one value per modality {MODALITIES}, got {self.reliability}"
            )

    @property
    def slot_reliability(self) -> np.ndarray:
        """float64[9]: the reliability of each slot's modality."""
        return np.repeat(np.asarray(self.reliability), SLOTS_PER_MODALITY)


_EVEN = WorldConfig(
    category_counts=(0.15, 0.45, 0.3, 0.1), reliability=(0.9, 0.8, 0.85), second_meaning=0.15, label_gain=0.4
)
# By name, as `data.synthetic_world` takes them; the lab has the same, on scenes that are never drawn.
WORLDS = {
    "U": WorldConfig(),  # slow answers name too few: F1 wants recall
    "O": WorldConfig(category_counts=(0.55, 0.35, 0.1), label_gain=1.0, label_loss=0.0, evidence=0.0),  # too many
    "even": _EVEN,  # plain cues
    "concluding": dataclasses.replace(_EVEN, concludes=True),
}
DEFAULT = "U"
CUE_STREAM, ANNOTATION_STREAM = 0, 5  # random streams of what is shown, and of what an annotator makes of it


@dataclasses.dataclass(frozen=True)
class Scene:
    """One clip before it is drawn.

    Attributes:
        split: which file of records it belongs to, one of SPLITS.
        index: its number within the split.
        key: the integers all its random choices follow from.
        annotator: whose label and reasoning this is.
        truth: true categories, indices into CATEGORIES.
        cues: display of each slot, an index into CATEGORIES (its first meaning) or NEUTRAL.
        label: categories of the noisy label, strongest evidence first.
        truth_words, label_words: emotion words, one per category.
        skipped: which slots the reasoning passes over.
    """

    split: str
    index: int
    key: tuple[int, ...]
    annotator: int
    truth: tuple[int, ...]
    cues: tuple[int, ...]
    label: tuple[int, ...]
    truth_words: tuple[str, ...]
    label_words: tuple[str, ...]
    skipped: tuple[bool, ...]

    @property
    def name(self) -> str:
        """The clip's name, unique in its data set."""
        return f"{self.split}-{self.index:06d}"


def load_lexicon() -> dict:
    """Words, cue descriptions and subtitle phrases of the world, as `lexicon.json` holds them."""
    text = resources.files("mer_r1_jax.data.synthetic").joinpath("lexicon.json").read_text(encoding="utf-8")
    return json.loads(text)


def random_stream(key: tuple[int, ...], purpose: int) -> np.random.Generator:
    """An independent stream of random numbers for one purpose of one clip (drawing never disturbs the cues)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((*key, purpose))))


def draw_scene(
    seed: int, split: str, index: int, lexicon: dict, config: WorldConfig = WORLDS[DEFAULT], annotator: int = 0
) -> Scene:
    """Draws clip `index` of a split. The same arguments always give the same scene; the annotator decides on the label,
    its words and the skipped cues only.

    Raises:
        ValueError: unknown split, or a negative seed or index.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {SPLITS}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got seed {seed} and index {index}")
    key = (seed, SPLITS.index(split), index)
    rng = random_stream(key, CUE_STREAM)
    count = 1 + rng.choice(len(config.category_counts), p=config.category_counts)
    order = rng.permutation(len(CATEGORIES))
    truth, wrong = order[:count], order[count:]
    distractor = wrong[0]
    cues = tuple(_draw_cue(rng, slot, truth, distractor, config) for slot in range(len(SLOTS)))
    words = lexicon["words"]
    truth_words = tuple(_draw_word(rng, words[CATEGORIES[c]], config) for c in truth)
    rng = random_stream((*key, annotator), ANNOTATION_STREAM)
    label = _draw_label(rng, truth, wrong, cues, config)
    return Scene(
        split=split,
        index=index,
        key=key,
        annotator=annotator,
        truth=tuple(int(c) for c in truth),
        cues=cues,
        label=label,
        truth_words=truth_words,
        label_words=tuple(_draw_word(rng, words[CATEGORIES[c]], config) for c in label),
        skipped=tuple(bool(s) for s in rng.random(len(SLOTS)) < config.trace_skip),
    )


def evidence(cues: tuple[int, ...], config: WorldConfig, slots: np.ndarray | None = None) -> np.ndarray:
    """How much the cues speak for each category: 1 for a first meaning, for a second the odds of second
    meanings, `second_meaning / (1 - second_meaning)`.

    Args:
        cues: display of each slot.
        slots: bool[9], the slots that count; None counts all.

    Returns:
        float64[9], one value per category.
    """
    weight = config.second_meaning / (1 - config.second_meaning)
    score = np.zeros(len(CATEGORIES))
    for slot, display in enumerate(cues):
        if display == NEUTRAL or (slots is not None and not slots[slot]):
            continue
        score[display] += 1
        score[SECOND[slot, display]] += weight
    return score


def _draw_cue(rng, slot: int, truth, distractor: int, config: WorldConfig) -> int:
    """The display of one slot."""
    missing, reliable, distracted, second = rng.random(4)
    any_category, true_category = rng.integers(len(CATEGORIES)), truth[rng.integers(len(truth))]
    if missing < config.missing:
        return NEUTRAL
    if reliable < config.slot_reliability[slot]:
        category = true_category
    else:
        category = distractor if distracted < config.distractor else any_category
    if second < config.second_meaning:
        return int(np.flatnonzero(SECOND[slot] == category)[0])
    return int(category)


def _draw_label(rng, truth, wrong, cues, config: WorldConfig) -> tuple[int, ...]:
    """What the annotator writes down: some true categories lost, perhaps a wrong one gained, the plainest first."""
    kept = [c for c in truth if rng.random() >= config.label_loss] or [truth[0]]
    gain, by_distractor = rng.random(2)
    other = wrong[rng.integers(len(wrong))]
    if gain < config.label_gain:
        kept.append(wrong[0] if by_distractor < config.label_gain_distractor else other)
    score = evidence(cues, config)
    return tuple(int(c) for c in sorted(kept, key=lambda c: (-score[c], c)))


def _draw_word(rng, words: list[str], config: WorldConfig) -> str:
    weights = np.asarray(config.word_weights[: len(words)])
    return words[rng.choice(len(weights), p=weights / weights.sum())]
