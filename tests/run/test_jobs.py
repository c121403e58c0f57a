"""Runs as processes: in turn, side by side, stopped, failed, and taken up again. Their program is a small one here."""

import dataclasses
import json
import os
import sys
import threading
import time

import pytest

from mer_r1_jax.config.schema import RunConfig, TrainConfig
from mer_r1_jax.run.ablation_plan import Job
from mer_r1_jax.run.jobs import JobsError, Outcome, cores_for, hold, is_finished, run_jobs
from mer_r1_jax.training.signals import EXIT_SAVED

# Notes when it ran and where; behaves as the file <run>/do says: wait for SIGTERM, fail, or nothing.
PROGRAM = """
import json, os, pathlib, signal, sys, time
train = json.loads(pathlib.Path(sys.argv[1]).read_text())["train"]
folder = pathlib.Path(train["output_dir"]) / train["run_name"]
folder.mkdir(exist_ok=True)
def saved(*_):
    sys.exit(75)
signal.signal(signal.SIGTERM, saved)
begun = time.time()
with open(folder / "attempts", "a") as file:
    print(os.getpid(), sorted(os.sched_getaffinity(0)), os.environ["JAX_COMPILATION_CACHE_DIR"], file=file)
do = (folder / "do").read_text() if (folder / "do").exists() else ""
if do == "wait":
    (folder / "waits").touch()
    time.sleep(100)
if do == "fail":
    print("error: the clip is broken")
    sys.exit(2)
time.sleep(0.5)
(folder / "times").write_text(json.dumps([begun, time.time()]))
"""


class Stop:
    """Asks for the end when told."""

    def __init__(self):
        self.asked = threading.Event()
        self.should_stop = self.asked.is_set


def jobs_in(out, *names):
    """Jobs by name; those called x_seedN need sft_seedN where that is among them."""
    found = []
    for name in names:
        row, _, seed = name.partition("_seed")
        config = RunConfig(train=TrainConfig(output_dir=str(out), run_name=name, seed=int(seed)))
        needs = f"sft_seed{seed}" if row != "sft" and f"sft_seed{seed}" in names else ""
        found.append(Job(row, int(seed), config, needs))
    return found


def run(out, jobs, parallel=1, stop=None):
    said = []
    with hold(out, said.append, patience=0) as folder:
        program = [sys.executable, "-c", PROGRAM]
        outcome = run_jobs(jobs, folder, parallel, stop or Stop(), lambda job: f": {job.row} is good", program)
    return outcome, said


def tell(out, name, what):
    (out / name).mkdir(parents=True, exist_ok=True)
    (out / name / "do").write_text(what)


def attempts(out, name):
    file = out / name / "attempts"
    return file.read_text().splitlines() if file.exists() else []


