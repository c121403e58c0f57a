"""Weights and settings that are damaged or meant to do harm: named, never loaded, no endless wait."""

import hashlib
import json
import os
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mer_r1_jax.omni.architecture_checks import ConfigError
from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.hf.export import ExportSettings, export_model
from mer_r1_jax.omni.hf.load import find_weights, load_params
from mer_r1_jax.omni.hf.sums import SUMS_FILE, write_sums
from mer_r1_jax.omni.hf.tensor_files import WeightError
from mer_r1_jax.storage.atomic_files import sha256_of

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def refused(folder):
    """What loading the folder is refused with. Only headers are read: no data of a folder like this may be needed."""
    with pytest.raises(WeightError) as error:
        find_weights(folder, load_config(folder))
    return str(error.value)


def split(folder):
    content = (folder / FILE).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(folder, header, data):
    text = header if isinstance(header, str) else json.dumps(header)
    (folder / FILE).write_bytes(struct.pack("<Q", len(text)) + text.encode() + data)


def overlap(header, data):
    header["visual.merger.ln_q.weight"]["data_offsets"] = header[NORM]["data_offsets"]


def negative(header, data):
    header[NORM]["data_offsets"] = [-12, 244]


def backwards(header, data):
    header[NORM]["data_offsets"] = header[NORM]["data_offsets"][::-1]


def other_dtype(header, data):
    header[NORM]["dtype"] = "F16"


def odd_shape(header, data):
    header[NORM]["shape"] = [64.0]


def other_shape(header, data):
    header[NORM]["shape"] = [2**40, 2**40]


def text_offsets(header, data):
    header[NORM]["data_offsets"] = ["0", "4"]


def twice(header, data):
    entry = json.dumps(header[NORM])
    return json.dumps(header)[:-1] + f', "{NORM}": {entry}}}'


def twice_escaped(header, data):
    entry = json.dumps(header[NORM])
    return json.dumps(header)[:-1] + f', "\\u006d{NORM[1:]}": {entry}}}'


def deep(header, data):
    return '{"a":' * 60_000 + "1" + "}" * 60_000


@pytest.mark.parametrize(
    "change",
    [overlap, negative, backwards, other_dtype, odd_shape, other_shape, text_offsets, twice, twice_escaped, deep],
)
def test_headers_that_do_not_describe_their_file_are_refused(folder, change):
    header, data = split(folder)
    write(folder, change(header, data) or header, data)
    told = refused(folder)
    assert told.startswith(f"{folder / FILE}: ") and "copy it again" in told and len(told) < 1000
    assert change not in (twice, twice_escaped) or f"names '{NORM}' twice" in told


@pytest.mark.parametrize(
    "content, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"PK\x03\x04\x00\x00", "a zip, such as torch.save writes"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (struct.pack("<Q", 1 << 62) + b"{}", "no whole safetensors file"),
    ],
)
def test_files_of_another_kind_say_what_they_are(folder, content, words):
    (folder / FILE).write_bytes(content)
    assert words in refused(folder)


@pytest.mark.parametrize("name", [FILE, "config.json", "generation_config.json", INDEX])
def test_a_named_pipe_is_not_waited_for(folder, name):
    if name == INDEX:
        (folder / FILE).unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises((WeightError, ConfigError), match=name):
        find_weights(folder, load_config(folder))


def test_a_named_pipe_is_not_read_to_compare_its_sum(folder):
    write_sums(folder, {FILE: sha256_of(folder / FILE)})
    load_params(folder, load_config(folder))
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)
    with pytest.raises(WeightError, match=f"{FILE}: not a regular file"):
        load_params(folder, load_config(folder))


