"""A plan of answering: the programs that a policy calls, a sheet made with the real TPU compiler, and its cures."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from support.jaxprs import program
from support.small_run import visits_of
from support.tiny_plan import tiny_config

from mer_r1_jax.config.schema import ConfigError, MeshConfig
from mer_r1_jax.planning.answering import AnsweringPrograms, as_opened
from mer_r1_jax.planning.chips import CHIPS, GIB, chip_of
from mer_r1_jax.planning.markdown import markdown
from mer_r1_jax.planning.planner import plan
from mer_r1_jax.run import asking
from mer_r1_jax.run.asking import eval_buckets, make_answerer
from mer_r1_jax.training.prompts import uid_of

CHIP = "v5e:1x1"
CLIPS = 2  # answered at once


@pytest.fixture(scope="module")
def planned(small):
    run = AnsweringPrograms(small.config, jax.devices()[:1])
    return {one.name: one for one in run.of_phase("answer", run.buckets("answer")[-1])}


@pytest.fixture(scope="module")
def called(small):
    """What answering a batch of real clips calls: (jitted function, its arguments) by the plan's name."""
    calls, programs = {}, small.programs

    def recorded(name, function):
        def call(*args):
            calls[name] = (function, args)
            return function(*args)

        return call

    answerer = make_answerer(small, small.config.rl.max_completion_length)
    visits = visits_of(small, small.data.eval, range(CLIPS))
    before = dict(programs.__dict__)
    for name, attribute in {"encode": "encode_media", "sample": "rollout", "ask": "ask"}.items():
        setattr(programs, attribute, recorded(name, getattr(programs, attribute)))
    try:
        with answerer.holding(small.backbone.init(seed=0)) as policy:
            buckets = eval_buckets(small)[-1:]
            uids = [uid_of(visit.record.id) for visit in visits]
            prompts = policy.encode([visit.clips.prompt for visit in visits], buckets, uids)
            answers = policy.answer(prompts)
            policy.score(answers, [("happy",)] * CLIPS)
    finally:
        programs.__dict__.clear()
        programs.__dict__.update(before)
    return calls


def test_every_program_of_an_answer_is_planned(planned, called):
    assert list(planned) == list(called) == ["encode", "sample", "ask"]  # float32 takes no cast


@pytest.mark.parametrize("name", ["encode", "sample", "ask"])
def test_the_plan_traces_what_a_policy_calls(planned, called, name):
    function, args = called[name]
    assert program(planned[name].function, (*planned[name].args, *planned[name].static)) == program(function, args)


@pytest.fixture(scope="module")
def config():
    tiny = tiny_config(max_completion_length=64)
    evaluation = dataclasses.replace(tiny.eval, prompts_per_batch=CLIPS, max_completion_length=32)
    model = dataclasses.replace(tiny.model, lora=dataclasses.replace(tiny.model.lora, rank=4))
    return dataclasses.replace(tiny, eval=evaluation, model=model)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where compiled answers are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def sheet(config, cache):
    return plan(config, CHIP, cache_dir=cache, answering=True)


def test_one_chip_holds_the_weights_once_and_the_caches_of_a_batch(sheet, config):
    backbone = AnsweringPrograms(as_opened(config, 1), jax.devices()[:1]).backbone
    assert not any("lora" in name for name in backbone.shapes)  # merged into the export
    values = sum(int(np.prod(leaf.shape)) for leaf in backbone.shapes.values())
    held = {program.name: program.held for program in sheet.programs}
    assert list(held) == ["encode", "sample", "ask"]  # bfloat16 on one chip is what decoding wants: nothing is copied
    for parts in held.values():
        assert parts["parameters"] + parts["towers"] == 2 * values
        assert "optimizer" not in parts and "reference" not in parts
    assert held["encode"]["batch"] > held["sample"]["batch"]  # the clips are freed once they are encoded
    sample, text = sheet.programs[1], backbone.config.text
    prompt, answer = config.data.max_prompt_length, 32
    assert sample.cache == CLIPS * (prompt + answer) * 2 * text.num_hidden_layers * text.num_key_value_heads * (
        text.head_dim * 2
    )


def test_an_opened_export_leaves_out_how_gradients_travel(config):
    """As what opens it does, whatever chip it is opened on."""
    trained = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, sparse_core_collectives=True))
    assert as_opened(trained, 1) == as_opened(config, 1)
    assert not as_opened(trained, 1).mesh.sparse_core_collectives
    assert "mesh.fsdp" in asking._overrides(trained, is_run=True, devices=1)
    assert "mesh.sparse_core_collectives" not in asking._overrides(trained, is_run=True, devices=1)


@pytest.mark.parametrize(("devices", "decode_tensor"), [(1, 1), (3, 1), (8, 2)])
def test_a_layout_of_a_slice_answers_on_fewer_devices(config, devices, decode_tensor):
    """As what opens it does: without `decode_tensor`, where the devices are no multiple of it."""
    trained = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=-1, decode_tensor=2))
    assert as_opened(trained, devices).mesh == MeshConfig(data=1, fsdp=-1, decode_tensor=decode_tensor)
    overrides = asking._overrides(trained, is_run=True, devices=devices)
    assert (overrides["mesh.fsdp"], overrides["mesh.decode_tensor"]) == (-1, decode_tensor)


def test_the_sheet_speaks_of_a_batch_and_not_of_epochs(sheet):
    page, values = markdown(sheet), json.loads(json.dumps(sheet.to_json()))
    assert sheet.fits and sheet.config.name.endswith("_answering")
    seconds = sum(program.bound for program in sheet.programs)
    assert f"## One batch of slow answers\n\n- {CLIPS} at a time: at least **{seconds:.2f} s**" in page
    assert "epoch" not in page and "- one answer a prompt, each taken to be 32 tokens long" in page
    assert values["step_seconds_lower_bound"] == {"answer": pytest.approx(seconds)}
    assert values["epoch_hours_lower_bound"] == {}


def test_a_batch_that_does_not_fit_is_made_smaller(config, cache, sheet, monkeypatch):
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(chip_of(CHIP), hbm_bytes=2**16))
    tight = plan(config, CHIP, cache_dir=cache, answering=True, only=["sample"])
    (line,) = tight.advice
    assert f"{tight.programs[0].over / GIB:.2f} GiB too many" in line
    assert "Try eval.prompts_per_batch=1, which halves the rows of a batch; or a larger slice: 2 chips" in line
    assert "is compiled" in markdown(tight)  # no time of a batch without the other programs


def test_answering_has_no_other_batches_to_try(config, cache):
    with pytest.raises(ConfigError, match="--try_others compiles the RL update"):
        plan(config, CHIP, cache_dir=cache, answering=True, try_others=True)


@pytest.mark.parametrize(
    ("answering", "only", "there"),
    [
        (False, ["decode"], "decode, expected some of those of what this configuration trains: encode, cast, sample"),
        (False, ["cast", "ask"], "ask, expected some of those of what this configuration trains: encode, cast, sample"),
        (True, ["update", "score"], "update, score, expected some of those of answering: encode, "),
    ],
)
def test_a_program_that_a_plan_has_not_is_refused_with_those_it_has(config, cache, answering, only, there):
    with pytest.raises(ConfigError, match=f"programs: got {there}") as refused:
        plan(config, CHIP, cache_dir=cache, only=only, answering=answering)
    assert ("or add --answering" in str(refused.value)) == ("ask" in only)
