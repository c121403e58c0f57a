"""SIGTERM in each part of a run, and a disk that is full there: the exit status is the documented one, the message says
what counts, and the run that goes on ends bit for bit as one that was left alone."""

import os
import re
import time
from typing import NamedTuple

import pytest
from support.killing import train
from support.run_contents import contents, differences, leftovers
from support.small_run import REPOSITORY

from mer_r1_jax.training.signals import EXIT_SAVED

pytestmark = pytest.mark.timeout(3000)  # nine processes, on a busy machine
SFT_STEPS, RL_STEPS = 4, 5
SETTINGS = (
    f"--config.sft.max_steps={SFT_STEPS}",
    f"--config.rl.max_steps={RL_STEPS}",
    "--config.rl.decode_chunk=6",
    "--config.rl.reward_funcs=('support.reward_functions.held_up',)",
    "--config.rl.reward_timeout=600",
    "--config.eval.eval_steps=0",
    "--config.train.save_steps=3",
    "--config.train.preemption_grace_seconds=600",  # a busy machine compiles for longer than 25 s
)
# In the order of a run. Visits are counted from the start of an attempt, which goes on from what the one before saved;
# a group of 4 is a rollout's. The last one there is a regular save.
PARTS = {
    "compile": "sft_step 1 +0.3",
    "save": "checkpoint_manifest 1",
    "evaluation": "sampled 1 1",
    "rollout": "rollout_chunk 6 4",  # there are four in a rollout of 24 tokens
    "reward": "reward_call 1",
    "update": "rl_update 1",
    "export": "export_tensor 5",
}
# Met after those, in this order: there is no room for what is written there.
FULL = {
    "metrics.jsonl": "append 1 metrics.jsonl",
    "the export": "export_tensor 5",
    "report.html": "file_begins 1 report.html",
}


class Attempt(NamedTuple):
    """How an attempt ended: exit status, the checkpoint the next one goes on from, what it said, seconds it took."""

    status: int
    goes_on_from: int | None
    said: str
    seconds: float


@pytest.fixture(scope="module")
def environment():
    """That of commands which find the reward functions of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY / "tests"), prepend=os.pathsep)
        yield patch


@pytest.fixture(scope="module")
def alone(small_folder, compiled, environment, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("alone") / "runs"
    ended = train(small_folder, output, compiled, *SETTINGS)
    assert ended.returncode == 0, ended.stderr
    return output / "small"


@pytest.fixture(scope="module")
def stopped(small_folder, compiled, environment, tmp_path_factory):
    """(folder, attempts by part, leftovers) of the same command, hit in each part and then left alone."""
    folder = tmp_path_factory.mktemp("stopped")
    output, held_up = folder / "runs", folder / "held_up"
    environment.setenv("HELD_UP", str(held_up))
    attempts = {}
    parts = {name: (place, "SIGTERM") for name, place in PARTS.items() if name != "export"}
    parts |= {"metrics.jsonl": (FULL["metrics.jsonl"], "ENOSPC"), "export": (PARTS["export"], "SIGTERM")}
    parts |= {name: (FULL[name], "ENOSPC") for name in ("the export", "report.html")}
    for part, (place, what) in parts.items():
        if part == "reward":
            held_up.write_text("")  # no call returns
        cache = folder / "nothing compiled yet" if part == "compile" else compiled
        begun = time.monotonic()
        ended = train(small_folder, output, cache, *SETTINGS, place=place, signal_name=what)
        said = " ".join(ended.stderr.split())
        found = re.search(r"goes on from checkpoint (\d+)", said)
        attempts[part] = Attempt(
            ended.returncode, int(found.group(1)) if found else None, said, time.monotonic() - begun
        )
        held_up.unlink(missing_ok=True)
    left = leftovers(output / "small")
    ended = train(small_folder, output, compiled, *SETTINGS)
    assert ended.returncode == 0, ended.stderr
    return output / "small", attempts, left


@pytest.mark.parametrize("part", PARTS)
def test_every_part_ends_with_the_documented_status_and_in_time(stopped, part):
    attempt = stopped[1][part]
    assert attempt.status == EXIT_SAVED, attempt.said
    assert "SIGTERM received" in attempt.said and "Traceback" not in attempt.said
    assert "ends now" not in attempt.said  # within train.preemption_grace_seconds


@pytest.mark.parametrize(
    ("part", "step"),
    [
        ("compile", 1),  # the step that compiled is done
        ("save", SFT_STEPS),  # saved at 3, and the step after it
        ("evaluation", SFT_STEPS),
        ("rollout", SFT_STEPS + 1),  # in the rollout of the second step
        ("reward", SFT_STEPS + 1),
        ("update", SFT_STEPS + 2),
    ],
)
def test_the_last_finished_step_is_what_the_run_goes_on_from(stopped, part, step):
    assert stopped[1][part].goes_on_from == step, stopped[1][part].said


@pytest.mark.parametrize("part", ["rollout", "reward"])
def test_a_rollout_that_is_left_is_named(stopped, part):
    assert "the rollout of rl step 2 was left; the run that goes on samples it again" in stopped[1][part].said


def test_an_export_that_is_left_leaves_nothing(stopped):
    _, attempts, left = stopped
    assert "training is done, and the same command goes on with what comes after it" in attempts["export"].said
    assert left == []


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_ends_the_run_with_a_message(stopped, what):
    attempt = stopped[1][what]
    assert attempt.status == 2 and "Traceback" not in attempt.said, attempt.said
    assert f"error: {what} could not be written: " in attempt.said and "GiB free there" in attempt.said
    assert "run the same command again" in attempt.said


def test_the_run_ends_bit_for_bit_as_one_that_was_left_alone(alone, stopped):
    expected, found = contents(alone), contents(stopped[0])
    assert differences(expected, found) == []
    assert any("opt_state" in name for name in found) and "export: model.safetensors" in found
    assert leftovers(stopped[0]) == []
