"""The training command as a process that a signal or a full disk hits at a chosen place, and places worth choosing."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support.small_run import CONFIG_FILE, REPOSITORY, command, environment

INTERRUPT = REPOSITORY / "tests/support/interrupt.py"
# In the order a run meets them, so that every attempt gets a little further. Their form is told in interrupt.py; visits
# are counted from the start of an attempt, which goes on from the newest checkpoint.
PLACES = {
    "decode": "decode 9",
    "sft_update": "update_noted 11",
    "sft_save": "checkpoint_manifest 1",
    "sft_saved": "checkpoint_saved 3",
    "first_evaluation": "evaluation_scores 3",
    "reference": "checkpoint_commit 1 .saving-0",
    "rollout": "sampled 1",
    "reward": "answer_scored 21",
    "completions": "completions_written 3",
    "evaluation_files": "file_written 1 .samples.jsonl",
    "rl_save": "metrics_synced 1",
    "rl_saved": "checkpoint_saved 2",
    "rl_update": "update_noted 1",
    "rl_last_save": "checkpoint_manifest 1",
    "last_evaluation": "evaluation_files 1",
    "export": "tensors_written 1",
    "exported": "exported 1",
    "report": "report 1",
}
# Where a run writes, in the order it meets them; the same counting.
WRITING = {
    "metrics": "append 3 metrics.jsonl",
    "sft_checkpoint": "metrics_synced 1",
    "manifest": "checkpoint_manifest 1",
    "reference": "checkpoint_commit 1 .saving-0",
    "first_evaluation": "file_begins 1 .samples.jsonl",
    "first_scores": "file_begins 1 heldout_",
    "completions": "file_begins 1 completions_",
    "rl_metrics": "append 1 metrics.jsonl",
    "rl_checkpoint": "metrics_synced 1",
    "last_checkpoint": "checkpoint_manifest 1",
    "last_evaluation": "evaluation_files 1",
    "export": "export_tensor 5",
    "exported": "exported 1",
    "report": "file_begins 1 report.html",
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
        signal_name: the signal, or what else interrupt.py lets come there.
    """
    words = command("train.py", f"--config={CONFIG_FILE}:{data}", f"--config.train.output_dir={output}", *arguments)
    if place is not None:
        words = [words[0], str(INTERRUPT), place, signal_name, *words[1:]]
    ended = subprocess.run(words, env=environment(cache), capture_output=True, text=True, timeout=900)
    with open(output.with_name(f"{output.name}.log"), "a") as log:
        log.write(ended.stdout + ended.stderr)
    return ended
