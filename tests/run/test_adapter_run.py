"""A whole run with adapters: what lies in its folder, going on from it, and what is exported of it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.small_run import run_command, small_config_of

from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.hf.load import load_params
from mer_r1_jax.omni.hf.peft_folder import load_adapters
from mer_r1_jax.omni.lora import is_adapter, without_adapters
from mer_r1_jax.run import policy
from mer_r1_jax.run.fingerprints import of_model
from mer_r1_jax.run.policy import PolicyError, load_policy, load_run_adapters, open_model
from mer_r1_jax.run.stored_base import BASE_FOLDER
from mer_r1_jax.run.train import train
from mer_r1_jax.storage.checkpoints import CheckpointError
from mer_r1_jax.storage.working_copy import IN_BUCKET
from mer_r1_jax.training.metrics import read_metrics
from mer_r1_jax.training.state import flatten

STEPS = 2


def config_of(folder, output, **model):
    return small_config_of(
        folder,
        model={"lora.rank": 2, "lora.alpha": 8.0, "lora.dropout": 0.1, **model},
        data={"eval_path": ""},
        media={"decode_workers": 0},
        sft={"max_steps": STEPS, "train_vision_tower": False, "train_audio_tower": False, "fast_fraction": 0.0},
        rl={"max_steps": 0},
        mesh={"data": 2, "fsdp": 2, "tensor": 2},  # adapters are cut as their kernels are
        train={"output_dir": str(output), "save_steps": 1, "save_total_limit": 9, "report_to": ()},
    )


@pytest.fixture(scope="module")
def finished(small_folder, compiled, tmp_path_factory):
    """The folder of a run from random weights."""
    output = tmp_path_factory.mktemp("adapters")
    assert train(config_of(small_folder, output)) == 0
    return output / "small"


def sizes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_checkpoints_hold_no_base_which_is_kept_once_beside_them(finished):
    described = json.loads((finished / "checkpoints/2/host.json").read_text())
    names = [name for name in described["arrays"] if name.startswith(("trainable.", "frozen."))]
    assert names and all(is_adapter(name) and name.startswith("trainable.") for name in names)
    assert [step.name for step in (finished / "base").iterdir()] == ["0"]
    assert sizes(finished / "base") > 4 * sizes(finished / "checkpoints/2")


def test_a_run_that_goes_on_takes_the_same_steps(finished, small_folder, tmp_path):
    shutil.copytree(finished, tmp_path / "small")
    again = tmp_path / "small"
    for place in ("checkpoints/2", "export"):
        shutil.rmtree(again / place)
    assert train(config_of(small_folder, tmp_path)) == 0
    losses = [[row["loss"] for row in read_metrics(folder / "metrics.jsonl")] for folder in (finished, again)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    one, other = (flatten(load_policy(folder)[1]) for folder in (finished, again))
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[name], err_msg=name)


def test_a_base_that_is_lost_is_named(finished, small_folder, tmp_path):
    shutil.copytree(finished, tmp_path / "small")
    shutil.rmtree(tmp_path / "small/base")
    with pytest.raises(Exception, match=r"base: got nothing, expected the base .* put a copy of that folder back"):
        train(config_of(small_folder, tmp_path))


def test_the_export_is_merged_and_its_adapters_come_apart_and_back(finished, tmp_path):
    config, nested, _ = load_policy(finished)
    params, merged = flatten(nested), flatten(load_params(finished / "export/hf", load_config(finished / "export/hf")))
    assert merged.keys() == without_adapters(params).keys()
    a, b = (np.asarray(params[f"text/layers/mlp/up/lora_{half}"]) for half in "ab")
    kernel = np.asarray(params["text/layers/mlp/up/kernel"])
    np.testing.assert_allclose(merged["text/layers/mlp/up/kernel"], kernel + 4.0 * a @ b, atol=1e-6)
    assert np.abs(np.asarray(merged["text/layers/mlp/up/kernel"]) - kernel).max() > 1e-4

    ended = run_command("export.py", f"--run={finished}", f"--out={tmp_path / 'peft'}", "--adapter")
    assert ended.returncode == 0, ended.stderr
    assert "adapters of rank 2, 14 tensors" in " ".join(ended.stdout.split())
    assert load_file(tmp_path / "peft/adapter_model.safetensors").keys()
    back = load_adapters(tmp_path / "peft", config, lambda name, stack: stack)
    for name, leaf in back.items():
        np.testing.assert_array_equal(leaf, params[name], err_msg=name)


def test_a_run_is_answered_with_its_adapters(finished):
    setup, params = open_model(finished)
    try:
        assert params.keys() == setup.backbone.shapes.keys()
        assert np.any(np.asarray(params["text/layers/attn/q/lora_b"]))
    finally:
        setup.close()


def test_a_run_that_trained_towers_too_is_not_exported_as_adapters_alone(small_folder, tmp_path):
    config = config_of(small_folder, tmp_path)
    config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, train_vision_tower=True))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    with pytest.raises(PolicyError, match=r"got a run that trained media towers too \(train_vision\), expected"):
        load_run_adapters(tmp_path)


def test_adapters_are_not_put_on_another_base(tmp_path, caplog):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"0123456789")
    (tmp_path / "env.json").write_text(json.dumps({"fingerprints": {"model": of_model(base)}}))
    policy._check_base(tmp_path, str(base))
    (base / "model.safetensors").write_bytes(b"0123456788")  # as long as before
    with pytest.raises(CheckpointError, match="base: got another model than .* began with, expected the base that its"):
        policy._check_base(tmp_path, str(base))
    (tmp_path / "env.json").unlink()
    policy._check_base(tmp_path, str(base))
    assert "it cannot be told whether" in caplog.text


def test_a_run_in_a_bucket_keeps_its_base_there_alone():
    assert BASE_FOLDER in IN_BUCKET
