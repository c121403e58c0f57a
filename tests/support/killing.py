"""The training command as a process that a real signal hits at a chosen place, and the places worth choosing."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support.small_run import CONFIG_FILE, REPOSITORY, command, environment

INTERRUPT = REPOSITORY / "tests/support/interrupt.py"
# In the order a run meets them, so that every attempt gets a little further. Their form is told in interrupt.py; calls
# are counted from the start of an attempt, which goes on from the newest checkpoint.
PLACES = {
    "decode": "before mer_r1_jax.media.loader:ClipLoader._entry 9",
    "sft_update": "after mer_r1_jax.run.session:StepLog.add 11",
    "sft_save": "before mer_r1_jax.training.checkpoints:_write_manifest 1",
    "sft_saved": "before mer_r1_jax.training.checkpoints:Checkpoints._collect_garbage 3",
    "first_evaluation": "before mer_r1_jax.evaluation.evaluate:Evaluator._score 3",
    "reference": "before mer_r1_jax.training.checkpoints:Checkpoints._commit 1 .saving-0",
    "rollout": "after mer_r1_jax.training.rl:RlPrograms.sample 1",
    "reward": "before mer_r1_jax.rl.scoring:AnswerScorer.answer 21",
    "completions": "after mer_r1_jax.training.metrics:MetricsWriter.write_completions 3",
    "evaluation_files": "after mer_r1_jax.training.durable:write_atomically 1 .samples.jsonl",
    "rl_save": "after mer_r1_jax.training.metrics:MetricsWriter.sync 1",
    "rl_saved": "before mer_r1_jax.training.checkpoints:Checkpoints._collect_garbage 2",
    "rl_update": "after mer_r1_jax.run.session:StepLog.add 1",
    "rl_last_save": "before mer_r1_jax.training.checkpoints:_write_manifest 1",
    "last_evaluation": "before mer_r1_jax.evaluation.summary:write 1",
    "export": "after mer_r1_jax.omni.hf.export:write_tensor_file 1",
    "exported": "before mer_r1_jax.run.road:write_settings 1",
    "report": "before mer_r1_jax.run.road:make_report 1",
}


def train(
    data: Path, output: Path, cache: Path, *arguments: str, place: str | None = None, signal_name: str = "SIGKILL"
) -> subprocess.CompletedProcess:
    """Runs the small run's training command once.

    Args:
        data: folder of the small run's data.
        output: where runs go; what the command says is added to `<output>.log`.
        cache: folder of compiled programs.
        *arguments: further flags.
        place: where the signal comes, in the form of interrupt.py; None lets the run be.
        signal_name: the signal.
    """
    words = command("train.py", f"--config={CONFIG_FILE}:{data}", f"--config.train.output_dir={output}", *arguments)
    if place is not None:
        words = [words[0], str(INTERRUPT), place, signal_name, *words[1:]]
    ended = subprocess.run(words, env=environment(cache), capture_output=True, text=True, timeout=900)
    with open(output.with_name(f"{output.name}.log"), "a") as log:
        log.write(ended.stdout + ended.stderr)
    return ended
