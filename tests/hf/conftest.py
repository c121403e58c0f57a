"""A small Thinker as transformers saves it, as a fixture."""

import pytest
from support.tiny_hf import make_tiny_thinker


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Its folder; tests that change it copy it first."""
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny_thinker(directory, seed=3)
    return directory
