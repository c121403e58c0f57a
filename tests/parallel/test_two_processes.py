"""Two processes of four devices each train, evaluate and export; one of eight devices goes on where they were."""

import json
import shutil

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from support.run_contents import leftovers
from support.several import end_of, start_processes
from support.small_run import CONFIG_FILE, REPOSITORY

from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.hf.load import load_params
from mer_r1_jax.run.policy import load_policy
from mer_r1_jax.storage.checkpoints import HOST_STATE, Checkpoints
from mer_r1_jax.training.metrics import read_metrics
from mer_r1_jax.training.state import flatten

LIMIT = 1500  # seconds, on a busy machine
pytestmark = pytest.mark.timeout(3 * LIMIT)
SFT_STEPS, RL_STEPS, FIRST_SAVED = 4, 2, 2
SETTINGS = {
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    "sft": {"max_steps": SFT_STEPS},
    "rl": {"max_steps": RL_STEPS},
    "eval": {"eval_steps": 0},
    "train": {"save_steps": FIRST_SAVED, "save_total_limit": 9},
}
# Sums over devices are added in another order between processes: float32 rounding, which Adam's division by the size
# of a gradient enlarges where that is near 0.
RELATIVE = 1e-4
RL_RELATIVE = 1e-3


@pytest.fixture(scope="module")
def train(small_folder, compiled):
    """Runs the training command as so many processes of so many devices; gives how each of them ended."""

    def train(output, count, devices, **changes):
        changed = {section: fields | changes.pop(section, {}) for section, fields in SETTINGS.items()} | changes
        changed["train"] |= {"output_dir": str(output)}
        fields = [(section, *field) for section, fields in changed.items() for field in fields.items()]
        flags = [f"--config.{section}.{name}={value}" for section, name, value in fields]
        words = [str(REPOSITORY / "experiments/train.py"), f"--config={CONFIG_FILE}:{small_folder}", *flags]
        ended = [end_of(process, LIMIT) for process in start_processes(words, count, devices, compiled)]
        assert [status for status, _, _ in ended] == [0] * count, "".join(told[-4000:] for _, _, told in ended)
        return ended

    return train


@pytest.fixture(scope="module")
def pair(train, tmp_path_factory):
    """The folder of a run of two processes, and how they ended."""
    output = tmp_path_factory.mktemp("pair")
    ended = train(output, count=2, devices=4)
    return output / "small", ended


@pytest.fixture(scope="module")
def alone(pair, train, tmp_path_factory):
    """The folder of a run of one process of eight devices that goes on from the pair's first checkpoint."""
    output = tmp_path_factory.mktemp("alone")
    shutil.copytree(pair[0] / "checkpoints" / str(FIRST_SAVED), output / "small/checkpoints" / str(FIRST_SAVED))
    train(output, count=1, devices=8, data={"eval_path": ""}, train={"export": False})
    return output / "small"


def lines_of(folder):
    return {(line["phase"], line["step"]): line for line in read_metrics(folder / "metrics.jsonl")}


def arrays_of(folder, step):
    described = json.loads((folder / "checkpoints" / str(step) / HOST_STATE).read_text())["arrays"]
    shapes = {name: jax.ShapeDtypeStruct(spec["shape"], spec["dtype"]) for name, spec in described.items()}
    restored = Checkpoints(folder / "checkpoints").restore(shapes, step=step)
    return restored.arrays, restored.host


def test_what_is_written_once_is_written_by_one_process(pair):
    folder, ended = pair
    steps = [(line["phase"], line["step"]) for line in read_metrics(folder / "metrics.jsonl")]
    assert steps == [("sft", 1), ("sft", 2), ("sft", 3), ("sft", 4), ("rl", 1), ("rl", 2)]
    assert sorted(int(path.name) for path in (folder / "checkpoints").iterdir()) == [2, 4, 6]
    assert [path.name for path in folder.glob("logs/*")] == ["attempt_1"]
    assert (folder / "report.html").exists() and leftovers(folder) == []
    # Both tell the same story only where one of them tells it.
    assert "held-out clips" in ended[0][1] and "held-out clips" not in ended[1][1]
    assert "sft 4/4" in ended[0][2] and "sft 4/4" not in ended[1][2]


