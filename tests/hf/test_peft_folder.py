"""PEFT folders: peft's names and shapes, read back bit by bit, and to peft the same model as the merged export."""

import dataclasses
import json
import re
import shutil

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.thinker_logits import logits_of
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from mer_r1_jax.omni.hf import peft_folder
from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.hf.export import ExportSettings, export_model
from mer_r1_jax.omni.hf.load import left_in_files, load_params
from mer_r1_jax.omni.hf.staging import ExportError
from mer_r1_jax.omni.hf.tensor_files import WeightError
from mer_r1_jax.omni.lora import AdapterConfig
from mer_r1_jax.training.state import flatten, nest

ADAPTERS = AdapterConfig(rank=4, alpha=6.0)
PREFIX = "base_model.model.model.layers"
INPUTS = {"input_ids": np.array([[1, 5, 9, 4]]), "attention_mask": np.ones((1, 4), np.int64)}


@pytest.fixture(scope="module")
def config(tiny):
    return dataclasses.replace(load_config(tiny), adapters=ADAPTERS)


@pytest.fixture(scope="module")
def adapters(config):
    """Adapters that have learnt, flat."""
    rng = np.random.default_rng(0)
    shapes = {}
    for entry in peft_folder.entries(config):
        shapes["/".join(entry.path)] = (config.text.num_hidden_layers, *entry.shape)
    return {name: 0.3 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(config, adapters, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapters") / "peft"
    assert peft_folder.save_adapters(out, config, adapters, base=str(tiny)) == 2 * 7 * config.text.num_hidden_layers
    return out


def loaded(folder, config):
    return peft_folder.load_adapters(folder, config, lambda name, stack: stack)


def test_names_and_shapes_are_those_that_peft_publishes(folder, config, adapters):
    """Written out from peft's checkpoint format: base_model.model.<module>.lora_A.weight is (rank, inputs)."""
    stored, text = load_file(folder / "adapter_model.safetensors"), config.text
    width, wide, kv = text.hidden_size, text.intermediate_size, text.num_key_value_heads * text.head_dim
    sizes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (width, kv), "self_attn.v_proj": (width, kv),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (width, wide), "mlp.up_proj": (width, wide),
        "mlp.down_proj": (wide, width),
    }  # fmt: skip
    expected = {}
    for layer in range(text.num_hidden_layers):
        for module, (inputs, outputs) in sizes.items():
            expected[f"{PREFIX}.{layer}.{module}.lora_A.weight"] = (4, inputs)
            expected[f"{PREFIX}.{layer}.{module}.lora_B.weight"] = (outputs, 4)
    assert {name: array.shape for name, array in stored.items()} == expected
    # o takes its inputs head by head, q gives its outputs so.
    np.testing.assert_array_equal(
        stored[f"{PREFIX}.1.self_attn.o_proj.lora_A.weight"], adapters["text/layers/attn/o/lora_a"][1].reshape(-1, 4).T
    )
    np.testing.assert_array_equal(
        stored[f"{PREFIX}.2.self_attn.q_proj.lora_B.weight"], adapters["text/layers/attn/q/lora_b"][2].reshape(4, -1).T
    )
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"], settings["bias"]) == ("LORA", 4, 6.0, "none")


def test_a_folder_comes_back_bit_by_bit(folder, config, adapters):
    back = loaded(folder, config)
    assert back.keys() == adapters.keys()
    for name, array in adapters.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_every_spelling_of_a_module_is_read(folder, config, adapters, tmp_path):
    stored = load_file(folder / "adapter_model.safetensors")
    spelt = {name.replace("model.model.layers", "model.model.language_model.layers"): a for name, a in stored.items()}
    omni = {name.replace("base_model.model.", "base_model.model.thinker."): a for name, a in stored.items()}
    for number, tensors in enumerate((spelt, omni)):
        other = tmp_path / str(number)
        other.mkdir()
        save_file(tensors, other / "adapter_model.safetensors")
        (other / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
        np.testing.assert_array_equal(
            loaded(other, config)["text/layers/mlp/up/lora_a"], adapters["text/layers/mlp/up/lora_a"]
        )


def test_adapters_of_another_kind_are_refused_in_one_message(folder, config, tmp_path):
    other = dataclasses.replace(config, adapters=dataclasses.replace(ADAPTERS, alpha=8.0, mlp=False))
    with pytest.raises(WeightError, match=r"(?s)lora_alpha: got 6.0, expected model.lora.alpha=8.*surplus: .*mlp"):
        loaded(folder, other)
    changed = json.loads((folder / "adapter_config.json").read_text()) | {"use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
    stored = load_file(folder / "adapter_model.safetensors")
    stored.pop(f"{PREFIX}.0.mlp.up_proj.lora_A.weight")
    save_file(stored, tmp_path / "adapter_model.safetensors")
    with pytest.raises(WeightError, match=r"(?s)use_dora: got True, expected False.*missing: .*up_proj.lora_A"):
        loaded(tmp_path, config)


def test_only_an_earlier_folder_of_adapters_is_replaced(folder, config, adapters, tiny):
    with pytest.raises(ExportError, match="exists and is not empty"):
        peft_folder.save_adapters(folder, config, adapters)
    with pytest.raises(ExportError, match=r"holds no adapter_config.json"):
        peft_folder.save_adapters(tiny, config, adapters, overwrite=True)


@pytest.fixture(scope="module")
def merged_logits(config, adapters, tiny, tmp_path_factory):
    """What transformers gives for the merged export."""
    out = tmp_path_factory.mktemp("merged") / "hf"
    params = load_params(tiny, config.base)
    export_model(out, config, nest(flatten(params) | adapters), ExportSettings())
    return logits_of(Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(out), INPUTS)


def test_a_merged_export_is_the_base_plus_the_scaled_product(config, adapters, tiny, merged_logits):
    """torch's own arithmetic on the base: W + alpha / rank x B A."""
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tiny)
    before = logits_of(model, INPUTS)
    with torch.no_grad():
        for number, layer in enumerate(model.model.language_model.layers):
            for path, module in (("attn/q", layer.self_attn.q_proj), ("attn/k", layer.self_attn.k_proj),
                                 ("attn/v", layer.self_attn.v_proj), ("attn/o", layer.self_attn.o_proj),
                                 ("mlp/gate", layer.mlp.gate_proj), ("mlp/up", layer.mlp.up_proj),
                                 ("mlp/down", layer.mlp.down_proj)):  # fmt: skip
                a, b = (torch.tensor(adapters[f"text/layers/{path}/lora_{half}"][number]) for half in "ab")
                module.weight += 1.5 * (a.reshape(-1, 4) @ b.reshape(4, -1)).T
    after = logits_of(model, INPUTS)
    assert np.abs(after - before).max() > 1
    np.testing.assert_allclose(merged_logits, after, atol=1e-3)


def test_a_folder_is_merged_into_a_base_that_stays_in_its_files(folder, tiny, merged_logits, tmp_path):
    config = load_config(tiny)
    assert peft_folder.adapters_of(folder) == ADAPTERS
    config, params = peft_folder.with_adapters(config, left_in_files(tiny, config), folder)
    export_model(tmp_path / "hf", config, params, ExportSettings())
    np.testing.assert_array_equal(
        logits_of(Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path / "hf"), INPUTS), merged_logits
    )


def test_peft_loads_the_folder_as_the_merged_model(folder, tiny, merged_logits):
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tiny)
    model = peft.PeftModel.from_pretrained(model, folder)
    # One module each, all of them in the text decoder.
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 7 * 3
    np.testing.assert_allclose(logits_of(model, INPUTS), merged_logits, atol=1e-3)


