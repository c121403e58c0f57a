"""What an ablation runs, run by run."""

import dataclasses
import json
from pathlib import Path

import pytest

from mer_r1_jax.config.build import difference, to_json
from mer_r1_jax.config.schema import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RlConfig,
    RunConfig,
    SftConfig,
)
from mer_r1_jax.run.ablation import setting_of
from mer_r1_jax.run.ablation_plan import Controls, make_plan, setting_differences

OUT = Path("/somewhere/ablation")


def config(**sections):
    base = RunConfig(
        model=ModelConfig(preset="tiny", text_layers=3, text_rope_theta=100.0, vision_heads=2, audio_mlp_size=8),
        data=DataConfig(eval_path="eval.jsonl"),
        sft=SftConfig(max_steps=2000, optimizer=OptimizerConfig(learning_rate=2e-3)),
        rl=RlConfig(arm="rd", max_steps=200, beta=0.1),
    )
    return dataclasses.replace(base, **sections)


def changed(job, base=None):
    return {
        name: now
        for name, (_, now) in difference(dataclasses.asdict(base or config()), dataclasses.asdict(job.config)).items()
    }


def test_arms_differ_in_nothing_but_the_arm():
    plan = make_plan(config(), OUT, ["baseline", "mer_r1"], ["0", "2"])
    jobs = {job.name: job for job in plan.jobs()}
    assert list(jobs) == ["sft_seed0", "baseline_seed0", "mer_r1_seed0", "sft_seed2", "baseline_seed2", "mer_r1_seed2"]
    sft = changed(jobs["sft_seed2"])
    place = {"train.output_dir": str(OUT), "train.run_name": "sft_seed2", "train.seed": 2}
    assert sft == place | {"rl.max_steps": 0, "rl.arm": "mer_r1"}
    assert jobs["sft_seed2"].needs == "" and jobs["baseline_seed2"].needs == "sft_seed2"
    no_sizes = dict.fromkeys(
        ["model.text_layers", "model.text_rope_theta", "model.vision_heads", "model.audio_mlp_size"], 0
    )
    expected = place | no_sizes | {"train.run_name": "baseline_seed2", "rl.arm": "baseline", "sft.max_steps": 0}
    assert changed(jobs["baseline_seed2"]) == expected | {"model.path": str(OUT / "sft_seed2/export/hf")}
    apart = difference(
        dataclasses.asdict(jobs["baseline_seed2"].config), dataclasses.asdict(jobs["mer_r1_seed2"].config)
    )
    assert apart == {"rl.arm": ("baseline", "mer_r1"), "train.run_name": ("baseline_seed2", "mer_r1_seed2")}


def test_controls_change_what_they_say():
    plan = make_plan(config(), OUT, ["ad"], [1], Controls(("permuted", "sft", "plateau"), 800))
    jobs = {job.row: job for job in plan.jobs()}
    assert list(jobs) == ["sft", "ad", "control_permuted", "control_sft", "control_plateau"] == list(plan.rows)
    permuted = changed(jobs["control_permuted"])
    assert (permuted["rl.arm"], permuted["rl.permute_rewards"], permuted["sft.max_steps"]) == ("mer_r1", True, 0)
    further = changed(jobs["control_sft"])
    assert (further["sft.max_steps"], further["rl.max_steps"]) == (800, 0)
    assert "sft.optimizer.learning_rate" not in further and further["model.path"] == str(OUT / "sft_seed1/export/hf")
    plateau = changed(jobs["control_plateau"])
    assert (plateau["sft.max_steps"], plateau["rl.max_steps"]) == (2400, 0)
    assert "model.path" not in plateau and jobs["control_plateau"].needs == ""
    slower = make_plan(config(), OUT, ["ad"], [1], Controls(["sft"], 800, 5e-4)).job("control_sft", 1)
    assert slower.config.sft.optimizer.learning_rate == 5e-4
    epochs = config(sft=SftConfig(max_steps=-1, num_train_epochs=2.0))
    longer = make_plan(epochs, OUT, ["ad"], [1], Controls(["plateau"])).job("control_plateau", 1)
    assert (longer.config.sft.max_steps, longer.config.sft.num_train_epochs) == (-1, pytest.approx(2.4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"arms": ["base"]}, "--arms: 'base' is no arm; expected some of baseline"),
        ({"arms": ["ad", "ad"]}, "--arms: ad stands there twice"),
        ({"arms": []}, "--arms: got none"),
        ({"seeds": ["-1"]}, "--seeds: got '-1', expected whole numbers"),
        ({"controls": Controls(["none"])}, "--controls: 'none' is no control; expected some of permuted, sft, plateau"),
        ({"controls": Controls(["sft"])}, "--control_sft_steps: got 0"),
        ({"config": config(rl=RlConfig(max_steps=0))}, "rl.max_steps: got 0"),
        ({"config": config(sft=SftConfig(max_steps=0))}, "sft.max_steps: got 0"),
        ({"config": config(data=DataConfig())}, "data.eval_path: got nothing"),
        ({"config": config(rl=RlConfig(max_steps=1, permute_rewards=True))}, "--controls=permuted"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments, words):
    values = {"config": config(), "out": OUT, "arms": ["ad"], "seeds": ["0"]} | arguments
    with pytest.raises(ConfigError) as refused:
        make_plan(**values)
    assert words in str(refused.value)


def test_runs_with_other_settings_are_named(tmp_path):
    plan = make_plan(config(), tmp_path / "moved", ["ad", "rd"], [0])
    for job in make_plan(config(), tmp_path / "here", ["ad", "rd"], [0]).jobs():
        folder = tmp_path / "moved" / job.name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(to_json(job.config))
    assert setting_differences(plan.jobs()) == []  # a folder may move, and arms be added
    assert setting_differences(make_plan(config(), tmp_path / "moved", ["ad", "mer_r1"], [0, 1]).jobs()) == []
    saved = json.loads((tmp_path / "moved/ad_seed0/config.json").read_text())
    saved["rl"]["max_steps"] = 100
    (tmp_path / "moved/ad_seed0/config.json").write_text(json.dumps(saved))
    assert setting_differences(plan.jobs()) == ["ad_seed0: rl.max_steps: 100 in the run, 200 now"]


def test_the_tables_say_how_many_updates_share_a_rollout():
    def said(**settings):
        plan = make_plan(config(rl=RlConfig(max_steps=200, prompts_per_step=6, **settings)), OUT, ["mer_r1"], ["0"])
        return setting_of(plan.config, plan)

    assert "RL: 200 steps of 6 prompts × 4 completions from that checkpoint, learning rate" in said()
    shared = "RL: 200 steps of 6 prompts × 4 completions, {} updates a rollout of {} prompts, from that checkpoint"
    assert shared.format(2, 12) in said(steps_per_generation=2)
    assert shared.format(4, 6) in said(num_iterations=4)
    assert shared.format(8, 12) in said(steps_per_generation=2, num_iterations=4)
