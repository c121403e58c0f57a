"""Reads what `mer-r1 evaluate`, `train`, `ablate`, `lab` and `study` have left, for the paper's tables.

Runs of an ablation are averaged over their seeds: its plan has refused other settings. Runs that are named one by one
stay rows of their own, for nothing says that they differ in their seed alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mer_r1_jax.config.schema import ARM_NAMES
from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.evaluation.benchmarks.benchmark_folder import BenchmarkFolder
from mer_r1_jax.evaluation.benchmarks.sets import LAYOUTS, SYNTHETIC, WAF, title_of
from mer_r1_jax.evaluation.benchmarks.tables import Columns
from mer_r1_jax.evaluation.mme.mme_folder import NAME as MME_EMOTION
from mer_r1_jax.evaluation.over_seeds import mean_over_seeds
from mer_r1_jax.evaluation.paper_tables import Level, Measured, Tables
from mer_r1_jax.evaluation.run_record import EXPECTED_F1, IN_WORDS, KeptEvaluation, read_run, stages_of
from mer_r1_jax.run.jobs import FINISHED

_RUN_OF_AN_ABLATION = re.compile(r"(.+)_seed(\d+)")
_OF_EXPECTED_F1 = {"f1": EXPECTED_F1, "recall": "expected_recall"}  # where the clips' world is known
_PERMUTED, _SFT = "permuted", "sft"
_LAB_KEYS = {"world", "config", "seeds", "rows"}  # of a file that `mer-r1 lab` or `study` writes


class TablesError(ValueError):
    """Folders of which no tables can be made."""


def read_tables(folders: Sequence[str]) -> Tables:
    """Everything that some folders hold for the tables.

    Args:
        folders: each a folder of `evaluate` (scores/), `train` (eval/), `ablate` (runs ROW_seedN), `lab` (WORLD.json)
            or `study` (summaries), or NAME=FOLDER. The name is the row's; where it is an arm's, scores of `evaluate`,
            which do not know what trained their model, count for that arm.

    Raises:
        TablesError: there is no such folder, nothing in it is known, or two rows would have one name.
    """
    rows: list[Measured] = []
    left_out: list[str] = []
    for given in folders:
        name, named, path = given.rpartition("=")
        folder = Path(path)
        if named and not name:
            raise TablesError(f"--folders: got {given!r}, expected FOLDER or NAME=FOLDER; write the name before the =")
        if not folder.is_dir():
            raise TablesError(
                f"--folders: {folder} is not a folder; expected one that mer-r1 evaluate, train, ablate or lab has "
                "written; name its --out, or the run's folder"
            )
        found, skipped = _read(folder, name)
        if not found and not skipped:
            raise TablesError(
                f"{folder}: got nothing that is known, expected scores/ (evaluate), eval/ (train), folders such as "
                "mer_r1_seed0 (ablate) or a WORLD.json (lab); name the folder that holds them"
            )
        rows += found
        left_out += [f"{folder}: {line}" for line in skipped]
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TablesError(
            f"--folders: {', '.join(twice)} would name two rows, expected a name of its own for each; write "
            "NAME=FOLDER, and each folder once"
        )
    return Tables(tuple(rows), tuple(left_out))


def _read(folder: Path, name: str) -> tuple[list[Measured], list[str]]:
    """The rows of one folder, and what is left out of them."""
    rows: list[Measured] = []
    left_out: list[str] = []
    # A folder may hold what several commands wrote: each reader takes what it knows and leaves the rest.
    for read in (_evaluated, _trained, _ablated, _kept_seeds):
        found, skipped = read(folder, name)
        rows += found
        left_out += skipped
    return rows, left_out


# ------------------------------------------------------------------------------------------------------------- evaluate


def _evaluated(folder: Path, name: str) -> tuple[list[Measured], list[str]]:
    """A row for each protocol under which the folder's answers were scored."""
    results = BenchmarkFolder(folder)
    scores = results.scores()
    left_out = []
    scored = {score["benchmark"] for score in scores}
    unscored = sorted({path.stem for path in (folder / "answers").glob("*.jsonl")} - scored)
    if unscored:
        titles = ", ".join(map(title_of, unscored))
        left_out.append(f"{titles}: answered and not scored; run mer-r1 evaluate --rescore --out={folder}")
    if (folder / MME_EMOTION).is_dir():
        left_out.append("MME-Emotion: it has tables of its own (mer-r1 evaluate-mme)")
    columns = Columns(scores)
    called, rows = name or folder.name, []
    for protocol in columns.protocols:
        own = [columns_of for columns_of in scores if columns_of["protocol"]["key"] == protocol["key"]]
        letter = f" · {protocol['letter']}" if len(columns.protocols) > 1 else ""
        rows.append(_protocol_row(f"{called}{letter}", str(folder), called, own))
    return rows, left_out


