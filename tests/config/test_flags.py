"""Numbers among the commands' own flags, which are no fields of the configuration, have bounds as well."""

import subprocess
import sys

import pytest
from absl import flags
from support.commands import COMMANDS, EXPERIMENTS, load_command

from mer_r1_jax.config.schema import ConfigError, RunConfig
from mer_r1_jax.run.ablation_plan import make_plan

WITH_FLAGS = sorted(path.stem for path in COMMANDS.glob("*.py") if "flags.DEFINE" in path.read_text())


@pytest.mark.parametrize("name", WITH_FLAGS)
def test_every_number_among_a_commands_flags_has_a_lowest_value(name):
    load_command(name)
    own = flags.FLAGS.flags_by_module_dict()[f"command_{name}"]
    numbers = [flag for flag in own if flag.flag_type() in ("int", "float") and "." not in flag.name]
    assert [flag.name for flag in numbers if flag.parser.lower_bound is None] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate_mme", "--out=x", "--timeout=nan"], "--timeout: got nan, expected"),
        (["evaluate_mme", "--out=x", "--max_failed_frac=nan"], "--max_failed_frac: got nan, expected"),
        (["evaluate_mme", "--out=x", "--timeout=-1"], "timeout"),
        (["probe", "swap", "--limit=-1"], "limit"),
        (
            ["probe", "swap", "--limit=1000000000000000"],
            "--limit: got 1000000000000000, expected at least 0 and at most",
        ),
        (["make_synthetic", "--out=x", "--seed=-1"], "seed"),
    ],
)
def test_commands_refuse_numbers_beyond_the_bounds_of_their_flags(words, said, tmp_path):
    command = [sys.executable, str(EXPERIMENTS / f"{words[0]}.py"), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: the command line cannot be used" in done.stderr and said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", ["nan", "-1", "1.5", "9" * 12, "9" * 5000, "0x1", ""])
def test_seeds_of_an_ablation_are_held_to_the_bounds_of_a_runs(seed, tmp_path):
    with pytest.raises(ConfigError, match="--seeds: got .*expected whole numbers"):
        make_plan(RunConfig(), tmp_path, ["ad"], ["0", seed])


def test_one_seed_spelt_in_two_ways_stands_there_twice(tmp_path):
    with pytest.raises(ConfigError, match="--seeds: 1 stands there twice"):
        make_plan(RunConfig(), tmp_path, ["ad"], ["1", "01"])
