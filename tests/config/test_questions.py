"""The question that a trained model is asked where nobody gives one is that of the records it was trained on."""

import logging
from types import SimpleNamespace

import pytest

from mer_r1_jax.config.build import load_config
from mer_r1_jax.config.schema import DataConfig
from mer_r1_jax.data.synthetic.wording import QUESTION
from mer_r1_jax.run.console import _compare_questions


def setup_of(*questions):
    records = [SimpleNamespace(messages=({"role": "user", "content": question},)) for question in questions]
    return SimpleNamespace(
        config=SimpleNamespace(data=DataConfig()), data=SimpleNamespace(sft=records[:1], rl=records[1:])
    )


@pytest.mark.parametrize("name", ["synthetic", "synthetic:smoke"])
def test_models_of_the_synthetic_world_are_asked_its_question(name):
    assert load_config(name).data.question == QUESTION


def test_records_that_all_ask_something_else_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        _compare_questions(setup_of())
        _compare_questions(setup_of("Mine?", "Mine?", f"<video>{DataConfig.question}"))
    assert not caplog.records
    _compare_questions(setup_of("Mine?", "Yours?", "Mine?"))
    (record,) = caplog.records
    told = record.getMessage()
    assert "no record asks data.question" in told and "got 'Mine?' in 2 of 3" in told
    assert "set --config.data.question" in told
