"""Every number of the schema has bounds, which hold however a configuration comes in."""

import dataclasses
import json
import math
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from mer_r1_jax.config.bounds import Number, bounds_of, plain_type
from mer_r1_jax.config.build import checked, config_dict, from_mapping, load_config, to_json
from mer_r1_jax.config.schema import ConfigError, RlConfig, RunConfig, TrainConfig

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def fields_of(section, prefix=""):
    """Yields (dotted name, type, default) of every field."""
    for name, hint in typing.get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name, hint, value


def is_number(hint):
    return plain_type(hint) in (int, float, tuple[int, ...], tuple[float, ...])


NUMBERS = [(name, hint) for name, hint, _ in fields_of(RunConfig()) if is_number(hint)]
FLOATS = [name for name, hint in NUMBERS if plain_type(hint) in (float, tuple[float, ...])]
LISTS = [name for name, hint in NUMBERS if typing.get_origin(plain_type(hint)) is tuple]


def with_value(dotted, value):
    values = json.loads(to_json(RunConfig()))
    *sections, field = dotted.split(".")
    section = values
    for name in sections:
        section = section[name]
    section[field] = [value] if dotted in LISTS and not isinstance(value, list) else value
    return values


@pytest.mark.parametrize(("name", "hint"), NUMBERS, ids=[name for name, _ in NUMBERS])
def test_every_number_of_the_schema_has_bounds_that_hold_its_default(name, hint):
    (bound,) = bounds_of(hint)
    assert isinstance(bound, Number) and math.isfinite(bound.least) and math.isfinite(bound.most)


def test_no_text_of_the_schema_is_without_a_bound_or_a_choice():
    texts = [(name, hint) for name, hint, _ in fields_of(RunConfig()) if plain_type(hint) in (str, tuple[str, ...])]
    free = [name for name, hint in texts if not bounds_of(hint) and "Literal" not in str(hint)]
    assert len(texts) > 20 and free == []


def test_the_defaults_are_in_bounds():
    assert checked(RunConfig()) == RunConfig()


@pytest.mark.parametrize("name", [name for name, _ in NUMBERS])
def test_numbers_beyond_their_bounds_are_refused_by_name(name):
    # JSON brings NaN and Infinity too; 10**5000 is a number that Python will not even write out.
    odd = [10**30, -(10**30), 10**5000, True, "3", None]
    odd += [math.nan, math.inf, -math.inf, 1e308, -1e308] if name in FLOATS else [1.5, math.nan]
    for value in odd:
        with pytest.raises(ConfigError, match=rf"\n  - {name}: got .*expected ") as caught:
            from_mapping(with_value(name, value))
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(f"{phase}.optimizer.{name}", 0.0) for phase in ("sft", "rl") for name in ("learning_rate", "adam_epsilon")],
        *[
            (f"rl.optimizer.{name}", value)
            for name in ("adam_beta1", "adam_beta2", "warmup_ratio")
            for value in (1, -1)
        ],
        *[("rl.optimizer.weight_decay", -0.1), ("rl.optimizer.max_grad_norm", 0.0)],
        *[("rl.beta_decay", value) for value in (-0.5, 1.5)],
        *[("rl.top_p", value) for value in (0.0, 1.01)],
        *[("data.max_quarantined_fraction", value) for value in (-0.1, 1.1)],
        *[("rl.num_train_epochs", 0.0), ("sft.num_train_epochs", -1.0), ("rl.max_steps", -2)],
        *[("media.fps", 0.0), ("media.max_audio_seconds", 301.0), ("media.decode_workers", -1)],
        *[("media.video_total_pixels", 0), ("model.initializer_range", 0.0), ("model.text_layers", -1)],
        *[("train.seed", -1), ("train.seed", 2**31), ("data.synthetic_rl_clips", -4), ("eval.limit", -1)],
        *[("eval.num_examples", -1), ("train.num_completions_to_print", -1), ("mesh.data", 0), ("mesh.tensor", -2)],
        *[("data.prompt_buckets", [0, 2048]), ("rl.word_penalty", -1.0), ("rl.reward_weights", [1.0, math.nan])],
    ],
)
def test_zeros_negatives_and_shares_outside_their_range_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"\n  - {name}: got "):
        from_mapping(with_value(name, value))


