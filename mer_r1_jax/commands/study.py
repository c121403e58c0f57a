"""Runs and judges the registered study of docs/study/protocol.md: mer-r1 study --stage=A [--out=FOLDER]

    mer-r1 study --stage=A                       the registered runs of the lab: half an hour on two fast cores
    mer-r1 study --stage=B --runs=FOLDER         what mer-r1 ablate has run on rendered clips

Every block of seeds leaves a summary of 30 kB in --out. Started again the command goes on with the blocks that have
none, so that a copy of the summaries is enough. When all are there it writes results.md and results.json: each
hypothesis confirmed, refuted or undecided. Nothing is judged before; of stage B not before seeds 10 to 15 are there.

--seeds and --set try it with other seeds and smaller sizes; what they give is marked as a trial.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import as_typed, explained
from mer_r1_jax.config.command_line import named_values, seed_numbers
from mer_r1_jax.storage.atomic_files import writing

if TYPE_CHECKING:
    from mer_r1_jax.study.study_report import Results

_STAGE = flags.DEFINE_enum("stage", "A", ("A", "B"), "A: the lab; B: rendered clips")
_OUT = flags.DEFINE_string("out", "", "folder of the summaries and results; empty = runs/study/stage_a or stage_b")
_SEEDS = flags.DEFINE_list("seeds", [], "other seeds than the registered ones: a trial")
_SET = flags.DEFINE_multi_string("set", [], "stage A: a setting of a trial, such as eval_clips=50")
_RUNS = flags.DEFINE_string("runs", "", "stage B: folder of mer-r1 ablate; empty = judge the summaries that are there")
_JUDGE = flags.DEFINE_bool("judge", True, "stage B: judge the summaries; --nojudge only keeps those of new seeds")
_BESIDE = flags.DEFINE_string("beside", "", "folder of the first run's summaries, where this is a second run")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --stage=A")
    if _STAGE.value == "A" and _RUNS.value or _STAGE.value == "B" and _SET.value:
        raise app.UsageError("--runs belongs to --stage=B, and --set to --stage=A")
    with explained():
        seeds = seed_numbers(_SEEDS.value)
        trial = "_trial" if seeds else ""  # whose files must not take the place of the registered stage's
        folder = pathlib.Path(_OUT.value or f"runs/study/stage_{_STAGE.value.lower()}{trial}")
        with writing("the study's files", folder):
            folder.mkdir(parents=True, exist_ok=True)
        stage = _stage_a if _STAGE.value == "A" else _stage_b
        # Read before anything is run: a first run that is not there would be found out in an hour.
        beside = stage(pathlib.Path(_BESIDE.value), seeds, only_read=True) if _BESIDE.value else None
        results = stage(folder, seeds)
        if results is None:
            return 0
        results = dataclasses.replace(results, beside=beside)
        from mer_r1_jax.study import study_report

        for title, verdicts in results.families.items():
            screen.say(f"\n{title}{'' if results.registered else ' (a trial)'}")
            for verdict in verdicts:
                why = f" ({verdict.why})" if verdict.why else ""
                screen.say(f"  {verdict.claim.key:24} {verdict.outcome}{why}: {verdict.claim.said}")
        written = study_report.write(folder, results, as_typed("study"))
        screen.say(f"\nwritten: {', '.join(map(str, written))}")
    return 0


def _stage_a(folder: pathlib.Path, seeds: list[int], only_read: bool = False) -> Results:
    from mer_r1_jax.study.stage_a import make_plan, read_stage, run_stage
    from mer_r1_jax.study.study_report import results_of_a

    plan = make_plan(seeds, named_values(_SET.value))
    if only_read:
        return results_of_a(read_stage(plan, folder))
    import jax

    from mer_r1_jax.storage import compilation_cache

    compilation_cache.use("", jax.devices())  # blocks of one size of groups run the same programs
    return results_of_a(run_stage(plan, folder, as_typed("study"), screen.console(stderr=True).print))


def _stage_b(folder: pathlib.Path, seeds: list[int], only_read: bool = False) -> Results | None:
    """None where nothing is judged yet: a result is looked at once, when its stage has ended."""
    from mer_r1_jax.study.stage_b import CERTAIN, SEEDS, keep, kept, summaries_of
    from mer_r1_jax.study.study_report import results_of_b

    if _RUNS.value and not only_read:
        found, left_out = summaries_of(pathlib.Path(_RUNS.value), tuple(seeds) or SEEDS)
        for line in (*keep(folder, found), *left_out):
            screen.say(line)
    summaries = kept(folder)
    there = {summary.seeds[0] for summary in summaries}
    if not _JUDGE.value:
        return None
    if all(summary.registered for summary in summaries) and (missing := sorted(CERTAIN - there)):
        screen.say(f"seeds {', '.join(map(str, missing))} have no summary yet; nothing is judged before")
        return None
    return results_of_b(summaries)
