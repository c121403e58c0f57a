"""What is installed on each Python: the pins for all, and the files with hashes that are made from them."""

import configparser
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.pinned import pinned_versions
from support.small_run import REPOSITORY

PYTHONS = ("3.11", "3.12", "3.13")
PINS = REPOSITORY / "requirements.txt"


@pytest.fixture(scope="module")
def wanted():
    """The package's own requirements."""
    setup_cfg = configparser.ConfigParser()
    setup_cfg.read(REPOSITORY / "setup.cfg")
    lines = setup_cfg["options"]["install_requires"].splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def locked(python):
    return REPOSITORY / f"requirements/run-py{python.replace('.', '')}.txt"


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_what_the_package_asks_for_on_each_python(wanted, python):
    pins = pinned_versions(PINS, python)
    held = [one for one in wanted if one.marker is None or one.marker.evaluate({"python_version": python})]
    assert {"jax", "flax", "transformers"} <= {one.name for one in held}
    for one in held:
        assert one.specifier.contains(pins[canonicalize_name(one.name)]), one
    # jax, its library and its plugins are one release.
    assert len({pins[name] for name in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt")}) == 1
    assert (pins["jax"] >= "0.11.2") == (python != "3.11")


@pytest.mark.parametrize("python", PYTHONS)
def test_what_a_run_takes_is_locked_with_hashes_at_the_pinned_versions(wanted, python):
    text, versions = locked(python).read_text(), pinned_versions(locked(python), python)
    pins = pinned_versions(PINS, python)
    for name, version in versions.items():
        assert pins[name] == version, f"{name}: made from other pins; run `make lock`"
    asked = {canonicalize_name(one.name) for one in wanted}
    assert asked <= set(versions), f"{sorted(asked - set(versions))} is missing; run `make lock`"
    assert not {"torch", "pytest", "trl", "basedpyright"} & set(versions)
    blocks = re.split(r"\n(?=[A-Za-z])", text.partition("\n")[2])
    assert all("--hash=sha256:" in block for block in blocks if "==" in block)
    assert f"requirements/run-py{python.replace('.', '')}.txt" in text and "://" not in text