def test_jobs_run_once_and_after_what_they_need(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # a folder of the user's would come first
    out = tmp_path / "out"
    jobs = jobs_in(out, "sft_seed0", "ad_seed0", "rd_seed0")
    outcome, said = run(out, jobs)
    assert outcome == Outcome(finished=["sft_seed0", "ad_seed0", "rd_seed0"])
    outcome.check()
    times = [json.loads((out / job.name / "times").read_text()) for job in jobs]
    assert times[0][1] < times[1][0] and times[1][1] < times[2][0]  # one by one
    assert json.loads((out / "jobs/ad_seed0.json").read_text())["train"]["run_name"] == "ad_seed0"
    assert "finished" in said[-1] and said[-1].endswith("(3 of 3): rd is good")
    assert attempts(out, "ad_seed0")[0].endswith(str(out / "compiled"))
    again, said = run(out, jobs_in(out, "sft_seed0", "ad_seed0", "rd_seed0", "mer_r1_seed0"))
    assert again.finished == ["sft_seed0", "ad_seed0", "rd_seed0", "mer_r1_seed0"]
    assert said[0] == "3 of 4 runs are finished already"
    assert [len(attempts(out, job.name)) for job in jobs] == [1, 1, 1] and len(attempts(out, "mer_r1_seed0")) == 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_jobs_side_by_side_have_cores_of_their_own(tmp_path):
    out = tmp_path / "out"
    before = os.sched_getaffinity(0)
    outcome, _ = run(out, jobs_in(out, "sft_seed0", "sft_seed1", "ad_seed0"), parallel=2)
    assert len(outcome.finished) == 3 and os.sched_getaffinity(0) == before
    (a0, a1), (b0, b1) = (json.loads((out / f"sft_seed{seed}/times").read_text()) for seed in (0, 1))
    assert a0 < b1 and b0 < a1  # at the same time
    cores = [json.loads(attempts(out, f"sft_seed{seed}")[0].split(" ", 1)[1].rpartition(" ")[0]) for seed in (0, 1)]
    assert cores[0] and cores[1] and not set(cores[0]) & set(cores[1])


def test_more_processes_than_cores_are_refused():
    with pytest.raises(JobsError, match="--parallel: got 1000, but there are"):
        cores_for(1000)
    with pytest.raises(JobsError, match="--parallel: got 0"):
        cores_for(0)


def test_a_failed_run_costs_itself_and_what_starts_from_it(tmp_path):
    out = tmp_path / "out"
    names = ("sft_seed0", "ad_seed0", "rd_seed0", "sft_seed1", "ad_seed1")
    (out / "jobs").mkdir(parents=True)
    tell(out, "ad_seed0", "fail")
    tell(out, "sft_seed1", "fail")
    outcome, _ = run(out, jobs_in(out, *names))
    assert outcome.finished == ["sft_seed0", "rd_seed0"] and outcome.waiting == ["ad_seed1"]
    with pytest.raises(JobsError) as failed:
        outcome.check()
    assert "2 runs failed, and 1 that start from them were left out" in str(failed.value)
    assert "sft_seed1: exit status 2" in str(failed.value) and "error: the clip is broken" in str(failed.value)
    (out / "sft_seed1/do").unlink()
    (out / "ad_seed0/do").unlink()
    mended, _ = run(out, jobs_in(out, *names))
    mended.check()
    assert len(mended.finished) == 5 and [len(attempts(out, name)) for name in names] == [1, 2, 1, 2, 1]


def test_a_stop_is_passed_on_and_gone_on_with(tmp_path):
    out = tmp_path / "out"
    (out / "jobs").mkdir(parents=True)
    tell(out, "ad_seed0", "wait")
    stop = Stop()

    def ask():
        while not (out / "ad_seed0/waits").exists():
            time.sleep(0.05)
        stop.asked.set()

    asking = threading.Thread(target=ask)
    asking.start()
    jobs = jobs_in(out, "sft_seed0", "ad_seed0", "rd_seed0")
    outcome, said = run(out, jobs, stop=stop)
    asking.join()
    assert outcome == Outcome(finished=["sft_seed0"], stopped=["ad_seed0"], waiting=["rd_seed0"])
    assert said[-1] == "ad_seed0: stopped" and not is_finished(jobs[1])
    outcome.check()  # not a failure
    (out / "ad_seed0/do").unlink()
    again, _ = run(out, jobs)
    assert len(again.finished) == 3 and len(attempts(out, "sft_seed0")) == 1


def test_somebody_elses_signal_stops_one_run_only(tmp_path):
    out = tmp_path / "out"
    (out / "jobs").mkdir(parents=True)
    tell(out, "ad_seed0", "wait")

    def end():
        while not (out / "ad_seed0/waits").exists():
            time.sleep(0.05)
        os.kill(int(attempts(out, "ad_seed0")[0].split()[0]), 15)

    ending = threading.Thread(target=end)
    ending.start()
    outcome, _ = run(out, jobs_in(out, "ad_seed0", "rd_seed0"))
    ending.join()
    assert outcome == Outcome(finished=["rd_seed0"], stopped=["ad_seed0"]) and EXIT_SAVED == 75


def test_folder_of_something_else_or_in_use_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(JobsError, match="holds thesis.tex but no ablation: nothing was touched"), hold(tmp_path, print):
        pass
    out = tmp_path / "out"
    said = []
    with hold(out, said.append):
        with pytest.raises(JobsError, match="another ablation is at work"), hold(out, said.append, patience=0.3):
            pass
    assert len(said) == 1 and "waiting" in said[0]
    with hold(out, said.append, patience=0):
        pass


def test_job_is_named_after_its_row_and_seed(tmp_path):
    (job,) = jobs_in(tmp_path, "sft_seed3")
    assert job.folder == tmp_path / "sft_seed3" and dataclasses.asdict(job)["needs"] == ""
