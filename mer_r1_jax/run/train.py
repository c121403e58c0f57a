"""A whole run, top to bottom: SFT, RL, evaluations, export, report. Started again, it goes on where it stopped.

    train        the door: configuration, data and model checked, the run's folder opened
    _stages      the stages in their order, those of them that are not done yet
    train_sft    the SFT loop
    train_rl     the RL loop: a rollout, one or more updates from it, evaluations in between
    evaluate, export, report

Every stage is either recorded in a checkpoint or leaves a file that appears whole; a stage whose record is there is not
done again, and one that is cut short is done again from the last record, with the same result.

A signal (SIGTERM, SIGINT, a spot notice) is obeyed between steps, by all processes at the same one. A rollout can take
minutes and a spot machine gives seconds, so a signal that comes while one is made leaves it: the step before is saved,
and the run that goes on samples it again, from the same random bits. A signal that comes half-way through the updates
of a rollout is obeyed after the last of them, so that no buffer of experience has to be kept with a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console

from mer_r1_jax import faults, screen
from mer_r1_jax.config.bounds import is_bucket
from mer_r1_jax.config.build import checked
from mer_r1_jax.config.schema import ConfigError, RlConfig, RunConfig
from mer_r1_jax.data.prefetch import ClipPrefetcher
from mer_r1_jax.data.synthetic.oracle import oracle_of
from mer_r1_jax.evaluation import summary
from mer_r1_jax.evaluation.clip_players import Patience
from mer_r1_jax.evaluation.run_report import make_report
from mer_r1_jax.evaluation.second_looks import SecondLooks
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.json_lines import json_texts
from mer_r1_jax.media.seen_clips import ClipFingerprints
from mer_r1_jax.parallel import processes
from mer_r1_jax.parallel.rows import put
from mer_r1_jax.parallel.whole import on_first
from mer_r1_jax.run.agreement import check_config, check_data
from mer_r1_jax.run.asking import load_prompts, make_evaluator
from mer_r1_jax.run.console import conclude, introduce, unscored
from mer_r1_jax.run.fingerprints import clip_label, of_inputs, read_clips, write_clips
from mer_r1_jax.run.fitted_gate import write_gate
from mer_r1_jax.run.policy import RUN_MARKER, SETTINGS_FILE, write_settings
from mer_r1_jax.run.setup import Setup, make_setup
from mer_r1_jax.run.stored_base import BASE_FOLDER, begin, restore_base
from mer_r1_jax.run.stored_reference import StoredRun, open_reference
from mer_r1_jax.run.warm_up import is_wanted, warm_up
from mer_r1_jax.storage import bucket
from mer_r1_jax.storage.checkpoints import Checkpoints, Restored
from mer_r1_jax.storage.run_directory import RunDirectory
from mer_r1_jax.storage.stored_arrays import named_leaves
from mer_r1_jax.training.device_metrics import Utilisation, memory_metrics
from mer_r1_jax.training.metrics import MetricsWriter, NoMetrics
from mer_r1_jax.training.phase import Phase
from mer_r1_jax.training.profiling import StepProfiler
from mer_r1_jax.training.progress import Progress
from mer_r1_jax.training.reference import Reference
from mer_r1_jax.training.rl_step import Rollout, beta_at
from mer_r1_jax.training.sft_step import SftPhase
from mer_r1_jax.training.signals import EXIT_SAVED, StopRequested, StopSignals
from mer_r1_jax.training.state import (
    Params,
    TrainState,
    applied_before,
    as_stored,
    check_host,
    check_numbers,
    from_stored,
    left_out_of_checkpoints,
    stored_params,
)
from mer_r1_jax.training.stopping import Stop

BENCHMARK = "heldout"  # names the files of evaluations
EVALUATED_MODES = ("slow", "fast")
REPORT_SECONDS = 60.0  # while a run goes on, its report is written at most this often
CLIP_SECONDS = 20.0  # and waits for its clips' files no longer than this: nothing is trained meanwhile


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run(StoredRun):
    """One attempt at a run: its parts (`Setup`), where it writes, and who may stop it.

    Attributes:
        metrics: metrics.jsonl, reporters, completion tables; written by the first process.
        stop: asks for SIGTERM and SIGINT.
        console: of the first process.
    """

    metrics: MetricsWriter | NoMetrics
    stop: Stop
    console: Console


# ----------------------------------------------------------------------------------------------------------- the door


def train(config: RunConfig) -> int:
    """Runs, or goes on with, a run.

    Returns:
        The process's exit code: 0 when everything is done, EXIT_SAVED when a signal stopped the run with a checkpoint.
    """
    console = screen.console(stderr=True, quiet=not processes.is_first())
    config = checked(config)
    check_config(config)  # the same on all processes
    # A missing library shows now: making or fetching data, which comes next, may take an hour.
    if is_bucket(config.train.output_dir):
        bucket.require()
    setup = make_setup(config, functools.partial(console.print, highlight=False))
    if not (setup.data.sft or setup.data.rl or setup.data.eval):
        raise ConfigError(
            "there is nothing to do: sft.max_steps and rl.max_steps are 0 and data.eval_path is empty; set one of them"
        )
    check_data(setup.data)
    # The folder comes after the set-up: hashes of data, tokenizer and model decide whether its run may go on.
    with _open_folder(setup, config) as folder, StopSignals(config.train.preemption_grace_seconds) as signals:
        try:
            # No clip is decoded before: each is held against what earlier attempts saw under its name.
            setup.source.clips = ClipFingerprints(clip_label(setup.config))
            setup.source.clips.restore(read_clips(folder))
            return _stages(setup, folder, Stop(signals), console)
        except StopRequested:
            # Raised inside the last evaluation or the export, which leave no trace: everything before them is saved.
            console.print("stopped; training is done, and the same command goes on with what comes after it")
            return EXIT_SAVED
        finally:
            setup.close()


def _open_folder(setup: Setup, config: RunConfig) -> RunDirectory:
    """Opens the run's folder on the first process, whose lock and log it is, and joins it on the others."""
    section = config.train
    path = os.path.join(section.output_dir, section.run_name or config.name)
    folder = None
    if processes.is_first():
        folder = RunDirectory.open(
            path,
            dataclasses.asdict(config),
            fingerprints=of_inputs(setup),
            resume=section.resume_from_checkpoint == "auto",
            local_dir=section.local_dir,
        )
    # The others wait here until the folder is there: they write their logs into it.
    opened = processes.exchange("the run's folder", folder and (folder.attempt, folder.resumed))[0]
    return folder or RunDirectory.join(path, *opened, process=processes.index(), local_dir=section.local_dir)


