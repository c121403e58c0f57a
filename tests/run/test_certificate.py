"""The certificate of a model: what turns it red, what it leaves open, and that its page says so."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.commands import run_command
from support.subtitle_world import run_config, write_world

from mer_r1_jax.media.tokenizer import load_tokenizer
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.hf.export import ExportSettings, export_model
from mer_r1_jax.omni.hf.load import load_params
from mer_r1_jax.omni.thinker import abstract_thinker
from mer_r1_jax.parity import self_checks
from mer_r1_jax.parity.self_checks import Agreement
from mer_r1_jax.run import certificate
from mer_r1_jax.run.certificate import CERTIFIED, FAILED, NOT_CERTIFIED, Asked, Certificate, Check, certify
from mer_r1_jax.run.policy import PolicyError, write_settings
from mer_r1_jax.training.omni_backbone import thinker_config

NUMBERS = [
    certificate.LOADED,
    certificate.AGAINST_TRANSFORMERS,
    certificate.CACHE,
    certificate.BATCH,
    certificate.SAMPLER,
    certificate.GAP,
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def sound(world):
    """An export of random numbers with a tokenizer, made without compiling anything."""
    config = run_config(world, world / "runs", steps=0)
    config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, max_completion_length=6))
    thinker = thinker_config(config.model, load_tokenizer(config.model.tokenizer_path))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), abstract_thinker(thinker)[1])
    export_model(world / "sound", thinker, params, ExportSettings(source=config.model.tokenizer_path))
    write_settings(world / "sound", config)
    return world / "sound"


@pytest.fixture
def folder(sound, tmp_path, monkeypatch):
    """A copy to damage. Whatever is wrong with it has to show before the model is opened."""
    monkeypatch.setattr(certificate, "open_model", lambda *_: pytest.fail("the model was opened"))
    shutil.copytree(sound, tmp_path / "model")
    return tmp_path / "model"


def failed_of(folder):
    """Name -> what was found, of the failed checks; none of the numbers may be certified beside them."""
    found = certify(Asked(model=folder))
    assert {check.name for check in found.of(NOT_CERTIFIED)} >= set(NUMBERS)
    assert found.verdict.startswith(f"{len(found.of(FAILED))} of {len(found.checks)} checks failed: do not use")
    return {check.name: check.found for check in found.of(FAILED)}


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_transposed_matrix_turns_it_red(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert weights[name].shape == (64, 64)  # square: no header shows it
    weights[name] = np.ascontiguousarray(weights[name].T)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    failed = failed_of(folder)
    assert list(failed) == [certificate.WRITTEN] and "model.safetensors has the sum" in failed[certificate.WRITTEN]


def test_a_shifted_special_token_turns_it_red(folder):
    audio = json.loads((folder / "config.json").read_text())["audio_token_index"]
    rewrite(folder / "config.json", audio_token_index=audio + 1)
    failed = failed_of(folder)
    assert list(failed) == [certificate.TOKENS]
    assert f"audio_token_id is {audio + 1}, but <|AUDIO|> has id {audio}" in failed[certificate.TOKENS]


@pytest.mark.parametrize("file, expected", [("generation_config.json", "vLLM"), ("config.json", "length cap")])
def test_an_end_token_that_is_not_told_turns_it_red(folder, file, expected):
    rewrite(folder / file, eos_token_id=7)
    failed = failed_of(folder)
    assert list(failed) == [certificate.ENDS]
    assert "<|im_end|>) among them" in failed[certificate.ENDS] and expected in failed[certificate.ENDS]


def test_a_file_that_is_gone_or_a_description_of_something_else_turns_it_red(folder):
    (folder / "tokenizer.json").unlink()
    rewrite(folder / "config.json", model_type="llama")
    failed = failed_of(folder)
    assert list(failed) == [certificate.DESCRIPTION, certificate.WRITTEN]
    assert "tokenizer.json is not there" in failed[certificate.WRITTEN]


def test_a_number_that_is_none_turns_it_red(folder, monkeypatch):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "mer_r1.sha256").unlink()
    monkeypatch.setattr(certificate, "open_model", lambda path, *_: load_params(path, load_config(path)))
    found = certify(Asked(model=folder))
    (failed,) = found.of(FAILED)
    assert failed.name == certificate.LOADED and "model.norm.weight" in failed.found
    assert {check.name for check in found.of(NOT_CERTIFIED)} == {certificate.WRITTEN, *NUMBERS} - {certificate.LOADED}


def test_without_a_list_of_sums_the_files_are_not_certified(folder, monkeypatch):
    (folder / "mer_r1.sha256").unlink()
    monkeypatch.setattr(certificate, "_certify_numbers", lambda *_: None)
    found = certify(Asked(model=folder))
    assert [check.name for check in found.of(NOT_CERTIFIED)] == [certificate.WRITTEN] and not found.of(FAILED)
    assert {file["name"] for file in found.files} == {path.name for path in folder.iterdir()}
    assert all(len(file["sha256"]) == 64 and file["bytes"] for file in found.files)


def test_without_a_transformers_that_knows_the_model_its_numbers_are_not_certified(monkeypatch):
    def too_old(*_):
        raise ImportError("cannot import name 'Qwen2_5OmniThinkerForConditionalGeneration'")

    monkeypatch.setattr(self_checks, "against_transformers", too_old)
    monkeypatch.setattr(certificate.importlib.util, "find_spec", lambda name: name)
    found = Certificate("model")
    certificate._certify_against_transformers(found, Asked(model="model"), {}, ThinkerConfig.tiny())
    assert [(check.name, check.state) for check in found.checks] == [(certificate.AGAINST_TRANSFORMERS, NOT_CERTIFIED)]
    assert "4.57 or later" in found.checks[0].found


def test_a_runs_folder_or_none_is_refused(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(PolicyError, match="certify its export, .*run/export/hf"):
        certify(Asked(model=tmp_path / "run"))
    with pytest.raises(PolicyError, match="no such folder"):
        certify(Asked(model=tmp_path / "none"))


def test_what_is_not_within_its_limit_or_no_number_is_not_agreed():
    assert Agreement("logits", 0.001, 5.0, 0.002).agrees
    for wrong in (Agreement("logits", 0.003, 5.0, 0.002), Agreement("logits", np.nan, np.nan, np.nan)):
        assert not wrong.agrees
        with pytest.raises(certificate.CertificateError, match="logits: worst difference"):
            certificate._agreed("in float32", [wrong], "this port")


def test_the_page_says_what_is_certified_and_what_is_not(tmp_path):
    found = Certificate("a <model>", [Check("one", CERTIFIED, "fine"), Check("two", FAILED, "5 < 6")])
    found.leave("nobody asked", "three")
    page, data = certificate.write_certificate(tmp_path / "new/out", found)
    text = page.read_text()
    assert "1 of 3 checks failed: do not use this model yet. 1 certified, 1 not certified." in text
    assert "a &lt;model&gt;" in text and "5 &lt; 6" in text and "nobody asked" in text and "<script" not in text
    assert [text.index(f">{state}<") for state in (FAILED, NOT_CERTIFIED, CERTIFIED)] == sorted(
        text.index(f">{state}<") for state in (FAILED, NOT_CERTIFIED, CERTIFIED)
    )
    assert json.loads(data.read_text())["checks"][1] == {"name": "two", "state": "failed", "found": "5 < 6"}


def test_slow_beside_fast_with_intervals_over_the_clips_that_count():
    answer = SimpleNamespace(answer=SimpleNamespace(truncated=True))
    scores = {"slow": np.array([1.0, 0.5, np.nan]), "fast": np.array([0.5, 0.5, np.nan])}
    evaluation = SimpleNamespace(
        records=("a", "b", "c"),
        answers={"slow": [answer] * 3, "fast": []},
        scored=(0, 1),
        scores=lambda mode, name: scores[mode],
        skipped=[("d", "no sound")],
    )
    found = Certificate("model")
    said = certificate._gap(found, evaluation)
    assert said == "3 clips answered slow and fast, 2 scored, 1 could not be used; figures below"
    assert found.figures["F1 of slow answers"].startswith("75.0 points (95% interval 50.0 to 100.0)")
    assert found.figures["slow minus fast F1"].startswith("+25.0 points (95% interval +0.0 to +50.0, 2 clips")
    assert found.figures["slow answers cut at the length cap"] == "3 of 3"


def test_the_command_compares_the_sampler_and_says_what_it_left_out(sound, tmp_path, monkeypatch):
    """The comparisons that it asks for beside have tests of their own (tests/hf/test_self_checks.py)."""
    monkeypatch.setattr(self_checks, "cached_against_uncached", lambda *_: None)
    monkeypatch.setattr(self_checks, "batch_against_single", lambda *_: Agreement("logits", 9.0, 9.0, 0.1))
    code = run_command("certify", f"--model={sound}", f"--out={tmp_path}", "--noreference")
    found = json.loads((tmp_path / "certificate.json").read_text())
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert code == 1 and [name for name in states if states[name] == FAILED] == [certificate.BATCH]
    left_out = {name for name in states if states[name] == NOT_CERTIFIED}
    assert left_out == {certificate.CACHE, certificate.AGAINST_TRANSFORMERS, certificate.GAP}
    assert states[certificate.SAMPLER] == CERTIFIED
    assert "tokens/s" in found["figures"]["speed of slow answers"]
