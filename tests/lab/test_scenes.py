"""Scenes as arrays: what is seen, what is shown to say, and tables of scores."""

import dataclasses

import numpy as np
import pytest

from mer_r1_jax.data.synthetic.wording import plain_word, reasoning
from mer_r1_jax.data.synthetic.world import CATEGORIES, NEUTRAL, draw_scene
from mer_r1_jax.lab import scenes
from mer_r1_jax.lab.worlds import WORLDS

SMALL = {"sft_clips": 12, "rl_clips": 5, "eval_clips": 150}


def small(world, **changes):
    return dataclasses.replace(WORLDS[world], **(SMALL | changes))


@pytest.fixture(scope="module")
def default():
    return scenes.draw_scenes(small("default"))


def code(categories):
    return sum(1 << category for category in categories)


@pytest.mark.parametrize(
    ("truth", "answer", "recall", "precision", "f1"),
    [
        ({0}, {0}, 1, 1, 1),
        ({0, 3}, {3}, 1 / 2, 1, 2 / 3),
        ({8}, {1, 2, 8}, 1, 1 / 3, 1 / 2),
        ({1}, {2}, 0, 0, 0),
        ({1, 2, 3}, {2, 3, 4, 5}, 2 / 3, 2 / 4, 4 / 7),
        ({1}, set(), 0, 0, 0),
    ],
)
def test_scores_of_a_set_against_a_set(truth, answer, recall, precision, f1):
    np.testing.assert_allclose(scenes.SCORES[:, code(truth), code(answer)], [recall, precision, f1], rtol=1e-6)


def test_an_expected_score_is_what_truths_that_fit_the_cues_give():
    """Averaged over clips, the expected score of a fixed rule is its score: here, naming what two displays show."""
    config = small("default", eval_clips=3000, misread=0.0)
    clips = scenes.draw_scenes(config).held_out
    shown = np.where(clips.display_N9[:, [0, 6]] == scenes.DISPLAYS - 1, 0, clips.display_N9[:, [0, 6]])
    answer_N = np.array([code(set(row)) for row in shown.tolist()])
    drawn = scenes.SCORES[:, clips.truth_N, answer_N]
    expected = clips.expected_3NM[:, np.arange(len(answer_N)), answer_N]
    difference = drawn - expected
    assert (np.abs(difference.mean(axis=1)) < 3 * difference.std(axis=1) / np.sqrt(len(answer_N))).all()
    # What it is for: the same mean with less noise.
    assert (expected.std(axis=1) < 0.85 * drawn.std(axis=1)).all()
    assert expected[2].mean() < clips.ceiling < 1


def test_demonstrations_say_what_those_of_the_rendered_world_say():
    config = small("concluding")
    data = scenes.draw_scenes(config).sft
    word_of = {token: word for word, token in scenes.WORD_TOKEN.items()}
    category_of = {plain_word(c, scenes.LEXICON): c for c in range(len(CATEGORIES))}
    for row in range(len(data.slow_NP)):
        scene = draw_scene(0, "sft", row // 4, scenes.LEXICON, config.world, row % 4)
        text, kept = reasoning(scene, scenes.LEXICON, config.world)
        trace, answer = np.split(data.slow_NP[row], [config.trace_length])
        # Read back word by word, without the pattern that wrote them.
        sentences = {part.split(":")[0]: part for part in text.split(". ") if ":" in part}
        for number, modality in enumerate(("Face", "Voice", "Words")):
            told = sentences.get(modality, "seem ").split("seem ")[1].rstrip(".").split(" or ")
            named = [category_of[word] for word in told if word]
            assert list(trace[2 * number : 2 * number + 2]) == (named + [scenes.NOTHING] * 2)[:2]
        assert list(trace[6:]) == [*kept[:3], *[scenes.NOTHING] * 3][:3]
        words = [word_of[token] for token in answer if token != scenes.STOP]
        assert all(word in scenes.LEXICON["words"][CATEGORIES[c]] for c, word in zip(kept, words, strict=True))
        fast = data.fast_NP[row]
        assert (fast[: config.trace_length] == scenes.SKIPPED).all()
        said = [word_of[token] for token in fast[config.trace_length :] if token != scenes.STOP]
        assert said == list(scene.label_words[:5])


def test_a_clip_is_seen_alike_by_all_its_annotators_and_is_sometimes_misread(default):
    config = WORLDS["default"]
    by_clip = default.sft.display_N9.reshape(12, config.world.annotators, 9)
    assert (by_clip == by_clip[:, :1]).all()
    cues = np.array([draw_scene(0, "eval", i, scenes.LEXICON, config.world).cues for i in range(150)])
    shown = np.where(cues == NEUTRAL, scenes.DISPLAYS - 1, cues)
    wrong = (default.held_out.display_N9 != shown).mean()
    assert 0.06 < wrong < 0.13  # misread 0.1, and one in ten of those by chance as what it is
    exact = scenes.draw_scenes(small("default", misread=0.0)).held_out
    assert (exact.display_N9 == shown).all()


def test_worlds_differ_in_what_they_are_named_for():
    truths = {name: scenes.SETS[scenes.draw_scenes(small(name)).held_out.truth_N].sum(axis=1) for name in "UO"}
    assert truths["U"].mean() > 2.7 and truths["U"].max() == 5
    assert truths["O"].mean() < 1.8 and truths["O"].max() == 3
    assert WORLDS["T"].answers_from_trace and WORLDS["concluding"].trace_length == WORLDS["T"].trace_length + 3
