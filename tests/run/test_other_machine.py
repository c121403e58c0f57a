"""A run that was trained on chips of another kind is opened where there are none of them."""

import dataclasses

import numpy as np
from support.small_run import small_config_of

from mer_r1_jax.run.policy import open_model
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.checkpoints import Checkpoints
from mer_r1_jax.training.state import as_stored, make_optimizer, tower_flags, trainable_names


def test_settings_that_other_chips_refuse_are_those_of_training_alone(small, small_folder, tmp_path):
    config = small_config_of(small_folder)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, sparse_core_collectives=True))
    run = tmp_path / "run"
    run.mkdir()
    atomic_files.write_json(run / "config.json", dataclasses.asdict(config))
    flags = trainable_names(**tower_flags(config, "sft"))
    optimizer = make_optimizer(config.sft.optimizer, total_steps=1)
    state = small.backbone.new_state(small.backbone.init(0), flags, optimizer, "float32")
    host = {"phase": "sft", "step": 7, "data": {"stream": {}, "quarantine": []}, "counters": {"num_tokens": 0}}
    Checkpoints(run / "checkpoints").save(7, as_stored(state), host)
    setup, params = open_model(run)
    try:
        assert not setup.config.mesh.sparse_core_collectives and not setup.backbone.sparse_core_collectives
        name = "text/norm/scale"
        np.testing.assert_array_equal(np.asarray(params[name]), np.asarray(state.params[name]))
    finally:
        setup.close()
