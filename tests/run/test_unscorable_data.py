"""Data of which nothing, or only a part, can be scored: refused before anything is compiled, or counted and said."""

import json

import pytest
from support.small_run import small_config_of

from mer_r1_jax.data.quarantine import Quarantine, QuarantineLimitError
from mer_r1_jax.data.records import read_records
from mer_r1_jax.run.setup import make_setup
from mer_r1_jax.run.train import train

NOTHING = "no record's solution has a word on a wheel, so nothing can be learnt from it"


@pytest.fixture
def neutral(small_folder, tmp_path):
    """Writes a copy of one of the small run's files in which the last `count` truths, or all, are on no wheel."""

    def neutral(name, count=None):
        rows = [json.loads(line) for line in (small_folder / f"{name}.jsonl").read_text().splitlines()]
        for row in rows[-count:] if count else rows:
            row["solution"] = ["neutral"]
        path = tmp_path / f"{name}_neutral.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {f"{name}_path": str(path)}

    return neutral


@pytest.fixture
def config_of(small_folder, tmp_path):
    def config_of(data, **changes):
        data = {"media_root": str(small_folder)} | data
        changes = {"mesh": {"data": 4, "tensor": 2}, "train": {"output_dir": str(tmp_path / "runs")}} | changes
        return small_config_of(small_folder, data=data, **changes)

    return config_of


@pytest.mark.parametrize("unscorable", ["drop", "format_only"])
@pytest.mark.parametrize("sft_steps", [0, 40])
@pytest.mark.parametrize("held_out", [True, False])
def test_rl_on_nothing_scorable_stops_before_anything_begins(
    unscorable, sft_steps, held_out, neutral, config_of, tmp_path, refusal
):
    data = neutral("rl") | ({} if held_out else {"eval_path": ""})
    config = config_of(data, sft={"max_steps": sft_steps}, rl={"unscorable": unscorable})
    told = refusal(config)
    assert NOTHING in told and data["rl_path"] in told and not (tmp_path / "runs").exists()


def test_held_out_records_of_which_none_can_be_scored_are_refused(neutral, config_of, tmp_path, refusal):
    data = neutral("eval")
    told = refusal(config_of(data))
    assert data["eval_path"] in told and "no solution of its 5 records has a word on a wheel" in told
    assert not (tmp_path / "runs").exists()


def test_held_out_records_within_the_limit_are_the_ones_that_count(small_folder, config_of, tmp_path, refusal):
    rows = [json.loads(line) for line in (small_folder / "eval.jsonl").read_text().splitlines()]
    rows[0]["solution"] = rows[1]["solution"] = ["neutral"]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = refusal(config_of({"eval_path": str(path)}, eval={"limit": 2}))
    assert "no solution of its 2 records" in told and "eval.limit" in told
    assert make_setup(config_of({"eval_path": str(path)}, eval={"limit": 3})).data.unscorable_eval == 2


def test_sft_alone_needs_no_word_on_a_wheel(neutral, config_of):
    setup = make_setup(config_of(neutral("sft") | {"eval_path": ""}, rl={"max_steps": 0}))
    assert len(setup.data.sft) == 7 and setup.data.rl == ()


def test_an_evaluation_alone_says_how_many_clips_are_in_no_score(neutral, config_of, tmp_path, capsys):
    config = config_of(neutral("eval", count=2), sft={"max_steps": 0}, rl={"max_steps": 0})
    assert train(config) == 0
    told = capsys.readouterr()
    said = " ".join((told.out + told.err).split())
    assert "5 held-out records (2 unscorable, in no score)" in said
    # One of the two is broken besides, and is in no count of answers.
    assert said.count("over 3 of 4 clips, the truth of 1 is on no wheel") == 2
    (file,) = (tmp_path / "runs/small/eval").glob("*[0-9].json")
    scores = json.loads(file.read_text())
    assert (scores["n"], scores["n_scored"], scores["n_unscorable"]) == (4, 3, 1)


@pytest.mark.parametrize("allowed", [0.5, 1.0])
def test_a_run_whose_every_clip_broke_stops_whatever_may_break(allowed, small_folder):
    records = read_records(small_folder / "rl.jsonl")
    quarantine = Quarantine(len(records), allowed)
    for record in records[:-1]:
        quarantine.add(record, ValueError("broken"), step=1)
    if allowed == 1.0:
        quarantine.check()
    quarantine.add(records[-1], ValueError("broken"), step=1)
    with pytest.raises(QuarantineLimitError, match="6 of 6 clips"):
        quarantine.check()
