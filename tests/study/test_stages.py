"""Both stages of the study without their training: blocks, summaries gone on with, what is refused, results."""

import dataclasses
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from support.commands import run_command
from support.small_ablation import rescore, write_run

from mer_r1_jax.config.build import load_config, shipped
from mer_r1_jax.config.schema import ARM_NAMES, ConfigError, RlConfig
from mer_r1_jax.lab import experiment
from mer_r1_jax.lab.experiment import OVER_RL, SFT, LabResult
from mer_r1_jax.lab.measures import COMMON_POINT, MEASURES, cross_fitted
from mer_r1_jax.lab.teaching import SAMPLED
from mer_r1_jax.run.ablation_plan import run_name
from mer_r1_jax.study import stage_b
from mer_r1_jax.study.stage_a import make_plan, run_stage
from mer_r1_jax.study.summaries import StudyError, Summary, merged, read_summary, write_summary

DOCS = Path(__file__).parents[2] / "docs"
FEW = {"eval_clips": 6, "width": 8}


def test_the_registered_stage_is_that_of_the_protocol():
    plan = make_plan([], {})
    assert plan.registered and plan.seeds == tuple(range(200, 216))
    blocks = plan.blocks()
    assert len({block.name for block in blocks}) == len(blocks) == 2 * (2 * 3 + 2)
    assert [(b.world, b.generations, b.seeds[0]) for b in blocks[:3]] == [("U", 8, 200), ("U", 8, 208), ("O", 8, 200)]
    assert blocks[0].name == "U_g8_seeds200-207"
    tenth, one = {*ARM_NAMES, "permuted"}, {f"{arm}@1" for arm in ARM_NAMES if arm.startswith(("sfcc", "mer"))}
    assert all(set(b.arms) == (tenth | one if b.generations == 8 else tenth) for b in blocks if not b.variant)
    for block in blocks:
        config = block.config({})
        assert config.rl.num_generations * config.rl.prompts_per_step == 96
        assert (config.eval_samples, config.common_point, config.data_seed) == (4, True, 201)
        assert (config.eval_clips, config.sft.max_steps, config.rl.max_steps) == (2000, 1200, 150)
    variants = {b.variant: (b.world, b.config({}).rl.beta, b.config({}).rl.calibration_counts) for b in blocks}
    assert variants == {"": ("T", 0.04, "word"), "no_kl": ("U", 0.0, "word"), "count_once": ("T", 0.04, "category")}


@pytest.mark.parametrize(
    ("seeds", "settings", "said"),
    [
        ([], {"eval_clips": 5}, "--set: got eval_clips for the registered seeds, expected none"),
        ([900], {"data_seed": 201}, "--set=data_seed: got 201, the seed of the registered scenes"),
        ([199, 200], {}, "--seeds: got 200, expected none of 200 to 215, which are registered and run once"),
        ([900], {"rl.num_generations": 4}, "the stage compares groups of 8 and 4"),
        ([900], {"eval_clip": 5}, "eval_clip"),
    ],
)
def test_a_trial_never_touches_what_is_registered(seeds, settings, said):
    with pytest.raises((StudyError, ConfigError), match=said):
        make_plan(seeds, settings)


def fake_run(world, config, arms, seeds, say):
    """What the lab would give, from random numbers."""
    rng = np.random.default_rng([len(world), config.rl.num_generations, *seeds])
    rows = {
        row: {name: rng.random((len(seeds), config.eval_clips)) for name in (*MEASURES, *COMMON_POINT)}
        for row in (SFT, *(arm.name for arm in arms))
    }
    names = (*SAMPLED, *(f"{name}_over_rl" for name in OVER_RL))
    sampled = {arm.name: {name: rng.random(len(seeds)) for name in names} for arm in arms}
    return LabResult(
        world=world, config=config, seeds=tuple(seeds), rows=rows, sampled=sampled, paths={}, stop_curve=[],
        ceiling=0.7, seconds={"rl": 1.0},
    )  # fmt: skip


def test_a_trial_sees_other_scenes_than_the_registered_stage():
    plan = make_plan([900], {})
    assert {block.config(plan.settings).data_seed for block in plan.blocks()} == {0}


