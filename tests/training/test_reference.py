"""The reference that follows the policy: mixed as TRL mixes it, and the same one again in a run that goes on."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_run import small_setup, visits_of

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.parallel.rows import put
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.run.stored_reference import ReferenceLostError, open_reference
from mer_r1_jax.storage.checkpoints import Checkpoints
from mer_r1_jax.training.prompts import loaded_rows
from mer_r1_jax.training.reference import Reference, dtypes_in_memory, mixed, synced_at

CONFIG = RlConfig(sync_ref_model=True, ref_model_mixup_alpha=0.25, ref_model_sync_steps=3)
SAVED = (2, 4, 5, 8)  # steps with a checkpoint


def policy(step):
    return {"text/w": jnp.full((2, 3), float(step * step)), "text/b": jnp.arange(3.0) + step}


def state_of(step):
    return types.SimpleNamespace(split=lambda: (policy(step), {}))


@pytest.mark.torch
def test_it_is_mixed_as_trl_does():
    import torch
    from trl.trainer.callbacks import SyncRefModelCallback

    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    policy_, reference = [
        {name: jnp.asarray(value.detach().numpy()) for name, value in model.named_parameters()} for model in models
    ]
    made = mixed(reference, policy_, np.float32(0.6))
    SyncRefModelCallback._sync_target_model(*models, 0.6)
    for name, value in models[1].named_parameters():
        # Terms of up to 0.6 are rounded before they are added, and may cancel: float32's step there, not the sum's.
        np.testing.assert_allclose(made[name], value.detach().numpy(), rtol=1e-6, atol=1e-7)


def test_a_small_share_of_a_bfloat16_difference_is_not_rounded_away():
    old, new = jnp.full(2, 1.0, jnp.bfloat16), jnp.full(2, 1.5, jnp.bfloat16)
    made = mixed({"w": old}, {"w": new}, np.float32(0.25))["w"]
    assert made.dtype == jnp.bfloat16 and float(made[0]) == 1.125


def test_only_the_steps_that_are_due_change_it():
    assert [synced_at(CONFIG, step) for step in range(7)] == [0, 0, 0, 3, 3, 3, 6]
    assert synced_at(RlConfig(), 999) == 0
    fixed = Reference(policy(0), RlConfig(), None)
    for step in range(1, 9):
        fixed.follow(state_of(step), step)
    fixed.keep()
    np.testing.assert_array_equal(fixed.params["text/w"], policy(0)["text/w"])


class Folder:
    """A run's folder, as far as the reference sees it."""

    def __init__(self, path):
        self.path = path

    def open_checkpoints(self, name, max_to_keep):
        return Checkpoints(self.path / name, max_to_keep=max_to_keep)


def run_in(path):
    """A run kept there, as far as the reference sees it."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), policy(0))
    return types.SimpleNamespace(
        config=types.SimpleNamespace(
            train=types.SimpleNamespace(save_total_limit=2, seed=0), model=types.SimpleNamespace(path="")
        ),
        folder=Folder(path),
        sft_steps=0,
        backbone=types.SimpleNamespace(
            shapes=shapes,
            shardings=dict.fromkeys(shapes, place),
            decode_shardings=dict.fromkeys(shapes, place),
            config=types.SimpleNamespace(compute_dtype="bfloat16"),
        ),
        initial_params=lambda: policy(0),
    )


@pytest.fixture
def attempt(tmp_path):
    """Starts a run of steps first + 1..last as `train_rl` does; what its steps' references were."""
    run = run_in(tmp_path)

    def attempt(done, last):
        phase = types.SimpleNamespace(config=CONFIG, is_trainable=lambda name: True)
        reference = open_reference(run, phase, state_of(0), done)
        seen = {}
        for step in range((done or 0) + 1, last + 1):
            seen[step] = np.asarray(reference.params["text/w"])  # what the step is held against
            reference.follow(state_of(step), step)
            if step in SAVED:
                reference.keep()
        return seen

    return attempt


def test_a_run_that_goes_on_is_held_against_the_very_same_reference(attempt, tmp_path):
    whole = attempt(None, 9)
    assert sorted({float(value[0, 0]) for value in whole.values()}) == [0.0, 0.25 * 9, 0.75 * 2.25 + 0.25 * 36]
    # From the newest checkpoint, from the one before it (the newest was damaged), and what comes after both.
    for done in (8, 5):
        again = attempt(done, 9)
        assert again.keys() == set(range(done + 1, 10))
        for step, value in again.items():
            np.testing.assert_array_equal(value, whole[step], err_msg=f"{done}: {step}")
    assert {step.name for step in (tmp_path / "reference").iterdir()} >= {"3", "6"}


