"""The cue model: what it promises about probabilities, seeds, labels and reasoning texts."""

import collections
import dataclasses
import typing

import numpy as np
import pytest

from mer_r1_jax.config.schema import DataConfig
from mer_r1_jax.data.synthetic import wording
from mer_r1_jax.data.synthetic.world import (
    CATEGORIES,
    DEFAULT,
    NEUTRAL,
    SECOND,
    SLOTS,
    SPLITS,
    WORLDS,
    WorldConfig,
    draw_scene,
    load_lexicon,
)
from mer_r1_jax.emotion.wheels import load_wheels

CONFIG = WorldConfig()
CONCLUDING = dataclasses.replace(CONFIG, concludes=True)
LEXICON = load_lexicon()
MANY = 4000


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(3, "sft", index, LEXICON, CONFIG) for index in range(MANY)]


def _within(successes, trials, probability):
    """Whether a count lies within four standard deviations of what the probability promises."""
    return abs(successes - trials * probability) < 4 * np.sqrt(trials * probability * (1 - probability))


def test_a_scene_follows_from_seed_split_and_index_alone():
    assert draw_scene(5, "rl", 17, LEXICON) == draw_scene(5, "rl", 17, LEXICON)
    others = [draw_scene(6, "rl", 17, LEXICON), draw_scene(5, "rl", 18, LEXICON), draw_scene(5, "eval", 17, LEXICON)]
    assert all(other.cues != draw_scene(5, "rl", 17, LEXICON).cues for other in others)


def test_annotators_see_the_same_clip_and_slip_apart():
    for index in range(40):
        first, second = (draw_scene(5, "sft", index, LEXICON, annotator=annotator) for annotator in (0, 1))
        same = {
            field.name
            for field in dataclasses.fields(first)
            if getattr(first, field.name) == getattr(second, field.name)
        }
        assert {"split", "index", "key", "truth", "cues", "truth_words"} <= same
    labels = [
        [draw_scene(5, "sft", index, LEXICON, annotator=annotator).label for index in range(40)] for annotator in (0, 1)
    ]
    assert labels[0] != labels[1]


