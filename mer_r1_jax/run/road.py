"""The whole road of one run: data, SFT, RL, evaluations, export, report. Started again, it goes on where it stopped.

Every stage is either recorded in a checkpoint or leaves a file that appears whole; a stage whose record is there is not
done again, and one that is cut short is done again from the last record, with the same result.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from mer_r1_jax import faults, screen
from mer_r1_jax.bucket import storage
from mer_r1_jax.bucket.storage import is_bucket
from mer_r1_jax.config.build import checked
from mer_r1_jax.config.errors import ConfigError
from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.data.records import Record
from mer_r1_jax.evaluation import summary
from mer_r1_jax.evaluation.evaluate import Evaluator
from mer_r1_jax.evaluation.run_report import make_report
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.media.errors import MediaError, PromptError
from mer_r1_jax.media.fingerprints import ClipFingerprints
from mer_r1_jax.media.prompt import Prompt
from mer_r1_jax.omni.hf.export import export_model
from mer_r1_jax.parallel import processes
from mer_r1_jax.parallel.mesh import row_cut
from mer_r1_jax.parallel.whole import on_first
from mer_r1_jax.run.agreement import check_config, check_data
from mer_r1_jax.run.fingerprints import clip_label, of_inputs, read_clips, write_clips
from mer_r1_jax.run.layout import mesh_changes
from mer_r1_jax.run.policy import RUN_MARKER, SETTINGS_FILE, write_settings
from mer_r1_jax.run.rl import RlPhase
from mer_r1_jax.run.session import Session, check_host, check_numbers
from mer_r1_jax.run.setup import Setup, make_setup
from mer_r1_jax.run.sft import SftPhase, describe
from mer_r1_jax.training.bucket_run_directory import BucketRunDirectory
from mer_r1_jax.training.checkpoints import Restored
from mer_r1_jax.training.metrics import MetricsWriter, NoMetrics
from mer_r1_jax.training.prompts import plan_buckets
from mer_r1_jax.training.run_directory import RunDirectory
from mer_r1_jax.training.signals import EXIT_SAVED, StopRequested, StopSignals
from mer_r1_jax.training.state import Leaves, TrainState, merge
from mer_r1_jax.training.stopping import Stop
from mer_r1_jax.training.stored_arrays import named_leaves

BENCHMARK = "heldout"
PROMPTS_TRIED = 8  # records looked through for a prompt to show

log = logging.getLogger(__name__)


def run(config: RunConfig) -> int:
    """Runs, or goes on with, a run.

    Returns:
        The process's exit code: 0 when everything is done, EXIT_SAVED when a signal stopped the run with a checkpoint.
    """
    console = screen.console(stderr=True, quiet=not processes.is_first())
    config = checked(config)
    check_config(config)
    if is_bucket(config.train.output_dir):
        storage.require()
    setup = make_setup(config, _clip_progress(console))
    if not (setup.data.sft or setup.data.rl or setup.data.eval):
        raise ConfigError(
            "there is nothing to do: sft.max_steps and rl.max_steps are 0 and data.eval_path is empty; set one of them"
        )
    check_data(setup.data)
    with _open_folder(setup, config) as folder, StopSignals(config.train.preemption_grace_seconds) as signals:
        try:
            setup.source.clips = ClipFingerprints(clip_label(setup.config))
            setup.source.clips.restore(read_clips(folder))
            return _Road(setup, folder, Stop(signals), console).walk()
        except StopRequested:
            # Raised inside the last evaluation or the export, which leave no trace: everything before them is saved.
            console.print("stopped; training is done, and the same command goes on with what comes after it")
            return EXIT_SAVED
        finally:
            setup.close()


def _open_folder(setup: Setup, config: RunConfig) -> RunDirectory:
    """Opens the run's folder on the first process, whose lock and log it is, and joins it on the others."""
    train, name = config.train, config.train.run_name or config.name
    if is_bucket(train.output_dir):
        place = f"{train.output_dir.rstrip('/')}/{name}", train.local_dir
        open_folder, join = BucketRunDirectory.open_in_bucket, BucketRunDirectory.join_in_bucket
    else:
        place = (pathlib.Path(train.output_dir) / name,)
        open_folder, join = RunDirectory.open, RunDirectory.join
    folder = None
    if processes.is_first():
        resume = train.resume_from_checkpoint == "auto"
        fingerprints = of_inputs(setup)
        folder = open_folder(*place, dataclasses.asdict(config), fingerprints=fingerprints, resume=resume)
    opened = processes.exchange("the run's folder", folder and (folder.attempt, folder.resumed))[0]
    return folder or join(*place, *opened, process=processes.index())


