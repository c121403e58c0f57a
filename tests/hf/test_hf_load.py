"""Loading weights: every spelling, onto several devices, within a bounded host memory, with every fault listed."""

import gc
import json
import re
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from support.omni_dir import EXTRA_TENSORS, make_omni_directory
from support.tiny_hf import make_tiny_thinker

from mer_r1_jax.omni.hf import load as load_module
from mer_r1_jax.omni.hf import table
from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.hf.load import find_weights, load_params
from mer_r1_jax.omni.hf.tensor_files import WeightError, list_tensors
from mer_r1_jax.omni.thinker import abstract_thinker

INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the tiny directory to damage, with a function that rewrites its tensors."""
    directory = tmp_path / "copy"
    shutil.copytree(tiny, directory)

    def rewrite(change):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return directory, rewrite


def as_stored(params, config):
    """Our parameters as stored tensors in float32, by bare name, through the table alone."""
    leaves = table.leaves(params)
    found = {}
    for entry in table.entries(abstract_thinker(config)[1], config):
        leaf = np.asarray(leaves[entry.path])
        found[entry.name] = entry.to_stored(leaf if entry.layer is None else leaf[entry.layer])
    return found


def assert_same_weights(params, config, expected):
    found = as_stored(params, config)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_loads_a_single_file_of_bare_names(tiny):
    config = load_config(tiny)
    params = load_params(tiny, config)
    assert_same_weights(params, config, load_file(tiny / "model.safetensors"))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_thinker(config)[1])


def test_loads_names_as_transformers_5_has_them_in_memory(tiny, tmp_path):
    model = make_tiny_thinker(None, seed=3)
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    assert any(name.startswith("model.language_model.") for name in tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    config = load_config(tiny)
    assert_same_weights(load_params(tmp_path, config), config, load_file(tiny / "model.safetensors"))


def test_loads_the_thinker_of_a_full_directory_and_counts_the_rest(tiny, tmp_path, caplog):
    make_omni_directory(tmp_path, seed=3, dtype=torch.float32)
    config = load_config(tmp_path)
    assert config == load_config(tiny)
    with caplog.at_level("INFO", logger="mer_r1_jax.omni.hf.load"):
        params = load_params(tmp_path, config)
    assert_same_weights(params, config, load_file(tiny / "model.safetensors"))
    assert find_weights(tmp_path, config).skipped == EXTRA_TENSORS
    assert "148 tensors loaded" in caplog.text and "5 of talker" in caplog.text and "3 of token2wav" in caplog.text


def test_loads_tied_embeddings_with_and_without_a_stored_head(tmp_path):
    make_tiny_thinker(tmp_path, tie_word_embeddings=True)
    config = load_config(tmp_path)
    params = load_params(tmp_path, config)
    assert "head" not in params["text"]
    tensors = load_file(tmp_path / "model.safetensors")
    assert_same_weights(params, config, tensors)

    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    assert "head" not in load_params(tmp_path, config)["text"]
    tensors["lm_head.weight"][7, 5] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match="untied: lm_head.weight: differs from the embedding"):
        load_params(tmp_path, config)


def test_a_head_that_an_untied_config_asks_for_must_be_there(tmp_path):
    make_tiny_thinker(tmp_path, tie_word_embeddings=True)
    untied = load_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(
        WeightError, match=r"missing: lm_head.weight: expected shape \(512, 64\)[\s\S]*tie_word_embeddings"
    ):
        load_params(tmp_path, untied)


@pytest.mark.parametrize(
    "stored, kept", [(np.float32, "bfloat16"), (ml_dtypes.bfloat16, "float32"), (np.float16, "float32")]
)
def test_casts_to_the_param_dtype(copy, stored, kept):
    directory, rewrite = copy
    rewrite(lambda tensors: tensors.update({name: value.astype(stored) for name, value in tensors.items()}))
    config = load_config(directory, param_dtype=kept)
    params = load_params(directory, config)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {kept}
    tensors = load_file(directory / "model.safetensors")
    assert_same_weights(params, config, {name: value.astype(kept) for name, value in tensors.items()})


def eighths(shapes, mesh):
    """Shards each leaf's last axis that eight devices divide, except the layer axis; the rest is replicated."""

    def sharding(path, leaf):
        first = 1 if any(getattr(key, "key", None) == "layers" for key in path) else 0
        axes = [i for i in range(first, leaf.ndim) if leaf.shape[i] % 8 == 0]
        return NamedSharding(
            mesh, PartitionSpec(*["all" if axes and i == axes[-1] else None for i in range(leaf.ndim)])
        )

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def test_loads_onto_eight_devices(tiny):
    config = load_config(tiny)
    shapes = abstract_thinker(config)[1]
    shardings = eighths(shapes, Mesh(np.array(jax.devices()), ("all",)))
    params = load_params(tiny, config, shardings=shardings)
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, params, shardings))
    kernel = params["text"]["layers"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 64, 12)}
    sharded = [leaf for leaf in jax.tree.leaves(params) if not leaf.sharding.is_fully_replicated]
    assert len(sharded) > 60
    assert_same_weights(params, config, load_file(tiny / "model.safetensors"))