def test_splits_share_no_seed():
    keys = [draw_scene(0, split, index, LEXICON).key for split in SPLITS for index in range(200)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("arguments", [(0, "test", 0), (-1, "sft", 0), (0, "sft", -1)])
def test_a_scene_outside_the_world_is_refused(arguments):
    with pytest.raises(ValueError, match="expected one of|must not be negative"):
        draw_scene(*arguments, LEXICON)


def test_world_probabilities_must_sum_to_one():
    with pytest.raises(ValueError, match="category_counts must sum to 1"):
        WorldConfig(category_counts=(0.5, 0.4))


def test_second_meanings_are_permutations_without_fixed_points():
    for row in SECOND:
        assert sorted(row) == list(range(len(CATEGORIES)))
        assert (row != np.arange(len(CATEGORIES))).all()


def test_category_counts_have_their_probabilities(scenes):
    counts = collections.Counter(len(scene.truth) for scene in scenes)
    for size, probability in enumerate(CONFIG.category_counts, start=1):
        assert _within(counts[size], MANY, probability)
    assert all(len(scene.truth_words) == len(scene.truth) == len(set(scene.truth)) for scene in scenes)


def test_missing_cues_have_their_probability(scenes):
    missing = sum(cue == NEUTRAL for scene in scenes for cue in scene.cues)
    assert _within(missing, MANY * len(SLOTS), CONFIG.missing)


def test_modalities_differ_in_how_often_they_show_a_true_category(scenes):
    single = [scene for scene in scenes if len(scene.truth) == 1]
    for slot, reliability in enumerate(CONFIG.slot_reliability):
        shown = [scene for scene in single if scene.cues[slot] != NEUTRAL]
        first = sum(scene.cues[slot] == scene.truth[0] for scene in shown)
        # A true cue by its first meaning; or any category, chosen by chance, that shows the true one: first meaning,
        # or another category whose second meaning's display has the true one as its first.
        chance = (1 - reliability) * (1 - CONFIG.distractor) / len(CATEGORIES)
        other = (1 - reliability) * (CONFIG.distractor / (len(CATEGORIES) - 1) + chance / (1 - reliability))
        expected = (reliability + chance) * (1 - CONFIG.second_meaning) + other * CONFIG.second_meaning
        assert _within(first, len(shown), expected)


def test_labels_lose_true_categories_and_gain_wrong_ones(scenes):
    gained = sum(not set(scene.label) <= set(scene.truth) for scene in scenes)
    assert _within(gained, MANY, CONFIG.label_gain)
    several = [scene for scene in scenes if len(scene.truth) == 3]
    lost = sum(len(set(scene.truth) - set(scene.label)) for scene in several)
    assert _within(lost, 3 * len(several), CONFIG.label_loss)
    assert all(1 <= len(scene.label) <= len(scene.truth) + 1 for scene in scenes)


def test_no_noise_makes_labels_the_truth():
    config = dataclasses.replace(CONFIG, label_gain=0.0, label_loss=0.0)
    for index in range(50):
        scene = draw_scene(0, "sft", index, LEXICON, config)
        assert set(scene.label) == set(scene.truth)


def test_the_words_of_a_category_agree_on_every_wheel():
    wheels = load_wheels()
    for category in CATEGORIES:
        signatures = {
            tuple(wheels.category(word, wheel) for wheel in range(len(wheels))) for word in LEXICON["words"][category]
        }
        assert len(signatures) == 1 and None not in signatures.pop(), category


def test_categories_are_told_apart_by_most_wheels():
    wheels = load_wheels()
    apart = [
        len({wheels.category(LEXICON["words"][category][0], wheel) for category in CATEGORIES})
        for wheel in range(len(wheels))
    ]
    assert sorted(apart, reverse=True)[:3] == [9, 9, 9] and min(apart) >= 6


def test_the_reasoning_names_only_cues_that_are_there(scenes):
    described = {d: (s, k) for s, slot in enumerate(SLOTS[:6]) for k, d in enumerate(LEXICON["descriptions"][slot])}
    for scene in scenes[:300]:
        trace, kept = wording.reasoning(scene, LEXICON, CONCLUDING)
        quotes = wording.subtitle(scene, LEXICON)[1]
        for sentence in trace.split(". ")[:-1]:
            modality, cues = sentence.split(" seem ")[0].split(": ")
            for cue in cues.split(", "):
                assert cue in quotes if modality == "Words" else scene.cues[described[cue][0]] == described[cue][1]
        assert set(kept) <= set(scene.label) and kept
        concluded = f" So {', '.join(wording.plain_word(c, LEXICON) for c in kept)}."
        assert trace.endswith(concluded)
        # Where the world does not conclude, the same is said but for the last sentence.
        assert wording.reasoning(scene, LEXICON, CONFIG) == (trace.removesuffix(concluded), kept)


def test_each_modality_seems_what_its_named_cues_show_most_often(scenes):
    scene = dataclasses.replace(
        scenes[0], cues=(2, 5, 5, NEUTRAL, 3, 1, 0, NEUTRAL, NEUTRAL), label=(5, 2), label_words=("amazed", "furious")
    )
    trace, kept = wording.reasoning(scene, LEXICON, CONCLUDING, np.zeros(9, bool))
    seem = [part.split(". ")[0] for part in trace.split(" seem ")[1:]]
    assert seem == ["surprised or angry", "afraid or sad", "happy"]
    assert kept == (5,) and trace.endswith("So surprised.")


def test_the_worlds_that_a_configuration_may_name_are_those_there_are():
    field = next(field for field in dataclasses.fields(DataConfig) if field.name == "synthetic_world")
    assert typing.get_args(typing.get_type_hints(DataConfig)["synthetic_world"]) == tuple(WORLDS)
    assert field.default == DEFAULT and WORLDS["concluding"].concludes


def test_the_slow_answer_is_shorter_than_the_label(scenes):
    kept = [wording.reasoning(scene, LEXICON, CONFIG)[1] for scene in scenes[:1000]]
    assert np.mean([len(k) for k in kept]) < 0.9 * np.mean([len(scene.label) for scene in scenes[:1000]])


def test_subtitles_quote_themselves(scenes):
    for scene in scenes[:300]:
        subtitle, quotes = wording.subtitle(scene, LEXICON)
        assert all(quote in subtitle.lower() for quote in map(str.lower, quotes))
        assert [quote == "" for quote in quotes] == [cue == NEUTRAL for cue in scene.cues[6:]]


def test_a_long_reasoning_is_shortened_to_its_limit(scenes):
    def words(piece):
        return len(piece.split())

    for scene in scenes[:100]:
        trace, kept = wording.short_reasoning(scene, LEXICON, CONFIG, words, 14)
        assert kept and trace.startswith(("Face:", "Voice:", "Words:"))
        assert words(trace) <= 14