# --------------------------------------------------------------------------------------------------------- the stages


def _stages(setup: Setup, folder: RunDirectory, stop: Stop, console: Console) -> int:
    """Does what is not done yet; see `train`."""
    # Both phases are made before anything is compiled: targets and numbers of steps that cannot be used end here.
    sft = setup.sft_phase() if setup.data.sft else None
    rl = setup.rl_phase() if setup.data.rl else None
    section = setup.config.train
    checkpoints = folder.open_checkpoints(RUN_MARKER, section.save_total_limit)

    leave_out = left_out_of_checkpoints(setup.config)

    if is_wanted(setup):  # before anything lies in the devices' memory
        done = processes.from_first("the checkpoint a warm-up goes by", checkpoints.latest_step) or 0
        try:
            warm_up(setup, sft, rl, done, functools.partial(console.print, highlight=False), stop)
        except StopRequested:
            return _stopped(console, checkpoints)

    # SFT and RL may train other parameters, and only a checkpoint's host state says which phase it is of.
    def abstract(step: int, host: dict[str, Any]) -> dict[str, Any]:
        check_host(host)
        return as_stored(setup.abstract_state_of(host["phase"]), leave_out)

    restored = checkpoints.restore(abstract)
    if restored:
        # The optimizer's moments too: broken ones break the next update.
        numbers = stored_params(restored.arrays) | named_leaves({"optimizer": restored.arrays["opt_state"]})
        check_numbers(numbers, f"{checkpoints.directory}/{restored.step}")
        # Checkpoints of a run with adapters leave the base out: it comes from model.path, or was saved beside them.
        restored.arrays["frozen"] |= restore_base(setup, functools.partial(folder.open_checkpoints, BASE_FOLDER, 1))
    if processes.is_first():
        introduce(console, setup, folder, (sft, rl), restored)
    # Metrics of later steps than the checkpoint's are set aside: these steps are made again.
    resume_at = (restored.host["phase"], restored.host["step"]) if restored else None
    first = processes.is_first()
    with MetricsWriter(folder, resume_at, section.report_to) if first else NoMetrics() as metrics:
        run = Run(
            **vars(setup),
            folder=folder,
            checkpoints=checkpoints,
            metrics=metrics,
            stop=stop,
            console=console,
            sft_steps=sft.total_steps if sft else 0,
        )
        params = _train_phases(run, sft, rl, restored)
    if params is None:
        return _stopped(console, checkpoints)
    evaluate(run, params, "rl" if rl else "sft", rl.total_steps if rl else run.sft_steps)
    export(run, params)
    report(run)
    return 0