def test_a_stage_goes_on_from_its_summaries_and_is_judged_when_all_are_there(tmp_path, monkeypatch, capsys):
    ran = []

    def run(world, config, arms, seeds, say):
        ran.append((world, config.rl.num_generations, len(arms), tuple(seeds)))
        if len(ran) == 4:
            raise KeyboardInterrupt
        return fake_run(world, config, arms, seeds, say)

    monkeypatch.setattr(experiment, "run", run)
    words = ["--seeds=900-908", f"--out={tmp_path}", *(f"--set={name}={value}" for name, value in FEW.items())]
    with pytest.raises(KeyboardInterrupt):
        run_command("study", *words)
    assert len(list(tmp_path.glob("*.json"))) == 3 and not (tmp_path / "results.md").exists()
    assert run_command("study", *words) == 0
    # The three finished ones are not run again, nor anything when all are there.
    assert len(ran) == 16 + 1 and ran[3] == ran[4]
    assert run_command("study", *words) == 0 and len(ran) == 17

    said = capsys.readouterr().out
    assert "Registered: weight 0.1, groups of 8 (a trial)" in said and "Second weight: 1, groups of 8" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["registered"] is False and list(results["families"]) == [
        "Registered: weight 0.1, groups of 8",
        "Second weight: 1, groups of 8",
        "Second size of groups: weight 0.1, groups of 4",
    ]
    h3 = results["families"]["Registered: weight 0.1, groups of 8"]["H3"]
    blocks = [read_summary(tmp_path / f"U_g8_seeds{seeds}.json") for seeds in ("900-907", "908-908")]
    recall = [np.concatenate([block.rows[row]["slow_recall"] for block in blocks]) for row in ("ad", "baseline")]
    assert h3["measures"][0]["mean"] == pytest.approx(100 * np.mean(recall[0] - recall[1]))
    assert h3["measures"][0]["seeds"] == 9
    page = (tmp_path / "results.md").read_text()
    assert "This is a **trial**" in page and "### World T, groups of 8, count\\_once: levels" not in page
    assert "World T, groups of 8, count_once: levels" in page and "permuted, over sft" in page

    # A second run in another folder is printed beside the first, which differs in one score of one seed.
    again = tmp_path / "again"
    assert run_command("study", *[word for word in words if "--out" not in word], f"--out={again}") == 0
    changed = read_summary(again / "O_g8_seeds900-907.json")
    changed.rows["rd"]["slow_f1"][2] += 0.0125
    write_summary(again / "O_g8_seeds900-907.json", changed)
    second = [word for word in words if "--out" not in word] + [f"--out={again}", f"--beside={tmp_path}"]
    assert run_command("study", *second) == 0
    page = (again / "results.md").read_text()
    apart = page.split("### How far the two runs are apart")[1].split("###")[0]
    assert "| World O, groups of 8 | 162 | 1.250 |" in apart and "| World U, groups of 8 | 162 | 0.000 |" in apart
    assert "### The first run and this one" in page and page.count("| H4a sfcc_loss@1 |") == 2

    # Summaries of other settings are not taken for these.
    with pytest.raises(StudyError, match="summary of other config, expected those of this block"):
        run_stage(make_plan(range(900, 909), FEW | {"width": 9}), tmp_path, "", print)


def test_a_summary_is_read_back_and_a_broken_one_is_not_believed(tmp_path):
    rows = {"sft": {"slow_f1": [0.123456, 0.5]}, "ad": {"slow_f1": [0.25, 1.0], "kl": [0.1, 0.2]}}
    summary = Summary("A", True, "U", "", (4, 2), {"width": 8}, rows, {"seconds": 1})
    write_summary(tmp_path / "s.json", summary)
    back = read_summary(tmp_path / "s.json")
    assert back.rows["sft"]["slow_f1"] == [0.12346, 0.5] and back.rows["ad"] == rows["ad"] and back.seeds == (4, 2)
    other = Summary("A", True, "U", "", (3,), {"width": 8}, {"ad": {"slow_f1": [0.75]}, "rd": {"slow_f1": [0.1]}})
    assert merged([back, other]) == {"ad": {"slow_f1": [1.0, 0.75, 0.25]}}  # by seed; what both have
    with pytest.raises(StudyError, match="seeds 2, 4 are in two summaries"):
        merged([back, back])
    (tmp_path / "s.json").write_text(json.dumps({"stage": "A"}))
    with pytest.raises(StudyError, match="got no summary that can be read .it lacks config, registered, rows"):
        read_summary(tmp_path / "s.json")


def test_a_common_point_is_chosen_on_the_other_half():
    # Two biases, one seed, four clips: the first is better on even clips, the second on odd ones.
    f1_BSN = np.asarray([[[0.9, 0.1, 0.8, 0.2]], [[0.3, 0.5, 0.4, 0.6]]], np.float32)
    np.testing.assert_allclose(cross_fitted(f1_BSN), [[0.3, 0.1, 0.4, 0.2]])


def write_seed(folder, seed, gain):
    """A whole seed of a small ablation, whose expected scores are set by hand."""
    spreads = [{"rewards/recall/group_std": 0.1, "rewards/precision/group_std": 0.2 + 0.01 * n} for n in range(3)]
    for number, row in enumerate((stage_b.SFT, *stage_b.ARMS)):
        run = write_run(folder / run_name(row, seed), arm=row, seed=seed, metrics=spreads)
        scores = {
            f"{mode}_expected_{name}": 0.4 + gain * number + 0.01 * seed * (name == "f1")
            for mode in ("slow", "fast")
            for name in ("f1", "recall", "precision")
        }
        rescore(run, **scores, slow_fixed_confidence_correct=0.5, slow_fixed_confidence_wrong=0.25)


