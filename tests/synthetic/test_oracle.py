"""The ceiling: exact posterior, scores equal to the rewards', and no modality enough by itself."""

import json

import numpy as np
import pytest

from mer_r1_jax.data.synthetic.make import WorldSettings
from mer_r1_jax.data.synthetic.oracle import Oracle, oracle_of
from mer_r1_jax.data.synthetic.world import (
    CATEGORIES,
    MODALITIES,
    NEUTRAL,
    WORLDS,
    WorldConfig,
    draw_scene,
    load_lexicon,
)
from mer_r1_jax.emotion.rewards import answer_rewards
from mer_r1_jax.emotion.wheels import load_wheels

LEXICON = load_lexicon()
CONFIG = WorldConfig()


@pytest.fixture(scope="module")
def wheels():
    return load_wheels()


@pytest.fixture(scope="module")
def oracle(wheels):
    return Oracle(CONFIG, LEXICON, wheels)


def test_the_score_tables_are_the_rewards(oracle, wheels):
    rng = np.random.default_rng(0)
    for truth, answer in rng.integers(len(oracle.sets), size=(60, 2)):
        words = [[LEXICON["words"][CATEGORIES[c]][-1] for c in oracle.categories(row)] for row in (answer, truth)]
        reward = answer_rewards(*words, wheels)
        found = oracle.precision[truth, answer], oracle.recall[truth, answer], oracle.f1[truth, answer]
        assert found == pytest.approx((reward.precision, reward.recall, reward.f1), abs=1e-12)


def test_the_posterior_agrees_with_counting(oracle):
    """Scenes drawn at random, those with the commonest first three cues counted."""
    scenes = [draw_scene(11, "sft", index, LEXICON, CONFIG) for index in range(12_000)]
    wanted = (0, 0)  # a laugh and a grin
    match = [scene for scene in scenes if scene.cues[:2] == wanted]
    cues = (*wanted, *[NEUTRAL] * 7)
    posterior = oracle.posterior(cues, "face")
    joy = posterior[oracle.sets[:, 0]].sum()
    counted = np.mean([0 in scene.truth for scene in match])
    assert abs(counted - joy) < 4 * np.sqrt(joy * (1 - joy) / len(match))
    assert joy > 0.7


def test_without_cues_the_posterior_is_the_prior(oracle):
    posterior = oracle.posterior([NEUTRAL] * 9)
    sizes = oracle.sets.sum(1)
    assert [posterior[sizes == n].sum() for n in range(1, len(CONFIG.category_counts) + 1)] == pytest.approx(
        CONFIG.category_counts
    )


def test_every_modality_alone_is_worse_and_the_floor_is_worst(oracle):
    scenes = [draw_scene(4, "eval", index, LEXICON, CONFIG) for index in range(600)]
    truths = np.array([oracle.row(scene.truth) for scene in scenes])
    clip_f1 = {name: oracle.f1[truths, [oracle.answer(s.cues, name) for s in scenes]] for name in (None, *MODALITIES)}
    floor = oracle.f1[truths, oracle.constant_answer()]
    for name in MODALITIES:
        for better, worse in ((clip_f1[None], clip_f1[name]), (clip_f1[name], floor)):
            difference = better - worse
            assert difference.mean() > 3 * difference.std() / np.sqrt(len(scenes))
    assert clip_f1[None].mean() > 0.65


def test_an_unknown_modality_is_refused(oracle):
    with pytest.raises(ValueError, match="unknown modality 'smell'"):
        oracle.posterior([0] * 9, "smell")


def test_an_answer_expects_its_mean_score_over_what_may_be_true(oracle, wheels):
    """By the rewards themselves, truth by truth, for answers of any words: repeats, unknown ones, none at all."""
    rng = np.random.default_rng(1)
    words = [word for of_one in LEXICON["words"].values() for word in of_one] + ["bewildered", "qwzx", "neutral"]
    truths = [[LEXICON["words"][CATEGORIES[c]][0] for c in oracle.categories(row)] for row in range(len(oracle.sets))]
    answers = [list(rng.choice(words, size)) for size in (0, 1, 2, 3, 5)] + [["happy", "joyful", "qwzx"]]
    for answer in answers:
        cues = rng.integers(NEUTRAL, len(CATEGORIES), 9)
        posterior = oracle.posterior(cues)
        rewards = [answer_rewards(answer, truth, wheels) for truth in truths]
        found = oracle.expected(cues, answer)
        for name in ("precision", "recall", "f1"):
            mean = float(posterior @ [getattr(reward, name) for reward in rewards])
            assert getattr(found, name) == pytest.approx(mean, abs=1e-12), (answer, name)


def test_over_many_clips_expected_scores_are_the_scores(oracle, wheels):
    scenes = [draw_scene(7, "eval", index, LEXICON, CONFIG) for index in range(1500)]
    answer = ["happy", "sad"]
    truths = [[LEXICON["words"][CATEGORIES[c]][0] for c in scene.truth] for scene in scenes]
    f1 = np.array([answer_rewards(answer, truth, wheels).f1 for truth in truths])
    expected = np.array([oracle.expected(scene.cues, answer).f1 for scene in scenes])
    assert abs((f1 - expected).mean()) < 4 * f1.std() / np.sqrt(len(f1))
    assert expected.std() < 0.8 * f1.std()


def test_the_oracle_of_a_folder_is_its_worlds(tmp_path, wheels):
    assert oracle_of(tmp_path, wheels) is None
    (tmp_path / "settings.json").write_text('{"editor": "dark"}')  # somebody else's
    assert oracle_of(tmp_path, wheels) is None
    world = WorldSettings(sft_clips=0, rl_clips=0, eval_clips=0, config=WORLDS["O"])
    (tmp_path / "settings.json").write_text(json.dumps(world.to_json(LEXICON)))
    found = oracle_of(tmp_path, wheels)
    assert found is not None and found.config == WORLDS["O"] and len(found.sets) == 129
