"""Exports: both versions of transformers load them, every byte survives, and nothing half-written looks finished."""

import dataclasses
import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from support import tiny_hf
from support.omni_dir import EXTRA_TENSORS, make_omni_directory
from support.thinker_logits import logits_of, mixed_inputs, outputs_of_directory
from support.transformers4 import VERSION, transformers4_path

from mer_r1_jax import faults
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf import table
from mer_r1_jax.omni.hf.companion_files import LAYOUTS
from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.hf.export import ExportSettings, export_model
from mer_r1_jax.omni.hf.load import load_params
from mer_r1_jax.omni.hf.staging import ExportError
from mer_r1_jax.omni.hf.tensor_files import list_tensors
from mer_r1_jax.omni.thinker import init_params

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "support" / "thinker_logits.py"
INPUTS = mixed_inputs(
    tiny_hf.IMAGE, tiny_hf.AUDIO, tiny_hf.AUDIO_BOS, tiny_hf.AUDIO_EOS, tiny_hf.VISION_BOS, tiny_hf.VISION_EOS
)


def export(model, out, **options):
    config = load_config(model)
    return export_model(out, config, load_params(model, config), ExportSettings(**options))


def stored_bytes(directory):
    """Name -> (dtype, shape, bytes) of every tensor of a checkpoint."""
    return {
        name: (tensor.dtype, tensor.shape, b"".join(tensor.chunks()))
        for name, tensor in list_tensors(directory).items()
    }


def forget_ends(directory):
    """Rewrites a directory's generation settings without end tokens, as sampling settings are shared."""
    (directory / "generation_config.json").write_text('{"top_k": 7}')


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Exports of several models with what transformers 5 gives for the originals and for the exports.

    One process with transformers 4 evaluates all exports.
    """
    root = tmp_path_factory.mktemp("exports")
    expected, directories = {}, {}

    def add(name, model, source, **options):
        expected[name] = logits_of(model, INPUTS)
        directories[name] = root / f"{name}_export"
        export(source, directories[name], **options)

    add("untied", tiny_hf.make_tiny_thinker(root / "untied"), root / "untied", max_shard_size="500KB")
    add("tied", tiny_hf.make_tiny_thinker(root / "tied", tie_word_embeddings=True), root / "tied")
    other = dict(text=dict(rope_parameters={"rope_type": "default", "rope_theta": 5e3, "mrope_section": [4, 2, 2]}))
    add("other_rope", tiny_hf.make_tiny_thinker(root / "other_rope", seed=1, **other), root / "other_rope")
    full = make_omni_directory(root / "full", seed=2, dtype=torch.float32)
    forget_ends(root / "full")
    add("full", full, root / "full", base=root / "full")
    for name in ("untied", "tied"):
        forget_ends(root / name)
        for layout in LAYOUTS:
            expected[f"{name}_{layout}"] = expected[name]
            directories[f"{name}_{layout}"] = root / f"{name}_{layout}"
            export(root / name, root / f"{name}_{layout}", layout=layout, source=root / name)

    np.savez(root / "inputs.npz", **INPUTS)
    environment = os.environ | {"PYTHONPATH": transformers4_path()}
    command = [sys.executable, SCRIPT, root / "inputs.npz", root / "v4.npz", *directories.values()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    v4 = np.load(root / "v4.npz")
    assert str(v4["version"]) == VERSION
    by_v4 = {
        name: {part: v4[f"{part}_{i}"] for part in ("logits", "ends", "answer")} for i, name in enumerate(directories)
    }
    by_v5 = {name: outputs_of_directory(directory, INPUTS) for name, directory in directories.items()}
    return directories, expected, by_v4, by_v5


MODELS = (
    "untied",
    "tied",
    "other_rope",
    "full",
    *(f"{one}_{layout}" for one in ("untied", "tied") for layout in LAYOUTS),
)


@pytest.mark.parametrize("model", MODELS)
def test_both_transformers_compute_the_original_logits_from_an_export(exports, model):
    directories, expected, by_v4, by_v5 = exports
    assert transformers.__version__.startswith("5.") and len(directories) == len(MODELS)
    assert expected[model].std() > 1  # weights wide enough to show a misplaced one
    np.testing.assert_array_equal(by_v5[model]["logits"], expected[model])
    np.testing.assert_array_equal(by_v4[model]["logits"], expected[model])


@pytest.mark.parametrize("model", MODELS)
def test_both_transformers_know_where_to_stop(exports, model):
    """Though the source's generation_config.json says nothing of it, in every layout, and in the Omni class too."""
    *_, by_v4, by_v5 = exports
    for found in (by_v4[model], by_v5[model]):
        assert found["ends"].tolist() == [tiny_hf.IM_END]
        assert 0 < len(found["answer"]) <= 12
    np.testing.assert_array_equal(by_v4[model]["answer"], by_v5[model]["answer"])


