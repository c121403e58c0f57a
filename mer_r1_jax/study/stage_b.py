"""Stage B of the study: summaries of whole seeds from the runs of `mer-r1 ablate`, as docs/study/protocol.md has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.evaluation.run_record import KeptEvaluation, RunRecord, read_run, stages_of
from mer_r1_jax.run.ablation_plan import run_name
from mer_r1_jax.run.jobs import FINISHED
from mer_r1_jax.study.hypotheses import AD, SFT
from mer_r1_jax.study.summaries import DIGITS, StudyError, Summary, completed, read_summary, write_summary

ARMS = ("baseline", "rd", "ad", "mer_r1")
SEEDS = tuple(range(10, 20))  # the first six for certain, then one after another while there is time
CERTAIN = frozenset(SEEDS[:6])  # without these nothing is judged
CONTROL = "control_permuted"
# What the protocol names; all else is the configuration's. SFT may run 3,000 steps where the pilot says so.
_NAMED: dict[str, tuple[Any, ...]] = {
    "data.synthetic_world": ("U",),
    "data.synthetic_seed": (1,),
    "data.synthetic_sft_clips": (4000,),
    "data.synthetic_rl_clips": (2000,),
    "data.synthetic_eval_clips": (4000,),
    "sft.max_steps": (2000, 3000),
    "sft.prompts_per_step": (16,),
    "sft.optimizer.learning_rate": (2e-3,),
    "rl.max_steps": (200,),
    "rl.prompts_per_step": (12,),
    "rl.num_generations": (8,),
    "rl.calibration_weight": (0.1,),
    "rl.optimizer.learning_rate": (2e-4,),
    # ... and what would change what is compared, or over which clips.
    "eval.limit": (0,),
    "model.lora.rank": (0,),
    "model.text_hidden_size": (96,),
    "model.text_layers": (3,),
    "sft.fast_fraction": (0.25,),
    "rl.beta": (0.04,),
    "rl.temperature": (0.9,),
    "rl.loss_type": ("dapo",),
    "rl.calibration_counts": ("word",),
    "rl.num_iterations": (1,),
    "rl.steps_per_generation": (1, None),  # None: by a version that had no such setting
}
# Measure, as the lab calls it -> score of an evaluation.
_SCORES = {
    **{f"{mode}_{name}": (mode, f"expected_{name}") for mode in MODES for name in ("recall", "precision", "f1")},
    **{f"{mode}_f1_drawn": (mode, "f1") for mode in MODES},
    "confidence_right": ("slow", "fixed_confidence_correct"),
    "confidence_wrong": ("slow", "fixed_confidence_wrong"),
    "words": ("slow", "mean_words"),
}
# ... -> metric of every step of RL, whose mean it is.
_METRICS = {
    "recall_spread_over_rl": "rewards/recall/group_std",
    "precision_spread_over_rl": "rewards/precision/group_std",
    "kl": "kl",
    "repeats": "answers/mean_repeats",  # of the answers sampled in RL; an evaluation does not count them
}

# Settings that differ from seed to seed, or from machine to machine, and that no result depends on.
_NAMES_OF_A_RUN = {"train": ("seed", "run_name")}
_PLACES = {"train": ("output_dir", "local_dir", "compilation_cache_dir"), "data": ("cache_dir", "synthetic_dir")}


def summaries_of(folder: Path, seeds: tuple[int, ...] = SEEDS) -> tuple[list[Summary], list[str]]:
    """The summaries of an ablation's whole seeds, and in words which seeds are left out and why.

    Args:
        folder: of the ablation.
        seeds: looked for, in this order.

    Raises:
        StudyError: there is no such folder, or the runs of a seed have other settings than another's.
    """
    if not folder.is_dir():
        raise StudyError(f"--runs: {folder} is not a folder; expected that of mer-r1 ablate; name its --out")
    found: list[Summary] = []
    left_out: list[str] = []
    for seed in seeds:
        missing = [row for row in (SFT, *ARMS) if not (folder / run_name(row, seed) / FINISHED).is_file()]
        if missing:
            left_out.append(f"seed {seed}: {', '.join(missing)} not finished")
        else:
            found.append(_summary(folder, seed))
    if found:
        first, settings = found[0], _settings(found[0])
        for other in found[1:]:
            if _settings(other) != settings:
                raise StudyError(
                    f"{folder}: seed {other.seeds[0]} was run with other settings than seed {first.seeds[0]}, expected "
                    "one value for all; run it again with those of the protocol"
                )
    return found, left_out


def keep(folder: Path, summaries: Sequence[Summary]) -> list[str]:
    """Writes the summaries that are not there yet, and says what became of each. The first run of a seed counts."""
    said = []
    for summary in summaries:
        path = folder / f"{summary.world}_seed{summary.seeds[0]}.json"
        if not path.exists():
            write_summary(path, summary)
            said.append(f"written: {path} ({path.stat().st_size / 1000:.0f} kB)")
            continue
        there = read_summary(path)
        again = {
            row: {name: [round(v, DIGITS) for v in of] for name, of in rows.items()}
            for row, rows in summary.rows.items()
        }
        if there.rows != again:
            said.append(
                f"{path}: got other numbers from these runs, expected those of the first: they are kept, a seed counts "
                "once; judge a second run in another --out and print it beside"
            )
    return said


def kept(folder: Path) -> list[Summary]:
    """The summaries of a folder, by seed.

    Raises:
        StudyError: there is none, or one cannot be read; or they are of the registered stage and of trials, or of other
            settings or worlds, which no mean may go over.
    """
    found = [read_summary(path) for path in folder.glob("*_seed*.json")]
    if not found:
        raise StudyError(
            f"{folder}: got no summary of a whole seed, expected at least one; name the folder of mer-r1 ablate with "
            "--runs"
        )
    if len({(one.registered, one.world) for one in found}) > 1 or any(
        _settings(one) != _settings(found[0]) for one in found
    ):
        raise StudyError(
            f"{folder}: got summaries of the registered stage beside those of a trial, or of seeds with other "
            "settings, expected one kind alone, as no mean goes over both; keep them apart with --out"
        )
    return sorted(found, key=lambda summary: summary.seeds)


def _settings(summary: Summary) -> Mapping[str, Any]:
    """What all seeds have in common: not where runs and clips lie."""
    own = {section: (*names, *_NAMES_OF_A_RUN.get(section, ())) for section, names in _PLACES.items()}
    config = completed(summary.config, RunConfig())
    return {
        section: {k: v for k, v in values.items() if k not in own.get(section, ())}
        if isinstance(values, dict)
        else values
        for section, values in config.items()
    }


def _without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with an empty text for each folder: others read a summary, whom no machine's path concerns."""
    return {
        section: {k: "" if k in _PLACES.get(section, ()) else v for k, v in values.items()}
        if isinstance(values, dict)
        else values
        for section, values in config.items()
    }


