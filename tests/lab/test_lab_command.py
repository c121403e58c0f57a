"""`mer-r1 lab`: the tables, the files, an arm of one's own, and what is refused."""

import json
import sys

import numpy as np
import pytest
from support.commands import load_command, run_command

from mer_r1_jax.config.schema import ARM_NAMES
from mer_r1_jax.lab.measures import MEASURES
from mer_r1_jax.lab.worlds import PURPOSES, WORLDS
from mer_r1_jax.rl.own_function import own_function

SMALL = [
    f"--set={setting}"
    for setting in (
        *("sft_clips=30", "rl_clips=20", "eval_clips=25", "width=8", "sft.max_steps=3", "sft.prompts_per_step=8"),
        *("rl.max_steps=2", "rl.prompts_per_step=2", "rl.num_generations=3"),
    )
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of its own with a module of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own_function.cache_clear()
    (tmp_path / "mine_of_lab.py").write_text("def recall(rewards, config):\n    return rewards.recall_BG - 0.5\n")
    return tmp_path


def test_an_experiment_is_printed_and_written(here, capsys):
    words = ["--world=T", "--arms=baseline,permuted", "--arm=mine_of_lab.recall,mer_r1@1", "--seeds=3,5-6", *SMALL]
    assert run_command("lab", *words) == 0
    said = capsys.readouterr().out
    rows = ["sft", "baseline", "permuted", "mine_of_lab.recall", "mer_r1@1"]
    assert all(f"\n{row} " in f"\n{said}" for row in rows) and "3 seeds" in said and "F1 − baseline" in said
    assert {path.name for path in (here / "runs/lab").iterdir()} == {"T.json", "T.md", "T.svg"}

    written = json.loads((here / "runs/lab/T.json").read_text())
    assert list(written["rows"]) == rows and written["seeds"] == [3, 5, 6] and written["world"] == "T"
    assert all(list(row) == list(MEASURES) for row in written["rows"].values())
    assert all(
        len(values) == 3 and np.isfinite(values).all() for row in written["rows"].values() for values in row.values()
    )
    assert written["config"]["width"] == 8 and written["config"]["answers_from_trace"] is True
    assert [point[0] for point in written["paths"]["mer_r1@1"]] == [0, 1, 2]
    assert set(written["sampled"]["baseline"]) > {"drift", "kl"} and written["seconds"]["rl"] > 0

    page = (here / "runs/lab/T.md").read_text()
    assert "| mine_of_lab.recall |" in page and "![Operating points](T.svg)" in page and "```bash\nmer-r1 lab" in page
    mean = 100 * np.mean(written["rows"]["baseline"]["slow_f1"])
    assert f"| baseline | {mean:.1f} |" in page
    picture = (here / "runs/lab/T.svg").read_bytes()
    assert picture.startswith(b"<?xml") and len(picture) > 10_000


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--arm=mer_r2", "arm: got 'mer_r2', expected baseline"),
        ("--arm=nowhere.arm", "the module nowhere cannot be imported"),
        ("--seeds=7-3", "--seeds: got '7-3', expected a number such as 0, or a range such as 0-7"),
        ("--set=rl.bet=0", "rl.bet: no such field; did you mean rl.beta?"),
        ("--set=world.label_gain.x=1", "world.label_gain: got {'x': 1} (dict), expected float"),
        ("--set=rl.num_generations=1", "rl.num_generations: got 1"),
        ("--set=rl.max_steps=0", "rl.max_steps: got 0, expected at least 1 here"),
        ("--set=width=0", "width: got 0"),
        ("--set=eval_clips=1", "eval_clips: got 1, expected at least 2 here"),
        ("--set=world.word_weights=[1, 2]", "WorldConfig.word_weights must sum to 1, got (1.0, 2.0)"),
        ("--set=concludes", "--set=concludes: expected NAME=VALUE"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_drawn(here, capsys, word, said):
    assert run_command("lab", word) == 2
    assert said in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_lists_written_out_for_quick_help_are_those_of_the_code():
    arms = load_command("lab").ARMS
    assert len(arms) == 9 and set(arms) - {"permuted"} <= set(ARM_NAMES) and list(PURPOSES) == list(WORLDS)
