"""A run that was trained on chips of another kind is opened where there are none of them."""

import dataclasses

import jax
import numpy as np
import pytest
from support.small_run import small_config_of

from mer_r1_jax.run.policy import open_model
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.checkpoints import Checkpoints
from mer_r1_jax.training.state import as_stored, make_optimizer, tower_flags, trainable_names


@pytest.fixture
def saved_run(small, small_folder, tmp_path):
    """Writes a run of one checkpoint whose mesh is as told; gives its folder and its parameters."""

    def saved_run(**mesh):
        config = small_config_of(small_folder)
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))
        run = tmp_path / "run"
        run.mkdir()
        atomic_files.write_json(run / "config.json", dataclasses.asdict(config))
        flags = trainable_names(**tower_flags(config, "sft"))
        optimizer = make_optimizer(config.sft.optimizer, total_steps=1)
        state = small.backbone.new_state(small.backbone.init(0), flags, optimizer, "float32")
        host = {"phase": "sft", "step": 7, "data": {"stream": {}, "quarantine": []}, "counters": {"num_tokens": 0}}
        Checkpoints(run / "checkpoints").save(7, as_stored(state), host)
        return run, state.params

    return saved_run


def test_settings_that_other_chips_refuse_are_those_of_training_alone(saved_run):
    run, trained = saved_run(sparse_core_collectives=True)
    setup, params = open_model(run)
    try:
        assert not setup.config.mesh.sparse_core_collectives and not setup.backbone.sparse_core_collectives
        name = "text/norm/scale"
        np.testing.assert_array_equal(np.asarray(params[name]), np.asarray(trained[name]))
    finally:
        setup.close()


@pytest.mark.parametrize(
    ("trained_on", "opened_on"),
    [
        (dict(data=1, fsdp=-1, decode_tensor=2), dict(data=1, fsdp=4, decode_tensor=2, tensor=1)),
        (dict(data=1, fsdp=-1, decode_tensor=3), dict(data=1, fsdp=8, tensor=1)),  # eight devices are no threes
        (dict(data=3, fsdp=1, decode_tensor=1), dict(data=8, fsdp=1, tensor=1)),
    ],
)
def test_a_model_is_opened_on_the_devices_there_are(saved_run, trained_on, opened_on):
    run, trained = saved_run(**trained_on)
    setup, params = open_model(run)  # on eight
    try:
        assert dict(setup.backbone.mesh.shape) == opened_on
        for name, leaf in params.items():
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(trained[name]))
    finally:
        setup.close()


def test_a_model_is_opened_on_one_of_many_devices(saved_run):
    run, _ = saved_run(data=1, fsdp=-1, decode_tensor=2)
    setup, _ = open_model(run, devices=jax.devices()[:1])
    try:
        assert dict(setup.backbone.mesh.shape) == dict(data=1, fsdp=1, tensor=1)
    finally:
        setup.close()


def test_what_is_said_of_the_mesh_beside_a_model_is_heeded(saved_run):
    run, _ = saved_run(data=1, fsdp=-1, decode_tensor=2)
    setup, _ = open_model(run, {"mesh.decode_tensor": 1, "mesh.tensor": 2})
    try:
        assert dict(setup.backbone.mesh.shape) == dict(data=1, fsdp=4, tensor=2)
    finally:
        setup.close()
