"""Rollouts, an RL update and words asked about on fixed prompts: two processes against one device."""

import math

import jax
import numpy as np
import pytest
from support.several import end_of, start_processes
from support.several_steps import GENERATIONS, LENGTHS, TOKENS, completions, parameters, results, small_backbone
from support.small_run import REPOSITORY

from mer_r1_jax.config.schema import MeshConfig
from mer_r1_jax.omni.lora import AdapterConfig

LIMIT = 400  # seconds, on a busy machine
pytestmark = pytest.mark.timeout(2 * LIMIT)
# Sums over devices are added in another order: float32 rounding of gradients, relative to the largest of a leaf.
RELATIVE = 5e-5


@pytest.fixture(scope="module")
def alone():
    """What one device finds, in one loop over tokens."""
    return results(small_backbone(MeshConfig(), jax.devices()[:1]), chunks=(0,))


@pytest.fixture(scope="module", params=["1 2 1 2", "1 1 2 1", "2 1 2 1"], ids=["fsdp", "decode", "data"])
def pair(request, tmp_path_factory):
    """What two processes find between which weights and rows are cut: on 2 x 2 devices, where cuts of a row lie in one
    process; on 2 x 1, which have rows of their own in training and parts of every row's heads while decoding; and on
    2 x 2 whose rows are moved within a process.
    """
    file, mesh = tmp_path_factory.mktemp("pair") / "found.npz", request.param.split()
    words = [str(REPOSITORY / "tests/support/several_steps.py"), *mesh, str(file)]
    ended = [
        end_of(process, LIMIT) for process in start_processes(words, count=2, devices=math.prod(map(int, mesh)) // 2)
    ]
    assert [status for status, _, _ in ended] == [0, 0], "".join(told[-4000:] for _, _, told in ended)
    with np.load(file) as found:
        return dict(found)


@pytest.mark.parametrize("chunk", [0, 3])
def test_two_processes_sample_the_tokens_of_one_in_one_loop_or_in_chunks(alone, pair, chunk):
    for name in ("id_BGC", "length_BG", "mask_BGC", "stop_BG"):
        np.testing.assert_array_equal(pair[f"{name} {chunk}"], alone[f"{name} 0"], err_msg=name)
    for name in ("logprob_BGC", "sampling_logprob_BGC"):
        np.testing.assert_allclose(pair[f"{name} {chunk}"], alone[f"{name} 0"], rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("chunk", [0, 3])
def test_a_model_with_adapters_samples_the_same_where_heads_are_cut_for_decoding_alone(chunk):
    """In one process, in float32: what is moved to the layout of decoding has the dtype that it had."""
    cut = MeshConfig(data=2, fsdp=2, decode_tensor=2)
    found = []
    for mesh, devices in ((MeshConfig(), jax.devices()[:1]), (cut, jax.devices())):
        backbone = small_backbone(mesh, devices, AdapterConfig(rank=4, alpha=8.0))
        assert any("lora" in name for name in backbone.decode_shardings)
        found.append(jax.device_get(completions(backbone, parameters(backbone), chunk)))
    for name in ("id_BGC", "length_BG", "stop_BG"):
        np.testing.assert_array_equal(getattr(found[1], name), getattr(found[0], name), err_msg=name)
    np.testing.assert_allclose(found[1].logprob_BGC, found[0].logprob_BGC, rtol=0, atol=2e-5)


def test_the_completions_end_at_different_chunks(alone):
    lengths = alone["length_BG 0"][np.asarray(LENGTHS) > 0]
    assert lengths.min() < 3 and lengths.max() == TOKENS and len(np.unique(-(-lengths // 3))) == TOKENS // 3


def test_two_processes_make_the_loss_and_the_gradients_of_one(alone, pair):
    metrics = [name for name in alone if name.startswith("metric ")]
    gradients = [name for name in alone if name.startswith("gradient ")]
    assert {"metric loss", "metric grad_norm", "metric kl", "metric entropy"} <= set(metrics) and len(gradients) > 10
    assert abs(alone["metric loss"]) > 1e-3 and alone["metric kl"] > 1e-3
    for name in metrics:
        np.testing.assert_allclose(pair[name], alone[name], rtol=1e-4, atol=1e-6, err_msg=name)
    for name in gradients:
        scale = np.abs(alone[name]).max()
        assert scale > 1e-6, name
        np.testing.assert_allclose(pair[name], alone[name], rtol=0, atol=RELATIVE * scale, err_msg=name)


def test_two_processes_are_told_of_their_own_words_what_one_is_told(alone, pair):
    """Each reads the probabilities of its own rows, and every row asks about other words."""
    for kind in (0, 1):
        expected, found = alone[f"asked {kind}"], pair[f"asked {kind}"]
        assert expected.shape == found.shape == (len(LENGTHS), GENERATIONS, 3, 2)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        there = np.asarray(LENGTHS) > 0
        np.testing.assert_allclose(found[there], expected[there], rtol=1e-4)
        values = expected[there][~np.isnan(expected[there])]
        assert len(np.unique(values.round(9))) > 0.7 * len(values) > 50
