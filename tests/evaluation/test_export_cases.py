"""Checking an export with transformers: the cases say what our batches say, and a wrong export is caught."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.commands import load_command, run_command
from support.prompts import noise_audio, noise_image, noise_video, simple_prompt, tiny_thinker
from support.subtitle_world import run_config, write_world
from support.transformers4 import VERSION, transformers4_path

from mer_r1_jax.media.collate import collate, prompt_shape
from mer_r1_jax.omni.hf.export import ExportSettings, export_model
from mer_r1_jax.parity.processor_inputs import MEL_PADDING, ProcessorInputs, processor_tensors, to_batch
from mer_r1_jax.run.policy import write_settings
from mer_r1_jax.run.setup import make_setup
from mer_r1_jax.training.state import nest

CLIPS, NEW_TOKENS = 3, 12


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads of torch on a tiny model cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("agreement"))


@pytest.fixture(scope="module")
def export(world):
    """A random policy whose weights are spread so widely that mistakes show."""
    config = run_config(world, world / "runs", steps=0)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, initializer_range=0.2),
        rl=dataclasses.replace(config.rl, max_completion_length=NEW_TOKENS),
    )
    setup = make_setup(config)
    folder = world / "export"
    export_model(
        folder,
        setup.backbone.config,
        nest(setup.initial_params()),
        ExportSettings(source=setup.tokenizer_path, dtype="float32"),
    )
    write_settings(folder, config)
    return folder


@pytest.fixture(scope="module")
def checked(world, export):
    """The command's exit code, its results under both versions of transformers, and its cases."""
    cases, out = world / "cases.npz", world / "results.json"
    code = run_command(
        "export_check",
        f"--export={export}",
        f"--data={world / 'eval.jsonl'}",
        f"--clips={CLIPS}",
        f"--cases={cases}",
        f"--also={transformers4_path()}",
        f"--out={out}",
        "--least_distinct=4",
    )
    return SimpleNamespace(code=code, results=json.loads(out.read_text()), cases=cases)


def test_both_transformers_give_our_logits_and_answers(checked):
    newer, older = checked.results
    assert newer["transformers"].startswith("5.") and older["transformers"] == VERSION
    for result in checked.results:
        assert result["agrees"] and result["clips"] == result["same_answers"] == CLIPS
        assert 0 < result["largest_logit_difference"] < 2e-3
        assert all(clip["same_tokens"] == clip["tokens"] for clip in result["by_clip"])
    logits = np.load(checked.cases)["case000.logits"]
    assert logits.std() > 0.5  # spread widely enough for a limit of 2e-3 to mean something
    # Random answers hold no emotion words, so they are all the same to a reader: that alone fails the command.
    assert newer["distinct_answers"] == 1 and checked.code == 1


def test_a_wrong_export_is_caught(checked, export, tmp_path, capsys):
    wrong = tmp_path / "wrong"
    shutil.copytree(export, wrong)
    weights = load_file(wrong / "model.safetensors")
    weights["audio_tower.layers.0.fc1.bias"] += 0.5
    save_file(weights, wrong / "model.safetensors", metadata={"format": "pt"})
    script = load_command("check_in_transformers")
    result = script.check(str(checked.cases), str(wrong))
    assert not result["agrees"] and result["largest_logit_difference"] > 2e-3
    script.show(result | {"transformers": "5", "torch": "2"})
    assert "largest difference of a logit" in capsys.readouterr().out


def test_other_answers_and_overruled_tokens_are_counted(checked, export, tmp_path):
    loaded = dict(np.load(checked.cases))
    overruled = sum(int(loaded[f"case{number:03d}.overruled"]) for number in range(CLIPS))
    assert checked.results[0]["overruled_tokens"] == overruled > 0
    cases = dict(loaded, cases=np.asarray(2))
    ids = cases["case001.completion_ids"] = cases["case001.completion_ids"].copy()
    ids[5] = (ids[5] + 1) % 256
    np.savez(tmp_path / "changed.npz", **cases)
    result = load_command("check_in_transformers").check(str(tmp_path / "changed.npz"), str(export))
    first, second = result["by_clip"]
    assert first["same_answer"] and not second["same_answer"] and second["same_tokens"] == 5
    assert result["same_answers"] == 1 and not result["agrees"]


def test_without_torch_the_cases_are_kept_and_the_message_says_so(world, export, checked, tmp_path, capsys):
    out = tmp_path / "cases.npz"
    arguments = [f"--export={export}", f"--data={world / 'eval.jsonl'}", "--clips=1", f"--cases={out}"]
    missing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    made = dict(np.load(checked.cases))  # the real one would compile every program again
    assert run_command("export_check", *arguments, importlib=missing, make_cases=lambda *_, **__: made) == 2
    message = capsys.readouterr().err
    assert "torch is not installed here" in message and f"check_in_transformers.py {out} {export}" in message
    assert int(np.load(out)["cases"]) == CLIPS


PROMPTS = {
    "text": {},
    "one of each": dict(videos=[noise_video()], audios=[noise_audio()], images=[noise_image()]),
    "several sizes": dict(
        videos=[noise_video(4, 56, 84), noise_video(2, 112, 56, fps=1.5, seed=3)],
        audios=[noise_audio(1.0), noise_audio(2.3, seed=2)],
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_cases_are_what_the_processors_layout_says(name):
    """Read back by the code that reads transformers' tensors, a case gives the batch that we run ourselves."""
    thinker, prompt = tiny_thinker(), simple_prompt(**PROMPTS[name])
    tensors = processor_tensors(prompt)
    theirs, next_position_B, _ = to_batch(ProcessorInputs.of(tensors), thinker)
    ours = collate([prompt], prompt_shape(prompt), thinker)
    assert next_position_B[0] == prompt.next_position
    np.testing.assert_array_equal(theirs.tokens.id_BT, ours.tokens.id_BT)
    np.testing.assert_array_equal(theirs.tokens.segment_BT, ours.tokens.segment_BT)
    np.testing.assert_array_equal(theirs.tokens.position_3BT, ours.tokens.position_3BT)
    for token, ids in enumerate(prompt.ids):
        np.testing.assert_array_equal(
            media_at(theirs, token), media_at(ours, token), err_msg=f"token {token}, id {ids}"
        )
    if prompt.audio:
        assert tensors["input_features"].shape[2] % MEL_PADDING == 0


def media_at(batch, token):
    """What stands behind a media token: its four patches, or the mel frames of its clip and its place among them."""
    clip, row = batch.tokens.source_BT2[0, token]
    videos = 0 if batch.vision is None else batch.vision.patches_BVPSX.shape[1]
    if clip < 0:
        return np.zeros(0)
    if clip < videos:
        patches = batch.vision.patches_BVPSX[0, clip]
        return patches.reshape(-1, 4, patches.shape[-1])[row]
    mel, frames = batch.audio.mel_BAUFM[0, clip - videos], batch.audio.frames_BA[0, clip - videos]
    return np.append(mel.reshape(-1, mel.shape[-1])[:frames].ravel(), row)