def test_a_seed_of_stage_b_is_registered_as_the_protocol_names_it():
    """By the settings that the command of the study's page asks for."""
    page = (DOCS / "study" / "running.md").read_text()
    words = shlex.split(page.split("mer-r1 ablate")[1].split("mer-r1 study")[0].replace("\\\n", " "))
    asked = dict(word.removeprefix("--").split("=", 1) for word in words)
    settings = {name.removeprefix("config."): value for name, value in asked.items() if name.startswith("config.")}
    settings = {name: json.loads(value) if value.isdecimal() else value for name, value in settings.items()}
    config = dataclasses.asdict(load_config(shipped()["synthetic"], settings))
    assert asked["arms"].split(",") == list(stage_b.ARMS) and asked["seeds"] == "10,11,12,13,14,15"
    assert stage_b.is_registered(10, config) and not stage_b.is_registered(20, config)
    older = {name: value for name, value in config["rl"].items() if name != "steps_per_generation"}
    assert stage_b.is_registered(10, config | {"rl": older})
    for section, name, value in (
        ("data", "synthetic_seed", 0), ("sft", "max_steps", 1500), ("rl", "max_steps", 100),
        ("eval", "limit", 50), ("rl", "beta", 0.0), ("rl", "temperature", 0.5),
        ("rl", "num_iterations", 2), ("rl", "steps_per_generation", 4),
    ):  # fmt: skip
        assert not stage_b.is_registered(10, config | {section: config[section] | {name: value}})


def test_stage_b_is_judged_from_whole_seeds_and_each_counts_once(tmp_path, capsys):
    runs, out = tmp_path / "runs", tmp_path / "out"
    write_seed(runs, 10, 0.02)
    write_run(runs / run_name("sft", 11), seed=11)
    assert run_command("study", "--stage=B", f"--runs={runs}", f"--out={out}") == 0
    said = capsys.readouterr().out
    assert "seed 11: baseline, rd, ad, mer_r1 not finished" in said and "seed 19: sft, baseline" in said
    assert "H1                       undecided (1 of the 5 seeds that can decide anything)" in said
    summary = read_summary(out / "U_seed10.json")
    assert summary.rows["ad"]["slow_f1"] == [pytest.approx(0.4 + 0.02 * 3 + 0.1)]
    assert summary.rows["ad"]["precision_spread_over_rl"] == [pytest.approx(0.21)]
    assert summary.rows["ad"]["confidence_wrong"] == [0.25] and "kl" not in summary.rows["sft"]
    assert summary.registered is False  # eight clips of another data set
    # What is committed names no folder of the machine it was run on.
    assert summary.config["train"]["output_dir"] == summary.config["data"]["synthetic_dir"] == ""
    assert str(tmp_path) not in (out / "U_seed10.json").read_text()

    # Of registered runs nothing is judged before the seeds that are certain are all there.
    registered = tmp_path / "registered"
    for seed in range(10, 16):
        assert seed == 10 or not (registered / "results.md").exists()
        kept = dataclasses.replace(summary, registered=True, seeds=(seed,))
        if seed > 11:  # by a newer version than the first seeds', with a setting more, at its default
            newer = {**summary.config["rl"], "steps_per_generation": RlConfig().steps_per_generation}
            assert newer != summary.config["rl"]
            kept = dataclasses.replace(kept, config={**summary.config, "rl": newer})
        write_summary(registered / f"U_seed{seed}.json", kept)
        assert run_command("study", "--stage=B", f"--out={registered}", *["--nojudge"] * (seed == 11)) == 0
    said = capsys.readouterr().out
    assert "seeds 13, 14, 15 have no summary yet; nothing is judged before" in said and "seeds 12, 13" not in said
    assert (registered / "results.md").exists() and "a trial" not in said

    # Nor with a trial among them.
    write_summary(registered / "U_seed100.json", dataclasses.replace(summary, seeds=(100,)))
    assert run_command("study", "--stage=B", f"--out={registered}") == 2
    assert "summaries of the registered stage beside those of a trial" in " ".join(capsys.readouterr().err.split())

    # Other numbers of the same seed: the first ones stay. Without the runs the summaries are enough.
    rescore(runs / run_name("ad", 10), slow_expected_f1=0.9)
    assert run_command("study", "--stage=B", f"--runs={runs}", f"--out={out}") == 0
    assert "got other numbers from these runs, expected those of the first" in capsys.readouterr().out
    assert read_summary(out / "U_seed10.json") == summary
    assert run_command("study", "--stage=B", f"--out={out}") == 0
    assert run_command("study", "--stage=B", f"--out={tmp_path / 'empty'}") == 2
    assert "got no summary of a whole seed, expected at least one" in capsys.readouterr().err