def _stopped(console: Console, checkpoints: Checkpoints) -> int:
    """Says from where the run goes on, and gives the exit code."""
    newest = processes.from_first("the newest checkpoint", checkpoints.latest_step)
    place = "the beginning, as nothing was saved yet" if newest is None else f"checkpoint {newest}"
    console.print(f"stopped; the same command goes on from {place}")
    return EXIT_SAVED


def _train_phases(
    run: Run, sft: SftPhase | None, rl: Phase[RlConfig] | None, restored: Restored | None
) -> Params | None:
    """Takes up the phase that the checkpoint belongs to; None when a signal stopped the run."""
    if restored is not None and restored.host["phase"] == "rl":
        assert rl is not None  # or the run's folder would have refused the configuration
        return train_rl(run, rl, None, restored)
    if sft is None:
        params = begin(run, run.folder)
    elif restored is not None and restored.host["step"] == sft.total_steps:
        params = stored_params(restored.arrays)  # SFT is done, RL has no checkpoint yet
    else:
        params = train_sft(run, sft, restored)
    if params is None or rl is None:
        return params
    return train_rl(run, rl, params, None)


def train_sft(run: Run, phase: SftPhase, restored: Restored | None) -> Params | None:
    """Trains from the initial parameters or a checkpoint of SFT to the end of the phase.

    Returns:
        All parameters, or None when a signal stopped the run (a checkpoint was saved).
    """
    config = run.config.train
    with run.prompts_of(phase) as data:
        # Random or loaded weights are made only where no checkpoint has them.
        state, done, num_tokens = _begin(phase, None if restored else begin(run, run.folder), restored, data)
        sft_step = phase.make_step()
        with StepLog(run, phase, done, num_tokens) as steps:
            saved = done
            for step in range(done + 1, phase.total_steps + 1):
                steps.begin(step)
                # It is taken before the load: one that is left may have listed broken clips of a step never made.
                position = data.state()
                try:
                    batch, tokens = phase.batch(data.next(step, run.stop.asked))
                except StopRequested:
                    if saved < step - 1:
                        save(run, phase, step - 1, (state, position), steps)
                    return None
                faults.here("sft_step", step)
                # Donated: the old state's memory becomes the new one's.
                state, metrics = sft_step(state, put(batch, run.backbone.mesh))
                steps.add(step, metrics | data.metrics(), tokens)
                # All processes leave after the same step, or those left behind would wait in the next collective.
                stopping = run.stop.agreed()
                if step % config.save_steps == 0 or step == phase.total_steps or stopping:
                    save(run, phase, step, (state, data.state()), steps)
                    saved = step
                    steps.restart_clock()
                if stopping:
                    return None
    return state.params


