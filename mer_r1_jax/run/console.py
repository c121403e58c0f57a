"""What a run says on the console: what it is about to do when it starts, and what came of it at the end."""

from __future__ import annotations

import collections
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from mer_r1_jax import screen
from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.evaluation.narrative import verdict
from mer_r1_jax.evaluation.run_record import EXPECTED_F1, KeptEvaluation, read_run, stages_of
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.media.prompt import Prompt
from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.omni.lora import is_adapter
from mer_r1_jax.parallel import processes
from mer_r1_jax.parallel.mesh import AXES
from mer_r1_jax.run.asking import eval_buckets, eval_length, load_prompts
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.storage.checkpoints import Restored
from mer_r1_jax.storage.run_directory import RunDirectory
from mer_r1_jax.training.phase import Phase
from mer_r1_jax.training.sft_step import SftPhase

PROMPTS_TRIED = 8  # records looked through for a prompt to show
QUESTION_SHOWN = 120  # characters

log = logging.getLogger(__name__)


def introduce(
    console: Console,
    setup: Setup,
    folder: RunDirectory,
    phases: tuple[SftPhase | None, Phase | None],
    restored: Restored | None,
) -> None:
    """Says what is about to happen: sizes, shapes that can compile, one rendered prompt."""
    data, say = setup.data, console.print
    say(f"{folder.path}, attempt {folder.attempt}", style="bold")
    if restored:
        say(f"going on after {restored.host['phase']} step {restored.host['step']}")
        if changes := _mesh_changes(restored.saved_on, setup.backbone.mesh):
            log.warning("mesh changed: %s; from here on the run need not be equal bit for bit", changes)
    count = sum(shape.size for shape in setup.backbone.shapes.values())
    say(f"{count / 1e6:.2f} M parameters on mesh {dict(setup.backbone.mesh.shape)}")
    if rank := setup.config.model.lora.rank:
        size = sum(shape.size for name, shape in setup.backbone.shapes.items() if is_adapter(name))
        say(f"{size / 1e6:.2f} M of them are adapters of rank {rank}; the rest of the language model is frozen")
    kept = "left out" if setup.config.rl.unscorable == "drop" else "kept for their format"
    say(
        f"{len(data.sft)} SFT, {len(data.rl)} RL ({data.unscorable} unscorable {kept}), "
        f"{len(data.eval)} held-out records ({data.unscorable_eval} unscorable, in no score)"
    )
    # Candidate sets of categories lose the tokens they share; those of single words keep all.
    lost = getattr(setup.candidates, "share_lost", None)
    if lost is not None:
        say(f"confidences: {lost:.1%} of the emotion words' spellings share their first token with another category")
    _compare_questions(setup)
    say("shapes this run can compile:")
    for line in _shapes(setup, *phases):
        say(f"  {line}", highlight=False)
    _show_prompt(console, setup)


def _compare_questions(setup: Setup) -> None:
    """Warns where no record asks what the trained model is asked wherever nobody gives a question."""
    usual = setup.config.data.question
    asked = collections.Counter(
        next((turn["content"] for turn in record.messages if turn["role"] == "user"), "")
        for record in (*setup.data.sft, *setup.data.rl)
    )
    if asked and not any(usual in question for question in asked):
        (most, times), total = asked.most_common(1)[0], asked.total()
        log.warning(
            "no record asks data.question, which the trained model is asked by infer, serve and evaluate: got %s in %d "
            "of %d, expected %s; set --config.data.question to what the records ask",
            printable(repr(most), QUESTION_SHOWN),
            times,
            total,
            printable(repr(usual), QUESTION_SHOWN),
        )


def _mesh_changes(saved_on: Mapping[str, int], mesh: Mesh) -> str:
    """Changes such as `fsdp 2 -> 4, processes 1 -> 2`; empty when there are none, or none are known.

    Args:
        saved_on: of `Restored`.
        mesh: of this attempt.
    """
    if not saved_on:
        return ""
    now = dict(mesh.shape) | {"processes": processes.count()}
    # A mesh leaves an axis of one out.
    before, after = (dict.fromkeys((*AXES, "processes"), 1) | dict(sizes) for sizes in (saved_on, now))
    return ", ".join(f"{name} {before[name]} -> {after[name]}" for name in after if before[name] != after[name])


