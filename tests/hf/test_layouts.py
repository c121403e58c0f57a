"""An export as an Omni model without a voice: what its files say, what it takes in memory, that nothing is lost."""

import dataclasses
import json
import pickle
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest

from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf.companion_files import empty_speakers, merged_generation
from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.hf.export import ExportSettings, export_model
from mer_r1_jax.omni.hf.load import left_in_files, load_params
from mer_r1_jax.omni.hf.staging import ExportError
from mer_r1_jax.omni.hf.tensor_files import list_tensors
from mer_r1_jax.omni.thinker import abstract_thinker

CONFIG = ThinkerConfig.tiny()


def random_params(config):
    """Random parameters as numpy arrays, made without compiling anything."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract_thinker(config)[1])


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def omni(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("omni") / "out"
    export_model(folder, CONFIG, params, ExportSettings(layout="omni", max_shard_size="200KB"))
    return folder


def stored_bytes(directory):
    return {name: (one.dtype, one.shape, b"".join(one.chunks())) for name, one in list_tensors(directory).items()}


def test_the_names_are_those_vllm_looks_for(omni):
    names = list_tensors(omni)
    assert all(name.startswith("thinker.") for name in names)
    for name in (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "visual.blocks.0.attn.q.weight",
        "audio_tower.conv1.bias",
    ):
        assert f"thinker.{name}" in names
    index = json.loads((omni / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == names.keys()


def test_the_config_is_an_omni_model_without_a_voice(omni):
    config = json.loads((omni / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_omni" and config["enable_audio_output"] is False
    assert config["architectures"] == ["Qwen2_5OmniModel"] and config["torch_dtype"] == "float32"
    assert config["thinker_config"]["model_type"] == "qwen2_5_omni_thinker"
    assert config["thinker_config"]["eos_token_id"] == 504
    assert json.loads((omni / "generation_config.json").read_text()) == {"eos_token_id": 504, "pad_token_id": 503}


def test_our_own_loader_reads_it_back_byte_for_byte(omni, params, tmp_path):
    again = load_config(omni)
    assert again == CONFIG
    jax.tree.map(np.testing.assert_array_equal, load_params(omni, again), params)
    # and from its files back to a Thinker alone, which is what an export of the parameters is
    export_model(tmp_path / "back", again, left_in_files(omni, again))
    export_model(tmp_path / "alone", CONFIG, params)
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "alone/model.safetensors").read_bytes()


def test_the_table_of_speakers_is_a_zip_of_a_plain_pickle(omni):
    with zipfile.ZipFile(omni / "spk_dict.pt") as file:
        assert pickle.loads(file.read("spk_dict/data.pkl")) == {"Chelsie": {}}
    assert (omni / "spk_dict.pt").read_bytes() == empty_speakers()


def test_no_more_than_a_tensor_is_held_while_files_are_exported(tmp_path):
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, num_hidden_layers=30))
    export_model(tmp_path / "source", config, random_params(config))
    sizes = [tensor.nbytes for tensor in list_tensors(tmp_path / "source").values()]
    settings = ExportSettings(layout="omni", dtype="bfloat16")
    tracemalloc.start()
    try:
        export_model(tmp_path / "out", config, left_in_files(tmp_path / "source", config), settings)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    allowed = 3 * max(sizes) + 1_000_000  # as stored, cast and on its way; headers, names and JSON
    assert allowed < sum(sizes) / 2, f"{allowed} of {sum(sizes)}: too small a model to tell"
    assert max(sizes) < peak < allowed, f"{peak} bytes"


def test_end_tokens_are_merged_and_what_else_a_file_says_is_kept():
    ours = {"eos_token_id": 504, "pad_token_id": 503}
    assert merged_generation(CONFIG, {}) == ours
    assert merged_generation(CONFIG, {"top_p": 0.8, "eos_token_id": None}) == ours | {"top_p": 0.8}
    assert merged_generation(CONFIG, {"eos_token_id": 7, "pad_token_id": 9}) == {
        "eos_token_id": [7, 504],
        "pad_token_id": 9,
    }
    said = {"eos_token_id": [504, 7], "pad_token_id": 3}
    assert merged_generation(CONFIG, said) == said
    with pytest.raises(ExportError, match="eos_token_id is '<eos>'; expected a token id or a list"):
        merged_generation(CONFIG, {"eos_token_id": "<eos>"})


def test_a_file_that_is_no_json_is_refused_and_nothing_is_left(params, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "generation_config.json").write_text("{")
    with pytest.raises(ExportError, match="generation_config.json"):
        export_model(tmp_path / "out", CONFIG, params, ExportSettings(source=source))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_layouts_that_do_not_exist_or_do_not_go_with_a_base(tmp_path):
    with pytest.raises(ExportError, match="layout is 'gguf': expected one of thinker, omni"):
        ExportSettings(layout="gguf")
    with pytest.raises(ExportError, match="leave layout out"):
        ExportSettings(layout="omni", base=tmp_path)
