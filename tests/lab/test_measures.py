"""What the lab measures where it is asked for: several sampled answers a clip, and F1 at a common operating point."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mer_r1_jax.lab import tiny_policy
from mer_r1_jax.lab.measures import COMMON_POINT, MEASURES, STOP_BIASES, Examiner
from mer_r1_jax.lab.scenes import STOP
from mer_r1_jax.lab.worlds import ANSWER_WORDS


class Scripted(Examiner):
    """Answers with what it was told, by draw; the first for greedy ones."""

    def _answer(self, params, how=None, *, fast=False, stop_bias=0.0, draw=0):
        return self.script[draw]


def test_sampled_scores_are_means_over_the_draws(few, few_scenes):
    rng = np.random.default_rng(0)
    clips, places = len(few_scenes.held_out.truth_N), few.trace_length + ANSWER_WORDS
    script = jnp.asarray(rng.integers(0, STOP, (3, clips, places)))
    params = tiny_policy.init(few, rng)
    fixed = script[0][:, few.trace_length :]
    found = {}
    for samples in (1, 3):
        examiner = Scripted(dataclasses.replace(few, eval_samples=samples), few_scenes.held_out)
        object.__setattr__(examiner, "script", script)
        found[samples] = examiner._one(params, fixed)["sampled_f1"]
        by_draw = [examiner._expected(answers)[2] for answers in script]
    np.testing.assert_allclose(found[1], by_draw[0])
    np.testing.assert_allclose(found[3], np.mean(by_draw, axis=0), rtol=1e-5)
    assert float(np.abs(found[3] - found[1]).max()) > 0.01


@pytest.mark.parametrize("asked", [False, True])
def test_a_common_point_is_measured_where_it_is_asked_for(few, few_scenes, asked):
    examiner = Examiner(dataclasses.replace(few, common_point=asked), few_scenes.held_out)
    biases = []

    def f1(params, bias):
        biases.append(float(bias))
        return np.full((2, 6), 0.5 - abs(float(bias) + 1.0) / 10)  # best where the bias is -1

    object.__setattr__(examiner, "_f1", f1)
    object.__setattr__(examiner, "_measured", lambda *_: {name: np.zeros((2, 6)) for name in MEASURES})
    found = examiner.measure({}, np.zeros((2, 6, ANSWER_WORDS), int))
    assert set(found) == set(MEASURES) | (set(COMMON_POINT) if asked else set())
    assert biases == (list(STOP_BIASES) if asked else [])
    if asked:
        np.testing.assert_allclose(found["common_f1"], 0.5)
