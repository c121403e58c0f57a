"""The base of a run with adapters: what its checkpoints leave out, because no phase of it trains it.

It is the model at `model.path`, which a run that goes on, or whoever reads the run, needs anyhow for its architecture
and tokenizer. Where a run began with random weights, it is kept beside the checkpoints, once.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from mer_r1_jax.run.setup import Setup
from mer_r1_jax.storage.checkpoints import CheckpointError, Checkpoints
from mer_r1_jax.storage.run_directory import RunDirectory
from mer_r1_jax.training.state import Params, left_out_of_checkpoints

BASE_FOLDER = "base"  # of a run's folder


def begin(setup: Setup, folder: RunDirectory) -> Params:
    """All parameters that a run starts from; the base of random weights is kept for later attempts.

    Raises:
        CheckpointError: it could not be saved.
    """
    params, leave_out = setup.initial_params(), left_out_of_checkpoints(setup.config)
    base = {name: value for name, value in params.items() if leave_out(name)}
    if base and not setup.config.model.path:
        folder.open_checkpoints(BASE_FOLDER, max_to_keep=1).save(0, base, {})
    return params


def restore_base(setup: Setup, kept: Callable[[], Checkpoints]) -> Params:
    """The parameters that this run's checkpoints leave out; none where there are no adapters.

    Args:
        setup: of the run.
        kept: opens the checkpoints of its folder `base`.

    Raises:
        CheckpointError: the base of random weights is not there any more.
    """
    leave_out, backbone = left_out_of_checkpoints(setup.config), setup.backbone
    names = [name for name in backbone.shapes if leave_out(name)]
    if not names:
        return {}
    if path := setup.config.model.path:
        loaded = backbone.load(path)
        return {name: loaded[name] for name in names}
    # Restored where each parameter lives in training.
    abstract = {
        name: jax.ShapeDtypeStruct(
            backbone.shapes[name].shape, backbone.shapes[name].dtype, sharding=backbone.shardings[name]
        )
        for name in names
    }
    checkpoints = kept()
    restored = checkpoints.restore(abstract)
    if restored is None:
        raise CheckpointError(
            f"{checkpoints.directory}: got nothing, expected the base that this run's adapters belong to, as it began "
            "with random weights; put a copy of that folder back, or begin again under another train.run_name"
        )
    return restored.arrays
