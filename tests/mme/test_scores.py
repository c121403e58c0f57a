"""Scores against five items counted by hand, with failures left out and as zero."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from mer_r1_jax.evaluation.bootstrap import macro_interval
from mer_r1_jax.evaluation.mme import judging
from mer_r1_jax.evaluation.mme.mme_reader import Item
from mer_r1_jax.evaluation.mme.mme_scores import item_scores, paired_modes, score_mode
from mer_r1_jax.evaluation.mme.mme_tasks import METRICS, PAPER_COT, PAPER_OVERALL, TASKS, TOTAL
from mer_r1_jax.evaluation.mme.stages import Asked


def asked(task, name, mode="slow"):
    return Asked(Item(task, name, ("a",), ("a", "b"), "", None), mode)


# Counted by hand:                        recognition  reasoning         CoT
CASES = {
    "A": ["1/1", "0/1", "1/1"],  #              1      (1 + 0) / 2 = 1/2   3/4
    "B": ["0/1"],  #                            0      none -> 0           0
    "C": ["1/1", "1/1", "1/1", "2/3"],  #      2/3     1                   5/6
    "D": ["0/1", "1/2"],  #                    1/2     0                   1/4
}
# E has no ratings: the judge could not be read.


@pytest.fixture
def scored():
    items = [asked("SA", "A"), asked("SA", "B"), asked("ML-ER", "C"), asked("ML-ER", "D"), asked("SA", "E")]
    keys = {one.item.video_id: one.key for one in items}
    judged = {keys[name]: {"scores": ratings} for name, ratings in CASES.items()}
    judged[keys["E"]] = {"failed": "unreadable", "message": ""}
    answered = {one.key: {"text": "x"} for one in items}
    return score_mode(items, {"predict": answered, "steps": {key: {"steps": []} for key in answered}, "judge": judged})


@pytest.mark.parametrize(
    ("name", "recognition", "reasoning", "cot"),
    [("A", 1, 1 / 2, 3 / 4), ("B", 0, 0, 0), ("C", 2 / 3, 1, 5 / 6), ("D", 1 / 2, 0, 1 / 4)],
)
def test_items_by_hand(name, recognition, reasoning, cot):
    assert item_scores(CASES[name]) == pytest.approx(dict(zip(METRICS, (recognition, reasoning, cot), strict=True)))


def values(table):
    return [table[metric]["score"] for metric in METRICS]


def test_five_items_by_hand(scored):
    sa, ml = scored["tasks"]["SA"], scored["tasks"]["ML-ER"]
    assert values(sa["drop"]) == pytest.approx([50, 25, 37.5])  # A, B
    assert values(sa["zero"]) == pytest.approx([100 / 3, 50 / 3, 25])  # A, B, E = 0
    assert values(ml["drop"]) == values(ml["zero"]) == pytest.approx([700 / 12, 50, 650 / 12])  # C, D
    # Pooled: four items, or five; the mean over tasks is another number.
    assert values(scored["pooled"]["drop"]) == pytest.approx([650 / 12, 37.5, 1100 / 24])
    assert values(scored["pooled"]["zero"]) == pytest.approx([650 / 15, 30, 1100 / 30])
    assert values(scored["macro"]["drop"]) == pytest.approx([(50 + 700 / 12) / 2, 37.5, (37.5 + 650 / 12) / 2])
    assert (scored["macro"]["tasks"], scored["macro"]["rated_tasks"]) == (2, 2)


def test_counts_behind_the_scores(scored):
    sa = scored["tasks"]["SA"]
    assert (sa["n"], sa["rated"], sa["without_reasoning"], sa["mean_steps"]) == (3, 2, 1, 2.0)
    assert sa["failed"] == {"judge": {"unreadable": 1}}
    assert (scored["pooled"]["n"], scored["pooled"]["rated"]) == (5, 4)
    assert scored["tasks"]["ML-ER"]["failed"] == {}


def test_intervals_hold_their_score_and_need_two_items(scored):
    for table in (*scored["tasks"].values(), scored["pooled"], scored["macro"]):
        for treatment in ("drop", "zero"):
            for score in table[treatment].values():
                assert score["low"] <= score["score"] <= score["high"]
    one = [asked("SA", "A")]
    logs = {"predict": {one[0].key: {}}, "steps": {one[0].key: {}}, "judge": {one[0].key: {"scores": CASES["A"]}}}
    assert score_mode(one, logs)["pooled"]["drop"]["cot"] == {"score": 75.0, "low": None, "high": None}
    nothing = score_mode(one, {"predict": {}, "steps": {}, "judge": {}})["pooled"]
    assert nothing["drop"]["cot"]["score"] is None and nothing["zero"]["cot"]["score"] == 0
    assert nothing["failed"] == {"predict": {"not_asked": 1}}
    json.dumps(scored, allow_nan=False)


def test_slow_and_fast_are_compared_item_by_item():
    items = [asked("SA", name, mode) for name in "ABX" for mode in ("slow", "fast")]
    judged = {f"slow/SA/{name}": {"scores": ["1/1", "1/1"]} for name in "ABX"}
    judged |= {"fast/SA/A": {"scores": ["1/1"]}, "fast/SA/B": {"scores": ["0/1"]}, "fast/SA/X": {"failed": "timeout"}}
    paired = paired_modes(items, judged)
    assert paired["items"] == 2
    assert [paired[metric]["score"] for metric in METRICS] == pytest.approx([50, 100, 75])
    assert paired_modes(items, {}) is None


def test_the_papers_overall_pools_the_releases_items():
    """Per-task CoT and the release's counts give the paper's overall CoT; the unweighted mean does not."""
    assert TOTAL == 6500
    for model, row in PAPER_COT.items():
        pooled = sum(TASKS[task].count * score for task, score in row.items()) / TOTAL
        assert round(pooled, 1) == PAPER_OVERALL[model]["cot"]
        assert abs(sum(row.values()) / 8 - pooled) > 1


def test_macro_interval_resamples_within_groups():
    rng = np.random.default_rng(0)
    constant, noisy = np.full(50, 0.5), rng.random(50)
    interval = macro_interval([constant, noisy], resamples=2000)
    assert interval.points == pytest.approx(100 * (0.5 + noisy.mean()) / 2)
    half_width = 1.96 * 100 * noisy.std() / np.sqrt(50) / 2  # the constant group adds nothing
    assert (interval.high - interval.low) / 2 == pytest.approx(half_width, rel=0.1)
    for groups in ([], [np.ones(0)], [np.array([np.nan, 1.0])]):
        with pytest.raises(ValueError, match="expected at least one value|no finite number"):
            macro_interval(groups)


def test_prompt_versions_stand_for_their_texts():
    """A prompt that changes needs a new version: old answers in a cache were given to another question."""
    tasks = TASKS.values()
    texts = {
        judging.QUESTION_VERSION: json.dumps([judging.question(task, ("a", "b")) for task in tasks]),
        judging.STEPS_VERSION: json.dumps([judging.steps_messages(task, "x") for task in tasks]),
        judging.JUDGE_VERSION: json.dumps(
            [
                judging.judge_messages(task, labels, "s", ("x", "y"), p)
                for task in tasks
                for labels in (("a",), ("a", "b"))
                for p in ((), (b"",))
            ]
        ),
    }
    expected = json.loads((Path(__file__).parent / "prompt_hashes.json").read_text())
    assert {version: hashlib.sha256(text.encode()).hexdigest() for version, text in texts.items()} == expected
