"""Models whose numbers are none: whoever reads them is told which, and no page of nonsense stands for an answer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.small_run import run_command, small_config_of

from mer_r1_jax.omni.hf.export import ExportSettings, export_model
from mer_r1_jax.rl.rollout import RolloutError
from mer_r1_jax.run.inference import answer, clip_record
from mer_r1_jax.run.policy import load_policy, open_model
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.checkpoints import CheckpointError, Checkpoints
from mer_r1_jax.training.state import as_stored, make_optimizer, nest, tower_flags, trainable_names

NORM = "text/norm/scale"


@pytest.fixture
def exported(small, tmp_path):
    """The export of the small run's model, and a function that changes a stored tensor without its sum."""
    folder = tmp_path / "hf"
    export_model(
        folder, small.backbone.config, nest(small.backbone.init(0)), ExportSettings(source=small.tokenizer_path)
    )

    def change(name, edit):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = edit(tensors[name])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "mer_r1.sha256").unlink(missing_ok=True)

    return folder, change


def test_infer_ends_with_status_2_and_the_name_of_a_weight_that_is_nan(exported, small_folder, compiled):
    folder, change = exported
    change("model.norm.weight", lambda weight: np.full_like(weight, np.nan))
    ended = run_command("infer.py", f"--model={folder}", f"--video={small_folder / 'clips/0.mp4'}", cache=compiled)
    assert ended.returncode == 2, ended.stderr
    assert "model.norm.weight holds 32 NaN or infinite values of 32" in ended.stderr
    assert "Traceback" not in ended.stderr and "<|" not in ended.stdout


def test_finite_weights_that_give_scores_that_are_none_give_no_answer(exported, small_folder):
    """As one flipped bit of an exponent does."""
    folder, change = exported
    change("model.norm.weight", lambda weight: np.full_like(weight, 3e38))
    change("lm_head.weight", lambda weight: np.full_like(weight, 3e38))
    setup, params = open_model(folder, {"rl.max_completion_length": 16}, devices=jax.devices()[:1])
    try:
        record = clip_record(small_folder / "clips/0.mp4", "Feel?", None, frames=True, audio=True)
        with pytest.raises(RolloutError, match="NaN or infinite in 1 of 1 answers.*weights are damaged"):
            answer(setup, params, record, ("fast",))
    finally:
        setup.close()


@pytest.mark.parametrize(("name", "value"), [(NORM, np.nan), ("audio/conv1/bias", np.inf)])
def test_a_runs_checkpoint_that_is_not_finite_is_refused_by_every_reader(small, small_folder, tmp_path, name, value):
    config = small_config_of(small_folder)
    run = tmp_path / "run"
    run.mkdir()
    atomic_files.write_json(run / "config.json", dataclasses.asdict(config))
    params = small.backbone.init(0)
    params[name] = jnp.full_like(params[name], value)
    flags = trainable_names(**tower_flags(config, "sft"))
    state = small.backbone.new_state(params, flags, make_optimizer(config.sft.optimizer, total_steps=1), "float32")
    data = {"stream": {}, "quarantine": []}
    host = {"phase": "sft", "step": 7, "data": data, "counters": {"num_tokens": 0}}
    Checkpoints(run / "checkpoints").save(7, as_stored(state), host)
    for read in (load_policy, lambda path: open_model(path, devices=jax.devices()[:1])):
        with pytest.raises(CheckpointError) as error:
            read(run)
        told = str(error.value)
        assert "checkpoints/7" in told and f"({name})" in told and "expected finite numbers" in told
