"""A model folder whose tokenizer is a sentencepiece model, from its export through a prompt and sampling to scores."""

import jax
import numpy as np
import pytest
from support.small_run import small_setup
from support.spm_tokenizer import write_sentencepiece_model

from mer_r1_jax.config.schema import DataConfig
from mer_r1_jax.omni.hf.export import ExportSettings, export_model
from mer_r1_jax.rl.confidence import NO_SET
from mer_r1_jax.rl.rollout import STOP_EOS, Completions
from mer_r1_jax.run.inference import answer, clip_record
from mer_r1_jax.run.policy import open_model
from mer_r1_jax.training.state import nest


@pytest.fixture(scope="module")
def folder(small_folder, compiled, tmp_path_factory):
    """The export of a small random model with a sentencepiece tokenizer."""
    source = write_sentencepiece_model(tmp_path_factory.mktemp("spm"))
    idle = {"max_steps": 0}
    setup = small_setup(small_folder, model={"tokenizer_path": str(source)}, sft=idle, rl=idle)
    setup.close()
    out = tmp_path_factory.mktemp("out") / "hf"
    export_model(out, setup.backbone.config, nest(setup.backbone.init(0)), ExportSettings(source=source))
    assert (out / "tokenizer.model").is_file() and not (out / "tokenizer.json").exists()
    return out


def test_a_sentencepiece_model_answers_and_is_scored(folder, small_folder):
    overrides = {
        "rl.max_completion_length": 24,
        "data.max_prompt_length": 2000,
        "media.min_frames": 2,
        "media.max_frames": 2,
    }
    setup, params = open_model(folder, overrides, devices=jax.devices()[:1])
    try:
        clip = small_folder / "clips/0.mp4"
        record = clip_record(clip, DataConfig.question, "I never", frames=True, audio=True)
        prompt, (slow, fast) = answer(setup, params, record)
    finally:
        setup.close()
    assert "<subtitle>I never</subtitle>" in prompt.text and prompt.stats["frames"] == 2
    assert fast.text.startswith("<think></think>\n<answer>") and slow.text
    for token in ("<|im_start|>", "<|VIDEO|>", "<unk>"):
        assert token not in slow.text + fast.text

    ids, _ = setup.tags.slow_target("The voice", "happy, sad")
    completions = written(ids, length=48)
    scored = setup.eval_scorer.groups(completions, [("happy",)])
    np.testing.assert_allclose(scored.rewards.f1_BG, [[2 / 3]])
    np.testing.assert_array_equal(scored.rewards.format_BG, [[1]])
    sets = np.asarray(scored.anchors.set_BGWQ)[0, 0]
    assert (sets[:2] != NO_SET).any(axis=-1).all()  # both words have a place at which the model is asked


def written(ids, length):
    """One completion that was sampled as these ids."""
    row = np.zeros((1, 1, length), np.int32)
    row[0, 0, : len(ids)] = ids
    mask = np.arange(length)[None, None] < len(ids)
    zeros = np.zeros(mask.shape, np.float32)
    count, stop = np.full((1, 1), len(ids), np.int32), np.full((1, 1), STOP_EOS, np.int32)
    return Completions(
        id_BGC=row, length_BG=count, mask_BGC=mask, stop_BG=stop, logprob_BGC=zeros, sampling_logprob_BGC=zeros
    )