def test_exported_files_and_config(exports):
    directories, *_ = exports
    files = sorted(path.name for path in directories["untied"].iterdir())
    assert files[0] == "config.json" and "model.safetensors.index.json" in files and "generation_config.json" in files
    shards = [name for name in files if name.startswith("model-")]
    assert len(shards) == 5
    assert all((directories["untied"] / name).stat().st_size < 520_000 for name in shards)
    index = json.loads((directories["untied"] / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        len(data) for *_, data in stored_bytes(directories["untied"]).values()
    )
    config = json.loads((directories["untied"] / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_omni_thinker"
    assert config["vision_start_token_id"] == tiny_hf.VISION_BOS
    assert config["tie_word_embeddings"] is False and config["text_config"]["tie_word_embeddings"] is False
    assert config["text_config"]["rope_scaling"]["mrope_section"] == [2, 3, 3]
    assert "rope_parameters" not in config["text_config"]
    assert config["torch_dtype"] == "float32"
    assert "lm_head.weight" not in stored_bytes(directories["tied"])
    generation = json.loads((directories["untied"] / "generation_config.json").read_text())
    assert generation == {"eos_token_id": tiny_hf.IM_END, "pad_token_id": tiny_hf.ENDOFTEXT}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("naming", ["bare", "thinker", "transformers5"])
def test_round_trip_is_byte_exact(tmp_path, naming, dtype):
    model = tiny_hf.make_tiny_thinker(tmp_path / "bare", seed=4, dtype=getattr(torch, dtype))
    bare = load_file(tmp_path / "bare" / "model.safetensors")
    named = {
        "bare": bare,
        "thinker": {f"thinker.{name}": value for name, value in bare.items()},
        "transformers5": {name: bare[table.plain_name(name)] for name in model.state_dict()},
    }[naming]
    assert len(named) == len(bare)
    source = tmp_path / "source"
    source.mkdir()
    save_file(named, source / "model.safetensors")
    (source / "config.json").write_bytes((tmp_path / "bare" / "config.json").read_bytes())
    config = load_config(source, param_dtype=dtype)
    export_model(tmp_path / "out", config, load_params(source, config), ExportSettings(max_shard_size=300_000))
    assert stored_bytes(tmp_path / "out") == stored_bytes(tmp_path / "bare")
    # the same through float32 parameters, which hold every bfloat16
    export(source, tmp_path / "out32", dtype=dtype)
    assert stored_bytes(tmp_path / "out32") == stored_bytes(tmp_path / "bare")


@pytest.fixture(scope="module")
def small():
    config = ThinkerConfig.tiny()
    return config, jax.jit(lambda key: init_params(config, key))(jax.random.key(1))


def test_export_from_eight_devices(small, tmp_path):
    config, params = small
    mesh = jax.make_mesh((8,), ("all",))
    spread = jax.tree.map(
        lambda leaf: jax.device_put(
            leaf,
            jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), "all"))
            if leaf.shape[-1] % 8 == 0
            else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
        ),
        params,
    )
    export_model(tmp_path / "one", config, params)
    export_model(tmp_path / "eight", config, spread)
    assert filecmp.cmp(tmp_path / "one/model.safetensors", tmp_path / "eight/model.safetensors", shallow=False)


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    directory = tmp_path_factory.mktemp("omni") / "base"
    make_omni_directory(directory, seed=5)
    return directory