class _Road:
    """One attempt, from what is there to what is missing."""

    def __init__(self, setup: Setup, folder: RunDirectory, stop: Stop, console: Console):
        self.setup, self.folder, self.stop, self.console = setup, folder, stop, console
        self.config = setup.config
        self.sft = SftPhase(setup) if setup.data.sft else None
        self.rl = RlPhase(setup) if setup.data.rl else None
        self.sft_steps = self.sft.total_steps if self.sft else 0
        self._evaluator: Evaluator | None = None

    def walk(self) -> int:
        """Does what is not done yet; see `run`."""
        checkpoints = self.folder.open_checkpoints(RUN_MARKER, self.config.train.save_total_limit)
        restored = checkpoints.restore(self._abstract)
        if restored:
            check_numbers(_all_leaves(restored.arrays), f"{checkpoints.directory}/{restored.step}")
        if processes.is_first():
            self._introduce(restored)
        resume_at = (restored.host["phase"], restored.host["step"]) if restored else None
        report_to = self.config.train.report_to
        with MetricsWriter(self.folder, resume_at, report_to) if processes.is_first() else NoMetrics() as metrics:
            session = Session(self.setup, self.folder, checkpoints, metrics, self.stop, self.sft_steps)
            leaves = self._train(session, restored)
        if leaves is None:
            newest = processes.from_first("the newest checkpoint", checkpoints.latest_step)
            place = "the beginning, as nothing was saved yet" if newest is None else f"checkpoint {newest}"
            self.console.print(f"stopped; the same command goes on from {place}")
            return EXIT_SAVED
        final_step = self.rl.total_steps if self.rl else 0
        self._evaluate(leaves, "rl" if self.rl else "sft", self.sft_steps + final_step)
        self._export(leaves)
        if processes.is_first():
            faults.here("report")
            data = self.config.data
            make_report(self.folder.path, media_root=data.media_root or os.path.dirname(data.eval_path) or None)
            self._conclude()
        return 0

    def _abstract(self, step: int, host: dict[str, Any]) -> TrainState:
        check_host(host)
        return self.setup.abstract_state_of(host["phase"])

    def _train(self, session: Session, restored: Restored | None) -> Leaves | None:
        phase = restored.host["phase"] if restored else None
        if phase != "rl":
            leaves = self._train_sft(session, restored)
            if leaves is None or self.rl is None:
                return leaves
            return self.rl.run(session, leaves, None, self._evaluate_state)
        return self.rl.run(session, None, restored, self._evaluate_state)

    def _train_sft(self, session: Session, restored: Restored | None) -> Leaves | None:
        if self.sft is None:
            return self.setup.initial_leaves()
        if restored is not None and restored.host["step"] == self.sft.total_steps:
            return restored.arrays.trainable | restored.arrays.frozen
        return self.sft.run(session, None if restored else self.setup.initial_leaves(), restored)

    def _evaluate_state(self, state: TrainState, step: int) -> None:
        """Evaluates before RL and every `eval.eval_steps` updates; the end is evaluated by `walk`."""
        every = self.config.eval.eval_steps
        if step == 0 or (every and step % every == 0 and step < self.rl.total_steps):
            self._evaluate(state.trainable | state.frozen, "rl", self.sft_steps + step)

    def _evaluate(self, leaves: Leaves, phase: str, step: int) -> None:
        if not self.setup.data.eval:
            return
        if processes.from_first("evaluations", (self.folder.eval / f"{BENCHMARK}_{step:05d}.json").exists):
            return
        if self._evaluator is None:
            self._evaluator = make_evaluator(self.setup)
        records, batches = self._own_records()
        prompts = load_prompts(self.setup, records)
        evaluation = self._evaluator.run((leaves, {}), prompts, stop=self.stop, at_least=batches)
        write_clips(self.setup, self.folder)
        if not processes.is_first():
            return
        wheels = self.setup.wheels
        scores = summary.summarise(evaluation, wheels, benchmark=BENCHMARK, phase=phase, step=step)
        summary.write(self.folder.eval, scores, summary.samples(evaluation, wheels))
        self.console.print(
            f"held-out clips after step {step}: "
            + "; ".join(
                f"{mode} F1 {scores[mode]['f1']:.3f} (P {scores[mode]['precision']:.3f} R {scores[mode]['recall']:.3f})"
                for mode in ("slow", "fast")
            )
            + _in_no_score(scores)
        )

    def _own_records(self) -> tuple[tuple[Record, ...], int]:
        """The held-out records that this process loads, and the batches in which every process does."""
        share, rows = self.setup.share, self._evaluator.buckets[0].rows
        size = -(-len(self.setup.data.eval) // share.count)
        own = self.setup.data.eval[share.index * size : (share.index + 1) * size]
        return own, -(-size // rows) if share.count > 1 else 0

    def _export(self, leaves: Leaves) -> None:
        if not self.config.train.export:
            return
        if processes.from_first("the export", (self.folder.export / SETTINGS_FILE).exists):
            return
        if processes.count() > 1:
            leaves = on_first(leaves)
        left = False
        if processes.is_first():
            try:
                self._write_export(leaves)
            except StopRequested:
                left = True
        if processes.from_first("whether the export was left", lambda: left):
            raise StopRequested("a signal came while the model was exported")

    def _write_export(self, leaves: Leaves) -> None:
        export_model(
            self.folder.export,
            self.setup.backbone.config,
            merge(leaves),
            source=self.setup.tokenizer_path,
            overwrite=True,
            asked=self.stop.asked,
        )
        faults.here("exported")
        write_settings(self.folder.export, self.config)

    def _introduce(self, restored: Restored | None) -> None:
        """Says what is about to happen: sizes, shapes that can compile, one rendered prompt."""
        setup, say = self.setup, self.console.print
        say(f"{self.folder.path}, attempt {self.folder.attempt}", style="bold")
        if restored:
            say(f"going on after {restored.host['phase']} step {restored.host['step']}")
            if changes := mesh_changes(restored.saved_on, setup.backbone.mesh):
                log.warning("mesh changed: %s; from here on the run need not be equal bit for bit", changes)
        count = sum(leaf.size for leaf in setup.backbone.shapes.values())
        say(f"{count / 1e6:.2f} M parameters on mesh {dict(setup.backbone.mesh.shape)}")
        kept = "left out" if self.config.rl.unscorable == "drop" else "kept for their format"
        say(
            f"{len(setup.data.sft)} SFT, {len(setup.data.rl)} RL ({setup.data.unscorable} unscorable {kept}), "
            f"{len(setup.data.eval)} held-out records ({setup.data.unscorable_eval} unscorable, in no score)"
        )
        lost = getattr(setup.candidates, "share_lost", None)
        if lost is not None:
            say(
                f"confidences: {lost:.1%} of the emotion words' spellings share their first token with another category"
            )
        say("shapes this run can compile:")
        for line in self._shapes():
            say(f"  {line}", highlight=False)
        self._show_prompt(setup.data.sft or setup.data.rl or setup.data.eval)

    def _show_prompt(self, records: tuple[Record, ...]) -> None:
        """Shows the first record whose clips can be used; a broken one is met, and counted, in its turn."""
        for record, prompt in load_prompts(self.setup, records[:PROMPTS_TRIED]):
            if isinstance(prompt, Prompt):
                seconds = prompt.stats["audio_seconds"]
                self.console.print(
                    f"first prompt, {printable(record.id)}: {prompt.stats['frames']} frames, {seconds:.1f} s audio",
                    highlight=False,
                )
                self.console.print(prompt.text, markup=False, highlight=False, style="dim")
                return

    def _shapes(self) -> list[str]:
        config, lines = self.config, []
        if self.sft:
            lines += describe(self.sft.buckets, "SFT", " + ".join(f"{n} target" for n in self.sft.lengths if n))
        if self.rl:
            added = f"{config.rl.num_generations} x {config.rl.max_completion_length} completion tokens"
            lines += describe(self.rl.buckets, "RL", added)
            if 0 < config.rl.decode_chunk < config.rl.max_completion_length:
                lines.append(f"RL rollouts, {config.rl.decode_chunk} tokens at once: {self._decoded_sizes()}")
        if self.setup.data.eval:
            lines += describe(eval_buckets(self.setup), "evaluation", f"{eval_length(config)} completion tokens")
        return lines

    def _decoded_sizes(self) -> str:
        rows, generations = self.rl.buckets[0].rows * self.setup.share.count, self.config.rl.num_generations
        programs = self.setup.programs
        sizes = programs.chunked_rollout(generations, programs.sampling).sizes(rows)
        return ", then ".join(f"{size.rows} x {size.generations}" for size in sizes) + " completions a device"

    def _conclude(self) -> None:
        table = Table("held-out clips", "precision", "recall", "F1", "words", "tokens", "distinct answers")
        files = sorted(self.folder.eval.glob(f"{BENCHMARK}_*.json"))
        for file, label in (
            [(files[0], "start of RL"), (files[-1], "end")] if len(files) > 1 else [(f, "end") for f in files]
        ):
            scores = json.loads(file.read_text())
            for mode in ("slow", "fast"):
                row = scores[mode]
                numbers = [f"{row[name]:.3f}" for name in ("precision", "recall", "f1")]
                numbers += [f"{row[name]:.1f}" for name in ("mean_words", "mean_length")]
                table.add_row(f"{label}, {mode}", *numbers, str(row["distinct_answers"]))
        output = screen.console()
        output.print(table)
        if files:
            scores = json.loads(files[-1].read_text())
            ceiling = "" if scores["oracle_f1"] is None else f"; one who knows the cues: F1 {scores['oracle_f1']:.3f}"
            output.print(f"always the same answer: F1 {scores['majority_f1']:.3f}{ceiling}{_in_no_score(scores)}")
        for name, path in (
            ("report", self.folder.report_file),
            ("model in Hugging Face format", self.folder.export),
            ("metrics", self.folder.metrics_file),
        ):
            if path.exists():
                output.print(f"{name}: {path}", soft_wrap=True, highlight=False)


def _all_leaves(state: TrainState) -> Leaves:
    """Parameters by their names, and beside them the optimizer's moments: as broken, they break the next update."""
    return state.trainable | state.frozen | named_leaves({"optimizer": state.opt_state})


def _in_no_score(scores: dict[str, Any]) -> str:
    """What is to be said of clips whose truth is on no wheel; "" where there are none."""
    count = scores.get("n_unscorable", 0)
    return f"; over {scores['n_scored']} of {scores['n']} clips, the truth of {count} is on no wheel" if count else ""


def eval_length(config: RunConfig) -> int:
    """Tokens an answer may have in evaluation."""
    return config.eval.max_completion_length or config.rl.max_completion_length


def eval_buckets(setup: Setup, records: tuple[Record, ...] | None = None) -> list[Any]:
    """Shapes of evaluation batches: the rows asked for, rounded up to what the devices can share."""
    cut = row_cut(setup.backbone.mesh)
    rows = -(-setup.config.eval.prompts_per_batch // cut) * cut
    return plan_buckets(setup.config, setup.backbone.config, records or setup.data.eval, setup.share.of(rows))


def make_evaluator(setup: Setup, records: tuple[Record, ...] | None = None) -> Evaluator:
    """An evaluator with the run's settings."""
    return Evaluator(
        setup.programs,
        setup.eval_scorer,
        setup.candidates.ids_ZY,
        eval_buckets(setup, records),
        eval_length(setup.config),
    )


def load_prompts(setup: Setup, records: tuple[Record, ...]) -> Iterator[tuple[Record, Prompt | str]]:
    """Prompts of records; a clip that cannot be used comes as the reason, and is counted by whoever asked.

    Raises:
        PromptError: for a record that cannot become a prompt, with its file and line.
    """
    for record in records:
        try:
            yield record, setup.source.load(record).prompt
        except MediaError as error:
            log.warning("%s: %s: left out: %s", record.where, record.id, error)
            yield record, error.reason
        except PromptError as error:
            raise PromptError(f"{record.where}: {error}") from error


def _clip_progress(console: Console) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == total or done % 512 < 32:
            console.print(f"clips of the embedded world: {done} of {total}", highlight=False)
            sys.stderr.flush()

    return progress
