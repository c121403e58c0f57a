"""A run that learns from a rollout in three updates; stopped and killed between them, it ends as one left alone."""

import json
import re

import pytest
from support.killing import train
from support.run_contents import contents, differences

from mer_r1_jax.training.metrics import read_metrics
from mer_r1_jax.training.signals import EXIT_SAVED

pytestmark = pytest.mark.timeout(1800)  # four processes, on a busy machine

SFT_STEPS, RL_STEPS, UPDATES, PROMPTS = 24, 6, 3, 2
SETTINGS = (
    f"--config.sft.max_steps={SFT_STEPS}",
    f"--config.rl.prompts_per_step={PROMPTS}",
    f"--config.rl.steps_per_generation={UPDATES}",
    "--config.eval.eval_steps=0",
    "--config.train.save_steps=2",
)


@pytest.fixture(scope="module")
def alone(small_folder, compiled):
    """The folder of a run that nothing disturbed."""
    output = small_folder / "several_alone"
    ended = train(small_folder, output, compiled, *SETTINGS)
    assert ended.returncode == 0, ended.stderr
    return output / "small"


def test_a_rollout_serves_several_updates(alone):
    lines = [line for line in read_metrics(alone / "metrics.jsonl") if line["phase"] == "rl"]
    assert [line["step"] for line in lines] == list(range(1, RL_STEPS + 1))
    # One table of completions a rollout: of all its prompts, under the first of its updates.
    assert [path.stem for path in sorted((alone / "completions").iterdir())] == [
        "completions_00001",
        "completions_00004",
    ]
    rewards = [line["reward"] for line in lines]
    assert rewards[0] == rewards[1] == rewards[2] != rewards[3] == rewards[4] == rewards[5]
    assert lines[0]["completions/count"] == PROMPTS * UPDATES * 4
    # Every prompt of the six records was seen once a rollout, and tokens are counted once.
    host = json.loads((alone / "checkpoints" / str(SFT_STEPS + RL_STEPS) / "host.json").read_text())["host"]
    assert host["data"]["stream"]["next_index"] == RL_STEPS * PROMPTS
    tokens = [line["num_tokens"] for line in lines]
    assert tokens[0] == tokens[1] == tokens[2] < tokens[3] == tokens[4] == tokens[5]
    # The first update of a rollout has the policy that sampled; the others have moved away from it.
    clipped = [line["clip_ratio/region_mean"] for line in lines]
    assert clipped[0] == clipped[3] == 0 and max(clipped) > 0


def test_a_run_stopped_or_killed_inside_a_rollout_ends_bit_for_bit_as_one_left_alone(alone, small_folder, compiled):
    output = small_folder / "several_disturbed"
    # At the second of three updates: the signal is obeyed after the third, so the whole rollout is in the checkpoint.
    place = f"update_dispatched {SFT_STEPS + 2}"
    stopped = train(small_folder, output, compiled, *SETTINGS, place=place, signal_name="SIGTERM")
    assert stopped.returncode == EXIT_SAVED, stopped.stderr
    assert re.search(rf"goes on from checkpoint {SFT_STEPS + UPDATES}\b", stopped.stderr)
    # Killed at the second update of the next rollout, which is made again as it was.
    killed = train(small_folder, output, compiled, *SETTINGS, place="update_noted 2")
    assert killed.returncode == -9
    ended = train(small_folder, output, compiled, *SETTINGS)
    assert ended.returncode == 0 and f"going on after rl step {UPDATES}" in ended.stderr
    expected, found = contents(alone), contents(output / "small")
    assert differences(expected, found) == [] and len(found) > 100
