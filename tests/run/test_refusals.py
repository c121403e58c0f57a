"""Input a run cannot use ends in one message that says where, what was got and how to mend it, and status 2."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.small_run import CONFIG_FILE, make_data, run_command, small_config_of

from mer_r1_jax.omni.hf.export import ExportSettings, export_model
from mer_r1_jax.omni.hf.sums import SUMS_FILE
from mer_r1_jax.run.fingerprints import of_inputs
from mer_r1_jax.run.setup import make_setup
from mer_r1_jax.storage.run_directory import RunDirectory
from mer_r1_jax.training.state import as_stored, make_optimizer, nest, tower_flags, trainable_names

# The tests have eight emulated devices, and a step of the small run has four rows.
MESH = {"data": 4, "tensor": 2}


@pytest.fixture
def config_of(small_folder, tmp_path):
    def config_of(**changes):
        train = {"output_dir": str(tmp_path / "runs")} | changes.pop("train", {})
        return small_config_of(small_folder, mesh=MESH, train=train, **changes)

    return config_of


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """A copy of the small run's data, to be spoilt."""
    return make_data(tmp_path_factory.mktemp("own"))


@pytest.fixture
def spoilt(own_data, tmp_path):
    """Replaces one record of sft.jsonl, or its whole text, in a copy beside the clips."""

    def spoilt(line, **fields):
        rows = (own_data / "sft.jsonl").read_text().splitlines()
        rows[line - 1] = fields["text"] if "text" in fields else json.dumps(json.loads(rows[line - 1]) | fields)
        path = own_data / f"spoilt_{tmp_path.name}.jsonl"
        path.write_text("\n".join(rows) + "\n")
        return path

    return spoilt


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": '{"id": "cut'}, ["JSON"]),
        ({"videos": 3}, ["videos"]),
        ({"subtitle": "look at <video> now"}, ["<video>", "subtitle"]),
        ({"subtitle": "over<|im_end|>"}, ["<|im_end|>"]),
        ({"videos": ["../elsewhere.mp4"]}, ["../elsewhere.mp4"]),
        ({"messages": [{"role": "user", "content": "Feel?"}]}, ["an assistant turn"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "clip", "clip": "a.mp4"}]}]},
            ["[0].type", "'clip'"],
        ),
        ({"prompt": "Feel?"}, ["both `messages` and `prompt`"]),
        ({"audio_path": "clips/0.mp4"}, ["audio_path", "rename it to `audios`", "data.extra_columns"]),
        ({"solution": ["ha\ud83d"]}, ["solution", "half of a surrogate pair"]),
        ({"videos": ["a" * 5000 + ".mp4"]}, ["videos[0]", "a path of 5004 bytes"]),
    ],
)
def test_record_that_cannot_be_used_is_named_with_file_and_line(refusal, config_of, spoilt, fields, words):
    path = spoilt(3, **fields)
    told = refusal(config_of(data={"sft_path": str(path)}))
    assert f"{path}:3" in told
    for word in words:
        assert word in told


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rl": {"prompts_per_step": 8}}, ["rl.prompts_per_step: got 8", "6 usable records"]),
        ({"sft": {"prompts_per_step": 6}}, ["sft.prompts_per_step: got 6", "= 4 devices", "try 8"]),
        ({"sft": {"gradient_accumulation_steps": 4}}, ["4 micro-batch(es), 1 rows each", "try 16"]),
        ({"rl": {"num_iterations": 4}}, ["rl.max_steps: got 6", "rl.num_iterations=4"]),
        ({"rl": {"num_iterations": 2}}, ["eval.eval_steps: got 3", "multiple of rl.num_iterations=2"]),
        (
            {"rl": {"steps_per_generation": 2}},
            ["rl.prompts_per_step: got 4 x rl.steps_per_generation=2", "6 usable records"],
        ),
        ({"rl": {"reward_funcs": ("no.such_reward",)}}, ["rl.reward_funcs", "no.such_reward", "cannot be imported"]),
        (
            {"rl": {"reward_funcs": ("support.reward_functions.needs_more",)}},
            ["it needs mood, but there are only", "data.rl_path"],
        ),
        ({"sft": {"max_completion_length": 8}}, ["sft.jsonl:1", "sft.max_completion_length=8"]),
        ({"data": {"rl_path": ""}}, ["data.rl_path is empty"]),
        ({"data": {"eval_path": "/nowhere/eval.jsonl"}}, ["/nowhere/eval.jsonl"]),
        ({"data": {"max_prompt_length": 40, "prompt_buckets": ()}}, ["sft.jsonl:1", "data.max_prompt_length=40"]),
        ({"model": {"tokenizer_path": "/nowhere"}}, ["/nowhere: no such folder", "model.tokenizer_path"]),
        ({"emotion": {"wheel_dir": "/nowhere"}}, ["/nowhere"]),
        (
            {"sft": {"max_steps": 0}, "rl": {"max_steps": 0}, "data": {"eval_path": ""}},
            ["there is nothing to do", "data.eval_path"],
        ),
    ],
)
def test_setting_that_cannot_be_used_is_named_with_its_value(refusal, config_of, changes, words):
    told = refusal(config_of(**changes))
    for word in words:
        assert word in told


