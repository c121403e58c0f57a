"""The results that are printed in docs/study are those of the committed summaries, judged again."""

import json
from pathlib import Path

import pytest

from mer_r1_jax.study.stage_a import make_plan, read_stage
from mer_r1_jax.study.stage_b import kept
from mer_r1_jax.study.study_report import as_json, results_of_a, results_of_b

STUDY = Path(__file__).parents[2] / "docs/study"
ROUNDED = 2e-3  # points: summaries have five digits, and the printed results were judged before they were cut to them


def judged_again(stage):
    if stage == "b":
        return results_of_b(kept(STUDY / "stage_b"))
    return results_of_a(read_stage(make_plan([], {}), STUDY / "stage_a"))


@pytest.mark.parametrize("stage", ["a", "b"])
def test_committed_summaries_give_the_committed_results(stage):
    """Under the settings of today, which have grown since: those that a summary lacks are at their defaults."""
    printed = json.loads((STUDY / f"stage_{stage}/results.json").read_text())
    again = as_json(judged_again(stage), printed["command"])
    assert printed["registered"] and again.keys() == printed.keys()
    assert again["families"].keys() == printed["families"].keys()
    for title, verdicts in printed["families"].items():
        assert again["families"][title].keys() == verdicts.keys()
        for key, verdict in verdicts.items():
            now = again["families"][title][key]
            assert (now["outcome"], now["why"], now["said"]) == (verdict["outcome"], verdict["why"], verdict["said"])
            for one, before in zip(now["measures"], verdict["measures"], strict=True):
                assert one["label"] == before["label"] and one["seeds"] == before["seeds"]
                for end in ("mean", "low", "high"):
                    assert one[end] == pytest.approx(before[end], abs=ROUNDED)
    for title, rows in printed["means"].items():
        for row, measures in rows.items():
            assert again["means"][title][row] == pytest.approx(measures, abs=ROUNDED)


@pytest.mark.parametrize("stage", ["a", "b"])
def test_the_page_of_a_stage_has_its_verdicts(stage):
    page = (STUDY / f"stage-{stage}.md").read_text()
    for verdicts in json.loads((STUDY / f"stage_{stage}/results.json").read_text())["families"].values():
        for key, verdict in verdicts.items():
            assert f"| {key} | {verdict['said']} | {verdict['outcome']}" in page
