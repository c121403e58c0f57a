"""Useful operations, counted from the architecture, against what programs ask for where nothing is computed twice."""

import dataclasses

import jax
import pytest
from support.tiny_plan import tiny_config

from mer_r1_jax.planning.flops import TRAINED, text_flops, traced_flops
from mer_r1_jax.planning.programs import RunPrograms

ROWS, PROMPT = 4, 64


@pytest.fixture(scope="module")
def run():
    """Programs that keep everything for the backward pass, on one device."""
    config = tiny_config()
    model = dataclasses.replace(config.model, remat="everything", packed_rows=True)
    return RunPrograms(dataclasses.replace(config, model=model), jax.devices()[:1])


@pytest.fixture(scope="module")
def planned(run):
    """The RL programs by name."""
    return {program.name: program for program in run.rl(run.buckets("rl")[-1])}


def asked(program):
    return traced_flops(program.trace().jaxpr)


def masked(run, tokens, sets):
    """Operations that plain attention spends in the decoder on pairs the mask then hides."""
    text = run.backbone.config.text
    count = {
        name: text_flops(text, prompt=PROMPT, sets=sets, scored=scored) for name, scored in (("one", 1), ("none", 0))
    }
    assert count["one"] - count["none"] == 2 * text.hidden_size * text.vocab_size
    visible = PROMPT * (PROMPT + 1) / 2 + sum(n * (length * PROMPT + length * (length + 1) / 2) for n, length in sets)
    return ROWS * 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * (tokens**2 - visible)


def test_the_reference_does_one_forward_pass(run, planned):
    rl = run.config.rl
    sets = ((rl.num_generations, rl.max_completion_length),)
    tokens = PROMPT + rl.num_generations * rl.max_completion_length
    assert asked(planned["reference"]) == planned["reference"].useful + masked(run, tokens, sets)


def test_media_are_encoded_once(run, planned):
    """A frame pair has 16 patches here, one window; attention that windows mask away is left out of the useful ones."""
    assert asked(planned["encode"]) == planned["encode"].useful


def test_the_update_is_a_forward_pass_and_twice_that_backward(run, planned):
    useful, update = planned["update"].useful, asked(planned["update"])
    rl = run.config.rl
    sets = ((rl.num_generations, rl.max_completion_length),)
    tokens = PROMPT + rl.num_generations * rl.max_completion_length
    # Scores of small vocabularies are computed again in the backward pass: one product of four.
    text = run.backbone.config.text
    head = ROWS * 2 * text.hidden_size * text.vocab_size * rl.num_generations * rl.max_completion_length
    assert update == useful + TRAINED * masked(run, tokens, sets) + head
