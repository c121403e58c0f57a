"""One attempt at an ablation: the plan is held against what is there, the rest is run, the tables are written."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from rich.console import Console

from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.evaluation.ablation.ablation_report import write
from mer_r1_jax.evaluation.ablation.alikeness import alikeness
from mer_r1_jax.evaluation.ablation.arm_comparison import compare
from mer_r1_jax.evaluation.ablation.results import read_result
from mer_r1_jax.evaluation.bootstrap import POINTS
from mer_r1_jax.evaluation.narrative import tell_ablation
from mer_r1_jax.evaluation.report_kit import counted
from mer_r1_jax.run.ablation_plan import PLATEAU, SFT, Job, Plan, setting_differences
from mer_r1_jax.run.inputs import resolve
from mer_r1_jax.run.jobs import Outcome, cores_for, hold, is_finished, run_jobs
from mer_r1_jax.training.signals import EXIT_SAVED, StopSignals


class SettingsError(RuntimeError):
    """A folder whose runs were made with other settings; the message lists them."""


def ablate(plan: Plan, parallel: int, command: str, console: Console) -> int:
    """Runs what is missing of an ablation and writes its tables.

    Args:
        parallel: runs at once.
        command: that was given, for the tables.

    Returns:
        The process's exit code: 0 when everything is done, EXIT_SAVED when a signal stopped it.

    Raises:
        SettingsError: the folder holds runs with other settings.
        JobsError: a run failed. The tables are written nevertheless.
    """
    say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
    jobs = plan.jobs()
    cores_for(parallel)  # refuses before anything is made
    with hold(plan.out, say) as folder:
        # This is asked under the lock: until then runs of another attempt may be writing these folders.
        if differences := setting_differences(jobs):
            raise SettingsError(
                f"{plan.out} holds runs with other settings, which cannot be put into one table with these:\n  "
                + "\n  ".join(differences)
                + "\nSet these back to go on, or choose another --out for a new ablation."
            )
        resolve(plan.config, say)  # made and fetched once, before several runs look for it at the same time
        # Signals are held while the tables are written too: after a stop these show what is finished.
        with StopSignals() as stop:
            outcome = run_jobs(jobs, folder, parallel, stop, _scores_of)
            _write_tables(plan, jobs, command, say)
            outcome.check()
            return EXIT_SAVED if _is_incomplete(outcome, say) else 0


def _scores_of(job: Job) -> str:
    """F1 of a finished run's last evaluation."""
    # Their names end in the step, with leading zeros.
    evaluations = sorted((job.folder / "eval").glob("*.json"))
    if not evaluations:
        return ""
    scores = json.loads(evaluations[-1].read_text())
    return ": " + ", ".join(f"{mode} F1 {POINTS * scores[mode]['f1']:.1f}" for mode in MODES)


def _is_incomplete(outcome: Outcome, say: Any) -> bool:
    left = len(outcome.stopped) + len(outcome.waiting)
    if left:
        say(f"stopped with {counted(left, 'run')} left; the same command goes on with them")
    return left > 0


def _write_tables(plan: Plan, jobs: list[Job], command: str, say: Any) -> None:
    finished = [job for job in jobs if is_finished(job)]
    # Every row is told by its difference to the checkpoint it started from.
    if not any(job.row == SFT for job in finished):
        return
    results = [read_result(job.folder, job.row, job.seed) for job in finished]
    missing = [job.name for job in jobs if job not in finished]
    settings = dataclasses.replace(plan.config.rl, reward_weights=())  # tables hold the arms' own rewards alone
    alike = alikeness([job.folder for job in finished if job.row in plan.arms], plan.arms, settings)
    ablation = compare(results, plan.rows, missing, alike)
    paths = write(plan.out, ablation, command, plan_as_json(plan), setting_of(plan.config, plan))
    for paragraph in tell_ablation(ablation):
        say(paragraph)
    for path in paths:
        say(str(path))


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """What was asked for; the folder is left out, for tables are passed on."""
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan) if field.name != "out"}
    return values | {"config": dataclasses.asdict(plan.config)}


def setting_of(config: RunConfig, plan: Plan) -> str:
    """What all runs have in common, in a sentence or two."""

    def steps(phase: str) -> str:
        section = getattr(config, phase)
        if section.max_steps == -1:
            return f"{section.num_train_epochs:g} epochs"
        return f"{section.max_steps} steps"

    sft, rl = config.sft, config.rl
    # Where updates share a rollout, they are not of one and the same policy.
    shared = f", {rl.updates_per_rollout} updates a rollout of {rl.prompts_per_rollout} prompts,"
    said = (
        f"Configuration {config.name}. SFT: {steps('sft')} of {sft.prompts_per_step} prompts, once a seed. RL: "
        f"{steps('rl')} of {rl.prompts_per_step} prompts × {rl.num_generations} completions"
        f"{shared if rl.updates_per_rollout > 1 else ''} from that checkpoint, "
        f"learning rate {rl.optimizer.learning_rate:g}, the same for every arm. {counted(len(plan.seeds), 'seed')}."
    )
    if plan.control_sft_steps:
        said += (
            f" Control sft: {plan.control_sft_steps} further steps of SFT with a fresh optimizer, learning rate "
            f"{plan.control_sft_learning_rate:g}."
        )
    if "plateau" in plan.controls:
        said += f" Control plateau: SFT from the start with {PLATEAU:g} times the steps."
    return said
