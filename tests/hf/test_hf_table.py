"""The weight table against transformers' own tensors and torch's own layers."""

import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.tiny_hf import make_tiny_thinker

from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf import table
from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.thinker import abstract_thinker

RNG = np.random.default_rng(0)


def entries_of(config):
    return table.entries(abstract_thinker(config)[1], config)


@pytest.mark.parametrize(
    "config, tensors, parameters",
    [
        (ThinkerConfig.qwen2_5_omni_3b(), 1442, 4_703_464_448),
        (ThinkerConfig.qwen2_5_omni_7b(), 1346, 8_931_813_888),
    ],
    ids=["3b", "7b"],
)
def test_released_sizes_have_the_published_totals(config, tensors, parameters):
    found = entries_of(config)
    assert len({entry.name for entry in found}) == len(found) == tensors
    assert sum(math.prod(entry.stored_shape) for entry in found) == parameters
    sizes = {entry.name: entry.stored_shape for entry in found}
    width = config.text.hidden_size
    assert sizes["visual.patch_embed.proj.weight"] == (1280, 3, 2, 14, 14)
    assert sizes["audio_tower.conv1.weight"] == (1280, 128, 3)
    assert sizes["audio_tower.proj.weight"] == (width, 1280)
    assert sizes["model.layers.0.self_attn.k_proj.weight"] == (config.text.num_key_value_heads * 128, width)


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_transformers_saves(tmp_path, tied):
    make_tiny_thinker(tmp_path, tie_word_embeddings=tied)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    assert {entry.name: entry.stored_shape for entry in entries_of(load_config(tmp_path))} == saved


def test_every_spelling_becomes_the_bare_name():
    model = make_tiny_thinker(None)
    bare = {entry.name for entry in entries_of(ThinkerConfig.tiny())}
    in_memory = set(model.state_dict())
    assert in_memory != bare
    assert {table.plain_name(name) for name in in_memory} == bare
    assert {table.plain_name(f"thinker.{name}") for name in in_memory | bare} == bare
    assert {table.plain_name(name) for name in bare} == bare
    assert table.known_extra("talker.model.norm.weight") == "talker"
    assert table.known_extra("token2wav.x") == "token2wav"
    assert table.known_extra("thinker.model.norm.weight") is None


def test_a_parameter_without_a_row_is_named():
    config = ThinkerConfig.tiny()
    params = dict(abstract_thinker(config)[1])
    with pytest.raises(ValueError, match="no row of the weight table for text/extra"):
        table.entries({**params, "text": {**params["text"], "extra": params["text"]["norm"]["scale"]}}, config)
    with pytest.raises(ValueError, match="audio/conv1/kernel, which the parameter tree lacks"):
        table.entries({"text": params["text"], "vision": params["vision"]}, config)


def torch_of(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def test_projection_to_heads_computes_what_torch_computes():
    weight, bias, x_D = RNG.standard_normal((12, 5)), RNG.standard_normal(12), RNG.standard_normal(5)
    kernel_DHh = table.Linear().to_ours(weight, (5, 3, 4))
    bias_Hh = table.Flat().to_ours(bias, (3, 4))
    expected = torch.nn.functional.linear(torch_of(x_D), torch_of(weight), torch_of(bias)).numpy().reshape(3, 4)
    np.testing.assert_allclose(np.einsum("D,DHh->Hh", x_D, kernel_DHh) + bias_Hh, expected, rtol=1e-12)


def test_projection_from_heads_computes_what_torch_computes():
    weight, x_Hh = RNG.standard_normal((5, 12)), RNG.standard_normal((3, 4))
    kernel_HhD = table.Linear(input_axes=2).to_ours(weight, (3, 4, 5))
    expected = torch.nn.functional.linear(torch_of(x_Hh.reshape(-1)), torch_of(weight)).numpy()
    np.testing.assert_allclose(np.einsum("Hh,HhD->D", x_Hh, kernel_HhD), expected, rtol=1e-12)


def test_convolution_computes_what_torch_computes():
    weight, x_TM = RNG.standard_normal((6, 4, 3)), RNG.standard_normal((9, 4))
    kernel_3Md = table.Conv1d().to_ours(weight, (3, 4, 6))
    windows = np.stack([x_TM[i : i + 3] for i in range(7)])
    expected = torch.nn.functional.conv1d(torch_of(x_TM.T)[None], torch_of(weight))[0].numpy().T
    np.testing.assert_allclose(np.einsum("TkM,kMd->Td", windows, kernel_3Md), expected, rtol=1e-12)


def test_patch_matrix_computes_what_torch_computes():
    weight, patches_SX = RNG.standard_normal((6, 3, 2, 14, 14)), RNG.standard_normal((5, 1176))
    kernel_Xd = table.Patches().to_ours(weight, (1176, 6))
    expected = torch.nn.functional.conv3d(torch_of(patches_SX.reshape(5, 3, 2, 14, 14)), torch_of(weight))
    np.testing.assert_allclose(patches_SX @ kernel_Xd, expected.numpy().reshape(5, 6), rtol=1e-10, atol=1e-10)


def test_every_row_is_undone_by_its_reverse():
    for entry in entries_of(ThinkerConfig.tiny()):
        stored = RNG.standard_normal(entry.stored_shape, np.float32)
        ours = entry.to_ours(stored)
        assert ours.shape == entry.shape
        np.testing.assert_array_equal(entry.to_stored(ours), stored, err_msg=entry.name)
