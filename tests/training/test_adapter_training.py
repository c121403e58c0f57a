"""Training with adapters: what is trained, stored and held twice; new ones switched off are the reference."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.small_run import small_config_of, small_setup, visits_of

from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.config.schema import ConfigError, RunConfig
from mer_r1_jax.omni.lora import is_adapter
from mer_r1_jax.parallel.rows import put
from mer_r1_jax.planning.programs import RunPrograms, bytes_per_chip
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.run.stored_reference import open_reference
from mer_r1_jax.storage.checkpoints import Checkpoints
from mer_r1_jax.training.prompts import loaded_rows
from mer_r1_jax.training.reference import switched_off
from mer_r1_jax.training.sft_step import make_sft_step
from mer_r1_jax.training.state import as_stored, from_stored, left_out_of_checkpoints, param_dtypes, trained_in

TOWERS_FROZEN = {"train_vision_tower": False, "train_audio_tower": False}
LORA = {"lora.rank": 2, "lora.alpha": 4.0}


@pytest.fixture(scope="module")
def adapted(small_folder, compiled):
    """The small run with adapters, from new ones to RL at once; its frozen leaves are bfloat16."""
    model = LORA | {"lora.dropout": 0.25, "frozen_dtype": "bfloat16"}
    changes = {"model": model, "sft": TOWERS_FROZEN | {"max_steps": 0}, "media": {"decode_workers": 0}}
    return small_setup(small_folder, **changes)


@pytest.fixture(scope="module")
def state(adapted):
    return adapted.rl_phase().new_state(adapted.initial_params())


def test_adapters_are_trained_and_the_rest_is_frozen_in_its_own_dtype(adapted, state):
    trained, frozen = state.split()
    assert trained and all(map(is_adapter, trained)) and not any(map(is_adapter, frozen))
    assert {leaf.dtype for leaf in trained.values()} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in frozen.values()} == {jnp.dtype("bfloat16")}
    for name, leaf in state.params.items():
        assert (leaf.shape, leaf.dtype) == (adapted.backbone.shapes[name].shape, adapted.backbone.shapes[name].dtype)


def test_checkpoints_hold_adapters_and_optimizer_only(adapted, state):
    stored = as_stored(state, left_out_of_checkpoints(adapted.config))
    assert stored["frozen"] == {} and stored["trainable"].keys() == state.trained
    base = state.split()[1]
    back = from_stored(stored | {"frozen": base})
    assert all(back.params[name] is leaf for name, leaf in state.params.items())


def test_a_tower_that_sft_trains_is_in_every_checkpoint_and_keeps_its_dtype(small_folder):
    model = LORA | {"frozen_dtype": "bfloat16"}
    config = small_config_of(small_folder, model=model, sft={"train_audio_tower": False})
    vision, audio, kernel = "vision/proj/kernel", "audio/proj/kernel", "text/layers/attn/q/kernel"
    assert [trained_in(config, "sft")(name) for name in (vision, audio, kernel)] == [True, False, False]
    assert not trained_in(config, "rl")(vision)
    leave_out, dtype = left_out_of_checkpoints(config), param_dtypes(config)
    assert [leave_out(name) for name in (vision, audio, kernel)] == [False, True, True]
    assert [dtype(name) for name in (vision, audio, kernel)] == ["float32", "bfloat16", "bfloat16"]
    # Without adapters checkpoints hold everything, as they did.
    plain = small_config_of(small_folder)
    assert not any(left_out_of_checkpoints(plain)(name) for name in (vision, audio, kernel))


def reference_of(setup, state, folder):
    run = types.SimpleNamespace(
        config=setup.config,
        folder=types.SimpleNamespace(
            open_checkpoints=lambda name, max_to_keep: Checkpoints(folder / name, max_to_keep=max_to_keep)
        ),
        sft_steps=0,
        backbone=setup.backbone,
        initial_params=setup.initial_params,
    )
    return open_reference(run, setup.rl_phase(), state, None)


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def test_the_reference_pass_has_no_second_copy_and_is_bit_equal_while_adapters_are_new(adapted, state, tmp_path):
    phase, programs = adapted.rl_phase(), adapted.programs
    rows, _ = loaded_rows(visits_of(adapted, adapted.data.rl, [0, 1]), phase.buckets, adapted.backbone.config)
    prompts = programs.encode(state.params, put(rows, adapted.backbone.mesh))
    completion = completions(rows.uid_B.shape[0], adapted.config.rl)
    before = live_bytes()
    reference = reference_of(adapted, state, tmp_path)
    held_against = reference.over(state)
    assert reference.params == {} and live_bytes() == before
    assert not any(map(is_adapter, held_against))
    logprob_BGC = jax.block_until_ready(programs.logprobs(held_against, prompts, completion))
    assert live_bytes() == before + logprob_BGC.nbytes
    np.testing.assert_array_equal(logprob_BGC, programs.logprobs(state.params, prompts, completion))
    learnt = {name: leaf + 0.5 * (name.endswith("lora_b")) for name, leaf in state.params.items()}
    assert np.abs(np.asarray(programs.logprobs(learnt, prompts, completion) - logprob_BGC)).max() > 1e-2


def completions(rows, rl):
    shape = (rows, rl.num_generations, rl.max_completion_length)
    return Continuations(id_BGC=np.full(shape, 7, np.int32), exists_BGC=np.ones(shape, bool))


def test_adapters_that_have_learnt_are_copied_for_the_reference(adapted):
    assert switched_off(adapted.config)("text/layers/attn/q/lora_a")
    assert not switched_off(adapted.config)("text/layers/attn/q/kernel")
    for section, changes in (("sft", {"max_steps": 2}), ("model", {"adapter_path": "somewhere"})):
        changed = dataclasses.replace(getattr(adapted.config, section), **changes)
        config = dataclasses.replace(adapted.config, **{section: changed})
        assert not switched_off(config)("text/layers/attn/q/lora_a")


def test_a_plan_counts_adapters_and_traces_every_program_of_rl(adapted, state):
    run = RunPrograms(adapted.config, jax.devices()[:1])
    programs = {program.name: program for program in run.rl(run.buckets("rl")[-1])}
    for program in programs.values():
        assert program.trace().jaxpr is not None, program.name
    trained, frozen = state.split()
    size = sum(leaf.nbytes for leaf in trained.values())
    held = {part: bytes_per_chip(tree) for part, tree in programs["update"].held.items()}
    assert held["parameters"] == size and held["reference"] == 0
    assert held["base"] == sum(leaf.nbytes for name, leaf in frozen.items() if name.startswith("text/"))
    assert held["base"] + held["towers"] == sum(leaf.nbytes for leaf in frozen.values())
    assert 2 * size <= held["optimizer"] < 2 * size + 64  # two moments, and counters
    # As `train_rl` calls it: the reference without adapters, sampling with them.
    assert not any(map(is_adapter, programs["reference"].args[0]))
    assert any(map(is_adapter, programs["sample"].args[0]))


def test_settings_that_do_not_go_with_adapters_are_refused():
    for changes, told in (
        ({"model": {"adapter_path": "x"}}, "model.adapter_path: got 'x' with model.lora.rank=0"),
        ({"model": {"lora": {"rank": 4}}, "rl": {"sync_ref_model": True}}, "rl.sync_ref_model: got True with"),
        ({"model": {"lora": {"rank": -1}}}, "model.lora.rank: got -1"),
        ({"model": {"lora": {"targets": "vision"}}}, "expected one of attention, mlp, both"),
    ):
        with pytest.raises(ConfigError, match=told):
            from_mapping(changes)
    assert RunConfig().model.lora.rank == 0


def test_dropout_follows_from_the_step_and_is_in_the_update_alone(small_folder, adapted):
    """The gradient of one SFT step: other bits at another step, the same ones again."""
    sft = dataclasses.replace(adapted.config.sft, max_steps=2, fast_fraction=0.0)
    setup = small_setup(
        small_folder,
        model=LORA | {"lora.dropout": 0.25},
        sft=TOWERS_FROZEN | {"max_steps": 2, "fast_fraction": 0.0},
        rl={"max_steps": 0},
        media={"decode_workers": 0},
    )
    phase = setup.sft_phase()
    batch = put(phase.batch(visits_of(setup, setup.data.sft, range(4)))[0], setup.backbone.mesh)
    step = make_sft_step(setup.backbone, optax.sgd(1.0), sft, towers_trained=False)
    params = setup.initial_params()
    names = [name for name in params if name.endswith("lora_b")]

    def gradient(number):
        state = setup.backbone.new_state(jax.tree.map(jnp.copy, params), phase.is_trainable, optax.sgd(1.0), "float32")
        state, metrics = step(dataclasses.replace(state, step=jnp.int32(number)), batch)
        return np.concatenate([np.ravel(state.params[name]) for name in names]), float(metrics["loss"])

    first, again, later = gradient(0), gradient(0), gradient(1)
    np.testing.assert_array_equal(first[0], again[0])
    assert np.abs(first[0] - later[0]).max() > 1e-3 * np.abs(first[0]).max() > 0
    assert first[1] == later[1]  # B is zero still: what is dropped does not show in the loss