@pytest.mark.parametrize("name", ["mesh.data", "mesh.fsdp"])
def test_one_axis_of_the_mesh_may_be_inferred_but_not_two(name):
    values = with_value(name, -1)
    values["mesh"]["tensor"] = -1
    if name == "mesh.fsdp":
        values["mesh"]["data"] = 1
    with pytest.raises(ConfigError, match="at most one -1"):
        from_mapping(values)
    values["mesh"]["tensor"] = 2
    values["mesh"]["data" if name == "mesh.fsdp" else "fsdp"] = 1
    from_mapping(values)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../../b", "a//b", "a/", ".", "a\x00b", "a\nb", "\x1b[31m", " a", "a\\b", "x" * 201, "\ud800"],
)
@pytest.mark.parametrize("field", ["run_name", "name"])
def test_a_run_is_named_below_the_output_folder(name, field):
    dotted = "train.run_name" if field == "run_name" else "name"
    with pytest.raises(ConfigError, match=f"{dotted}: got .*expected the name of a folder") as caught:
        from_mapping(with_value(dotted, name))
    assert str(caught.value).isprintable() or "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", ["mer_r1_seed0", "ablation/rd_seed1", "Lauf 3, größer", "v1.2-x"])
def test_names_of_runs_that_are_folders_pass(name):
    assert from_mapping(with_value("train.run_name", name)).train.run_name == name


@pytest.mark.parametrize(
    "field", ["data.rl_path", "model.path", "train.output_dir", "data.cache_dir", "data.media_root"]
)
@pytest.mark.parametrize("path", ["clips\x00/x", "a\x1b[2Jb", "x" * 5000, "\ud812.jsonl"])
def test_paths_that_no_file_system_holds_are_refused_by_name(field, path):
    with pytest.raises(ConfigError, match=f"{field}: got .*expected a path"):
        from_mapping(with_value(field, path))


def test_file_names_that_are_no_utf8_pass():
    assert from_mapping(with_value("data.rl_path", "caf\udce9.jsonl")).data.rl_path == "caf\udce9.jsonl"


@pytest.mark.parametrize("field", ["data.question", "data.system_prompt"])
def test_text_that_no_tokenizer_takes_is_refused_by_name(field):
    with pytest.raises(ConfigError, match=f"{field}: got .*surrogate"):
        from_mapping(with_value(field, "How \ud83d?"))


def test_a_saved_configuration_is_held_to_the_same_bounds(tmp_path):
    saved = tmp_path / "config.json"
    saved.write_text(to_json(RunConfig()).replace('"temperature": 0.9', '"temperature": NaN'))
    with pytest.raises(ConfigError, match=r"rl\.temperature: got nan, expected more than 0"):
        load_config(saved)
    saved.write_text(to_json(RunConfig()).replace('"temperature": 0.9', '"temperature": 1e999'))
    with pytest.raises(ConfigError, match=r"rl\.temperature: got inf"):
        load_config(saved)


def test_configurations_made_by_hand_are_held_to_the_same_bounds():
    with pytest.raises(ConfigError, match=r"rl\.temperature: got nan"):
        checked(RunConfig(rl=RlConfig(temperature=math.nan)))
    with pytest.raises(ConfigError, match=r"train\.seed: got True"):
        checked(RunConfig(train=TrainConfig(seed=True)))
    values = config_dict()
    values.rl.beta = -math.inf
    with pytest.raises(ConfigError, match=r"rl\.beta: got -inf"):
        from_mapping(values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("rl.optimizer.learning_rate=nan", "rl.optimizer.learning_rate: got nan, expected more than 0"),
        ("media.fps=inf", "media.fps: got inf, expected more than 0"),
        ("train.run_name=../x", "train.run_name: got '../x', expected the name of a folder"),
        ("rl.reward_weights=(1e999,)", "rl.reward_weights: got (inf,), expected"),
    ],
)
def test_train_refuses_what_comes_by_flags(flag, words, tmp_path):
    config = f"--config={EXPERIMENTS / 'configs' / 'synthetic.py'}:smoke"
    command = [sys.executable, str(EXPERIMENTS / "train.py"), config, f"--config.{flag}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
