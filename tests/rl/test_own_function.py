"""An arm and a loss type of the user's, by dotted path: found, tried on shapes, and named when something is wrong."""

import sys

import jax.numpy as jnp
import pytest

from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.config.schema import ARM_NAMES, LOSS_TYPES, ConfigError, RlConfig
from mer_r1_jax.rl.advantage import ARMS, arm_of
from mer_r1_jax.rl.losses import check_loss_type, step_totals
from mer_r1_jax.rl.own_function import OwnFunctionError, own_function

FUNCTIONS = """
import jax.numpy as jnp

NUMBER = 3

def good(rewards, config):
    return rewards.recall_BG - rewards.plus_BG

def one_a_prompt(rewards, config):
    return rewards.recall_BG.mean(-1)

def whole_numbers(rewards, config):
    return rewards.valid_BG.astype(int)

def a_list(rewards, config):
    return [1.0]

def looks_at_values(rewards, config):
    return rewards.recall_BG if rewards.recall_BG.sum() > 0 else rewards.f1_BG

def takes_too_little(rewards):
    return rewards.recall_BG

def loss(token_loss, mask, totals, config):
    return jnp.sum(token_loss * mask) / totals.tokens

def loss_of_tokens(token_loss, mask, totals, config):
    return token_loss
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a module that lies where the command is started, and nowhere else."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own_function.cache_clear()
    return name


def test_there_is_one_list_of_names():
    assert tuple(ARMS) == ARM_NAMES
    assert all(check_loss_type(name) is None for name in LOSS_TYPES)


def test_an_arm_is_found_by_its_path_and_reads_confidences(module):
    assert arm_of(f"{module}.good").candidates == "category"


def test_a_loss_type_is_found_by_its_path(module):
    check_loss_type(f"{module}.loss")
    mask = jnp.ones((1, 2, 3), bool)
    totals = step_totals(mask, mask.any(-1))
    assert own_function("rl.loss_type", f"{module}.loss")(2.0 * mask, mask, totals, RlConfig()) == 2


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none.such", "rl.arm: got .*the module none cannot be imported"),
        ("MODULE.nothing", "rl.arm: got .*has no nothing"),
        ("MODULE.NUMBER", "rl.arm: got .*it is a int, expected a function"),
        ("MODULE.one_a_prompt", r"returned float32\[2\], expected floats \[2, 3\]: one advantage for each"),
        ("MODULE.whole_numbers", r"returned int32\[2, 3\], expected floats"),
        ("MODULE.a_list", "returned a list, expected floats"),
        ("MODULE.looks_at_values", "raised TracerBoolConversionError"),
        ("MODULE.takes_too_little", "raised TypeError"),
    ],
)
def test_arms_that_cannot_be_used_are_named(module, path, said):
    with pytest.raises(OwnFunctionError, match=said):
        arm_of(path.replace("MODULE", module))


def test_loss_types_that_cannot_be_used_are_named(module):
    with pytest.raises(OwnFunctionError, match=r"rl.loss_type: .*returned float32\[2, 3, 4\], expected floats \[\]"):
        check_loss_type(f"{module}.loss_of_tokens")


@pytest.mark.parametrize("value", ["mer_r2", ".x", "a.", "a b.c", "", "a..b", "../x.py"])
@pytest.mark.parametrize("field", ["arm", "loss_type"])
def test_what_is_neither_a_name_nor_a_path_is_refused_with_both(field, value):
    with pytest.raises(
        ConfigError, match=rf"rl.{field}: got .*expected one of .*or a function of your own as module.fun"
    ):
        from_mapping({"rl": {field: value}})