def train_rl(run: Run, phase: Phase[RlConfig], params: Params | None, restored: Restored | None) -> Params | None:
    """Trains from the SFT result or a checkpoint of RL to the end of the phase.

    Returns:
        All parameters, or None when a signal stopped the run (a checkpoint was saved).
    """
    updates = phase.config.updates_per_rollout
    with run.prompts_of(phase) as data:
        state, done, num_tokens = _begin(phase, params, restored, data)
        reference = open_reference(run, phase, state, None if restored is None else done)
        # Compiled when they are first called, with the first prompts.
        rl_step, update = run.rl_step(phase.buckets), run.programs.make_update(phase.optimizer)
        with StepLog(run, phase, done, num_tokens) as steps:
            # One is due before the first update, and where an attempt was stopped between checkpoint and evaluation.
            try:
                _evaluate_when_due(run, phase, state, done, steps)
            except StopRequested:
                return None  # nothing was done since the newest checkpoint
            steps.restart_clock()
            saved = done
            for step in range(done + 1, phase.total_steps + 1):
                steps.begin(step)
                rollout_step, number = divmod(step - 1, updates)  # the rollout, and which of its updates
                if number == 0:
                    # It is taken before the load: a run that goes on from the step before draws these prompts again.
                    position = data.state()
                    try:
                        loaded = data.next(step, run.stop.asked)
                        # The reference has the policy's own frozen towers: only what is trained is held twice.
                        held_against = None if reference is None else reference.over(state)
                        rollout = rl_step.rollout(state.params, held_against, loaded, rollout_step, run.stop)
                    except StopRequested:
                        steps.note(f"the rollout of rl step {step} was left; the run that goes on samples it again")
                        if saved < step - 1:
                            save(run, phase, step - 1, (state, position), steps, reference)
                        return None
                    faults.here("rl_update", step)
                # A scalar of the program, not static: it falls with every step, and nothing compiles anew.
                beta = beta_at(phase.config, step - 1, phase.total_steps)
                minibatch = run.programs.minibatch(rollout.experience, number)
                state, metrics = update(state, minibatch, np.float32(beta))
                if reference is not None:
                    reference.follow(state, step)
                metrics |= {"beta": beta} | rollout.metrics | data.metrics()
                steps.add(step, metrics, rollout.tokens if number == 0 else 0)
                if number == 0:
                    _log_completions(run, phase, steps, step, rollout)
                if step % updates:
                    continue

                # Between two rollouts: save, stop or evaluate where that is due.
                steps.flush()  # the next rollout needs the update anyhow, and what comes first is not its time
                # A multiple of save_steps may lie inside a rollout: the step that ends the rollout is saved for it.
                due = step % run.config.train.save_steps < updates or step == phase.total_steps
                stopping = run.stop.agreed()  # read once: a signal may come at any moment
                if due or stopping:
                    save(run, phase, step, (state, data.state()), steps, reference)
                    saved = step
                if stopping:
                    return None
                try:
                    _evaluate_when_due(run, phase, state, step, steps)
                except StopRequested:
                    # A checkpoint that was due is there already; otherwise these updates are saved now.
                    if not due:
                        save(run, phase, step, (state, data.state()), steps, reference)
                    return None
                steps.restart_clock()
    return state.params