def test_base_keeps_everything_but_the_thinker(omni, tmp_path):
    config = load_config(omni)
    params = jax.tree.map(lambda leaf: leaf + 1, load_params(omni, config))
    report = export_model(tmp_path / "out", config, params, ExportSettings(base=omni))
    before, after = stored_bytes(omni), stored_bytes(tmp_path / "out")
    assert list(before) == list(after)
    for name, (dtype, shape, data) in before.items():
        assert after[name][:2] == (dtype, shape)
        assert (after[name][2] == data) == (not name.startswith("thinker.")), name
    old = np.frombuffer(before["thinker.model.norm.weight"][2], ml_dtypes.bfloat16).astype(np.float32)
    new = np.frombuffer(after["thinker.model.norm.weight"][2], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(new, (old + 1).astype(ml_dtypes.bfloat16))
    assert report.verbatim_tensors == sum(EXTRA_TENSORS.values())
    assert report.tensors == 148
    others = {path.name for path in omni.iterdir() if "safetensors" not in path.name}
    assert (
        {"spk_dict.pt", "config.json", "preprocessor_config.json", "chat_template.json"}
        <= others
        == set(report.copied_files)
    )
    assert set(filecmp.cmpfiles(omni, tmp_path / "out", others, shallow=False)[0]) == others
    assert sorted(path.name for path in omni.glob("model*")) == sorted(
        path.name for path in (tmp_path / "out").glob("model*")
    )


def test_base_round_trip_is_byte_exact_file_by_file(omni, tmp_path):
    export(omni, tmp_path / "out", base=omni)
    assert stored_bytes(tmp_path / "out") == stored_bytes(omni)


def test_a_base_of_another_architecture_is_refused(omni, small, tmp_path):
    with pytest.raises(ExportError) as error:
        export_model(tmp_path / "out", *small, ExportSettings(base=omni))
    assert "text.intermediate_size: 128 here, 96 in the base" in str(error.value)
    assert "image_token_id" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_talker_is_refused(tmp_path):
    tiny_hf.make_tiny_thinker(tmp_path / "tiny")
    with pytest.raises(ExportError, match="has no talker. or token2wav. tensors"):
        export(tmp_path / "tiny", tmp_path / "out", base=tmp_path / "tiny")


def test_tokenizer_and_processor_files_are_copied(small, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja")
    for name in (*names, "preprocessor_config.json", "README.md", "training_args.bin"):
        (source / name).write_text(f"content of {name}")
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 504], "pad_token_id": 3}')
    report = export_model(tmp_path / "out", *small, ExportSettings(source=source))
    assert set(report.copied_files) == {*names, "generation_config.json", "preprocessor_config.json"}
    for name in report.copied_files:
        assert filecmp.cmp(source / name, tmp_path / "out" / name, shallow=False), name
    assert not (tmp_path / "out" / "README.md").exists()


def test_two_exports_are_equal_byte_for_byte(small, tmp_path):
    for name in ("one", "two"):
        export_model(tmp_path / name, *small, ExportSettings(dtype="bfloat16"))
    names = [path.name for path in (tmp_path / "one").iterdir()]
    assert len(filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False)[0]) == len(names) == 4


def test_parameters_that_do_not_fit_are_all_listed(small, tmp_path):
    config, params = small
    text = {**params["text"], "extra": np.zeros(3, np.float32), "norm": {"scale": np.ones(63, np.float32)}}
    del text["head"]
    vision = {**params["vision"], "patch": {"kernel": np.zeros((1176, 64), np.int32)}}
    with pytest.raises(ExportError) as error:
        export_model(tmp_path / "out", config, {**params, "text": text, "vision": vision})
    for line in (
        "missing: text/head/kernel",
        "surplus: text/extra",
        "misshapen: text/norm/scale: got (63,), expected (64,)",
        "not a float: vision/patch/kernel: got int32",
    ):
        assert line in str(error.value), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value, dtype", [(np.nan, None), (np.inf, None), (1e6, "float16")])