def _protocol_row(name: str, source: str, called: str, scores: Sequence[dict[str, Any]]) -> Measured:
    official: dict[tuple[str, str], Level] = {}
    f1: dict[tuple[str, str], Level] = {}
    data, said = "", []
    for score in scores:
        benchmark, modes = score["benchmark"], score["modes"]
        for mode, values in modes.items():
            complete = _is_complete(score, values)
            if benchmark in LAYOUTS:
                # Where truths are numbers there is no set F, and the official score stands in its place.
                kind = "headline" if score["metric"] == WAF else "set_f"
                official[benchmark, mode] = _level(values["headline"]["score"], complete)
                f1[benchmark, mode] = _level(values[kind]["score"], complete)
                if not complete:
                    said.append(
                        f"{title_of(benchmark)} {mode}: {values['n_scored']} clips, the official split has "
                        f"{LAYOUTS[benchmark].size}"
                    )
            else:
                assert benchmark == SYNTHETIC
                # One data set by its folder: those of two evaluations may be different worlds.
                data = f"synthetic clips of {score['coverage']['media_root']}"
                # Recall is what a hit rate becomes where a clip has several true categories.
                official[data, mode] = _level(values["set_f"]["recall"], True)
                f1[data, mode] = _level(values["clip_f1"]["score"], True)
    return Measured(
        name=name,
        # evaluate does not know how its model was trained: only the row's name can say so.
        arm=called if called in (*ARM_NAMES, _SFT, _PERMUTED) else "",
        source=source,
        data=data,
        score="set F, WAF" + (f"; {IN_WORDS['f1']} of single clips" if data else ""),
        how="; ".join([scores[0]["protocol"]["description"], *said]),
        official=official,
        f1=f1,
    )


def _is_complete(score: dict[str, Any], values: dict[str, Any]) -> bool:
    """Whether exactly the official split was scored."""
    layout = LAYOUTS.get(score["benchmark"])
    return layout is None or values["n_scored"] == values["n_labelled"] == layout.size


def _level(interval: dict[str, Any], complete: bool) -> Level:
    return Level(interval["value"], interval["low"], interval["high"], complete=complete)


# ----------------------------------------------------------------------------------------------------- train and ablate


def _trained(folder: Path, name: str) -> tuple[list[Measured], list[str]]:
    """The row of a single run: its last evaluation, and its own SFT beside it."""
    if not (folder / "eval").is_dir():
        return [], []
    run = read_run(folder)
    if not run.evaluations:
        return [], ["a run without an evaluation that can be read: " + "; ".join(run.missing)]
    rows = []
    for benchmark in run.evaluations:
        stages = stages_of(run, benchmark)
        called = name or folder.name
        steps = f"{stages.rl_step(stages.end)} of {_steps(run.config)} steps of RL" if stages.end_is_rl else "no RL yet"
        data = _counted_clips([stages.end], _clips_of(run.config, stages.end))
        arm = _arm_of(run.config) if stages.end_is_rl else _SFT
        rows.append(_run_row(called, arm, str(folder), [stages.end], data, steps))
        # Where RL has made nothing yet, `end` is SFT's own evaluation and has its row already.
        if stages.end_is_rl and stages.start is not None:
            rows.append(_run_row(f"{called} before RL", _SFT, str(folder), [stages.start], data, "after SFT"))
    return rows, []