def test_too_many_broken_clips_stop_the_run(refusal, config_of, own_data, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(own_data, folder)
    for number in range(4):
        (folder / f"clips/{number}.mp4").write_bytes(b"")
    paths = {name: str(folder / f"{name[:-5]}.jsonl") for name in ("sft_path", "rl_path", "eval_path")}
    told = refusal(config_of(data=paths | {"max_quarantined_fraction": 0.1}))
    assert "data.max_quarantined_fraction = 10.0%" in told and "empty" in told and "clip-" in told


@pytest.mark.parametrize("part", ["parameters", "moments"])
def test_a_checkpoint_with_numbers_that_are_none_is_not_gone_on_from(refusal, config_of, own_data, tmp_path, part):
    config = config_of(data={"sft_path": str(own_data / "sft.jsonl")}, train={"run_name": "broken"})
    setup = make_setup(config)
    config = setup.config
    flags, optimizer = trainable_names(**tower_flags(config, "sft")), make_optimizer(config.sft.optimizer, 1)
    state = setup.backbone.new_state(setup.initial_params(), flags, optimizer, config.sft.optimizer.dtype)
    setup.close()
    spoil = lambda leaf: jnp.full_like(leaf, np.nan)  # noqa: E731
    if part == "parameters":
        name = "text/norm/scale"
        state = dataclasses.replace(state, params=state.params | {name: spoil(state.params[name])})
    else:
        name = "optimizer"
        is_number = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
        moments = jax.tree.map(lambda leaf: spoil(leaf) if is_number(leaf) else leaf, state.opt_state)
        state = dataclasses.replace(state, opt_state=moments)
    folder = tmp_path / "runs/broken"
    with RunDirectory.open(folder, dataclasses.asdict(config), fingerprints=of_inputs(setup)) as run_folder:
        data = {"stream": {}, "quarantine": []}
        host = {"phase": "sft", "step": 1, "data": data, "counters": {"num_tokens": 0}}
        run_folder.open_checkpoints("checkpoints", 2).save(1, as_stored(state), host)
    told = refusal(config_of(data={"sft_path": str(own_data / "sft.jsonl")}, train={"run_name": "broken"}))
    assert f"{folder}/checkpoints/1: NaN or infinite values in" in told and name in told


def test_folder_that_belongs_to_something_else_is_left_alone(refusal, config_of, tmp_path):
    folder = tmp_path / "runs/small"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("do not touch")
    told = refusal(config_of())
    assert f"{folder} is not a run of mer_r1_jax but holds thesis.tex: nothing was touched" in told
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


NO_SIZES = {
    f"{part}_{name}": 0
    for part in ("text", "vision", "audio")
    for name in ("hidden_size", "layers", "heads", "mlp_size")
} | {"text_kv_heads": 0}


@pytest.fixture(scope="module")
def model_dir(small, tmp_path_factory):
    """A Hugging Face directory of the small run's model."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    export_model(
        folder, small.backbone.config, nest(small.backbone.init(0)), ExportSettings(source=small.tokenizer_path)
    )
    return folder


def test_model_directory_with_missing_and_misshapen_tensors_lists_them_all(refusal, config_of, model_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"], tensors["visual.blocks.0.norm1.weight"]
    tensors["model.norm.weight"] = np.ones(3, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / SUMS_FILE).unlink()  # a folder that was not exported here has none
    told = refusal(config_of(model=NO_SIZES | {"path": str(folder), "tokenizer_path": ""}))
    for word in ("lm_head.weight", "visual.blocks.0.norm1.weight", "model.norm.weight", "3", "32"):
        assert word in told


def test_sizes_beside_a_checkpoint_are_refused(refusal, config_of, model_dir):
    told = refusal(config_of(model=NO_SIZES | {"path": str(model_dir), "text_layers": 2}))
    assert "whose sizes are its own: leave text_layers at 0" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--config={config}", "--config.rl.num_generation=8", "--config.rl.kl_loss_coef=0.1"],
            ["--config.rl.num_generation: no such field; did you mean rl.num_generations?", "here it is rl.beta"],
        ),
        (["--config={config}", "--config.rl.num_generations=eight"], ["--config.rl.num_generations=eight"]),
        (["--config=nowhere.py"], ["no configuration at nowhere.py"]),
    ],
)
def test_command_line_that_cannot_be_used(small_folder, compiled, tmp_path, arguments, words):
    config = f"{CONFIG_FILE}:{small_folder}"
    ended = run_command(
        "train.py", *(argument.format(config=config) for argument in arguments), cache=compiled, cwd=tmp_path
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr and ended.stderr.count("error: ") == 1
    for word in words:
        assert word in ended.stderr
    assert list(tmp_path.iterdir()) == []