def test_values_that_are_not_finite_are_refused(small, tmp_path, value, dtype):
    config, params = small
    kernel = params["vision"]["patch"]["kernel"].at[5, 6].set(value)
    poisoned = {**params, "vision": {**params["vision"], "patch": {"kernel": kernel}}}
    with pytest.raises(ExportError, match=r"visual.patch_embed.proj.weight \(vision/patch/kernel\)"):
        export_model(tmp_path / "out", config, poisoned, ExportSettings(dtype=dtype))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"max_shard_size": "5 parsecs"}, "max_shard_size is '5 parsecs'"),
        ({"max_shard_size": 0}, "max_shard_size is 0"),
        ({"source": "/nowhere/at/all"}, "/nowhere/at/all: not a directory"),
        ({"base": "/nowhere/at/all"}, "/nowhere/at/all: not a directory"),
    ],
)
def test_impossible_options_are_refused(small, tmp_path, options, expected):
    with pytest.raises(ExportError, match=expected):
        export_model(tmp_path / "out", *small, ExportSettings(**options))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_only_replaced_when_asked_and_when_it_is_an_export(small, tmp_path):
    config, params = small
    out = tmp_path / "out"
    out.mkdir()
    export_model(out, config, params)  # an empty directory is fine
    with pytest.raises(ExportError, match="exists and is not empty"):
        export_model(out, config, params)
    (out / "stale.txt").write_text("x")
    export_model(out, config, params, ExportSettings(overwrite=True, dtype="bfloat16"))
    assert not (out / "stale.txt").exists()
    assert {tensor.dtype for tensor in list_tensors(out).values()} == {"BF16"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    diary = tmp_path / "diary"
    diary.mkdir()
    (diary / "monday.txt").write_text("dear diary")
    with pytest.raises(ExportError, match="no earlier export"):
        export_model(diary, config, params, ExportSettings(overwrite=True))
    assert (diary / "monday.txt").read_text() == "dear diary"
    with pytest.raises(ExportError, match="is a file"):
        export_model(diary / "monday.txt", config, params, ExportSettings(overwrite=True))
    with pytest.raises(ExportError, match="also read from"):
        export_model(out, config, params, ExportSettings(overwrite=True, source=out))
    with pytest.raises(ExportError, match="which is read from"):
        export_model(tmp_path, config, params, ExportSettings(overwrite=True, source=out))


def test_a_failure_half_way_leaves_nothing(small, tmp_path, monkeypatch):
    calls = []

    def failing(place, detail=""):
        calls.append(place)
        if calls.count("export_tensor") == 50:
            assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
            raise OSError("no space left on device")

    monkeypatch.setattr(faults, "here", failing)
    with pytest.raises(OSError, match="no space left"):
        export_model(tmp_path / "out", *small)
    assert list(tmp_path.iterdir()) == []


def test_an_export_after_a_kill_starts_over(small, tmp_path):
    config, params = small
    out = tmp_path / "out"
    export_model(out, config, params)
    before = stored_bytes(out)
    # killed while writing: the partial directory is stale and the target whole
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model-00099-of-00099.safetensors").write_text("half")
    # killed between the two renames: the earlier export waits under another name
    out.rename(tmp_path / "out.replaced")
    with pytest.raises(ExportError, match="exists and is not empty"):
        export_model(out, config, params)
    assert stored_bytes(out) == before
    export_model(out, config, params, ExportSettings(overwrite=True, dtype="bfloat16"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list(out.glob("model-00099*"))


def test_an_export_holds_what_its_config_says(small, tmp_path):
    """The export reads back as the same config and the same parameters, bit for bit."""
    config, params = small
    export_model(tmp_path / "out", config, params, ExportSettings(max_shard_size="200KB"))
    again = load_config(tmp_path / "out")
    assert again == dataclasses.replace(config, param_dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "out", again), params)


def test_export_command_puts_a_thinker_into_a_full_directory(omni, tmp_path):
    command = [sys.executable, ROOT / "experiments/export.py"]
    environment = os.environ | {"XLA_FLAGS": ""}

    def run(*arguments):
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)

    done = run(f"--model={omni}", f"--base={omni}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "148 tensors" in done.stdout and "8 tensors of the base copied verbatim" in done.stdout
    assert stored_bytes(tmp_path / "out") == stored_bytes(omni)
    done = run(f"--model={omni / 'nothing'}", f"--out={tmp_path / 'other'}")
    assert done.returncode == 2
    assert "error: " in done.stderr and "no such folder" in done.stderr and "Traceback" not in done.stderr