def test_a_folder_that_peft_writes_is_read(folder, config, adapters, tiny, tmp_path):
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tiny)
    peft.PeftModel.from_pretrained(model, folder).save_pretrained(tmp_path)
    back = loaded(tmp_path, config)
    for name, array in adapters.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("name", "value"),
    [("init_lora_weights", "pissa"), ("init_lora_weights", "olora"), ("alora_invocation_tokens", [3, 4])]
    + [("layer_replication", [[0, 2], [1, 3]]), ("lora_bias", True), ("use_rslora", True), ("rank_pattern", {"q": 2})],
)
def test_a_setting_that_changes_what_is_computed_is_refused(folder, config, tmp_path, name, value):
    other = shutil.copytree(folder, tmp_path / "other")
    described = json.loads((other / "adapter_config.json").read_text()) | {name: value}
    (other / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(WeightError, match=f"{name}: got .*expected"):
        loaded(other, config)


def test_a_folder_of_some_projections_is_merged_but_not_trained_on(folder, config, adapters, tiny, tmp_path, caplog):
    """Most folders of others adapt q_proj and v_proj alone."""
    some = shutil.copytree(folder, tmp_path / "some")
    kept = {n: a for n, a in load_file(folder / "adapter_model.safetensors").items() if "q_proj" in n or "v_proj" in n}
    save_file(kept, some / "adapter_model.safetensors")
    with pytest.raises(WeightError, match=r"k_proj, o_proj: got no adapter, expected one for each .*can be merged"):
        loaded(some, dataclasses.replace(config, adapters=dataclasses.replace(ADAPTERS, mlp=False)))
    base = load_config(tiny)
    merged, params = peft_folder.with_adapters(base, left_in_files(tiny, base), some)
    assert merged.adapters == dataclasses.replace(ADAPTERS, mlp=False)
    assert "k_proj, o_proj have no adapter there" in caplog.text
    flat = flatten(params)
    for name, array in adapters.items():
        if "/mlp/" not in name:
            expected = array if "/q/" in name or "/v/" in name else np.zeros_like(array)
            np.testing.assert_array_equal(flat[name], expected, err_msg=name)


def test_peft_says_where_a_folder_has_no_place(folder):
    """In an Omni model, where a tensor without a place would be a warning and the answers the base's."""
    described = json.loads((folder / "adapter_config.json").read_text())
    pattern = re.compile(described["target_modules"])
    assert pattern.fullmatch("model.language_model.layers.1.self_attn.q_proj")
    assert pattern.fullmatch("model.layers.0.mlp.up_proj")
    assert not pattern.fullmatch("thinker.model.layers.0.self_attn.q_proj")
