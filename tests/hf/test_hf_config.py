"""config.json in both key styles, against transformers' own classes."""

import json

import pytest
from support.omni_dir import older_config
from support.tiny_hf import tiny_thinker_config
from transformers import Qwen2_5OmniThinkerConfig

from mer_r1_jax.omni.architecture_checks import ConfigError
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf.config_json import config_from_hf, config_to_hf, load_config

PRESETS = {
    "3b": ThinkerConfig.qwen2_5_omni_3b(),
    "7b": ThinkerConfig.qwen2_5_omni_7b(),
    "tiny": ThinkerConfig.tiny(vocab_size=700, eos_token_ids=(693, 691), tie_word_embeddings=True),
}


@pytest.mark.parametrize("style", ["v4", "v5"])
@pytest.mark.parametrize("preset", PRESETS)
def test_config_round_trip(preset, style):
    config = PRESETS[preset]
    written = json.loads(json.dumps(config_to_hf(config, style=style, dtype="bfloat16")))
    assert config_from_hf(written) == config
    assert ("rope_scaling" in written["text_config"]) == (style == "v4")
    assert config_from_hf({"model_type": "qwen2_5_omni", "thinker_config": written}) == config


@pytest.mark.parametrize("style", ["v4", "v5"])
@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_reads_what_is_written(preset, style):
    config = PRESETS[preset]
    theirs = Qwen2_5OmniThinkerConfig(**config_to_hf(config, style=style))
    assert theirs.text_config.rope_parameters["mrope_section"] == list(config.text.mrope_section)
    assert theirs.text_config.rope_parameters["rope_theta"] == config.text.rope_theta
    assert theirs.vision_start_token_id == config.vision_start_token_id
    assert theirs.audio_token_id == config.audio_token_id
    assert theirs.tie_word_embeddings == config.tie_word_embeddings
    assert theirs.vision_config.hidden_size == config.vision.hidden_size
    # and what transformers makes of it says the same when it is read back
    assert config_from_hf(json.loads(theirs.to_json_string())) == config


@pytest.mark.parametrize("restyle", [lambda config: config, older_config], ids=["v5_keys", "v4_keys"])
def test_transformers_file_gives_the_same_config_in_both_key_styles(tmp_path, restyle):
    theirs = tiny_thinker_config(text={"num_hidden_layers": 5})
    (tmp_path / "config.json").write_text(json.dumps(restyle(json.loads(theirs.to_json_string(use_diff=False)))))
    config = load_config(tmp_path, param_dtype="bfloat16")
    assert config.text.num_hidden_layers == 5
    assert config.text.mrope_section == (2, 3, 3)
    assert config.text.rope_theta == 1e6
    assert (config.vision.depth, config.vision.fullatt_block_indexes) == (4, (1, 3))
    assert (config.image_token_id, config.vision_start_token_id, config.eos_token_ids) == (492, 489, (482,))
    assert config.param_dtype == "bfloat16"


def test_other_spellings_of_placeholder_ids():
    written = config_to_hf(PRESETS["7b"])
    for name in ("audio", "image", "video"):
        written[f"{name}_token_id"] = written.pop(f"{name}_token_index") - 1
    config = config_from_hf(written)
    assert (config.audio_token_id, config.image_token_id, config.video_token_id) == (151645, 151654, 151655)


def test_missing_special_ids_are_the_released_ones_where_the_vocabulary_has_them(tmp_path):
    written = config_to_hf(PRESETS["7b"])
    for name in ("vision_start_token_id", "pad_token_id", "eos_token_id", "audio_token_index"):
        del written[name]
    assert config_from_hf(written) == PRESETS["7b"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643], "pad_token_id": 5}')
    config = load_config(tmp_path)
    assert (config.eos_token_ids, config.pad_token_id) == ((151645, 151643), 5)

    written = config_to_hf(PRESETS["tiny"])
    del written["vision_start_token_id"], written["image_token_index"]
    with pytest.raises(ConfigError) as error:
        config_from_hf(written)
    assert "vision_start_token_id is missing" in str(error.value) and "image_token_index is missing" in str(error.value)


def test_only_the_outer_tie_flag_counts():
    written = config_to_hf(PRESETS["7b"])
    written["text_config"]["tie_word_embeddings"] = True
    assert config_from_hf(written).tie_word_embeddings is False
    del written["tie_word_embeddings"]
    assert config_from_hf(written).tie_word_embeddings is False
    written["tie_word_embeddings"] = True
    assert config_from_hf(written).tie_word_embeddings is True


def test_missing_fields_take_the_defaults_of_transformers():
    written = config_to_hf(PRESETS["7b"])
    del (
        written["vision_config"]["hidden_size"],
        written["text_config"]["rope_scaling"],
        written["text_config"]["rope_theta"],
    )
    config = config_from_hf(written)
    assert config.vision.hidden_size == 3584  # the class's default, which no released model has
    assert config.text == PRESETS["7b"].text


def test_all_faults_of_a_config_are_listed_in_one_error():
    written = config_to_hf(PRESETS["7b"])
    written["text_config"]["hidden_act"] = "gelu"
    written["text_config"]["use_sliding_window"] = True
    written["text_config"]["rope_scaling"]["rope_type"] = "yarn"
    written["text_config"]["rope_parameters"] = {"rope_theta": 1e4, "mrope_section": [8, 28, 28]}
    written["vision_config"]["patch_size"] = [14, 16]
    written["audio_config"]["d_model"] = 1281
    with pytest.raises(ConfigError) as error:
        config_from_hf(written, where="there/config.json")
    message = str(error.value)
    for part in (
        "there/config.json",
        "text_config.hidden_act is 'gelu'",
        "text_config.use_sliding_window is True",
        "'yarn'",
        "disagree on rope_theta",
        "disagree on mrope_section",
        "vision_config.patch_size is [14, 16]",
        "d_model is 1281",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "an empty folder"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds a JSON list"),
        ('{"model_type": "llama"}', "model_type is 'llama'"),
        ('{"thinker_config": 3}', "thinker_config is a int"),
        ('{"text_config": {}}', "audio_config, vision_config"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=expected):
        load_config(tmp_path)


def test_sections_that_do_not_fit_a_tiny_head_are_refused():
    written = config_to_hf(PRESETS["tiny"])
    del written["text_config"]["rope_scaling"]  # transformers 4 would fall back to the released sections
    with pytest.raises(ConfigError, match="mrope_section"):
        config_from_hf(written)


def test_config_style_is_checked():
    with pytest.raises(ValueError, match="v6"):
        config_to_hf(PRESETS["tiny"], style="v6")