def test_one_that_is_lost_is_refused_by_its_number(attempt, tmp_path):
    attempt(None, 9)
    (tmp_path / "reference/6/manifest.json").write_bytes(b"[")
    with pytest.raises(ReferenceLostError, match=r"of update 6, which checkpoint 8 .* Put .*reference/6 back"):
        attempt(8, 9)
    # That of the start is made again.
    (tmp_path / "reference/0/manifest.json").write_bytes(b"[")
    assert (attempt(2, 3)[3] == 0).all()


def test_where_rl_begins_the_policy_s_own_arrays_are_kept_and_none_of_them_is_shared(tmp_path, monkeypatch):
    """No second set of them at full width stands beside the state, and donating the state leaves the reference."""
    run, arrays, kept = run_in(tmp_path), policy(3), []
    del run.backbone.decode_shardings["text/b"]  # so one is cast, and the other one has the dtype it is to have
    save = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, step, *rest: kept.append(dict(rest[0])) or save(self, step, *rest)
    )
    state = types.SimpleNamespace(split=lambda: (dict(arrays), {}))
    phase = types.SimpleNamespace(config=RlConfig(), is_trainable=lambda name: True)
    reference = open_reference(run, phase, state, None)
    (saved,) = kept
    assert saved.keys() == arrays.keys()
    assert all(saved[name] is arrays[name] for name in arrays)
    expected = jax.tree.map(np.asarray, policy(3))
    for array in arrays.values():
        array.delete()  # as the first update does, which is given them
    assert {name: str(array.dtype) for name, array in reference.params.items()} == {
        "text/w": "bfloat16",
        "text/b": "float32",
    }
    for params in (reference.params, open_reference(run, phase, state, 1).params):
        for name, array in params.items():
            np.testing.assert_array_equal(np.asarray(array, np.float32), expected[name])


def test_in_the_compute_dtype_it_takes_half_the_memory_and_gives_the_same_bits(small_folder, compiled, tmp_path):
    """From the beginning and from disk, where it is kept in the policy's dtype; one that is mixed stays in that."""
    model, rl = {"compute_dtype": "bfloat16"}, {"sync_ref_model": False}
    setup = small_setup(small_folder, model=model, media={"decode_workers": 0}, rl=rl)
    phase, programs = setup.rl_phase(), setup.programs
    state = phase.new_state(setup.initial_params())
    # Scales of 1 and biases of 0 would be the same in either dtype.
    rng = np.random.default_rng(0)
    moved = {n: leaf + jnp.asarray(0.05 * rng.normal(size=leaf.shape), leaf.dtype) for n, leaf in state.params.items()}
    state = dataclasses.replace(state, params=moved)
    run = types.SimpleNamespace(config=setup.config, folder=Folder(tmp_path), sft_steps=0, backbone=setup.backbone)
    rows, _ = loaded_rows(visits_of(setup, setup.data.rl, [0, 1]), phase.buckets, setup.backbone.config)
    prompts = programs.encode(state.params, put(rows, setup.backbone.mesh))
    shape = (rows.uid_B.shape[0], setup.config.rl.num_generations, setup.config.rl.max_completion_length)
    completion = Continuations(id_BGC=np.full(shape, 7, np.int32), exists_BGC=np.ones(shape, bool))
    expected = np.asarray(programs.logprobs(state.params, prompts, completion))
    for done in (None, 3):
        reference = open_reference(run, phase, state, done)
        text = {name: array for name, array in reference.params.items() if name.startswith("text/")}
        assert text and {array.dtype for array in text.values()} == {jnp.dtype("bfloat16")}
        towers = reference.params.keys() - text.keys()
        assert all(reference.params[name].dtype == state.params[name].dtype for name in towers)
        np.testing.assert_array_equal(programs.logprobs(reference.over(state), prompts, completion), expected)
    mixing = dataclasses.replace(setup.config.rl, sync_ref_model=True)
    assert set(dtypes_in_memory(state.split()[0], setup.backbone, mixing).values()) == {jnp.dtype("float32")}