def _show_prompt(console: Console, setup: Setup) -> None:
    """Shows the first record whose clips can be used; a broken one is met, and counted, in its turn."""
    records = setup.data.sft or setup.data.rl or setup.data.eval
    for record, prompt in load_prompts(setup, records[:PROMPTS_TRIED]):
        if isinstance(prompt, Prompt):
            seconds = prompt.stats["audio_seconds"]
            console.print(
                f"first prompt, {printable(record.id)}: {prompt.stats['frames']} frames, {seconds:.1f} s audio",
                highlight=False,
            )
            console.print(prompt.text, markup=False, highlight=False, style="dim")
            return


def _shapes(setup: Setup, sft: SftPhase | None, rl: Phase | None) -> list[str]:
    config, lines = setup.config, []
    if sft:
        lines += _describe(sft.buckets, "SFT", " + ".join(f"{length} target" for length in sft.lengths if length))
    if rl:
        # Prompt tokens once a row, completion tokens once each: what a step holds in memory.
        added = f"{config.rl.num_generations} x {config.rl.max_completion_length} completion tokens"
        lines += _describe(rl.buckets, "RL", added)
        if 0 < config.rl.decode_chunk < config.rl.max_completion_length:
            sizes = setup.programs.chunks.sizes(rl.buckets[0].rows * setup.share.count, setup.programs.sampling)
            text = ", then ".join(f"{size.rows} x {size.generations}" for size in sizes)
            lines.append(f"RL rollouts, {config.rl.decode_chunk} tokens at once: {text} completions a device")
    if setup.data.eval:
        lines += _describe(eval_buckets(setup), "evaluation", f"{eval_length(config)} completion tokens")
    return lines


def _describe(buckets: Sequence[BatchShape], phase: str, added: str) -> list[str]:
    """One line a bucket."""
    rows = "rows" if processes.count() == 1 else "rows a process"
    return [
        f"{phase}: {shape.rows} {rows} x {shape.tokens} prompt tokens + {added}; {shape.vision_clips} x "
        f"{shape.frame_pairs} frame pairs of {shape.patches} patches, "
        f"{shape.audio_clips} x {2 * shape.audio_units} s audio"
        for shape in buckets
    ]


def conclude(folder: RunDirectory, benchmark: str) -> None:
    """Prints the evaluations before and after RL of a finished run, who is ahead, and where its results are."""
    # Results go to standard output; what a run says on its way goes to standard error.
    output = screen.console()
    run = read_run(folder.path)
    if run.evaluations:
        stages = stages_of(run, benchmark)
        shown = [(stages.end, "end")]
        if stages.start is not None and stages.start is not stages.end:
            shown.insert(0, (stages.start, "start of RL"))
        output.print(_scores_table(shown))
        end = stages.end
        ceiling = (
            "" if end.scores["oracle_f1"] is None else f"; one who knows the cues: F1 {end.scores['oracle_f1']:.3f}"
        )
        output.print(f"always the same answer: F1 {end.scores['majority_f1']:.3f}{ceiling}{unscored(end.scores)}")
        if said := verdict(stages):
            output.print(said, highlight=False)
    for name, path in (
        ("report", folder.report_file),
        ("model in Hugging Face format", folder.export),
        ("metrics", folder.metrics_file),
    ):
        if path.exists():
            output.print(f"{name}: {path}", soft_wrap=True, highlight=False)


def _scores_table(shown: Sequence[tuple[KeptEvaluation, str]]) -> Table:
    """A row for slow and one for fast answers of each evaluation; expected F1 where the clips' world is known."""
    names = ["precision", "recall", "f1"]
    if all(evaluation.score(mode, EXPECTED_F1) is not None for evaluation, _ in shown for mode in MODES):
        names.append(EXPECTED_F1)
    heads = [name.replace("_", " ").replace("f1", "F1") for name in names]
    table = Table("held-out clips", *heads, "words", "tokens", "distinct answers")
    for evaluation, label in shown:
        for mode in MODES:
            row = evaluation.scores[mode]
            numbers = [f"{row[name]:.3f}" for name in names]
            numbers += [f"{row[name]:.1f}" for name in ("mean_words", "mean_length")]
            table.add_row(f"{label}, {mode}", *numbers, str(row["distinct_answers"]))
    return table


def unscored(scores: dict[str, Any]) -> str:
    """What is to be said of clips whose truth is on no wheel; "" where there are none."""
    count = scores.get("n_unscorable", 0)
    return f"; over {scores['n_scored']} of {scores['n']} clips, the truth of {count} is on no wheel" if count else ""