def test_shardings_of_another_tree_are_refused(tiny):
    config = load_config(tiny)
    shardings = eighths(abstract_thinker(config)[1], Mesh(np.array(jax.devices()), ("all",)))
    del shardings["text"]["head"]
    with pytest.raises(ValueError, match="differ in text/head/kernel"):
        load_params(tiny, config, shardings=shardings)


def test_the_host_never_holds_a_whole_stack(tmp_path):
    """Peak of what numpy allocates while a model is loaded whose stacks are many times larger than any tensor in them.

    Arrays on an emulated device may alias the host's, so leaves that are not stacked are kept small here.
    """
    layers = 24
    make_tiny_thinker(
        tmp_path,
        text=dict(hidden_size=128, intermediate_size=1024, num_hidden_layers=layers, vocab_size=494),
        audio=dict(num_mel_bins=8),
    )
    config = load_config(tmp_path)
    stored = list_tensors(tmp_path)
    largest = max(tensor.nbytes for tensor in stored.values())
    stack = layers * stored["model.layers.0.mlp.up_proj.weight"].nbytes
    unstacked = sum(tensor.nbytes for name, tensor in stored.items() if not re.search(r"(layers|blocks)\.\d", name))
    load_params(tmp_path, config)  # compiles, so that what is traced below is the loading
    gc.collect()
    tracemalloc.start()
    try:
        params = load_params(tmp_path, config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak > largest  # numpy's allocations are traced
    allowed = unstacked + 3 * largest + 1_000_000
    assert allowed < stack / 2 and allowed < sum(tensor.nbytes for tensor in stored.values()) / 8
    assert peak < allowed, f"{peak} bytes"
    assert params["text"]["layers"]["mlp"]["up"]["kernel"].nbytes == stack


def test_every_misfit_is_listed_in_one_error(copy):
    directory, rewrite = copy

    def damage(tensors):
        del tensors["audio_tower.conv2.bias"]
        for layer in range(3):
            del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((96, 64), np.float32)
        tensors["lora.A"] = np.zeros((2, 3), np.float32)
        tensors["visual.merger.mlp.0.weight"] = tensors["visual.merger.mlp.0.weight"][:, :-1].copy()
        tensors["model.norm.weight"] = np.ones(64, np.int8)
        tensors["thinker.model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()

    rewrite(damage)
    with pytest.raises(WeightError) as error:
        load_params(directory, load_config(directory))
    message = str(error.value)
    assert message.startswith(f"{directory}: 9 of its weights do not fit the config:")
    for line in (
        "missing: audio_tower.conv2.bias: expected shape (64,)",
        "missing: model.layers.[0-2].mlp.up_proj.weight: expected shape (96, 64)",
        "surplus: model.layers.3.mlp.up_proj.weight: got shape (96, 64)",
        "surplus: lora.A: got shape (2, 3)",
        "misshapen: visual.merger.mlp.0.weight: got shape (256, 255), expected (256, 256)",
        "not a float: model.norm.weight: got dtype I8",
        "repeated: model.embed_tokens.weight: stored as model.embed_tokens.weight and as thinker.model.embed_tokens",
        "config.json",
    ):
        assert line in message, line


def test_a_directory_of_another_model_says_so(copy):
    directory, _ = copy
    config = load_config(directory)
    save_file({"encoder.weight": np.zeros(3, np.float32)}, directory / "model.safetensors")
    with pytest.raises(WeightError, match="No tensor of a Qwen2.5-Omni Thinker"):
        load_params(directory, config)


def shard(directory):
    """Splits the single file in two with an index; returns the index's weight map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        part = dict(list(tensors.items())[i::2])
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_loads_shards_with_an_index(copy, tiny):
    directory, _ = copy
    shard(directory)
    config = load_config(directory)
    assert_same_weights(load_params(directory, config), config, load_file(tiny / "model.safetensors"))


@pytest.mark.parametrize(
    "break_it, expected",
    [
        (lambda d, m: (d / "model-00002-of-00002.safetensors").unlink(), "not there: model-00002-of-00002"),
        (lambda d, m: (d / INDEX).unlink(), "found safetensors files: model-00001-of-00002.safetensors, model-00002"),
        (lambda d, m: (d / INDEX).write_text("{}"), "weight_map"),
        (
            lambda d, m: (d / INDEX).write_text(json.dumps({"weight_map": m | {"new": m["lm_head.weight"]}})),
            "says new lies",
        ),
        (lambda d, m: (d / INDEX).write_text(json.dumps({"weight_map": {"a": "../x"}})), "not a plain file name"),
        (lambda d, m: shutil.rmtree(d), "no such folder"),
    ],
    ids=["shard_missing", "index_missing", "index_empty", "index_promises", "index_outside", "no_directory"],
)
def test_broken_shards_are_explained(copy, break_it, expected):
    directory, _ = copy
    config = load_config(directory)
    break_it(directory, shard(directory))
    with pytest.raises(WeightError, match=expected):
        load_params(directory, config)


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda data: data[:-1000], "no whole safetensors file"),
        (lambda data: data + b"x", "no whole safetensors file"),
        (lambda data: data[:4], "4 bytes that are no whole safetensors file"),
        (lambda data: data[:100], "100 bytes that are no whole safetensors file"),
        (lambda data: data[:8] + b"?" + data[9:], "no whole safetensors file"),
        (lambda data: b"", "0 bytes that are no whole safetensors file"),
    ],
    ids=["cut", "longer", "stub", "cut_header", "garbled_header", "empty"],
)
def test_damaged_files_are_explained(copy, change, expected):
    directory, _ = copy
    config = load_config(directory)
    file = directory / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(WeightError, match=expected):
        load_params(directory, config)


def test_a_directory_with_torch_files_only_says_how_to_convert(copy):
    directory, _ = copy
    config = load_config(directory)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(WeightError, match="save_pretrained"):
        load_params(directory, config)


def test_layers_are_written_into_the_stack_in_place():
    """Else the devices would hold every stack twice while it is filled."""
    mesh = Mesh(np.array(jax.devices()), ("all",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "all"))
    stack = jax.device_put(np.zeros((3, 8, 4), np.float32), sharding)
    stack = jax.jit(lambda x: x + 0, out_shardings=sharding)(stack)  # owned by the devices, so that it can be donated
    written = load_module._write_layer(stack, np.ones((8, 4), np.float32), 1, sharding)
    assert stack.is_deleted()
    np.testing.assert_array_equal(written, np.stack([np.zeros((8, 4)), np.ones((8, 4)), np.zeros((8, 4))]))