def _summary(folder: Path, seed: int) -> Summary:
    rows: dict[str, dict[str, list[float]]] = {}
    config: dict[str, Any] = {}
    extra = (CONTROL,) if (folder / run_name(CONTROL, seed) / FINISHED).is_file() else ()
    for row in (SFT, *ARMS, *extra):
        run = read_run(folder / run_name(row, seed))
        if not run.evaluations:
            raise StudyError(
                f"{run.path}: got no evaluation that can be read, expected one after the last step; remove the run's "
                "folder and start mer-r1 ablate again"
            )
        end = stages_of(run, next(iter(run.evaluations))).end
        rows["permuted" if row == CONTROL else row] = _measures(run, end, row)
        # SFT and RL are told by the runs that have them; an arm's differs from another's in the arm.
        config = run.config if row == SFT else config | {"rl": {**run.config["rl"], "arm": ""}} if row == AD else config
    world = str(config.get("data", {}).get("synthetic_world", ""))
    config = _without_places(config)
    return Summary("B", is_registered(seed, config), world, "", (seed,), config, rows, {"runs": folder.name})


def is_registered(seed: int, config: Mapping[str, Any]) -> bool:
    """Whether a seed was run as the protocol names it."""

    def value(name: str) -> Any:
        found: Any = config
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    return seed in SEEDS and all(value(name) in legal for name, legal in _NAMED.items())


def _measures(run: RunRecord, end: KeptEvaluation, row: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for measure, (mode, score) in _SCORES.items():
        value = end.score(mode, score)
        if value is None and score.startswith("expected_"):
            raise StudyError(
                f"{run.path}: the last evaluation lacks {score}, expected clips of a synthetic world, whose scores can "
                "be expected ones; run mer-r1 ablate with data.synthetic_dir"
            )
        if value is not None:
            found[measure] = [value]
    for measure, metric in _METRICS.items() if row != SFT else ():
        _, values = run.series("rl", metric)
        if len(values):
            found[measure] = [float(values.mean())]
    return found
