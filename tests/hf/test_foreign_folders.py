"""Paths that are no plain Qwen2.5-Omni folder: the message says what they are and how to make one of them."""

import json

import pytest
from support.small_run import run_command

from mer_r1_jax.omni.architecture_checks import ConfigError
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf.config_json import config_to_hf, load_config
from mer_r1_jax.run.policy import PolicyError, open_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16\n"


def write(folder, **files):
    """A folder with files; underscores before the suffix are kept, `__` stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def config(**changes):
    return json.dumps(config_to_hf(ThinkerConfig.tiny()) | changes)


def adapter(folder):
    settings = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-Omni-7B", "r": 8})
    return write(folder, adapter_config__json=settings, adapter_model__safetensors=b"x")


def adapter_beside_a_config(folder):
    return write(adapter(folder), config__json=config())


def adapter_weights_only(folder):
    return write(folder, adapter_model__bin=b"x")


def adapter_with_a_hostile_base(folder):
    return write(folder, adapter_config__json=json.dumps({"base_model_name_or_path": "\x1b[2J" + "x" * 9000}))


def gguf_folder(folder):
    return write(folder, model_q4__gguf=b"GGUF\x03")


def gguf_file(folder):
    return write(folder, model__gguf=b"GGUF\x03") / "model.gguf"


def file_inside(folder):
    return write(folder, config__json=config(), model__safetensors=b"x" * 70) / "model.safetensors"


def hub_cache(folder):
    write(folder / "snapshots/4a5b", config__json=config())
    return folder


def checkpoints_of_a_trainer(folder):
    write(folder / "checkpoint-500", config__json=config())
    return folder


def torch_shards(folder):
    (folder / "global_step100").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "make, words",
    [
        (adapter, ["an adapter", "Qwen/Qwen2.5-Omni-7B", "merge"]),
        (adapter_beside_a_config, ["an adapter", "Qwen/Qwen2.5-Omni-7B", "merge"]),
        (adapter_weights_only, ["an adapter", "does not say which", "merge"]),
        (adapter_with_a_hostile_base, ["an adapter", "\\x1b", "merge"]),
        (gguf_folder, ["GGUF", "safetensors"]),
        (gguf_file, ["GGUF", "safetensors"]),
        (file_inside, ["is a file", "give the one it lies in"]),
        (lambda folder: folder, ["no such folder", "nothing is downloaded"]),
        (lambda folder: write(folder), ["an empty folder"]),
        (lambda folder: write(folder, pytorch_model__bin=b"x"), [".bin files", "save_pretrained"]),
        (lambda folder: write(folder, model__pth=b"x"), [".pth files", "save_pretrained"]),
        (torch_shards, ["DeepSpeed", "zero_to_fp32"]),
        (hub_cache, ["snapshots/4a5b"]),
        (checkpoints_of_a_trainer, ["checkpoint-500"]),
        (lambda folder: write(folder, quantize_config__json="{}", config__json=config()), ["quantised"]),
        (lambda folder: folder / ("x" * 5000), ["cannot be looked at"]),
    ],
)
def test_a_path_that_is_no_model_says_what_it_is(tmp_path, make, words):
    path = make(tmp_path / "given")
    for open_it, kind in ((open_model, PolicyError), (load_config, ConfigError)):
        with pytest.raises(kind) as error:
            open_it(path)
        told = str(error.value)
        assert all(word in told for word in words), told
        assert "\x1b" not in told and len(told) < 6000


@pytest.mark.parametrize(
    "name, repository",
    [
        ("Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2.5-Omni-3B"),
        ("https://huggingface.co/Qwen/Qwen2.5-Omni-3B/", "Qwen/Qwen2.5-Omni-3B"),
        ("hf://Qwen/Qwen2.5-Omni-7B", "Qwen/Qwen2.5-Omni-7B"),
    ],
)
def test_a_name_on_a_hub_is_not_downloaded(name, repository):
    with pytest.raises(PolicyError, match=f"nothing is downloaded.*hf download {repository} --local-dir"):
        open_model(name)


@pytest.mark.parametrize(
    "content, words",
    [
        (POINTER, ["git-lfs", "git lfs pull"]),
        (config(quantization_config={"quant_method": "awq", "bits": 4}), ["quantised (awq)", "original model"]),
        (config(quantization_config={"quant_method": "gptq"}), ["quantised (gptq)"]),
        (config(quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"}), ["(bitsandbytes)"]),
        (config(quantization_config={"quant_method": "fp8"}), ["(fp8)"]),
        (config(quantization_config={"load_in_8bit": True}), ["quantised"]),
        (
            json.dumps(
                {
                    "model_type": "qwen2_5_omni",
                    "quantization_config": {"quant_method": "gptq"},
                    "thinker_config": json.loads(config()),
                }
            ),
            ["quantised (gptq)"],
        ),
        (json.dumps({"model_type": "qwen2_audio"}), ["Qwen2-Audio", "use a Qwen2.5-Omni model"]),
        (json.dumps({"model_type": "qwen2_5_vl", "vision_config": {}}), ["Qwen2.5-VL"]),
        (json.dumps({"model_type": "qwen3_omni_moe", "thinker_config": {}}), ["Qwen3-Omni"]),
        (json.dumps({"model_type": "llama"}), ["'llama'", "qwen2_5_omni_thinker"]),
    ],
)
def test_a_config_of_something_else_says_of_what(tmp_path, content, words):
    folder = write(tmp_path / "given", config__json=content)
    with pytest.raises(ConfigError) as error:
        load_config(folder)
    told = str(error.value)
    assert all(word in told for word in words), told


def test_commands_end_with_the_message_and_status_2(tmp_path):
    """--model of infer; the checks above hold for what every command calls."""
    ended = run_command("infer.py", f"--model={adapter(tmp_path / 'lora')}", "--video=x.mp4")
    assert ended.returncode == 2, ended.stderr
    assert "error: " in ended.stderr and "Qwen/Qwen2.5-Omni-7B" in ended.stderr and "Traceback" not in ended.stderr
