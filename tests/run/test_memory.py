"""A step leaves nothing behind in memory: what training has in use does not grow with the steps it has done."""

from __future__ import annotations

import json
import subprocess

from support.memory_of_steps import EVERY
from support.small_run import CONFIG_FILE, REPOSITORY, command, environment, make_data

STEPS = {"sft": 128, "rl": 48}
# Noise is a few hundred bytes. In RL the spelling of a token that is sampled for the first time is kept, up to those of
# the whole vocabulary; an untrained policy meets about 40 new ones a step, some 3 kB.
MOST_BYTES_A_STEP = {"sft": 2048, "rl": 8192}


def test_a_step_leaves_nothing_in_memory(tmp_path):
    data = make_data(tmp_path / "data")
    words = command(
        "train.py",
        f"--config={CONFIG_FILE}:{data}",
        *(f"--config.{phase}.max_steps={steps}" for phase, steps in STEPS.items()),
        "--config.data.eval_path=",
        "--config.train.save_steps=100000",
        "--config.train.export=False",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    )
    words = [words[0], str(REPOSITORY / "tests/support/memory_of_steps.py"), *words[1:]]
    ended = subprocess.run(
        words, env=environment() | {"PYTHONMALLOC": "malloc"}, capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    noted = json.loads(ended.stdout.splitlines()[-1])
    for phase, steps in STEPS.items():
        used = noted[phase]
        assert len(used) == steps // EVERY
        # The least of many steps: what is loaded ahead, and so in use, differs from step to step.
        window = len(used) // 4
        middle, end = min(used[window : 2 * window]), min(used[-window:])
        growth = (end - middle) / (2 * window * EVERY)
        assert growth < MOST_BYTES_A_STEP[phase], f"{phase}: {growth:.0f} bytes a step"
