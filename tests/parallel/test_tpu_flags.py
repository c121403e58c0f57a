"""What every command says to XLA: ours is added, the user's stays."""

import os
import subprocess
import sys

import pytest

from mer_r1_jax.cli import parse_flags
from mer_r1_jax.parallel import (
    FLAGS,
    GPU_MEMORY_SHARE,
    GPU_MEMORY_VARIABLE,
    SCOPED_VMEM,
    SCOPED_VMEM_KIB,
    VARIABLE,
    product_options,
    set_gpu_memory,
    set_tpu_flags,
)
from mer_r1_jax.planning import without_devices

OURS = [f"--{name}={value}" for name, value in FLAGS.items()]


def test_flags_are_added_once():
    environment = {}
    set_tpu_flags(environment)
    set_tpu_flags(environment)
    assert environment[VARIABLE].split() == OURS


def test_what_the_user_set_stays():
    name = next(iter(FLAGS))
    environment = {VARIABLE: f"--xla_jf_dump_to=there --{name}=7"}
    set_tpu_flags(environment)
    words = environment[VARIABLE].split()
    assert words[:2] == ["--xla_jf_dump_to=there", f"--{name}=7"]
    assert sum(name in word for word in words) == 1


def test_plans_look_for_no_device():
    environment = {"TPU_ACCELERATOR_TYPE": "v5e-8"}
    without_devices(environment)
    assert environment["JAX_PLATFORMS"] == "cpu" and environment[VARIABLE].split() == OURS
    assert environment["TPU_ACCELERATOR_TYPE"] == "v5e-8"  # the user's


def test_a_run_looks_for_its_devices():
    """What training imports says nothing to jax; a planner's settings would have it run on the CPU of a machine that
    has a GPU or a TPU, and say nothing."""
    told = "import os; before = dict(os.environ); import mer_r1_jax.run.train, mer_r1_jax.planning.advice, "
    told += "mer_r1_jax.planning.programs; print({k for k in os.environ if os.environ[k] != before.get(k)})"
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_", "ALLOW_"))}
    mine.pop(VARIABLE, None)
    done = subprocess.run([sys.executable, "-c", told], env=mine, capture_output=True, text=True, check=True)
    changed = done.stdout.strip()
    assert "JAX_PLATFORMS" not in changed and VARIABLE not in changed and "TPU_ACCELERATOR_TYPE" not in changed


def test_commands_set_them(monkeypatch):
    """Before anything can load the compiler: a command before it reads its own flags."""
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv(GPU_MEMORY_VARIABLE, raising=False)
    with pytest.raises(SystemExit):
        parse_flags(["train.py", "--no_such_flag"])
    assert os.environ[VARIABLE].split() == OURS
    assert float(os.environ[GPU_MEMORY_VARIABLE]) == GPU_MEMORY_SHARE


def test_products_may_fill_more_vector_memory_on_chips_that_are_known():
    for kind, kib in SCOPED_VMEM_KIB.items():
        assert product_options(kind, {}) == {SCOPED_VMEM: str(kib)}
        assert 16 * 1024 < kib < vmem_kib(kind)
    assert product_options("TPU v4", {}) == {}


def vmem_kib(kind):
    return 1024 * (64 if kind in ("TPU v5", "TPU v5p") else 128)


def test_a_limit_of_vector_memory_that_the_user_set_stays():
    """As an option of a program it would go before the user's flag, so none is given."""
    assert product_options("TPU v5", {VARIABLE: f"--{SCOPED_VMEM}=65536"}) == {}
    assert product_options("TPU v5", {VARIABLE: "--xla_jf_dump_to=there"}) != {}


@pytest.mark.parametrize("name", [GPU_MEMORY_VARIABLE, "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_share_of_a_gpu_s_memory_that_the_user_set_stays(name):
    """By jax's new name or its old one: it refuses both at once."""
    environment = {name: "0.3"}
    set_gpu_memory(environment)
    assert environment == {name: "0.3"}
