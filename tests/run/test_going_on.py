"""Runs gone on with on another mesh, without their reference, and looked at while somebody writes them."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support.run_contents import checkpoint
from support.several import end_of, start_processes
from support.small_run import CONFIG_FILE, REPOSITORY, run_command

from mer_r1_jax.training.metrics import read_metrics

LIMIT = 900  # seconds, on a busy machine
pytestmark = pytest.mark.timeout(3 * LIMIT)
SFT_STEPS, RL_STEPS = 2, 2
# Sums over devices are added in another order: float32 rounding.
RELATIVE = 1e-4
RL_RELATIVE = 1e-3
LOCKED = (
    "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX); print(); sys.stdin.read()"
)


@pytest.fixture(scope="module")
def train(small_folder, compiled):
    """Runs the training command on so many devices; gives its exit status and what it told."""

    def train(output, devices, **changes):
        settings = {
            "sft.max_steps": SFT_STEPS,
            "rl.max_steps": RL_STEPS,
            "data.eval_path": "",
            "mesh.fsdp": devices,
            "train.save_steps": 1,
            "train.save_total_limit": 9,
            "train.export": False,
            "train.output_dir": output,
        } | changes
        flags = [f"--config.{name}={value}" for name, value in settings.items()]
        words = [str(REPOSITORY / "experiments/train.py"), f"--config={CONFIG_FILE}:{small_folder}", *flags]
        [started] = start_processes(words, 1, devices, compiled)
        status, _, told = end_of(started, LIMIT)
        return status, told

    return train


@pytest.fixture(scope="module")
def on_two(train, tmp_path_factory):
    """The folder of a finished run on two devices, with all its checkpoints: SFT 1 and 2, RL 3 and 4."""
    output = tmp_path_factory.mktemp("two")
    status, told = train(output, 2)
    assert status == 0, told[-4000:]
    return output / "small"


@pytest.fixture
def copied(on_two, tmp_path):
    """Copies that run as it was at a step: later checkpoints are gone."""

    def copied(step):
        shutil.copytree(on_two, tmp_path / "small")
        for later in range(step + 1, SFT_STEPS + RL_STEPS + 1):
            shutil.rmtree(tmp_path / "small/checkpoints" / str(later))
        return tmp_path / "small"

    return copied


def lines_of(folder):
    return {(line["phase"], line["step"]): line for line in read_metrics(folder / "metrics.jsonl")}


def hashes_of_reference(run, scratch):
    """Of every array; it is kept in the form of checkpoints."""
    shutil.copytree(run / "reference", scratch / "checkpoints")
    return checkpoint(scratch, 0)


@pytest.mark.parametrize(
    ("relaid", "told_of_run", "told_of_settings", "saved_on"),
    [
        (
            {},
            "fsdp 2 -> 4",
            "mesh.fsdp: 2 in the run, 4 now",
            {"data": 1, "fsdp": 4, "tensor": 1, "processes": 1},
        ),
        (
            {"mesh.fsdp": 2, "mesh.decode_tensor": 2},
            "decode_tensor 1 -> 2",
            "mesh.decode_tensor: 1 in the run, 2 now",
            {"data": 1, "fsdp": 2, "decode_tensor": 2, "tensor": 1, "processes": 1},
        ),
    ],
    ids=["fsdp", "decode_tensor"],
)
def test_a_run_goes_on_on_another_mesh_with_the_same_losses(
    on_two, copied, train, tmp_path, relaid, told_of_run, told_of_settings, saved_on
):
    run = copied(1)
    status, told = train(tmp_path, 4, **{"eval.prompts_per_batch": 4} | relaid)
    assert status == 0, told[-4000:]
    log = (run / "logs/attempt_2/log.txt").read_text()
    for text in (told, log):
        assert f"mesh changed: {told_of_run}; from here on the run need not be equal bit for bit" in text
    assert told_of_settings in log and "eval.prompts_per_batch: 2 in the run, 4 now" in log
    before, after = lines_of(on_two), lines_of(run)
    assert before.keys() == after.keys() and before["sft", 1] == after["sft", 1]
    for name in ("loss", "loss/slow", "grad_norm", "learning_rate"):
        np.testing.assert_allclose(after["sft", 2][name], before["sft", 2][name], rtol=RELATIVE, err_msg=name)
    for name in ("entropy", "completions/mean_length", "sampling/sampling_logp_difference/mean"):
        np.testing.assert_allclose(after["rl", 1][name], before["rl", 1][name], rtol=RL_RELATIVE, err_msg=name)
    assert json.loads((run / "checkpoints/4/host.json").read_text())["saved_on"] == saved_on


def test_another_setting_than_of_layout_is_refused_still(copied, train, tmp_path):
    copied(1)
    status, told = train(tmp_path, 4, **{"rl.beta": 0.1})
    assert status == 2 and "rl.beta: 0.04 in the run, 0.1 now" in told and "mesh" not in told.partition("rl.beta")[2]


@pytest.mark.parametrize("damage", ["gone", "deep"])
def test_a_lost_reference_is_made_again_from_the_end_of_sft(on_two, copied, train, tmp_path, damage):
    run = copied(3)
    if damage == "gone":
        shutil.rmtree(run / "reference/0")
    else:
        (run / "reference/0/manifest.json").write_bytes(b"[" * 60_000)
    status, told = train(tmp_path, 2)
    assert status == 0, told[-4000:]
    assert "the reference was lost and is made again from checkpoint 2, the end of SFT" in told
    assert hashes_of_reference(run, tmp_path / "again") == hashes_of_reference(on_two, tmp_path / "first")
    assert checkpoint(run, 4) == checkpoint(on_two, 4)  # the KL term of step 2 reads it


def test_without_the_end_of_sft_a_lost_reference_is_refused_with_what_is_missing(copied, train, tmp_path):
    run = copied(3)
    shutil.rmtree(run / "reference")
    shutil.rmtree(run / "checkpoints/2")
    status, told = train(tmp_path, 2)
    assert status == 2 and "Traceback" not in told
    assert "the reference, which this run needs to go on, is lost" in told
    assert f"{run}/checkpoints/2 cannot be restored: it does not exist" in told
    assert f"put a copy of {run}/reference/0 or of checkpoint 2 back" in told


def test_a_lost_reference_of_a_run_without_sft_is_made_again_from_its_start(train, tmp_path):
    status, told = train(tmp_path / "one", 1, **{"sft.max_steps": 0})
    assert status == 0, told[-4000:]
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    run = tmp_path / "two/small"
    shutil.rmtree(run / "checkpoints/2")
    shutil.rmtree(run / "reference/0")
    status, told = train(tmp_path / "two", 1, **{"sft.max_steps": 0})
    assert status == 0, told[-4000:]
    assert "the reference was lost and is made again from random weights of seed 0" in told
    assert checkpoint(run, 2) == checkpoint(tmp_path / "one/small", 2)


def test_commands_that_read_a_live_run_change_nothing_and_say_so(copied, compiled, tmp_path):
    run = copied(4)
    shutil.copytree(run / "checkpoints/4", run / "checkpoints/.saving-5")
    words = [sys.executable, "-c", LOCKED, str(run / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        writer.stdout.readline()
        before = [(path, os.lstat(path)[6:]) for path in [run, *sorted(run.rglob("*"))]]
        ended = run_command("export.py", f"--run={run}", f"--out={tmp_path / 'out'}", cache=compiled)
        assert ended.returncode == 0, ended.stderr
        told = " ".join(ended.stderr.split())
        assert f"{run} is live: process " in told and "attempt 1; what is read is its checkpoint 4" in told
        inside = run_command("export.py", f"--run={run}", f"--out={run / 'export/hf'}", cache=compiled)
        assert inside.returncode == 2 and "where the run" in inside.stderr and "keeps what it writes" in inside.stderr
        strip = [(path, (size, mtime, ctime)) for path, (size, _, mtime, ctime) in before]
        after = [(path, os.lstat(path)[6:]) for path in [run, *sorted(run.rglob("*"))]]
        assert [(path, (size, mtime, ctime)) for path, (size, _, mtime, ctime) in after] == strip
        writer.communicate("")
    assert (tmp_path / "out/model.safetensors").is_file()