def _ablated(folder: Path, name: str) -> tuple[list[Measured], list[str]]:
    """A row for each arm and control of an ablation, over its finished seeds."""
    groups: dict[tuple[str, str, int], list[tuple[Path, KeptEvaluation]]] = {}
    left_out = []
    for run_folder in sorted(folder.iterdir()):
        match = _RUN_OF_AN_ABLATION.fullmatch(run_folder.name)
        if not match or not (run_folder / "config.json").is_file():
            continue
        if not (run_folder / FINISHED).is_file():
            left_out.append(f"{run_folder.name}: not finished; the same mer-r1 ablate goes on with it")
            continue
        run = read_run(run_folder)
        if not run.evaluations:
            left_out.append(f"{run_folder.name}: no evaluation that can be read: {'; '.join(run.missing)}")
            continue
        end = stages_of(run, next(iter(run.evaluations))).end
        # Runs that were asked other clips are no seeds of one mean; one that could not use a clip is.
        key = match[1], _clips_of(run.config, end), end.n_asked
        groups.setdefault(key, []).append((run_folder, end))
    rows = []
    for (row, clips, _), runs in groups.items():
        # A run that is named by itself calls this control "permuted" too, so both ways lead to one arm.
        arm = row.removeprefix("control_") if row == f"control_{_PERMUTED}" else row
        ends = [end for _, end in runs]
        called = f"{name or folder.name}/{row}"
        rows.append(_run_row(called, arm, str(folder), ends, _counted_clips(ends, clips), "a finished ablation"))
    return rows, left_out


def _run_row(name: str, arm: str, source: str, evaluations: Sequence[KeptEvaluation], data: str, how: str) -> Measured:
    """A row of held-out clips, the mean over some runs."""
    expected = all(one.score(mode, EXPECTED_F1) is not None for one in evaluations for mode in MODES)
    data += ", by expected scores" * expected  # never in one column with those against the truths that were drawn

    def level(mode: str, score: str) -> Level:
        values = [one.score(mode, _OF_EXPECTED_F1[score] if expected else score) for one in evaluations]
        known = [value for value in values if value is not None]
        # A mean over fewer runs than `seeds` says would mislead, so there is none then.
        return Level.over_seeds(mean_over_seeds(known)) if len(known) == len(values) else Level(None)

    return Measured(
        name=name,
        arm=arm,
        source=source,
        data=data,
        score=IN_WORDS[EXPECTED_F1 if expected else "f1"],
        how=how,
        seeds=len(evaluations),
        official={(data, mode): level(mode, "recall") for mode in MODES},
        f1={(data, mode): level(mode, "f1") for mode in MODES},
    )


def _arm_of(config: dict[str, Any]) -> str:
    rl = config.get("rl", {})
    return _PERMUTED if rl.get("permute_rewards") else str(rl.get("arm", ""))


def _steps(config: dict[str, Any]) -> str:
    """Steps of RL as configured, for people."""
    steps = config.get("rl", {}).get("max_steps")
    return "?" if steps is None else "an epoch's" if steps == -1 else str(steps)


def _clips_of(config: dict[str, Any], evaluation: KeptEvaluation) -> str:
    """The set that held-out clips come from, in words."""
    data = config.get("data", {})
    if data.get("eval_path"):
        return f"held-out clips of {data['eval_path']}"
    if data.get("synthetic_dir"):
        world = data.get("synthetic_world", "concluding")  # runs of before worlds had names
        return f"held-out clips of the synthetic world {world}, drawn by seed {data.get('synthetic_seed', 0)}"
    return f"held-out clips of {evaluation.benchmark}"