def evaluate(run: Run, params: Params, phase: str, step: int) -> None:
    """Answers the held-out clips slow and fast and writes the scores, once: where they are there, nothing is done.

    Args:
        phase, step: what was trained last, and its steps.
    """
    step += run.sft_steps if phase == "rl" else 0
    if not run.data.eval:
        return
    # Scores are written after the answers, so where they stand the evaluation is whole. All processes go by what the
    # first one sees: one that went on alone would wait for the others.
    if processes.from_first("evaluations", (run.folder.eval / f"{BENCHMARK}_{step:05d}.json").exists):
        return
    section = run.config.eval
    looks = SecondLooks(section.num_samples, section.temperature, section.top_p, _fixed_words(run))
    evaluator = make_evaluator(run, looks=looks)
    # Each process loads its share of the records, and all go through as many batches, the last ones empty.
    share, size = run.share, -(-len(run.data.eval) // run.share.count)
    own = run.data.eval[share.index * size : (share.index + 1) * size]
    batches = -(-size // evaluator.buckets[0].rows) if share.count > 1 else 0
    # Greedy, so the same weights give the same scores whenever they are asked.
    found = evaluator.run(params, load_prompts(run, own), stop=run.stop, at_least=batches)
    # What was seen of held-out clips counts like that of training clips: all processes take part.
    write_clips(run, run.folder)
    if not processes.is_first():
        return
    oracle = oracle_of(run.config.data.synthetic_dir, run.wheels) if run.config.data.synthetic_dir else None
    expected = summary.expected_scores(found, oracle)
    scores = summary.summarise(found, run.wheels, expected, benchmark=BENCHMARK, phase=phase, step=step)
    summary.write(run.folder.eval, scores, summary.samples(found, run.wheels, expected))
    run.console.print(
        f"held-out clips after step {step}: "
        + "; ".join(
            f"{mode} F1 {scores[mode]['f1']:.3f} (P {scores[mode]['precision']:.3f} R {scores[mode]['recall']:.3f})"
            for mode in EVALUATED_MODES
        )
        + unscored(scores)
    )


def _fixed_words(run: Run) -> dict[str, list[str]] | None:
    """Clip -> words of the fast answer before RL, whose confidence is asked at every evaluation; None before those."""

    def read() -> dict[str, list[str]] | None:
        path = run.folder.eval / f"{BENCHMARK}_{run.sft_steps:05d}.samples.jsonl"
        if not path.exists():
            return None
        rows = [json.loads(line) for line in json_texts(path.read_text(encoding="utf-8"))]
        return {row["id"]: row["fast"]["words"] for row in rows}

    # On another host the local copy of a run in a bucket may have no evaluations, so the first process reads.
    return processes.from_first("the words of the first evaluation", read)


def export(run: Run, params: Params) -> None:
    """Writes the policy in Hugging Face format, on the first process, unless it is there already."""
    if not run.config.train.export:
        return
    if processes.from_first("the export", (run.folder.export / SETTINGS_FILE).exists):
        return
    # Whole arrays on the first process, None on the others.
    whole = on_first(params) if processes.count() > 1 else params
    left = False
    if processes.is_first():
        assert whole is not None
        try:
            run.backbone.save(run.folder.export, whole, source=run.tokenizer_path, asked=run.stop.asked)
            faults.here("exported")
            if problem := write_gate(run.folder.export, run.folder.path):
                run.console.print(problem)
            write_settings(run.folder.export, run.config)  # last: it says that the export is complete
        except StopRequested:
            left = True
    # Told to all processes, so that all of them end alike.
    if processes.from_first("whether the export was left", lambda: left):
        raise StopRequested("a signal came while the model was exported")


def report(run: Run) -> None:
    """Writes report.html and prints what came of the run."""
    if not processes.is_first():
        return
    faults.here("report")
    _write_report(run)
    conclude(run.folder, BENCHMARK)


def _write_report(run: Run, under_way: str = "", patience: Patience | None = None) -> None:
    data = run.config.data
    root = data.media_root or os.path.dirname(data.eval_path) or None
    make_report(run.folder.path, media_root=root, under_way=under_way, patience=patience)


# ---------------------------------------------------------------------------------------------- parts of the two loops


def _begin(
    phase: Phase, params: Params | None, restored: Restored | None, data: ClipPrefetcher
) -> tuple[TrainState, int, int]:
    """The state, the steps done and the tokens seen: of fresh parameters, or of a checkpoint of this phase."""
    if restored is None:
        assert params is not None, "a phase begins with parameters or with a checkpoint"
        return phase.new_state(params), 0, 0
    data.restore(restored.host["data"])
    return from_stored(restored.arrays), restored.host["step"], restored.host["counters"]["num_tokens"]


def save(
    run: Run,
    phase: Phase,
    step: int,
    at: tuple[TrainState, Any],
    steps: StepLog,
    reference: Reference | None = None,
) -> None:
    """Saves a checkpoint of `step` steps done in a phase.

    Args:
        at: the state, and where the phase's prompts stand, after those steps.
        steps: the log, whose last step is written first.
        reference: of RL, kept before the checkpoint where it has changed.
    """
    state, position = at
    with run.stop.signals.saving() if run.stop.signals else contextlib.nullcontext():
        steps.flush()
        run.metrics.sync()  # a checkpoint must not outlive its metrics
        write_clips(run, run.folder)  # nor what its clips were
        # Checkpoints go to a bucket directly, so the files that must not be missing beside them go first.
        run.folder.publish()
        if reference is not None:
            reference.keep()
        done_before = run.sft_steps if phase.name == "rl" else 0
        host = {"phase": phase.name, "step": step, "data": position, "counters": {"num_tokens": steps.num_tokens}}
        run.checkpoints.save(done_before + step, as_stored(state, left_out_of_checkpoints(run.config)), host)


def _evaluate_when_due(run: Run, phase: Phase, state: TrainState, step: int, steps: StepLog) -> None:
    """Evaluates before RL and every `eval.eval_steps` updates; the end is evaluated after the phase."""
    every = run.config.eval.eval_steps
    if step == 0 or (every and step % every == 0 and step < phase.total_steps):
        evaluate(run, state.params, "rl", step)
        if run.data.eval and processes.is_first():
            _report_so_far(run, f"after RL step {step} of {phase.total_steps}", steps)


def _report_so_far(run: Run, under_way: str, steps: StepLog) -> None:
    """Writes report.html while the run goes on, unless that was done within REPORT_SECONDS: it takes some seconds.

    Whatever goes wrong is told, and stops nothing.

    Args:
        under_way: how far the run has come, in words.
        steps: the log of its phase.
    """
    began = time.monotonic()
    # Nor where the run is asked to end, whose checkpoint comes first; and at most a twentieth of the time goes into it.
    if run.stop.asked() or began - steps.reported < max(REPORT_SECONDS, 20 * steps.report_took):
        return
    try:
        # A disk that hangs would keep the run for minutes a file, and a signal from being obeyed.
        _write_report(run, under_way, Patience(CLIP_SECONDS, run.stop.asked))
    except Exception as error:  # it is for looking at, and written again at the end, where an error counts
        steps.note(f"report.html could not be written; the run goes on ({type(error).__name__}: {printable(error)})")
    steps.reported = time.monotonic()
    steps.report_took = steps.reported - began


def _log_completions(run: Run, phase: Phase[RlConfig], steps: StepLog, step: int, rollout: Rollout) -> None:
    """Writes the table of a rollout, and shows some of it, where a logging step is among its updates."""
    config = run.config.train
    # A rollout serves several updates; its table is written if any of them is logged.
    last = step + phase.config.updates_per_rollout - 1
    if not config.log_completions or last // config.logging_steps == (step - 1) // config.logging_steps:
        return
    run.metrics.write_completions(step, rollout.table)
    for line in range(min(config.num_completions_to_print, len(rollout.table.get("id", ())))):
        clip, words, truth, f1 = (rollout.table[name][line] for name in ("id", "words", "truth", "f1"))
        steps.note(
            f"  {printable(clip)}: {rollout.table['completion'][line]!r}\n"
            f"  answer {printable(', '.join(words)) or 'none'} | truth {printable(', '.join(truth))} | "
            + ("its truth is on no wheel" if f1 is None else f"F1 {f1:.2f}")
        )


class StepLog:
    """Writes the metrics of a step after the next one was dispatched, so that the device never waits for the host.

    Args:
        run, phase: whose steps they are.
        done: steps done before.
        num_tokens: tokens seen in them.
    """

    def __init__(self, run: Run, phase: Phase, done: int, num_tokens: int):
        self._run, self._phase, self._schedule = run, phase.name, phase.schedule
        self._nowhere = None if processes.is_first() else open(os.devnull, "w")
        self._progress = Progress(phase.name, phase.total_steps, done, self._nowhere)
        self._pending: tuple[int, dict[str, Any], int] | None = None
        self._profiler = StepProfiler(run.folder.attempt_logs / "profile", phase.name, run.config.train.profile_steps)
        self._utilisation = Utilisation(run.backbone.shapes, run.backbone.mesh.devices.flat, phase.config)
        self._last = time.perf_counter()
        self.num_tokens = num_tokens
        self.reported = time.monotonic()  # when report.html was written last, or the phase begun
        self.report_took = 0.0  # seconds

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._profiler.end()
        self._progress.close()
        if self._nowhere is not None:
            self._nowhere.close()

    def begin(self, step: int) -> None:
        """A step is about to be made: it is traced where `train.profile_steps` asks for it."""
        self._profiler.begin(step, self.flush)

    def add(self, step: int, metrics: Mapping[str, Any], tokens: int) -> None:
        """Takes the metrics of a step that was just dispatched and writes those of the step before.

        Args:
            step: of the phase, from 1.
            metrics: over all processes, on host or device.
            tokens: of this process's rows.
        """
        faults.here("update_dispatched", f"{self._phase} {step}")
        self.flush()
        self._pending = (step, dict(metrics), tokens)
        faults.here("update_noted", f"{self._phase} {step}")

    def restart_clock(self) -> None:
        """Leaves what was done since the last step (a checkpoint, an evaluation) out of the next one's time."""
        self._last = time.perf_counter()

    def flush(self) -> None:
        """Writes what is pending; waits for the device.

        Raises:
            NonFiniteError: too many updates in a row were left out; the step is named, and what to do.
        """
        if self._pending is None:
            return
        (step, metrics, tokens), self._pending = self._pending, None
        config = self._run.config.train
        # A process that loads the same rows as another (tensor parallelism) counts none.
        told = processes.gather("the tokens of a step", tokens if self._run.share.leader else 0)
        tokens = tokens if told is None else sum(told)
        self.num_tokens += tokens
        metrics = jax.device_get(metrics) | {"num_tokens": self.num_tokens}
        now = time.perf_counter()  # a step's time ends when the device is done with it
        seconds, self._last = now - self._last, now
        metrics |= {"step_time": seconds, "perf/throughput": tokens / seconds}  # seconds; tokens a second
        metrics |= memory_metrics() | self._utilisation.of_step(tokens, seconds)
        # Looked at every step, also where nothing is logged.
        skipped_in_a_row = int(metrics.pop("skipped_in_a_row"))
        count = applied_before(step, int(metrics["skipped_steps"]), skipped_in_a_row)
        metrics["learning_rate"] = float(np.asarray(self._schedule(count)))
        if step % config.logging_steps == 0:
            self._progress.update(step, self._run.metrics.write(self._phase, step, metrics))
        if skipped_in_a_row >= config.max_nonfinite_steps:
            raise NonFiniteError(
                f"{self._phase} step {step}: {skipped_in_a_row} updates in a row had a loss or gradient that is not "
                f"finite and were left out; the run stops at train.max_nonfinite_steps={config.max_nonfinite_steps}. "
                f"Lower {self._phase}.optimizer.learning_rate and go on from an earlier checkpoint under a new "
                "train.run_name"
            )

    def note(self, text: str) -> None:
        """Prints text beside the progress line."""
        self._progress.note(text)