def test_same_tokens_give_the_same_losses_and_gradients_in_one_process(pair, alone):
    several, one = lines_of(pair[0]), lines_of(alone)
    assert one.keys() == {("sft", 3), ("sft", 4), ("rl", 1), ("rl", 2)}
    for step in (3, 4):
        for name in ("loss", "loss/slow", "loss/fast", "grad_norm", "learning_rate"):
            expected = several["sft", step][name]
            np.testing.assert_allclose(one["sft", step][name], expected, rtol=RELATIVE, err_msg=f"{name} {step}")
        for name in ("num_tokens", "data/skipped", "data/silent_audio", "skipped_steps"):
            assert one["sft", step][name] == several["sft", step][name]
    assert sum(several["sft", step]["data/skipped"] for step in range(1, 5)) > 0  # one clip is broken
    assert_same_moments(pair, alone, SFT_STEPS)


def test_rollouts_and_updates_measure_the_same_in_one_process(pair, alone):
    # A model this young writes no answer that could be rewarded: test_several_steps.py compares updates that move.
    several, one = lines_of(pair[0])["rl", 1], lines_of(alone)["rl", 1]
    for name in ("entropy", "sampling/sampling_logp_difference/mean", "completions/mean_length", "completions/count"):
        np.testing.assert_allclose(one[name], several[name], rtol=RL_RELATIVE, err_msg=name)
    assert several["entropy"] > 1 and one["num_tokens"] == several["num_tokens"]


def assert_same_moments(pair, alone, step):
    """The first moment of AdamW is linear in the gradients."""
    moments, host = arrays_of(alone, step)
    other_moments, other_host = arrays_of(pair[0], step)
    assert host == other_host
    names = [name for name in moments if ".mu." in name]
    assert len(names) > 10
    for name in names:
        limit = RELATIVE * np.abs(moments[name]).max() + 1e-9
        np.testing.assert_allclose(other_moments[name], moments[name], rtol=0, atol=limit, err_msg=name)


def test_rollouts_draw_the_same_random_bits_in_one_process(pair, alone):
    tables = (folder / "completions/completions_00001.parquet" for folder in (pair[0], alone))
    several, one = (pq.read_table(table).to_pydict() for table in tables)
    for name in ("id", "generation", "truth"):
        assert several[name] == one[name]
    same = np.mean([a == b for a, b in zip(several["completion"], one["completion"], strict=True)])
    assert same >= 0.75 and len(set(one["completion"])) > 4  # an answer parts where rounding decides a token
    counted = lines_of(pair[0])["rl", 1]
    assert counted["completions/count"] == len(several["id"]) == 16
    assert counted["completions/mean_length"] == pytest.approx(np.mean(several["length"]))
    assert counted["rewards/format/mean"] == pytest.approx(np.mean(several["format"]))


@pytest.mark.parametrize("step", [SFT_STEPS, SFT_STEPS + RL_STEPS])
def test_evaluations_hold_every_held_out_clip_once_and_in_order(pair, step):
    scores = json.loads((pair[0] / "eval" / f"heldout_{step:05d}.json").read_text())
    assert scores["n"] == 4 and [entry["id"] for entry in scores["skipped"]] == ["broken held-out"]
    answers = [json.loads(line) for line in (pair[0] / "eval" / f"heldout_{step:05d}.samples.jsonl").open()]
    assert [answer["id"] for answer in answers] == [f"clip-{number}" for number in range(6, 10)]
    assert scores["slow"]["f1"] == pytest.approx(np.mean([answer["slow"]["f1"] for answer in answers]))


def test_the_export_of_two_processes_is_their_last_checkpoint(pair):
    config, params, _ = load_policy(pair[0])
    exported = flatten(load_params(pair[0] / "export/hf", load_config(pair[0] / "export/hf")))
    held = flatten(params)
    assert exported.keys() == held.keys()
    for name, leaf in held.items():
        np.testing.assert_array_equal(np.asarray(exported[name]), np.asarray(leaf), err_msg=name)
