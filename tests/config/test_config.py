"""The configuration: what the schema accepts, and how mistakes are named."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mer_r1_jax.config.build import config_dict, difference, from_mapping, load_config, to_json
from mer_r1_jax.config.schema import ConfigError, RunConfig
from mer_r1_jax.storage.run_settings import config_differences


def test_schema_survives_the_round_trip_through_ml_collections_and_json(tmp_path):
    config = dataclasses.replace(RunConfig(), name="mine")
    assert from_mapping(config_dict(config)) == config
    saved = tmp_path / "config.json"
    saved.write_text(to_json(config))
    assert load_config(saved) == config


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("rl", "num_generation"), 4, ["rl.num_generation", "did you mean rl.num_generations"]),
        (("rl", "kl_loss_coef"), 0.1, ["rl.kl_loss_coef", "rl.beta"]),
        (("rl", "num_generations"), "eight", ["rl.num_generations", "'eight'", "expected int"]),
        (("rl", "optimizer", "learning_rat"), 1.0, ["rl.optimizer.learning_rat", "rl.optimizer.learning_rate"]),
        (("rl", "loss_type"), "dapoo", ["rl.loss_type", "grpo, bnpo, dr_grpo, dapo"]),
        (("rl", "num_generations"), 1, ["rl.num_generations", "at least 2"]),
        (("rl", "delta"), 1.1, ["rl.delta: got 1.1", "0 (off) or more than 1 + rl.epsilon_high = 1.2"]),
        (("rl", "reward_funcs"), ["a.b,c.d"], ["rl.reward_funcs: got 'a.b,c.d'", "('a.b.one', 'a.b.two')"]),
        (("rl", "reward_funcs"), ["a.b", "a.b"], ["rl.reward_funcs", "each function once"]),
        (("rl", "reward_weights"), [1.0], ["rl.reward_weights: got 1 for 0 rl.reward_funcs", "calibration_weight"]),
        (("rl", "reward_timeout"), 0.0, ["rl.reward_timeout: got 0.0", "more than 0"]),
        (("rl", "max_faulty_rollouts"), 0, ["rl.max_faulty_rollouts", "at least 1"]),
        (("rl", "generation_batch_size"), 64, ["rl.generation_batch_size", "rl.prompts_per_step x rl.steps_per_gen"]),
        (("rl", "steps_per_generation"), 0, ["rl.steps_per_generation: got 0", "at least 1"]),
        (("rl", "repetition_penalty"), 1.1, ["rl.repetition_penalty", "not offered"]),
        (("media", "missing_audio"), "ignore", ["media.missing_audio", "error, skip, silence"]),
        (("media", "max_aspect_ratio"), 0.5, ["media.max_aspect_ratio: got 0.5, expected 1..200"]),
        (("mesh", "fsdp"), 0, ["mesh", "positive sizes"]),
        (("train", "report_to"), ["wandb2"], ["train.report_to", "tensorboard"]),
        (("sft",), 3, ["sft", "expected a section"]),
    ],
)
def test_mistakes_are_named_with_their_field_and_a_mend(path, value, words):
    values = json.loads(to_json(RunConfig()))
    section = values
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        from_mapping(values)
    for word in words:
        assert word in str(caught.value)


def test_batch_that_micro_batches_do_not_divide_suggests_one_that_they_do():
    values = json.loads(to_json(RunConfig()))
    values["rl"] |= {"prompts_per_step": 10, "gradient_accumulation_steps": 4}
    with pytest.raises(ConfigError, match="try 8 or 12"):
        from_mapping(values)


def test_reward_functions_and_their_weights_come_as_lists_or_tuples_whole_numbers_included():
    values = json.loads(to_json(RunConfig()))
    values["rl"] |= {"reward_funcs": ["mine.one", "mine.two"], "reward_weights": [1, 0.5], "delta": 4}
    config = from_mapping(values)
    assert config.rl.reward_funcs == ("mine.one", "mine.two") and config.rl.delta == 4.0
    assert config.rl.reward_weights == (1.0, 0.5) and type(config.rl.reward_weights[0]) is float


def test_all_mistakes_come_in_one_message():
    values = json.loads(to_json(RunConfig()))
    values["rl"] |= {"top_p": 0.0, "temperature": 0.0, "min_p": 2.0}
    with pytest.raises(ConfigError) as caught:
        from_mapping(values)
    assert all(f"rl.{name}" in str(caught.value) for name in ("top_p", "temperature", "min_p"))


def test_config_file_cannot_invent_fields(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from mer_r1_jax.config.build import config_dict\n"
        "def get_config():\n    config = config_dict()\n    config.rl.num_generatoins = 8\n    return config\n"
    )
    with pytest.raises(ConfigError, match="num_generatoins"):
        load_config(file)


def test_overrides_reach_nested_fields(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from mer_r1_jax.config.build import config_dict\ndef get_config():\n    return config_dict()\n")
    config = load_config(file, {"rl.optimizer.learning_rate": 1e-3, "rl.arm": "mer_r1"})
    assert config.rl.optimizer.learning_rate == 1e-3
    with pytest.raises(ConfigError, match="rl.optimizer.lr"):
        load_config(file, {"rl.optimizer.lr": 1e-3})


def test_difference_lists_changed_fields_with_both_values():
    old = json.loads(to_json(RunConfig()))
    new = dataclasses.asdict(dataclasses.replace(RunConfig(), name="other"))
    assert difference(old, new) == {"name": ("mer_r1", "other")}


def test_what_is_missing_on_a_command_line_is_named_and_nothing_runs():
    script = Path(__file__).parents[2] / "experiments" / "score.py"
    command = [sys.executable, str(script), "--predictions=x.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: the command line cannot be used: --metric is missing; --out is missing; --help" in done.stderr


def test_a_config_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("rl: {max_steps: 1}\n")
    with pytest.raises(ConfigError, match=r"ends in '\.yaml', expected a \.py file .*; rename it"):
        load_config(file)


def test_the_authors_recipe_differs_from_the_paper_s_in_what_it_names():
    paper, authors = (dataclasses.asdict(load_config(name)) for name in ("omni_7b", "authors_recipe"))
    differences = {
        line.partition(":")[0]: line.rpartition(" in the run, ")[2] for line in config_differences(paper, authors)
    }
    assert differences == {
        "name": '"authors_recipe" now',
        "mesh.tensor": "2 now",  # eight prompts, one for each two chips
        "mesh.decode_tensor": "2 now",
        "sft.prompts_per_step": "32 now",
        "sft.optimizer.warmup_ratio": "0.0 now",
        "rl.prompts_per_step": "8 now",
        "rl.optimizer.warmup_ratio": "0.0 now",
        "rl.loss_type": '"grpo" now',
        "rl.top_k": "50 now",
        "rl.unscorable": '"format_only" now',
        "rl.temper_logprobs": "false now",
        "rl.wheels_without_truth": '"zero" now',
        "rl.untagged_answer": '"split" now',
        "rl.format_reward": '"lenient" now',
    }


def test_switches_that_do_not_go_together_are_refused_by_name():
    for rl, message in (
        (dict(sampler_correction="token_mask", temper_logprobs=False), "rl.sampler_correction: got 'token_mask' with"),
        (dict(sync_ref_model=True, beta=0.0), "rl.sync_ref_model: got True with rl.beta=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_mapping({"rl": rl})


CONFIGS = Path(__file__).parents[2] / "experiments/configs"


def test_a_copy_of_a_config_begins_from_what_lies_beside_it_or_comes_with_the_package(tmp_path):
    copy = tmp_path / "mine.py"
    copy.write_text((CONFIGS / "omni_3b.py").read_text())
    assert load_config(copy) == load_config("omni_3b") == load_config(CONFIGS / "omni_3b.py")
    recipe = (CONFIGS / "omni_7b.py").read_text()
    (tmp_path / "omni_7b.py").write_text(recipe.replace("temperature = 0.9", "temperature = 0.8"))
    assert (load_config(copy).rl.temperature, load_config("omni_3b").rl.temperature) == (0.8, 0.9)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('other_config("omni_8b", __file__)', ["'omni_8b'", "omni_8b.py beside it", "omni_3b, omni_7b", "correct"]),
        ("with_values(RlConfig(), {'num_generations': 1})", ["num_generations", "at least 2"]),
    ],
)
def test_what_a_config_file_cannot_use_is_named_with_the_file_once(tmp_path, body, words):
    file = tmp_path / "mine.py"
    imports = "from mer_r1_jax.config.build import other_config, with_values\n"
    imports += "from mer_r1_jax.config.schema import RlConfig\n"
    file.write_text(f"{imports}\ndef get_config():\n    return {body}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(file)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert str(raised.value).count(str(file)) == 1


def test_a_config_file_may_have_the_name_of_the_one_it_begins_from(tmp_path):
    own = tmp_path / "omni_3b.py"
    body = 'other_config("omni_3b", __file__).get_config()'
    own.write_text(f"from mer_r1_jax.config.build import other_config\n\ndef get_config():\n    return {body}\n")
    assert load_config(own) == load_config("omni_3b")


def test_rl_alone_of_the_synthetic_run_differs_in_nothing_else():
    """What an export brings of its own, its sizes, is left to it; so `rl` continues what `make train` begins."""
    whole, alone = (dataclasses.asdict(load_config(CONFIGS / f"synthetic.py{part}")) for part in ("", ":rl"))
    changed = difference(whole, alone)
    assert changed.pop("name") == ("synthetic", "synthetic_rl")
    assert changed.pop("sft.max_steps") == (2000, 0)
    assert changed and all(name.startswith("model.") and not after for name, (_, after) in changed.items())
