"""A whole ablation of the small run: two arms, one seed, killed in the midst of the first arm and gone on with."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.commands import run_command
from support.small_run import CONFIG_FILE, command, environment
from support.small_run import run_command as run_alone

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.evaluation.ablation.alikeness import sampled_rewards
from mer_r1_jax.rl.advantage import advantages
from mer_r1_jax.run.jobs import FINISHED

WAIT_SECONDS = 500


def attempts(folder):
    return sorted(path.name for path in (folder / "logs").iterdir())


@pytest.fixture(scope="module")
def ablation(small_folder, compiled, tmp_path_factory):
    """(folder of the ablation, its flags)."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    words = [f"--config={CONFIG_FILE}:{small_folder}", "--arms=baseline,mer_r1", "--seeds=3", f"--out={out}"]
    said = out.parent / "killed.log"
    with open(said, "w") as log:
        process = subprocess.Popen(command("ablate.py", *words), env=environment(compiled), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not (out / "baseline_seed3/config.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with pytest.MonkeyPatch.context() as patched:
        for name, value in environment(compiled).items():
            patched.setenv(name, value)
        # The arm's process notices that its ablation is gone, saves and ends; the second one waits for that.
        assert run_command("ablate", *words) == 0
    return out, words


def test_a_killed_ablation_goes_on_and_runs_nothing_twice(ablation):
    out, _ = ablation
    assert attempts(out / "sft_seed3") == ["attempt_1"]
    assert attempts(out / "baseline_seed3") == ["attempt_1", "attempt_2"]
    assert attempts(out / "mer_r1_seed3") == ["attempt_1"]
    assert "SIGTERM received" in (out / "jobs/baseline_seed3.log").read_text()
    assert all((out / f"{row}_seed3" / FINISHED).exists() for row in ("sft", "baseline", "mer_r1"))


def test_arms_start_where_sft_ended(ablation):
    out, _ = ablation
    content = json.loads((out / "ablation.json").read_text())
    # Every held-out clip but the broken one, slow and fast, letter by letter.
    same = {"same": 4, "clips": 4}
    assert content["answered_as_sft_before_the_first_step"] == {"baseline_seed3": same, "mer_r1_seed3": same}
    runs = {run["row"]: run for run in content["runs"]}
    end = runs["sft"]["end"]
    for arm in ("baseline", "mer_r1"):
        start = runs[arm]["start"]
        assert start["slow"] == end["slow"] and start["fast"] == end["fast"]
    assert runs["baseline"]["sampled_at_the_end"]["reward"] != runs["mer_r1"]["sampled_at_the_end"]["reward"]


@pytest.mark.parametrize("arm", ["baseline", "mer_r1"])
def test_advantages_made_anew_for_the_table_are_those_of_the_run(ablation, arm):
    folder = ablation[0] / f"{arm}_seed3"
    logged = [pq.read_table(path)["advantage"].to_numpy() for path in sorted(folder.glob("completions/*.parquet"))]
    made = [np.asarray(advantages(arm, rewards, RlConfig())).ravel() for rewards in sampled_rewards(folder)]
    assert len(made) == 6 and np.ptp(logged) > 1
    np.testing.assert_allclose(made, logged, atol=1e-6)


def test_table_holds_what_the_runs_left(ablation):
    out, _ = ablation
    content = json.loads((out / "ablation.json").read_text())
    assert content["clips"] == 4 and content["missing"] == [] and content["plan"]["seeds"] == [3]
    for row in content["rows"]:
        scores = json.loads(
            (out / f"{row['row']}_seed3/eval/heldout_{40 if row['row'] == 'sft' else 6:05d}.json").read_text()
        )
        for mode in ("slow", "fast"):
            for name in ("precision", "recall", "f1", "mean_words", "distinct_answers"):
                assert row[mode][name]["mean"] == pytest.approx(scores[mode][name])
        if row["row"] != "sft":
            start = json.loads((out / "sft_seed3/eval/heldout_00040.json").read_text())
            gain = 100 * (scores["slow"]["f1"] - start["slow"]["f1"])
            assert row["gain_over_sft"]["slow"]["points"] == pytest.approx(gain)
    text = (out / "ablation.md").read_text()
    assert "| mer_r1 | baseline |" in text and "baseline < mer_r1" in text and "![" in text
    assert (out / "ablation.svg").stat().st_size > 10_000 and (out / "ablation.html").stat().st_size > 10_000
    for name in ("ablation.md", "ablation.html"):
        assert os.fspath(out) not in (out / name).read_text().replace(f"--out={out}", "")


def test_other_settings_are_refused(ablation):
    _, words = ablation
    ended = run_alone("ablate.py", *words, "--config.rl.beta=0.2", "--config.train.save_steps=2")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "baseline_seed3: rl.beta: 0.04 in the run, 0.2 now" in ended.stderr
    assert "choose another --out" in ended.stderr and "save_steps" not in ended.stderr  # that one may change


def test_a_finished_ablation_is_left_alone(ablation, capsys):
    out, words = ablation
    before = (out / "ablation.svg").read_bytes()
    assert run_command("ablate", *words) == 0
    assert "3 of 3 runs are finished already" in capsys.readouterr().err
    test_a_killed_ablation_goes_on_and_runs_nothing_twice(ablation)
    assert (out / "ablation.svg").read_bytes() == before


def test_a_mistake_on_the_command_line_is_explained(ablation, capsys):
    _, words = ablation
    assert run_command("ablate", *words, "--arms=baseline,merr1", "--controls=sft") == 2
    said = capsys.readouterr().err
    assert "--arms: 'merr1' is no arm" in said and "--control_sft_steps: got 0" in said and "Traceback" not in said
