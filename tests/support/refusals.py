"""Configurations that a run refuses, as the command does."""

from __future__ import annotations

import pytest

from mer_r1_jax.cli import EXIT_ERROR, explained
from mer_r1_jax.run.train import train


@pytest.fixture
def refusal(capsys):
    """Runs a configuration that cannot be used and gives the message that stands on standard error."""

    def refusal(config):
        with pytest.raises(SystemExit) as ended, explained():
            train(config)
        assert ended.value.code == EXIT_ERROR == 2
        told = capsys.readouterr().err
        assert told.count("error: ") == 1
        return told.partition("error: ")[2]

    return refusal