def _counted_clips(evaluations: Sequence[KeptEvaluation], clips: str) -> str:
    """The clips with the number that was scored; where runs could not use the same number, with the range."""
    fewest, most = (of(one.n_scored for one in evaluations) for of in (min, max))
    return f"{fewest} {clips}" if fewest == most else f"{fewest} to {most} {clips}"


# ------------------------------------------------------------------------------------------------------- lab and study


def _kept_seeds(folder: Path, name: str) -> tuple[list[Measured], list[str]]:
    """A row for each arm of the lab's experiments and of the study's summaries, over the seeds of equal settings."""
    groups: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    left_out = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            left_out.append(f"{path.name}: cannot be read ({error})")
            continue
        if not isinstance(content, dict) or not content.keys() >= _LAB_KEYS:
            continue  # another command's file
        # Settings are nested, so their JSON is the key: files that differ in any of them are not averaged.
        group = groups.setdefault(
            json.dumps(
                [content["world"], content.get("registered"), content.get("variant"), _shared(content["config"])],
                sort_keys=True,
            ),
            [],
        )
        if twice := {seed for _, other in group for seed in other["seeds"]} & set(content["seeds"]):
            left_out.append(f"{path.name}: seeds {sorted(twice)} are in {group[0][0].name} too, with the same settings")
        else:
            group.append((path, content))
    rows = []
    for group in groups.values():
        try:
            rows += _rows_of_seeds(folder, name or folder.name, group)
        except (KeyError, TypeError) as error:
            # Another program's file may have the four keys and something else below them.
            names = ", ".join(path.name for path, _ in group)
            left_out.append(f"{names}: no results of the lab or the study ({error} is not as they write it)")
    return rows, left_out


def _rows_of_seeds(folder: Path, called: str, group: Sequence[tuple[Path, dict[str, Any]]]) -> list[Measured]:
    first_path, first = group[0]
    config, world = first["config"], first["world"]
    # The lab's configuration has fields of its own; stage B of the study keeps the configuration of whole runs.
    if "eval_clips" in config:
        data = (
            f"{config['eval_clips']} clips of the lab's world {world}, a policy of {config['width']} units, "
            f"{config['rl']['num_generations']} answers a prompt"
        )
        data += f", {first['variant']}" if first.get("variant") else ""
        how = f"the lab, {config['rl']['max_steps']} steps of RL, no model"
    else:
        clips = config["data"]["synthetic_eval_clips"]
        data = (
            f"{clips} held-out clips of the synthetic world {world}, drawn by seed {config['data']['synthetic_seed']}"
        )
        data, how = (
            f"{data}, by expected scores",
            f"{config['rl']['max_steps']} steps of RL, whole seeds of an ablation",
        )
    rows = []
    for row in first["rows"]:

        def level(mode: str, score: str, row: str = row) -> Level:
            return Level.over_seeds(
                mean_over_seeds([v for _, content in group for v in content["rows"][row][f"{mode}_{score}"]])
            )

        if all(row in content["rows"] for _, content in group):
            rows.append(
                Measured(
                    name=f"{called}/{first_path.stem}/{row}",
                    arm=row,
                    source=str(folder),
                    data=data,
                    score=IN_WORDS[EXPECTED_F1],
                    how=how,
                    seeds=sum(len(content["seeds"]) for _, content in group),
                    official={(data, mode): level(mode, "recall") for mode in MODES},
                    f1={(data, mode): level(mode, "f1") for mode in MODES},
                )
            )
    return rows


def _shared(config: dict[str, Any]) -> dict[str, Any]:
    """Settings that seeds averaged over have in common: not where a run of one seed and its clips lie."""
    own = {"data": ("cache_dir", "synthetic_dir"), "train": ("seed", "run_name", "output_dir")}
    return {
        section: {k: v for k, v in values.items() if k not in own.get(section, ())}
        if isinstance(values, dict)
        else values
        for section, values in config.items()
    }