@pytest.mark.parametrize(
    "index, words",
    [
        ('{"weight_map": ' + '{"a":' * 60_000 + "1" + "}" * 60_001, "nested too deep"),
        (json.dumps({"weight_map": {"a": "../outside.safetensors"}}), "not a plain file name"),
        (json.dumps({"weight_map": {"a": "/etc/passwd"}}), "not a plain file name"),
        (json.dumps({"weight_map": {"a": "x" * 5000}}), "not a plain file name"),
        (json.dumps({"weight_map": {"a": 3}}), "not a plain file name"),
        (json.dumps({"weight_map": ["a"]}), "weight_map"),
        (json.dumps({"weight_map": {"a": "no.safetensors", "b\x1b[2J": "n\ud800"}}), "not there"),
        ('{"weight_map": {"a": ' + "1" * 5000 + "}}", "cannot be read as JSON"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(folder, index, words):
    (folder / FILE).rename(folder / "other.safetensors")
    (folder / INDEX).write_text(index)
    told = refused(folder)
    assert words in told and "\x1b" not in told and len(told) < 1500


def test_a_file_may_be_a_link_as_in_a_hubs_cache(folder, tmp_path):
    listed = set(find_weights(folder, load_config(folder)).tensors)
    (folder / FILE).rename(tmp_path / "blob")
    (folder / FILE).symlink_to(tmp_path / "blob")
    assert set(find_weights(folder, load_config(folder)).tensors) == listed and NORM in listed


@pytest.mark.parametrize(
    "name, dtype, value",
    [
        (NORM, np.float32, np.nan),
        ("model.layers.2.mlp.up_proj.weight", np.float32, -np.inf),
        (HEAD, ml_dtypes.bfloat16, np.nan),
        ("audio_tower.conv1.bias", np.float16, np.inf),
        (NORM, np.float64, 1e300),  # a number, but not one of the dtype it is loaded as
    ],
)
def test_weights_that_are_no_numbers_are_named(folder, name, dtype, value):
    tensors = load_file(folder / FILE)
    tensors[name] = tensors[name].astype(dtype)
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, folder / FILE)
    with pytest.raises(WeightError) as error:
        load_params(folder, load_config(folder))
    told = str(error.value)
    assert f"{name} holds 1 NaN or infinite values of {tensors[name].size}" in told
    assert "expected finite numbers" in told and "earlier checkpoint" in told


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """An export in shards, with a tokenizer's file beside it."""
    source = tmp_path_factory.mktemp("source")
    (source / "vocab.json").write_text("{}")
    config = load_config(tiny)
    out = tmp_path_factory.mktemp("out") / "hf"
    export_model(out, config, load_params(tiny, config), ExportSettings(source=source, max_shard_size="300KB"))
    return out


def test_an_exports_sums_are_those_of_its_files(exported):
    listed = dict(reversed(line.split("  ")) for line in (exported / SUMS_FILE).read_text().splitlines())
    shards = {path.name for path in exported.glob("*.safetensors")}
    assert len(shards) > 2 and listed.keys() == shards | {INDEX, "vocab.json"}
    for name, value in listed.items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == value


@pytest.mark.parametrize("place", [0.3, 0.9])
@pytest.mark.parametrize("file", ["model-00002-of", INDEX])
def test_a_flipped_bit_of_an_export_is_refused_by_name(exported, tmp_path, file, place):
    folder = shutil.copytree(exported, tmp_path / "copy")
    path = next(folder.glob(f"{file}*"))
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(WeightError) as error:
        load_params(folder, load_config(folder))
    told = str(error.value)
    assert path.name in told
    if file != INDEX:  # a shard's name that changed is not found before sums are compared
        assert "not as exported" in told and f"remove its line from {SUMS_FILE}" in told


def test_what_people_edit_may_change_and_folders_without_sums_load_as_before(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    settings = json.loads((folder / "config.json").read_text()) | {"note": "mine"}
    (folder / "config.json").write_text(json.dumps(settings))
    config = load_config(folder)
    load_params(folder, config)
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    next(iter(tensors.values())).reshape(-1)[0] += 1
    save_file(tensors, shard)
    with pytest.raises(WeightError, match="not as exported"):
        load_params(folder, config)
    lines = (folder / SUMS_FILE).read_text().splitlines()
    (folder / SUMS_FILE).write_text("\n".join(line for line in lines if shard.name not in line))
    load_params(folder, config)
    (folder / SUMS_FILE).unlink()
    load_params(folder, config)
    (folder / SUMS_FILE).write_text("garbage\n")
    with pytest.raises(WeightError, match=f"{SUMS_FILE}:1: expected a SHA-256 sum.*delete it"):
        load_params(folder, config)


T = "text_config"


@pytest.mark.parametrize(
    "part, field, value",
    [
        (T, "num_hidden_layers", 10**8),
        (T, "num_hidden_layers", 3.7),
        (T, "num_hidden_layers", True),
        (T, "num_hidden_layers", None),
        (T, "hidden_size", 2**40),
        (T, "hidden_size", "96"),
        (T, "hidden_size", -1),
        (T, "vocab_size", 10**12),
        (T, "vocab_size", [512]),
        (T, "rms_norm_eps", "1e-6"),
        (T, "rms_norm_eps", float("nan")),
        (T, "rope_theta", None),
        (T, "rope_theta", 10**400),
        (T, "rope_parameters", [1]),
        (T, "rope_parameters", {"mrope_section": "abc"}),
        (T, "rope_parameters", {"mrope_section": [2, 3, {}]}),
        (T, "rope_parameters", {"rope_type": ["x"]}),
        ("vision_config", "depth", 10**9),
        ("vision_config", "fullatt_block_indexes", 5),
        ("vision_config", "fullatt_block_indexes", ["1"]),
        ("vision_config", "patch_size", [[14], 14]),
        ("audio_config", "encoder_layers", 10**9),
        ("audio_config", "d_model", {}),
        (None, "audio_config", []),
        (None, "eos_token_id", []),
        (None, "eos_token_id", "x"),
        (None, "eos_token_id", [[1]]),
        (None, "image_token_index", "</script>\x1b[31m"),
        (None, "tie_word_embeddings", "no"),
        (None, "user_token_id", "x"),
        (None, "seconds_per_chunk", 0),
        (None, "initializer_range", "0.02"),
        (None, "model_type", ["qwen2_5_omni_thinker"]),
        (None, "model_type", "qwen2_5_vl"),
    ],
)
def test_settings_of_a_wrong_kind_or_size_are_named(folder, part, field, value):
    config = json.loads((folder / "config.json").read_text())
    target = config[part] if part else config
    if field == "rope_theta":
        target.pop("rope_parameters")
    target[field] = value
    with pytest.raises(ConfigError) as error:
        (folder / "config.json").write_text(json.dumps(config))
        load_config(folder)
    told = str(error.value)
    named = {"rope_parameters": "rop" if "rope_type" not in str(value) else "rotary", "eos_token_id": "eos_token_id"}
    names = (named.get(field, field.removesuffix("_index").removesuffix("_token")), "mrope_section")
    assert any(name in told for name in names)
    assert "expected" in told and "\x1b" not in told and len(told) < 2000


@pytest.mark.parametrize(
    "content", ['{"a":' * 60_000 + "1" + "}" * 60_000, '{"a":' + "1" * 5000 + "}", "\x00", "\ufeff{}"]
)
def test_a_config_that_is_no_json_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="config.json: .*copy it again"):
        load_config(folder)
